"""TOML to recipes: every key is known, every value of its kind, every `{{name}}` a variable.

What is wrong is said with file and line, and with the nearest right word. Knows no folder: the
shelf finds files and gives their tables, merged where one extends another.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, cast, get_args

from mimo_local.chat import PRESETS
from mimo_local.errors import UsageError
from mimo_local.recipes.types import ANY, Documents, Recipe, Text, Variable

MOST_BYTES: Final = 1 << 20
DOCS: Final = "docs/recipes.md shows what a recipe may say"
PLACE: Final = re.compile(r"\{\{[ \t]*([A-Za-z_][A-Za-z0-9_-]*)[ \t]*\}\}")
"""A variable in a template. Other braces are braces."""
_NAME: Final = re.compile(r"[a-z][a-z0-9_-]{0,39}")
_LANGUAGE: Final = re.compile(r"[a-z]{2,3}(-[A-Za-z]{2,4})?")
_TEXTS: Final = ("description", "system", "prompt")
_NUMBERS: Final[Mapping[str, tuple[float, float]]] = {
    "max_tokens": (1, 1 << 20),
    "temperature": (0, 100),
    "top_p": (0, 1),
    "repetition_penalty": (0, 100),
}
KEYS: Final = (
    *("description", "extends", "preset", "thinking", *_NUMBERS),
    *("documents", "instead", "system", "prompt", "variables"),
)


class Source:
    """A recipe file: its path and text, to say where something is wrong."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._text = ""

    def table(self) -> dict[str, Any]:
        """What the file says; UsageError if it cannot be read or is no TOML."""
        try:
            with self.path.open("rb") as file:
                data = file.read(MOST_BYTES + 1)
            if len(data) > MOST_BYTES:
                raise UsageError(f"{self.path} is larger than 1 MiB", hint=DOCS)
            self._text = data.decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(
                f"{self.path} cannot be read: {reason}",
                hint="repair the file or move it away; recipes are UTF-8 text",
            ) from error
        try:
            return tomllib.loads(self._text.replace("\r\n", "\n"))
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise UsageError(
                f"{self.path} is not valid TOML: {error}",
                hint=f"texts of several lines stand between three quotes; {DOCS}",
            ) from error

    def wrong(self, key: str, what: str, hint: str = "") -> UsageError:
        """The error for a key, with its line where there is one."""
        at = 0
        found: re.Match[str] | None = None
        for part in key.split("."):  # the table's head first, then the key below it
            word = re.escape(part)
            shape = rf"(?m)^[ \t]*(?:\[[^\]\n]*\b{word}\b|[\"']?{word}[\"']?[ \t]*[.=])"
            found = re.compile(shape).search(self._text, at) or found
            at = found.start() if found else at
        line = f", line {self._text.count(chr(10), 0, at) + 1}" if found else ""
        return UsageError(f"{self.path}{line}: {what}", hint=hint or DOCS)

    def unknown(self, key: str, known: Iterable[str]) -> UsageError:
        """The error for a key there is not."""
        names = list(known)
        close = difflib.get_close_matches(key.rpartition(".")[2], names, n=1)
        hint = f"did you mean `{close[0]}`?" if close else f"known are {', '.join(names)}"
        return self.wrong(key, f"there is no `{key}` in a recipe", hint)


def recipe(source: Source, name: str, table: Mapping[str, Any]) -> Recipe:
    """The recipe a table describes; UsageError names the file, the line and the key."""
    for key, value in table.items():
        language = isinstance(value, dict) and _LANGUAGE.fullmatch(key)
        if key not in KEYS and not language:
            raise source.unknown(key, (*KEYS, "en", "zh"))
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{source.path}: `{name}` is no name for a recipe",
            hint="call the file with small letters, digits and -",
        )
    variables = _variables(source, table)
    texts = _texts(source, table)
    for lang, text in texts.items():
        for word in PLACE.findall(f"{text.system}\n{text.prompt}"):
            if word not in variables:
                close = difflib.get_close_matches(word, variables, n=1)
                raise source.wrong(
                    f"{lang}.prompt" if lang else "prompt",
                    f"`{{{{{word}}}}}` is no variable of this recipe",
                    f"did you mean `{close[0]}`?" if close else f"add [variables.{word}]",
                )
    instead = _text(source, "instead", table)
    if instead and instead not in variables:
        raise source.wrong("instead", f"`instead`: there is no variable `{instead}`")
    return Recipe(
        name,
        source.path,
        texts,
        variables,
        _choice(source, table, "preset", tuple(sorted(PRESETS)), "default"),
        _switch(source, table, "thinking"),
        cast(Documents, _choice(source, table, "documents", get_args(Documents), "optional")),
        instead,
        {key: _number(source, key, table[key]) for key in _NUMBERS if key in table},
    )


def _texts(source: Source, table: Mapping[str, Any]) -> dict[str, Text]:
    """By language; what a language does not say is taken from the top of the file."""
    common = {key: _text(source, key, table) for key in _TEXTS}
    said = {lang: dict(table[lang]) for lang in table if lang not in KEYS}
    texts = {}
    for lang, own in (said or {ANY: {}}).items():
        for key in own:
            if key not in _TEXTS:
                raise source.unknown(f"{lang}.{key}", _TEXTS)
        found = common | {key: _text(source, key, own, lang) for key in own}
        if not found["prompt"].strip():
            where = f"{lang}.prompt" if lang else "prompt"
            raise source.wrong(lang or "prompt", f"`{where}` is missing")
        texts[lang] = Text(**{key: value.strip() for key, value in found.items()})
    return texts


def _variables(source: Source, table: Mapping[str, Any]) -> dict[str, Variable]:
    found = {}
    given = table.get("variables", {})
    if not isinstance(given, dict):
        raise source.wrong("variables", "`variables` must be a table like [variables.topic]")
    for name, said in given.items():
        where = f"variables.{name}"
        if not _NAME.fullmatch(name):
            raise source.wrong(where, f"`{name}` is no name for a variable: small letters, - and _")
        if not isinstance(said, dict):
            raise source.wrong(where, f"`{where}` must be a table like [variables.topic]")
        for key in said:
            if key not in ("description", "default"):
                raise source.unknown(f"{where}.{key}", ("description", "default"))
        default = _by_language(source, where, "default", said) if "default" in said else None
        about = _by_language(source, where, "description", said)
        found[name] = Variable(name, about, default)
    return found


def _by_language(source: Source, where: str, key: str, table: Mapping[str, Any]) -> dict[str, str]:
    """A text for all languages, or one for each."""
    value = table.get(key, "")
    if isinstance(value, str):
        return {ANY: value}
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise source.wrong(
            where, f'`{where}.{key}` must be a text, or like {{ en = "...", zh = "..." }}'
        )
    return dict(value)


def _text(source: Source, key: str, table: Mapping[str, Any], lang: str = "") -> str:
    value = table.get(key, "")
    if not isinstance(value, str):
        where = f"{lang}.{key}" if lang else key
        raise source.wrong(where, f"`{where}` must be a text in quotes")
    return value


def _choice(
    source: Source, table: Mapping[str, Any], key: str, names: tuple[str, ...], default: str
) -> str:
    value = table.get(key, default)
    if value not in names:
        raise source.wrong(key, f"`{key}` is {value!r}, but must be one of {', '.join(names)}")
    return str(value)


def _switch(source: Source, table: Mapping[str, Any], key: str) -> bool:
    value = table.get(key, False)
    if not isinstance(value, bool):
        raise source.wrong(key, f"`{key}` is {value!r}, but must be true or false")
    return value


def _number(source: Source, key: str, value: Any) -> float:
    low, high = _NUMBERS[key]
    whole = key == "max_tokens"
    kinds = int if whole else (int, float)
    if not isinstance(value, kinds) or isinstance(value, bool) or not low <= value <= high:
        kind = "a whole number" if whole else "a number"
        raise source.wrong(
            key, f"`{key}` is {value!r}, but must be {kind} from {low:g} to {high:g}"
        )
    return value
