"""Messages, presets, and asking: a conversation in, the parts of an answer out.

Knows people's words; knows no markup, no tensors, no cache and no screen.
Called by cli, tui, summarize and api. Which control tokens a turn needs is the template's affair.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, TypeAlias

from mimo_local.answer_parts import Part, Piece, Splitter
from mimo_local.errors import UsageError
from mimo_local.events import Done, Failed, Prefill, Token
from mimo_local.sampler import SamplingParams
from mimo_local.tool_calls import ToolCall, as_text, description

if TYPE_CHECKING:
    from mimo_local.engine import Engine, Session
    from mimo_local.remote import Remote

__all__ = [
    "PRESETS", "Attachment", "Chat", "Message", "Piece", "Preset", "Reply", "Role", "Splitter",
    "ToolCall", "ask", "is_mimo", "mimo_system", "preset",
]  # fmt: skip

Backend: TypeAlias = "Engine | Remote"
"""What answers: a model here, or one behind an address."""
Role: TypeAlias = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class Preset:
    """Sampling values for one kind of work."""

    name: str
    temperature: float
    top_p: float
    max_tokens: int
    repetition_penalty: float
    description: str

    def params(self, **own: Any) -> SamplingParams:
        """The preset's values, overridden by those of `own` that are not None."""
        values = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_tokens": self.max_tokens,
            "repetition_penalty": self.repetition_penalty,
        }
        return SamplingParams(**values | {k: v for k, v in own.items() if v is not None})


# From the published usage guide; agent and default from the model's own README.
PRESETS: Final[dict[str, Preset]] = {
    preset.name: preset
    for preset in (
        Preset("chat", 0.7, 0.9, 512, 1.1, "conversation"),
        Preset("summarize", 0.5, 0.85, 1024, 1.1, "close to the source, little variety"),
        Preset("code", 0.6, 0.9, 2048, 1.2, "programs and long listings"),
        Preset("math", 0.4, 0.8, 512, 1.05, "step by step, few surprises"),
        Preset("agent", 0.3, 0.95, 2048, 1.0, "tool use: short and steady"),
        Preset("default", 0.8, 0.95, 1024, 1.0, "the model's own recommendation"),
    )
}


def preset(name: str) -> Preset:
    """The preset of this name; UsageError lists the names there are."""
    if name not in PRESETS:
        raise UsageError(
            f"there is no preset `{name}`", hint=f"presets: {', '.join(sorted(PRESETS))}"
        )
    return PRESETS[name]


class TokenizerLike(Protocol):
    """What a chat needs of a tokenizer."""

    def token_id(self, text: str) -> int | None:
        """Id of a control token."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids."""

    def template_says(self, text: str) -> bool:
        """Whether the chat template contains a text."""

    def render_chat(
        self, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool = True, **kw: Any
    ) -> list[int]:
        """Ids of a conversation."""


@dataclass(frozen=True, slots=True)
class Attachment:
    """A document given along with a message: what it is called, and its text."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `reasoning`: what an assistant thought before it answered."""

    role: Role
    content: str
    reasoning: str = ""
    attachments: tuple[Attachment, ...] = ()
    """Documents that come before the content."""
    tool_calls: tuple[ToolCall, ...] = ()
    """What an assistant wanted called."""
    tool_call_id: str = ""
    """Of a tool's message: the call it answers."""

    @property
    def text(self) -> str:
        """What the model reads: the documents under their names, then the content."""
        parts = [f"Document {a.name}:\n\n{a.text}" for a in self.attachments]
        return "\n\n".join([*parts, self.content] if self.content else parts)


@dataclass(slots=True)
class Chat:
    """A conversation and how it is to be continued."""

    messages: list[Message] = field(default_factory=list)
    system: str = ""
    """Empty: the one the model's authors recommend, if the model is MiMo; else the template's."""
    preset: str = "chat"
    thinking: bool = False
    tools: tuple[dict[str, Any], ...] = ()
    """Functions the model may call, in OpenAI's form: {"type": "function", "function": {...}}."""
    began: date = field(default_factory=date.today)
    """The day the model is told: another one would change the beginning of all that was read."""

    def render(self, tokenizer: TokenizerLike) -> list[int]:
        """Ids of the whole conversation, up to where the answer begins.

        Both template switches are always given: their defaults differ between releases. Earlier
        thinking is left out, as the model was trained, except with tools: there it is wanted back.
        A template that knows no tools gets them, and earlier calls, as text.
        """
        messages = self._entries(_entry, is_mimo(tokenizer))
        uses_tools = self.tools or any(message.tool_calls for message in self.messages)
        own_words = uses_tools and not tokenizer.template_says("tools")
        if own_words:
            messages = _tools_as_text(messages, self)
        return tokenizer.render_chat(
            messages,
            add_generation_prompt=True,
            enable_thinking=self.thinking,
            keep_all_reasoning=bool(self.tools),
            **({"tools": list(self.tools)} if self.tools and not own_words else {}),
        )

    def splitter(self, tokenizer: TokenizerLike, ids: Sequence[int]) -> Splitter:
        """For the stream that continues `ids`, which `render` has made."""
        # Some templates open the thinking themselves; the stream then begins inside it.
        opened = tokenizer.decode(ids[-8:]).rstrip().endswith(Splitter.OPEN)
        return Splitter(opened=opened, tools=self.tools)

    def wire(self, *, mimo: bool) -> list[dict[str, Any]]:
        """The messages in OpenAI's form, for a server that renders them: else like `render`."""
        return self._entries(partial(_wire_entry, reasoning=bool(self.tools)), mimo)

    def _entries(
        self, entry: Callable[[Message], dict[str, Any]], mimo: bool
    ) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        system = self.system or (mimo_system(self.began) if mimo else "")
        if system and not any(message.role == "system" for message in self.messages):
            messages.append({"role": "system", "content": system})
        return messages + [entry(message) for message in self.messages]


def _tools_as_text(entries: Sequence[dict[str, Any]], chat: Chat) -> list[dict[str, Any]]:
    """Entries for a template without tools: declared in the system prompt, calls in the content."""
    calls = iter([message.tool_calls for message in chat.messages])
    skip = len(entries) - len(chat.messages)  # a system prompt of ours has no message
    made = []
    for n, given in enumerate(entries):
        entry = {key: value for key, value in given.items() if key != "tool_calls"}
        written = as_text(next(calls) if n >= skip else ())
        entry["content"] = "\n".join(part for part in (entry["content"], written) if part)
        made.append(entry)
    if chat.tools:
        system = made.pop(0)["content"] + "\n\n" if made[:1] and _is_system(made[0]) else ""
        made.insert(0, {"role": "system", "content": system + description(chat.tools)})
    return made


def _is_system(entry: dict[str, Any]) -> bool:
    return bool(entry["role"] == "system")


def _entry(message: Message) -> dict[str, Any]:
    """A message as templates expect it: arguments of calls as an object, not as text."""
    entry: dict[str, Any] = {"role": message.role, "content": message.text}
    if message.reasoning:
        entry["reasoning_content"] = message.reasoning
    if message.tool_calls:
        entry["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": json.loads(call.arguments)},
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id:
        entry["tool_call_id"] = message.tool_call_id
    return entry


def _wire_entry(message: Message, *, reasoning: bool) -> dict[str, Any]:
    """A message as servers expect it: arguments of calls as text."""
    entry = _entry(message)
    if not reasoning:
        entry.pop("reasoning_content", None)
    for call, own in zip(entry.get("tool_calls", ()), message.tool_calls, strict=True):
        call["function"]["arguments"] = own.arguments
    return entry


def is_mimo(tokenizer: TokenizerLike) -> bool:
    """Whether this is the MiMo family's own vocabulary (the demo model has another)."""
    return (tokenizer.token_id("<|im_end|>"), tokenizer.token_id("<think>")) == (151645, 151667)


def mimo_system(today: date) -> str:
    """The system prompt the model's README recommends, with date and weekday."""
    return (
        "You are MiMo, an AI assistant developed by Xiaomi.\n\n"
        f"Today's date: {_DATE.format(today)}. Your knowledge cutoff date is December 2024."
    )


class _EnglishDate:
    """`strftime("%A")` speaks the user's locale; the model was trained on English."""

    months = (
        *("January", "February", "March", "April", "May", "June", "July"),
        *("August", "September", "October", "November", "December"),
    )
    days = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

    def format(self, day: date) -> str:
        name = self.months[day.month - 1]
        return f"{name} {day.day}, {day.year} {self.days[day.weekday()]}"


_DATE: Final = _EnglishDate()


# ---- asking --------------------------------------------------------------------------------------


class Reply:
    """One answer being made: iterate it for Prefill, Piece and ToolCall, then Done or Failed."""

    def __init__(
        self,
        engine: Backend,
        session: Session | None,
        chat: Chat,
        params: SamplingParams,
        stop: Sequence[str],
    ) -> None:
        from mimo_local.remote import Remote  # asyncio, 0.07 s: not for `mimo --help`

        self.text = ""
        self.reasoning = ""
        self.calls: list[ToolCall] = []
        self._chat = chat
        self._splitter = Splitter()
        if isinstance(engine, Remote):
            self._stream = engine.submit_messages(
                chat.wire(mimo="mimo" in engine.name.lower()),
                params,
                thinking=chat.thinking,
                tools=chat.tools,
                stop=stop,
            )
        elif engine.tokenizer is None:
            raise UsageError(
                f"{engine.name} has no tokenizer files", hint="chat needs a model made with them"
            )
        else:
            ids = chat.render(engine.tokenizer)
            self._splitter = chat.splitter(engine.tokenizer, ids)
            self._stream = engine.submit(session, ids, params, stop=stop)
        self._events = self._run()

    def cancel(self) -> None:
        """Stop within one step; what was made is kept."""
        self._stream.cancel()

    def __iter__(self) -> Iterator[Part | Prefill | Done | Failed]:
        return self

    def __next__(self) -> Part | Prefill | Done | Failed:
        return next(self._events)

    def _run(self) -> Iterator[Part | Prefill | Done | Failed]:
        try:
            for event in self._stream:
                if isinstance(event, Token):
                    yield from self._keep(self._splitter.push(event.text))
                    continue
                if isinstance(event, Done):
                    yield from self._keep(self._splitter.flush())
                    answer = Message(
                        "assistant", self.text, self.reasoning, tool_calls=tuple(self.calls)
                    )
                    self._chat.messages.append(answer)
                yield event
        finally:
            self._stream.cancel()  # a reader that leaves early must not leave the engine busy

    def _keep(self, parts: list[Part]) -> list[Part]:
        for part in parts:
            if isinstance(part, ToolCall):
                self.calls.append(part)
            elif part.kind == "thinking":
                self.reasoning += part.text
            else:
                self.text += part.text
        return parts


def ask(
    engine: Backend,
    session: Session | None,
    chat: Chat,
    params: SamplingParams | None = None,
    *,
    stop: Sequence[str] = (),
) -> Reply:
    """Answer the chat's last message; `params` default to the chat's preset.

    Without a `session` the engine finds the one that knows most of this chat already.
    When the answer is done, also by a cancel, it is appended to `chat.messages`; a failed one is
    not. Raises UsageError for a chat without a question or a model without a tokenizer.
    """
    if not chat.messages or chat.messages[-1].role not in ("user", "tool"):
        raise UsageError("there is nothing to answer", hint="end the chat with a user message")
    return Reply(engine, session, chat, params or preset(chat.preset).params(), stop)
