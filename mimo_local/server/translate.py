"""Requests in OpenAI's words to what the engine is asked: ids, sampling, stops, constraints.

Everything that cannot be meant is refused here, before the engine hears of it. Knows no HTTP and no
stream; runs in a worker thread, because a long conversation takes a while to become ids.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from mimo_local.chat import Chat, Message, Role, Splitter, ToolCall
from mimo_local.grammar import Grammar, Grammars, calls_grammar, json_grammar
from mimo_local.sampler import MAX_SEED, SamplingParams
from mimo_local.server.failures import refuse
from mimo_local.server.schemas import (
    MAX_CHOICES,
    ChatRequest,
    CompletionRequest,
    MessageIn,
    ObjectFormat,
    Sampling,
    SchemaFormat,
    Thinking,
    ToolChoice,
)

if TYPE_CHECKING:
    from mimo_local.engine import Engine
    from mimo_local.server.options import Options
    from mimo_local.tokenizer import Tokenizer

COMPLETION_TOKENS: Final = 16
"""What /v1/completions writes unasked: OpenAI's own number."""


@dataclass(frozen=True)
class Asked:
    """One prompt and how it is to be continued, `n` times."""

    ids: list[int]
    params: SamplingParams
    n: int
    stop: tuple[str, ...]
    logprobs: int | None
    grammar: Grammar | None = None
    thinking: bool = False
    chat: Chat | None = None
    """None for a plain completion."""
    many_calls: bool = True
    echo: str = ""
    """The prompt's text, where the answer is to repeat it."""

    def splitter(self, tokenizer: Tokenizer) -> Splitter:
        """A fresh one for each answer."""
        assert self.chat is not None
        return self.chat.splitter(tokenizer, self.ids)


def asked_by_chat(body: ChatRequest, engine: Engine, grammars: Grammars, options: Options) -> Asked:
    """What a chat request asks for; ApiError or MimoError for what cannot be."""
    tokenizer = _tokenizer(engine)
    chat = Chat(
        [_message(given, n) for n, given in enumerate(body.messages)],
        system=options.system,
        thinking=_thinking(body, options),
        tools=() if body.tool_choice == "none" else _tools(body),
    )
    if chat.messages[-1].role not in ("user", "tool"):
        raise refuse(
            "the last message must be a user's or a tool's",
            f"messages.{len(body.messages) - 1}.role",
        )
    if body.top_logprobs and not body.logprobs:
        raise refuse("`top_logprobs` needs `logprobs`: true", "top_logprobs")
    ids = chat.render(tokenizer)
    lark = _lark(body, chat, tags=tokenizer.template_says("<function="))
    most = body.max_completion_tokens or body.max_tokens or options.max_tokens
    return Asked(
        ids,
        _params(body, options, most or _room(engine, ids)),
        body.n or 1,
        _stops(body),
        (body.top_logprobs or 0) if body.logprobs else None,
        grammars.compile(lark) if lark else None,
        chat.thinking,
        chat,
        body.parallel_tool_calls is not False,
    )


def asked_by_completion(body: CompletionRequest, engine: Engine, options: Options) -> list[Asked]:
    """What a completion request asks for, one for each of its prompts."""
    prompts: Sequence[Any] = [body.prompt]
    if isinstance(body.prompt, list) and not isinstance(body.prompt[0], int):
        prompts = body.prompt
    n = body.n or 1
    if len(prompts) * n > MAX_CHOICES:
        raise refuse(
            f"{len(prompts)} prompts with n = {n} are more than {MAX_CHOICES} answers", "n"
        )
    if body.echo and body.logprobs is not None:
        raise refuse("`logprobs` of the prompt are not made: leave out `echo`", "echo")
    asked = []
    for prompt in prompts:
        ids = _tokenizer(engine).encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not isinstance(prompt, str) and max(ids) >= engine.config.vocab_size:
            raise refuse(f"token id {max(ids)} is outside the vocabulary", "prompt")
        echo = ""
        if body.echo:
            echo = prompt if isinstance(prompt, str) else _tokenizer(engine).decode(ids)
        params = _params(body, options, body.max_tokens or COMPLETION_TOKENS)
        asked.append(Asked(ids, params, n, _stops(body), body.logprobs, echo=echo))
    return asked


def _tokenizer(engine: Engine) -> Tokenizer:
    if engine.tokenizer is None:
        raise refuse(f"{engine.name} has no tokenizer files: it takes ids only, in /v1/completions")
    return engine.tokenizer


def _room(engine: Engine, ids: list[int]) -> int:
    """The longest answer behind a prompt; at least one, so that the engine says what is wrong."""
    return max(1, engine.context_limit - len(ids))


def _params(body: Sampling, options: Options, max_tokens: int) -> SamplingParams:
    given: dict[str, Any] = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": None if body.top_k is None else max(0, body.top_k),
        "min_p": body.min_p,
        "repetition_penalty": body.repetition_penalty,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        # Others' seeds may be negative.
        "seed": None if body.seed is None else body.seed & MAX_SEED,
    }
    own: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return replace(options.params, max_tokens=max_tokens, **own)


def seeded(params: SamplingParams, index: int) -> SamplingParams:
    """For the answer of this index: the same seed would make the same answer n times."""
    if params.seed is None or not index:
        return params
    return replace(params, seed=(params.seed + index) & MAX_SEED)


def _stops(body: Sampling) -> tuple[str, ...]:
    if body.stop is None:
        return ()
    return (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)


# ---- messages ------------------------------------------------------------------------------------


def _message(given: MessageIn, n: int) -> Message:
    content = given.content
    if not isinstance(content, str):
        content = "\n".join(part.text for part in content or ())
    if given.tool_calls and given.role != "assistant":
        raise refuse("only an assistant's message has tool_calls", f"messages.{n}.tool_calls")
    if given.content is None and not given.tool_calls and given.role != "assistant":
        raise refuse("the message has no content", f"messages.{n}.content")
    calls = tuple(
        ToolCall(call.id, call.function.name, _arguments(call.function.arguments, n, m))
        for m, call in enumerate(given.tool_calls or ())
    )
    role: Role = "system" if given.role == "developer" else given.role
    reasoning = given.reasoning_content or given.reasoning or ""
    return Message(role, content, reasoning, (), calls, given.tool_call_id or "")


def _arguments(text: str, n: int, m: int) -> str:
    """A call's arguments as they are, if they are a JSON object; none at all is an empty one."""
    place = f"messages.{n}.tool_calls.{m}.function.arguments"
    if not text.strip():
        return "{}"
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise refuse(f"the arguments are not valid JSON: {str(error)[:200]}", place) from None
    if not isinstance(found, dict):
        raise refuse("the arguments are no JSON object", place)
    return text


def _tools(body: ChatRequest) -> tuple[dict[str, Any], ...]:
    """The tools as templates expect them."""
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
    names = [tool["function"]["name"] for tool in tools]
    if len(set(names)) < len(names):
        raise refuse("two tools have the same name", "tools")
    for n, tool in enumerate(tools):
        _check_parameters(tool["function"].setdefault("parameters", {"type": "object"}), n)
    return tuple(tools)


def _check_parameters(schema: dict[str, Any], n: int) -> None:
    """Templates and grammars read these two keys."""
    place = f"tools.{n}.function.parameters"
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if schema.get("type", "object") != "object" or not isinstance(properties, dict):
        raise refuse("the parameters are no schema of an object", place)
    if not all(isinstance(value, dict) for value in properties.values()):
        raise refuse("a parameter has no schema", f"{place}.properties")
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise refuse("`required` is no list of names", f"{place}.required")
    if any(set(name) & set("<>\r\n") for name in (*properties, *required)):
        raise refuse("a parameter's name holds <, > or a line break", f"{place}.properties")


# ---- switches ------------------------------------------------------------------------------------


def _thinking(body: ChatRequest, options: Options) -> bool:
    """Whether to think: the template's own switch, then the other two ways of saying it."""
    for name, value in (body.chat_template_kwargs or {}).items():
        if name not in ("enable_thinking", "thinking", "keep_all_reasoning"):
            raise refuse(f"there is no template switch `{name[:100]}`", "chat_template_kwargs")
        if not isinstance(value, bool):
            raise refuse(f"`{name}` must be true or false", "chat_template_kwargs")
    switches = body.chat_template_kwargs or {}
    for name in ("enable_thinking", "thinking"):
        if name in switches:
            return bool(switches[name])
    if body.thinking is not None:
        on = body.thinking
        return on.type != "disabled" if isinstance(on, Thinking) else on
    if body.reasoning_effort is not None:
        return body.reasoning_effort not in ("none", "minimal")
    return options.thinking


def _lark(body: ChatRequest, chat: Chat, *, tags: bool) -> str | None:
    """The grammar of the answer, if it is bound to one."""
    schema: dict[str, Any] | None = None
    bound = isinstance(body.response_format, (ObjectFormat, SchemaFormat))
    if isinstance(body.response_format, SchemaFormat):
        schema = body.response_format.json_schema.schema_
    choice = body.tool_choice
    if isinstance(choice, ToolChoice) or choice == "required":
        tools = list(chat.tools)
        if isinstance(choice, ToolChoice):
            tools = [t for t in tools if t["function"]["name"] == choice.function.name]
        if not tools:
            raise refuse("`tool_choice` names no tool there is", "tool_choice")
        many = choice == "required" and body.parallel_tool_calls is not False
        return calls_grammar(tools, tags=tags, many=many)
    if not bound:
        return None
    if not chat.tools:
        return json_grammar(schema)
    return calls_grammar(
        chat.tools,
        tags=tags,
        many=body.parallel_tool_calls is not False,
        instead={"type": "object"} if schema is None else schema,
    )
