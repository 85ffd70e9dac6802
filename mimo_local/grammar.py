"""Constraints: which ids may come next so that an answer is what was promised, by llguidance.

JSON for a schema, or calls of given functions in the form the model's template uses. Knows the
tokenizer's ids and bytes; no chat, no cache. The server makes one `Grammars` per model and hands a
`Grammar`'s constraints to `Engine.submit`; llguidance is imported when the first one is made.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

from mimo_local.errors import UsageError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from torch import Tensor

WHITESPACE: Final = r"[ ]|\n[ ]{0,16}"
"""Between the parts of JSON. Without a limit a small model may write spaces to the end."""
MANY: Final = 16
"""Most calls in one answer that must consist of calls."""


class Vocabulary(Protocol):
    """What a constraint needs of a tokenizer."""

    vocab_size: int
    stop_ids: tuple[int, ...]

    @property
    def control_ids(self) -> frozenset[int]:
        """Ids that are no text."""

    def token_id(self, text: str) -> int | None:
        """Id of a control token."""

    def bytes_of(self, token: int) -> bytes:
        """What an id stands for."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""


class Grammars:
    """Grammars for one model's vocabulary. Any thread; the first use costs about half a second."""

    def __init__(self, tokenizer: Vocabulary, vocab_size: int) -> None:
        """`vocab_size`: rows of the model's logits, which may be more than the tokenizer's ids."""
        self._tokenizer, self._size = tokenizer, vocab_size
        self._lock = threading.Lock()
        self._made: LLTokenizer | None = None

    def compile(self, lark: str) -> Grammar:
        """A grammar in llguidance's Lark; UsageError with its message if it cannot be used."""
        from llguidance import LLMatcher

        text = LLMatcher.grammar_from_lark(lark)
        tokenizer = self._vocabulary()
        if wrong := LLMatcher.validate_grammar(text, tokenizer):
            raise UsageError(
                f"the schema cannot be used: {_first_lines(wrong)}",
                hint="use the part of JSON Schema that llguidance knows",
            )
        ids = (self._tokenizer.token_id("<think>"), self._tokenizer.token_id("</think>"))
        return Grammar(text, tokenizer, self._tokenizer.stop_ids, ids)

    def _vocabulary(self) -> LLTokenizer:
        with self._lock:
            if self._made is None:
                from llguidance import LLTokenizer, TokenizerWrapper

                wrapped = TokenizerWrapper(_Wrapped(self._tokenizer, self._size))
                stops = [i for i in self._tokenizer.stop_ids if i < self._size]
                self._made = LLTokenizer(wrapped, eos_token=stops)
            return self._made


class _Wrapped:
    """A tokenizer as llguidance wants to see one."""

    bos_token_id = None

    def __init__(self, tokenizer: Vocabulary, size: int) -> None:
        known = min(size, tokenizer.vocab_size)
        control = tokenizer.control_ids
        # An id without bytes never fits a grammar: padding rows, and control tokens.
        self.tokens = [b"" if i in control else tokenizer.bytes_of(i) for i in range(known)]
        self.tokens += [b""] * (size - known)
        for i in tokenizer.stop_ids:
            if i < size:
                self.tokens[i] = tokenizer.bytes_of(i) or b"\xff<end>"
        self.eos_token_id = tokenizer.stop_ids[0]
        self.special_token_ids = [i for i in tokenizer.stop_ids if i < size]
        self._tokenizer = tokenizer

    def __call__(self, text: bytes | str) -> list[int]:
        text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        return self._tokenizer.encode(text)


@dataclass(frozen=True)
class Grammar:
    """A checked grammar: each request that follows it needs a constraint of its own."""

    text: str
    tokenizer: LLTokenizer
    stop_ids: tuple[int, ...]
    thinking_ids: tuple[int | None, int | None]
    """Of `<think>` and `</think>`."""

    def constraint(self, *, thinking: bool = False, opened: bool = False) -> GrammarConstraint:
        """A fresh one; `thinking`: the answer may think first, `opened`: it does."""
        return GrammarConstraint(self, thinking=thinking, opened=opened)


class GrammarConstraint:
    """A `sampler.Constraint`: the grammar from the answer's first id, or from behind `</think>`."""

    def __init__(self, grammar: Grammar, *, thinking: bool, opened: bool) -> None:
        from llguidance import LLMatcher

        self._matcher: LLMatcher = LLMatcher(grammar.tokenizer, grammar.text, log_level=0)
        self._stops = list(grammar.stop_ids)
        self._open, self._close = grammar.thinking_ids
        known = self._open is not None and self._close is not None
        self._may_think, self._thinks = thinking and known and not opened, opened and known

    def mask(self, logits: Tensor) -> Tensor:
        """Logits (V,) with -inf for ids that must not come next; at least one is left."""
        import torch

        if self._thinks:  # anything, but it must come to an end by itself
            index = torch.tensor(self._stops, device=logits.device)
            return logits.index_fill(0, index, float("-inf"))
        allowed = self._allowed(len(logits))
        return logits.masked_fill(~torch.from_numpy(allowed).to(logits.device), float("-inf"))

    def _allowed(self, size: int) -> Any:
        import numpy as np

        if self._matcher.is_stopped() and not self._matcher.is_error():
            allowed = np.zeros(size, dtype=bool)
            allowed[[i for i in self._stops if i < size]] = True
            return allowed
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        allowed = np.zeros(size, dtype=bool)
        known = np.unpackbits(bits, bitorder="little")[:size].astype(bool)
        allowed[: len(known)] = known
        if self._may_think:
            allowed[self._open] = True
        return allowed

    def advance(self, token: int) -> bool:
        """This id was drawn; whether the answer is complete and must end behind it."""
        if self._thinks:
            self._thinks = token != self._close
            return False
        if self._may_think:
            self._may_think = False
            if token == self._open:
                self._thinks = True
                return False
        if token in self._stops:
            return True
        self._matcher.consume_token(token)
        self._check()
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise UsageError(
                f"the schema became too complex: {_first_lines(self._matcher.get_error())}",
                hint="use a simpler schema",
            )


def _first_lines(text: str) -> str:
    """llguidance's errors show the grammar behind the reason."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[:4])[:300]


# ---- grammars ------------------------------------------------------------------------------------


def json_rule(schema: Mapping[str, Any] | None) -> str:
    """A Lark rule body: JSON that fits `schema`; None: any object."""
    found = {"type": "object"} if schema is None else dict(schema)
    return "%json " + json.dumps({**found, "x-guidance": {"whitespace_pattern": WHITESPACE}})


def json_grammar(schema: Mapping[str, Any] | None) -> str:
    """An answer that is JSON for `schema` (None: any object) and nothing else."""
    return f"start: {json_rule(schema)}\n"


def calls_grammar(
    tools: Sequence[Mapping[str, Any]],
    *,
    tags: bool,
    many: bool,
    instead: Mapping[str, Any] | None = None,
) -> str:
    """An answer that is one call of `tools`, or `many`; `instead`: or JSON for this schema.

    `tags`: calls are written with `<function=...>`, as MiMo's template shows, else as JSON.
    """
    rules = [rule for n, tool in enumerate(tools) for rule in _function(n, tool["function"], tags)]
    either = " | ".join(f"call_{n}" for n in range(len(tools)))
    between = "" if tags else '"\\n" '
    more = f" ({between}call){{0,{MANY - 1}}}" if many else ""
    start = f"start: call{more}" if instead is None else f"start: call{more} | other"
    if instead is not None:
        rules.append(f"other: {json_rule(instead)}")
    rules.append('value[suffix="</parameter>"]: /(?s:.*)/')
    return "\n".join([start, f"call: {either}", *rules, ""])


def _function(n: int, function: Mapping[str, Any], tags: bool) -> Iterator[str]:
    """The rules of one function's call."""
    name, schema = function["name"], function.get("parameters") or {}
    if not tags:
        head = json.dumps(f'<tool_call>\n{{"name": {json.dumps(name)}, "arguments": ')
        arguments = {"type": "object", **schema}
        yield f'call_{n}: {head} args_{n} "}}\\n</tool_call>"'
        yield f"args_{n}: {json_rule(arguments)}"
        return
    properties = schema.get("properties") or {}
    required = schema.get("required") or []
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    parts = []
    others: dict[str, Any] = {key: {} for key in required if key not in properties}
    for m, (key, given) in enumerate({**properties, **others}.items()):
        parts.append(f"p_{n}_{m}" + ("" if key in required else "?"))
        opening = json.dumps(f"<parameter={key}>", ensure_ascii=False)
        yield f'p_{n}_{m}: {opening} {_value(given, shared)} "\\n"'
    if not properties and not required and schema.get("additionalProperties", True):
        parts.append(f"any_{n}*")
        yield f'any_{n}: "<parameter=" /[^<>\\n]+/ ">" value "\\n"'
    head = json.dumps(f"<tool_call>\n<function={name}>\n")
    yield f'call_{n}: {head} {" ".join(parts)} "</function>\\n</tool_call>"'


def _value(schema: Any, shared: Mapping[str, Any]) -> str:
    """A parameter's value and its closing tag: text, or JSON where the type is no text."""
    schema = schema if isinstance(schema, Mapping) else {}
    choices = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(choices, list) and choices:
        texts = [c if isinstance(c, str) else json.dumps(c) for c in choices]
        either = " | ".join(json.dumps(t, ensure_ascii=False) for t in texts)
        return f'({either}) "</parameter>"'
    if schema.get("type") in ("integer", "number", "boolean", "object", "array", "null"):
        return f'({json_rule({**shared, **schema})}) "</parameter>"'
    return "value"
