"""Text for the search: what is indexed, what a query means, the line shown around a match.

The index splits text into words at spaces and punctuation. Chinese, Japanese, Korean and Thai are
written without spaces, so each of their characters is made a word of its own (`spaced`) and a
query of several is a phrase: any substring is found, one character too. Knows no database.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Final

from mimo_local.history.types import MARKS

SNIPPET = 72
"""Characters of a snippet."""
BEFORE = 24
"""Of these before the first match, where there is more text after it."""
TITLE = 60
"""Longest title made from a message."""

_UNSPACED: Final = (
    "\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029"
    "\u3040-\u318f\u31a0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\ua960-\ua97f\uac00-\ud7ff\uf900-\ufaff"
    "\uff66-\uff9f\U0001b000-\U0001b16f\U00020000-\U0003ffff"
)
_ALONE: Final = re.compile(f"([{_UNSPACED}])")
_WORD: Final = re.compile(rf"[{_UNSPACED}]+|[^\W_{_UNSPACED}]+")
"""A run of characters that are words of their own, or a word as the index cuts it."""
_CONTROL: Final = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]+"
)
"""Control characters, line separators, and those that turn the direction of writing."""


def spaced(text: str) -> str:
    """The text as it is indexed."""
    return text if text.isascii() else _ALONE.sub(r" \1 ", text)


def plain(text: str) -> str:
    """One line without control characters: safe in any terminal."""
    return " ".join(_CONTROL.sub(" ", text).split())


def chunks(query: str) -> list[str]:
    """What stands between the blanks of a query, as far as there are letters or digits in it."""
    # One form of an accented letter: the index knows no accents that stand alone.
    text = unicodedata.normalize("NFC", _CONTROL.sub(" ", query))
    return [chunk for chunk in text.split() if _WORD.search(chunk)]


def match(query: str) -> str:
    """The FTS5 expression that finds all words of a query, what it ends with also as a beginning.

    Each chunk is quoted: nothing a person types is syntax, and `f(x)` or a run of Chinese must
    stand there in this order. Empty if there is no word in the query.
    """
    found = [f'"{spaced(chunk.replace(chr(34), " ")).strip()}"' for chunk in chunks(query)]
    return " AND ".join(found) + ("*" if _begins(query) else "")


def _begins(query: str) -> bool:
    """Whether the last word may be the beginning of one: not in `C++`, and not before a sign."""
    return _WORD.match(query[-1:]) is not None


def pattern(query: str) -> re.Pattern[str]:
    """Finds in folded text what `match` finds; without words, the query itself."""
    found = chunks(query)
    if not found:
        return re.compile(re.escape(query.strip()))
    parts = []
    for i, chunk in enumerate(found):
        tokens = _WORD.findall(_folded(chunk))
        first, last = (_ALONE.match(token) is not None for token in (tokens[0], tokens[-1]))
        begins = i == len(found) - 1 and _begins(query)
        end = "" if last else r"[^\W_]*" if begins else r"(?![^\W_])"
        body = r"[\W_]*".join(map(re.escape, tokens))
        parts.append(("" if first else r"(?<![^\W_])") + body + end)
    # The longest first: `can` must not hide `canary`.
    return re.compile("|".join(sorted(parts, key=len, reverse=True)))


def snippet(text: str, wanted: re.Pattern[str]) -> str:
    """One line of the text around its first match, every match in it between MARKS."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    first = wanted.search(_folded(text))
    at = first.start() if first else 0
    # Only the part that can be shown is cleaned: a document may have megabytes.
    start = max(0, at - 4 * SNIPPET)
    before, after = plain(text[start:at]), plain(text[at : at + 4 * SNIPPET])
    glue = " " if before and text[at - 1 : at].isspace() else ""
    room = max(BEFORE, SNIPPET - len(after))
    cut_before = start > 0 or len(before) > room
    if len(before) > room:
        before = before[-room:]
        before = before.partition(" ")[2] or before  # begin with a whole word
    line = before + glue + after
    cut_after = len(line) > SNIPPET or at + 4 * SNIPPET < len(text)
    line = line[:SNIPPET].rstrip()
    marked, end = "", 0
    for found in wanted.finditer(_folded(line)):
        here = line[found.start() : found.end()]
        marked += line[end : found.start()] + MARKS[0] + here + MARKS[1]
        end = found.end()
    return ("…" if cut_before else "") + marked + line[end:] + ("…" if cut_after else "")


def title(text: str) -> str:
    """A title from a message: its first line with words, cut at a word."""
    line = next((found for raw in text.splitlines() if (found := plain(raw).strip("#*>` "))), "")
    if len(line) <= TITLE:
        return line
    cut = line[:TITLE].rpartition(" ")[0]
    return (cut if len(cut) > TITLE // 2 else line[: TITLE - 1]).rstrip(" ,;:.") + "…"


class _Fold(dict[int, str]):
    """Lower case without accents, one character for one, so that places stay the same."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        lower = unicodedata.normalize("NFD", char)[0].lower()
        self[code] = lower if len(lower) == 1 else char
        return self[code]


_FOLD: Final = _Fold()


def _folded(text: str) -> str:
    return text.lower() if text.isascii() else text.translate(_FOLD)
