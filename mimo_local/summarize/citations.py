"""Page marks: `[p. 12]` put into prompts, and every mark in an answer checked to exist.

`Anchors` knows which pages there are and what they are called. A mark that names a page the model
was not given is taken out and counted; other spellings are brought to one. Knows no model.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from mimo_local.documents import Document, Page

_LABEL = re.compile(r"[A-Za-z0-9]+(?:[.-][A-Za-z0-9]+)*")
_GROUP = re.compile(r"[ \t]*[\[(（【]([^\[\]()（）【】\n]{1,160})[\])）】]")
_WORDS = (
    r"pp|pgs?|pages?|p|seiten?|ss?|páginas?|paginas?|págs?|pags?|стр|с|strony|str|sections?|secs?|§"
)
_ITEM = re.compile(
    rf"(?:(?:see|cf\.?|siehe)\s+)?(?:(?P<name>\S.*?)[\s,:]+)?(?:{_WORDS})(?![^\W\d_])\.?\s*(?P<place>\w[\w.\-–—\s]*)",
    re.IGNORECASE,
)
_CJK = re.compile(r"第?\s*(?P<place>\d+(?:\s*[-–—~]\s*\d+)?)\s*[页頁ページ]+")
_PLACE = re.compile(r"(?:\d+|[ivxlcdm]+)(?:\s*(?:-|–|—|to)\s*(?:\d+|[ivxlcdm]+))?", re.IGNORECASE)
_OWN_MARK = re.compile(r"\[((?:p|pp|page|pages|sec)\.? ?\d[\d ,–-]*)\]", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Citation:
    """One mark in the summary: a page, or a stretch of pages (`last` differs from `first`)."""

    document: str
    first: str
    last: str
    page: int
    """Page number of `first`, from 1; `first` and `last` are what the document calls its pages."""


@dataclass(frozen=True, slots=True)
class Checked:
    """An answer whose marks all exist."""

    text: str
    citations: tuple[Citation, ...]
    removed: int
    matched: bool = False
    """The marks are not the model's own: they were found by matching words."""


class Anchors:
    """The pages of all documents by the name a mark gives them."""

    def __init__(self, documents: Sequence[Document]) -> None:
        self.names = _file_names(documents)
        self._several = len(documents) > 1
        self._labels: list[dict[int, str]] = []
        self._numbers: list[dict[str, int]] = []
        self._units: list[str] = []
        self.own_labels = False
        """Whether any document numbers its pages differently from 1, 2, 3, ..."""
        for document in documents:
            labels = _labels(document.pages)
            self.own_labels |= any(label != str(n) for n, label in labels.items())
            self._labels.append(labels)
            self._numbers.append({label.casefold(): n for n, label in labels.items()})
            self._units.append("p." if document.unit == "page" else "sec.")

    def tag(self, document: int, first: int, last: int | None = None) -> str:
        """`[p. 3]`, `[p. 3-7]`; with several documents `[a.pdf p. 3]`."""
        return f"[{self.where(document, first, last)}]"

    def where(self, document: int, first: int, last: int | None = None) -> str:
        """The same without brackets."""
        labels = self._labels[document]
        name = f"{self.names[document]} " if self._several else ""
        end = f"-{labels[last]}" if last is not None and last != first else ""
        return f"{name}{self._units[document]} {labels[first]}{end}"

    def check(self, text: str, given: Collection[tuple[int, int]]) -> Checked:
        """Bring marks to one spelling; take out those outside of `given`: (document, page)."""
        found: dict[Citation, None] = {}
        removed = 0
        here = {d for d, _ in given}

        def rewrite(match: re.Match[str]) -> str:
            nonlocal removed
            items = self._items(match[1], given, here)
            if items is None:
                return match[0]
            good = [item for item in items if item is not None]
            removed += len(items) - len(good)
            if not good:
                return ""
            marks = []
            for d, first, last in dict.fromkeys(good):
                labels = self._labels[d]
                found[Citation(self.names[d], labels[first], labels[last], first)] = None
                marks.append(self.where(d, first, last))
            blank = " " if match.start() and text[match.start() - 1] != "\n" else ""
            return f"{blank}[{', '.join(marks)}]"

        clean = _GROUP.sub(rewrite, text)
        return Checked(clean.strip(), tuple(found), removed)

    def _items(
        self, inside: str, given: Collection[tuple[int, int]], here: set[int]
    ) -> list[tuple[int, int, int] | None] | None:
        """Places a bracket names, None for each that is not there; None if it is no mark at all."""
        out: list[tuple[int, int, int] | None] = []
        document: int | None = None
        for item in re.split(r"\s*(?:[;,&]|\band\b|\bund\b)\s*", inside.strip()):
            if (alone := self._named(item)) is not None:  # [a.pdf, p. 3]
                document = alone
                continue
            match = _ITEM.fullmatch(item) or _CJK.fullmatch(item)
            name = match.groupdict().get("name") if match else None
            place = match["place"].strip() if match else item
            if match is None and (not out or not _PLACE.fullmatch(item)):
                return None
            if name is not None:
                document = self._named(name)
            elif document is None:
                document = next(iter(here)) if len(here) == 1 else self._only_with(place, given)
            known = self._place(place, document, given)
            if known is None and not (_PLACE.fullmatch(place) or (name and document is not None)):
                return None  # "(p. value below 0.05)", "(S. Smith)": words, no mark
            out.append(known)
        return out or None

    def _named(self, name: str) -> int | None:
        folded = name.strip(" \"'`,:").casefold()
        names = [n.casefold() for n in self.names]
        return names.index(folded) if folded in names else None

    def _only_with(self, place: str, given: Collection[tuple[int, int]]) -> int | None:
        """A mark without a file name means the one document that has such a page, if it is one."""
        able = [d for d in {d for d, _ in given} if self._place(place, d, given)]
        return able[0] if len(able) == 1 else None

    def _place(
        self, place: str, document: int | None, given: Collection[tuple[int, int]]
    ) -> tuple[int, int, int] | None:
        """(document, first page, last page) if all of it was given to the model."""
        if document is None:
            return None
        numbers = self._numbers[document]
        place = place.strip(" .").casefold()
        ends = [(place, place)]
        # "T-1" may be a label, "3-7" a range: a label wins, then any split that gives two labels.
        for match in re.finditer(r"\s*(?:-|–|—|~|\bto\b)\s*(?:pp?\.?\s*)?", place):
            ends.append((place[: match.start()], place[match.end() :]))
        for low, high in ends:
            first, last = numbers.get(low), numbers.get(high)
            if first is None or last is None or first > last:
                continue
            if (document, first) in given and (document, last) in given:
                return document, first, last
        return None


def neutral(text: str) -> str:
    """A document's own `[p. 12]` without brackets, so that it cannot pass for a mark of ours."""
    return _OWN_MARK.sub(r"\1", text)


def _labels(pages: Sequence[Page]) -> dict[int, str]:
    """Page number -> label; plain numbers where the labels cannot be told apart or typed."""
    labels = {page.number: page.label for page in pages}
    distinct = len({label.casefold() for label in labels.values()}) == len(labels)
    if distinct and all(_LABEL.fullmatch(x) and len(x) <= 12 for x in labels.values()):
        return labels
    return {page.number: str(page.number) for page in pages}


def _file_names(documents: Sequence[Document]) -> tuple[str, ...]:
    """Names fit for a mark (no brackets, commas, semicolons), each one different."""
    names: list[str] = []
    for document in documents:
        name = re.sub(r"[\[\](){}<>;,&\s（）【】]+", "_", document.name)[:60].strip("_") or "file"
        stem, n = name, 2
        while name.casefold() in (other.casefold() for other in names):
            name, n = f"{stem}_{n}", n + 1
        names.append(name)
    return tuple(names)
