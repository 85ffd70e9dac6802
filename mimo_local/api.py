"""The Python API: `from mimo_local import load`, and the model it gives.

A thin face over one engine: ids or text in, a stream out. Knows no terminal and no files but the
model's folder. For scripts and notebooks; the tool itself uses `Engine`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

from mimo_local.chat import Chat, Message, Piece, Preset, ask, preset
from mimo_local.engine import Engine
from mimo_local.errors import UsageError
from mimo_local.events import Failed, Token
from mimo_local.sampler import SamplingParams
from mimo_local.settings import Paths, Settings
from mimo_local.stream import NO_ID

if TYPE_CHECKING:
    from torch import Tensor

    from mimo_local.config import ModelConfig
    from mimo_local.tokenizer import Tokenizer

_T = TypeVar("_T")
Messages = str | Sequence[Message | Mapping[str, Any]]


def load(path: str | Path | None = None, **settings: Any) -> LocalModel:
    """Load a pack, or an unquantised or FP8 checkpoint folder, and return the model.

    `path`: a folder, or the name of a pack in the packs folder; None: the first pack found there.
    `settings`: any setting of docs/settings.md that concerns loading, such as `context=8192`,
    `threads=8`, `kv_dtype="bf16"`; others come from MIMO_* and config.toml as everywhere.
    Tokenizer files are optional: without them the model takes and gives ids.
    Raises MimoError with a hint.

        with load("MiMo-V2-Flash-nf4") as model:
            for text in model.chat("Why is the sky blue?"):
                print(text, end="", flush=True)
    """
    resolved = Settings.resolve(model=path, **settings)
    if resolved.model is None:
        found = Paths.default().first_pack()
        if found is None:
            raise UsageError(
                f"there is no pack in {Paths.default().packs_dir}",
                hint="give a folder, or the demo: `from mimo_local.demo import demo_pack`",
            )
        resolved = Settings.resolve(model=found, **settings)
    return LocalModel(Engine.load(resolved))


class LocalModel:
    """A loaded model. One at a time is enough; close it, or use it in a `with` statement."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        """For those who want sessions and events."""

    @property
    def config(self) -> ModelConfig:
        """Facts of the model: layers, heads, experts, vocabulary."""
        return self.engine.config

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Text to ids and back, or None if the folder has no tokenizer files."""
        return self.engine.tokenizer

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Logits (T, V) float32 after each of the T ids; independent of all conversations."""
        return self.engine.logits(ids)

    @overload
    def generate(
        self, prompt: str, *, stop: Sequence[str] = (), **sampling: Any
    ) -> Iterator[str]: ...

    @overload
    def generate(
        self, prompt: Sequence[int], *, stop: Sequence[str] = (), **sampling: Any
    ) -> Iterator[int]: ...

    def generate(
        self, prompt: str | Sequence[int], *, stop: Sequence[str] = (), **sampling: Any
    ) -> Iterator[str] | Iterator[int]:
        """Continue a prompt as it is, without chat turns: a text yields texts, ids yield ids.

        `sampling`: fields of SamplingParams (`max_tokens=64`, `temperature=0`, `seed=1`, ...); by
        default its own defaults. The id that ends the text is not yielded. Leaving the loop early,
        or dropping the iterator, stops the model. Raises UsageError and ContextOverflowError at
        once, other errors on the way.
        """
        params = _sampling(None, sampling)
        if isinstance(prompt, str):
            ids = self._require_tokenizer().encode(prompt)
            return (token.text for token in self._tokens(ids, params, stop) if token.text)
        return (token.id for token in self._tokens(prompt, params, stop) if token.id != NO_ID)

    def chat(
        self,
        messages: Messages,
        *,
        system: str = "",
        thinking: bool = False,
        preset: str = "chat",
        stop: Sequence[str] = (),
        **sampling: Any,
    ) -> Iterator[str]:
        """Yield the answer to a question or a conversation, piece by piece, thinking left out.

        `messages`: a question, or `Message`s or mappings with "role" and "content" of which the
        last is the user's. `sampling` overrides the preset's values. What the conversation shares
        with earlier calls is not processed again. Needs tokenizer files with a chat template.
        """
        chat = Chat(_messages(messages), system, preset, thinking)
        params = _sampling(chat.preset, sampling)
        self._require_tokenizer()
        reply = ask(self.engine, None, chat, params, stop=stop)

        def pieces() -> Iterator[str]:
            try:
                for event in reply:
                    if isinstance(event, Piece) and event.kind == "answer":
                        yield event.text
                    elif isinstance(event, Failed):
                        raise event.error
            finally:
                reply.cancel()

        return _cancelling(pieces(), reply.cancel)

    def close(self) -> None:
        """Stop and free the model; it cannot be used afterwards."""
        self.engine.close()

    def __enter__(self) -> LocalModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _require_tokenizer(self) -> Tokenizer:
        if self.engine.tokenizer is None:
            raise UsageError(
                f"{self.engine.name} has no tokenizer files, so it cannot read text",
                hint="give ids, or put the model's tokenizer.json into its folder",
            )
        return self.engine.tokenizer

    def _tokens(
        self, ids: Sequence[int], params: SamplingParams, stop: Sequence[str]
    ) -> Iterator[Token]:
        # Submitted here, not at the first `next`: a bad prompt is an error of this call.
        stream = self.engine.submit(None, ids, params, stop=stop)

        def tokens() -> Iterator[Token]:
            try:
                for event in stream:
                    if isinstance(event, Token):
                        yield event
                    elif isinstance(event, Failed):
                        raise event.error
            finally:
                stream.cancel()

        return _cancelling(tokens(), stream.cancel)


def _cancelling(stream: Iterator[_T], cancel: Callable[[], None]) -> Iterator[_T]:
    """The same iterator; dropping it unread cancels too, which its `finally` would not."""
    weakref.finalize(stream, cancel).atexit = False
    return stream


def _sampling(name: str | None, values: Mapping[str, Any]) -> SamplingParams:
    """The preset's (or no preset's) values with the caller's on top."""
    known = set(SamplingParams.__slots__)
    if unknown := set(values) - known:
        raise UsageError(
            f"there is no sampling value `{sorted(unknown)[0]}`",
            hint=f"there are {', '.join(sorted(known))}",
        )
    base: Preset | None = None if name is None else preset(name)
    return SamplingParams(**values) if base is None else base.params(**values)


def _messages(messages: Messages) -> list[Message]:
    if isinstance(messages, str):
        return [Message("user", messages)]
    return [m if isinstance(m, Message) else _message(m) for m in messages]


def _message(given: Mapping[str, Any]) -> Message:
    role, content = given.get("role"), given.get("content")
    if role not in ("system", "user", "assistant", "tool") or not isinstance(content, str):
        raise UsageError(
            f"a message is {dict(given)!r}",
            hint='each has a "role" (system, user, assistant or tool) and a "content" text',
        )
    return Message(role, content, given.get("reasoning_content") or "")
