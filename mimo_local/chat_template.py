"""A model's own chat template, run in a sandbox: messages to text, control tokens told apart.

Templates come with the weights, so they are foreign code: jinja2's immutable sandbox, plus limits
on steps and sizes. Knows no tokenizer and no ids; only `tokenizer` calls it.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from types import FrameType
from typing import Any, Final, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
from jinja2.exceptions import SecurityError

from mimo_local.errors import TokenizerError, UsageError

MAX_RENDERED: Final = 16 << 20
"""Most characters a template may produce; a full context of 262 144 ids is about 1 M."""
MAX_STEPS: Final = 2_000_000
"""Most lines a template may run (about 1 s); a chat of 100 messages takes some 13 000."""
_SPACE: Final = re.compile(r"\s*")


class ChatTemplate:
    """Messages to text by a model's own jinja2 template, control tokens told apart by origin.

    Every place in the messages that spells a control token gets a private mark after its first
    character before the template sees it, and so does an edge that a neighbouring text could
    complete to one. The mark survives slicing and stripping, and whatever stays unmarked the
    template wrote itself. A rendered chat is a list of (text, is_token).
    """

    def __init__(
        self,
        templates: Mapping[str, str],
        names: Mapping[str, str],
        tokens: Mapping[str, tuple[bool, bool]],
    ) -> None:
        """`names`: bos_token and so on; `tokens`: text -> does it eat spaces left, right of it."""
        self._templates, self._names = templates, names
        self._strips = tokens
        self._tokens = sorted(tokens, key=len, reverse=True)
        either = "|".join(map(re.escape, self._tokens))
        self.starts = re.compile(f"(?={either})" if either else "(?!)")
        """Where a control token begins; overlapping ones included."""
        self._heads = {t[:n] for t in tokens for n in range(1, len(t))}
        self._tails = {t[n:] for t in tokens for n in range(1, len(t))}
        self._compiled: dict[str, jinja2.Template] = {}

    def says(self, text: str) -> bool:
        """Whether any of the templates contains `text`."""
        return any(text in template for template in self._templates.values())

    def render(
        self, messages: Sequence[Mapping[str, Any]], generation: bool, options: Mapping[str, Any]
    ) -> list[tuple[str, bool]]:
        """Run the template; raises TokenizerError with the reason."""
        for message in messages:
            if not re.fullmatch(r"\w+", message.get("role") or ""):
                raise UsageError(
                    f"a message has the role {message.get('role')!r}",
                    hint="roles are one word: system, user, assistant or tool",
                )
        template = self._template("tool_use" if options.get("tools") else "default")
        texts = [list(messages), options, self._templates]
        mark = _unused_character(json.dumps(texts, default=str))
        variables = {
            "tools": None,
            "documents": None,
            **self._names,
            **{key: self._marked(value, mark) for key, value in options.items()},
            "messages": [self._marked(message, mark) for message in messages],
            "add_generation_prompt": generation,
        }
        text = _run(template, variables)
        # A template may write JSON in ASCII; then the mark arrives as its escape.
        text = text.replace(f"\\u{ord(mark):04x}", mark)
        return self._split(text, mark)

    def _template(self, name: str) -> jinja2.Template:
        if not self._templates:
            raise TokenizerError(
                "the model has no chat template",
                hint="put the model's chat_template.jinja beside its tokenizer.json",
            )
        if name not in self._templates:
            name = "default" if "default" in self._templates else next(iter(self._templates))
        if name not in self._compiled:
            try:
                self._compiled[name] = _environment().from_string(self._templates[name])
            except jinja2.TemplateError as error:
                raise TokenizerError(
                    f"the chat template is not valid: {error}",
                    hint="fetch the tokenizer files of the model again",
                ) from error
        return self._compiled[name]

    def _marked(self, value: Any, mark: str) -> Any:
        """A copy in plain JSON types (the sandbox guards no others), control tokens marked."""
        if isinstance(value, str):
            sizes = range(1, 1 + max(map(len, self._tokens), default=0))
            before = mark if any(value[:n] in self._tails for n in sizes) else ""
            after = mark if any(value[-n:] in self._heads for n in sizes) else ""
            return before + mark.join(halves(value, self.starts)) + after
        if value is None or type(value) in (bool, int, float):
            return value
        if isinstance(value, Mapping):
            # Keys and roles are names the template looks up: whole tokens only, never edges.
            return {
                mark.join(halves(str(key), self.starts)): (
                    str(item) if key == "role" else self._marked(item, mark)
                )
                for key, item in value.items()
            }
        if isinstance(value, Sequence):
            return [self._marked(item, mark) for item in value]
        raise UsageError(
            f"a message holds a {type(value).__name__}",
            hint="messages are made of texts, numbers, lists and mappings",
        )

    def _split(self, text: str, mark: str) -> list[tuple[str, bool]]:
        # A mark inside breaks a token, except one of a single character: there it comes after.
        tokens = [re.escape(t) + (f"(?!{mark})" if len(t) == 1 else "") for t in self._tokens]
        pieces: list[tuple[str, bool]] = []
        start = 0
        for match in re.finditer("|".join(tokens) or "(?!)", text):
            strip_left, strip_right = self._strips[match.group()]
            before = text[start : match.start()]
            pieces += [(before.rstrip() if strip_left else before, False), (match.group(), True)]
            start = match.end()
            if strip_right:
                start = _SPACE.match(text, start).end()  # type: ignore[union-attr]
        pieces.append((text[start:], False))
        return [(piece.replace(mark, ""), is_token) for piece, is_token in pieces if piece]


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """jinja2's sandbox, with limits on the operators that make huge values from small ones."""

    intercepted_binops = frozenset(["*", "**", "+", "%"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and _bits(left) * abs(right) > 4096:
            raise SecurityError(f"{left} ** {right} is too large")
        if operator == "*":
            for many, times in ((left, right), (right, left)):
                if hasattr(many, "__len__") and len(many) * times > MAX_RENDERED:
                    raise SecurityError(f"a text repeated {times} times")
        if operator == "+" and hasattr(left, "__len__") and len(left) + len(right) > MAX_RENDERED:
            raise SecurityError(f"more than {MAX_RENDERED} characters")
        if operator == "%" and isinstance(left, str) and re.search(r"%[^a-z]*(\d{5}|\*)", left):
            raise SecurityError(f"the format {left!r}")
        return super().call_binop(context, operator, left, right)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Also refuse str methods that pad to any width."""
        if isinstance(obj, str) and attr in ("center", "ljust", "rjust", "zfill", "expandtabs"):
            return False
        return super().is_safe_attribute(obj, attr, value)


class _Namespace(jinja2.utils.Namespace):
    """`namespace()` without attributes that reach Python's internals."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"namespace attribute {name!r}")
        super().__setitem__(name, value)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks an answer for training; here its body is simply rendered."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.Environment:
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
    )
    # jinja2's own tojson escapes < and > for HTML, which would change what the model reads.
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda layout: datetime.now().strftime(layout),
        "namespace": _Namespace,
    }
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _run(template: jinja2.Template, variables: Mapping[str, Any]) -> str:
    """The template's text, or TokenizerError; never more than MAX_STEPS lines or MAX_RENDERED."""
    pieces: list[str] = []
    size = 0
    try:
        with _step_limit(MAX_STEPS):
            for piece in template.generate(variables):
                pieces.append(piece)
                size += len(piece)
                if size > MAX_RENDERED:
                    raise SecurityError(f"more than {MAX_RENDERED} characters")
    except SecurityError as error:
        raise TokenizerError(
            f"the chat template does what templates may not: {error}",
            hint="use the template of the model's own repository",
        ) from error
    except jinja2.TemplateError as error:
        raise TokenizerError(
            f"the chat template refuses these messages: {error}",
            hint="check the roles and their order: system first, then user and assistant in turn",
        ) from error
    except Exception as error:  # a template can fail in as many ways as a program
        raise TokenizerError(
            f"the chat template fails: {type(error).__name__}: {error}",
            hint="check that every message has a text; then the model's chat_template.jinja",
        ) from error
    return "".join(pieces)


@contextmanager
def _step_limit(steps: int) -> Iterator[None]:
    """Stop endless templates: count the lines this thread runs, at 1.5 µs each."""
    left = steps

    def trace(frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        nonlocal left
        left -= 1
        if left < 0:
            raise SecurityError(f"more than {steps} steps")
        return trace if frame.f_code.co_filename == "<template>" else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def halves(text: str, starts: re.Pattern[str]) -> list[str]:
    """`text` cut after the first character of every control token in it."""
    cuts = [0, *(match.start() + 1 for match in starts.finditer(text)), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(cuts)]


def _unused_character(text: str) -> str:
    """A private-use character that `text` (JSON in ASCII) does not contain."""
    return next(chr(c) for c in range(0xE000, 0xF8FF) if f"\\u{c:04x}" not in text)


def _bits(number: Any) -> int:
    return number.bit_length() if isinstance(number, int) else 64
