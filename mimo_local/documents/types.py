"""What a document is once it has been read: pages of plain text with anchors. Plain frozen data.

Knows neither files nor formats; every reader in this package builds these, `summarize` and `cli`
take them. A page is what a reader can look up: a sheet of a PDF, a section of a web page.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from mimo_local.errors import UsageError

Kind: TypeAlias = Literal["pdf", "markdown", "html", "text"]
Unit: TypeAlias = Literal["page", "section"]


@dataclass(frozen=True, slots=True)
class Limits:
    """How much of a document is taken on before it is refused with an error."""

    file_bytes: int = 256 << 20
    pages: int = 5000
    characters: int = 12_000_000
    """About 3 million tokens: hours of reading for the real model."""
    page_characters: int = 400_000
    """More on one page than print can hold (a dense A4 page has about 6000)."""
    seconds: float = 300.0
    page_seconds: float = 20.0
    """Silence after which the PDF worker is ended and the page it was reading given up."""
    memory_bytes: int = 1 << 30
    """Address space of the PDF worker; a plain 36-page manual needs 0.2 GB of it."""


@dataclass(frozen=True, slots=True)
class Heading:
    """A heading inside a page: `offset` is where it begins in the page's text."""

    level: int
    title: str
    offset: int = 0


@dataclass(frozen=True, slots=True)
class OutlineEntry:
    """One line of the table of contents; `page` is a page number (from 1) or None."""

    level: int
    title: str
    page: int | None


@dataclass(frozen=True, slots=True)
class Page:
    """One page: `number` counts from 1, `label` is what the document itself calls it."""

    number: int
    label: str
    text: str
    headings: tuple[Heading, ...] = ()


@dataclass(frozen=True, slots=True)
class Document:
    """A document as text. `unread` lists pages whose content could not be read, or not fully."""

    name: str
    kind: Kind
    pages: tuple[Page, ...]
    outline: tuple[OutlineEntry, ...] = ()
    warnings: tuple[str, ...] = ()
    unread: tuple[int, ...] = ()
    page_count: int = 0
    """Pages of the whole document, whatever part of it was asked for."""
    unit: Unit = "page"
    """`section` where the format has no pages: a section is a stretch of text under a heading."""
    dropped_lines: tuple[str, ...] = field(default=(), compare=False)
    """Running headers and footers that were taken out, one example of each."""
    source: str = field(default="", compare=False, repr=False)
    """Plain text and Markdown read whole: every line with its indent, which pages do not keep."""

    @property
    def whole(self) -> str:
        """All of it for a model to read: a program keeps its lines as they are."""
        return self.source.strip("\n") or self.text

    @property
    def characters(self) -> int:
        """Characters of text in all pages."""
        return sum(len(page.text) for page in self.pages)

    @property
    def text(self) -> str:
        """The text of all pages, a blank line between them."""
        return "\n\n".join(page.text for page in self.pages if page.text)


def parse_pages(spec: str, count: int, *, name: str = "the document") -> tuple[int, ...]:
    """Page numbers (from 1, ascending) of `3-9,12` or `20-`; UsageError if not in 1..count."""
    chosen: set[int] = set()
    hint = f"give page numbers from 1 to {count}, for example --pages 1-{min(count, 9)}"
    for item in spec.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})?\s*(-)?\s*(\d{1,9})?\s*", item)
        first, dash, last = match.groups() if match else (None, None, None)
        if first is None and last is None:
            raise UsageError(f"page range {spec!r}: {item.strip()!r} is not a range", hint=hint)
        low = int(first or 1)
        high = int(last or count) if dash else low
        if not 1 <= low <= high <= count:
            known = "has 1 page" if count == 1 else f"has {count} pages"
            raise UsageError(
                f"page range {spec!r}: {item.strip()!r}, but {name} {known}", hint=hint
            )
        chosen.update(range(low, high + 1))
    return tuple(sorted(chosen))


def page_list(numbers: tuple[int, ...] | list[int]) -> str:
    """Numbers as people write them: (3, 4, 5, 9) -> `3-5, 9`."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(f"{a}-{b}" if b > a else str(a) for a, b in runs)
