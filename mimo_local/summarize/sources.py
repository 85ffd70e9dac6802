"""The documents of one summary and what their pages are called: marked text, stretches, shares.

Joins `citations` (what pages are called) and `chunks` (stretches of text). Knows no model and no
prompt; `job` asks it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mimo_local.documents import Document, page_list, parse_pages
from mimo_local.errors import DocumentError
from mimo_local.summarize.chunks import Block, glue
from mimo_local.summarize.citations import Anchors, neutral


class Sources:
    """All documents, narrowed to the pages asked for."""

    def __init__(self, documents: Sequence[Document], pages: str | None) -> None:
        """`pages`: a range like `3-9` for each document; UsageError if it is not in one of them."""
        self.documents = [_narrowed(document, pages) for document in documents]
        self.anchors = Anchors(self.documents)

    @property
    def name(self) -> str:
        """Their names in a few words."""
        names = self.anchors.names
        return ", ".join(names) if len(names) <= 3 else f"{len(names)} documents"

    @property
    def n_pages(self) -> int:
        """Pages asked for."""
        return sum(len(document.pages) for document in self.documents)

    @property
    def unit(self) -> str:
        """`pages`, or `sections` if any document has no pages."""
        return "pages" if all(d.unit == "page" for d in self.documents) else "sections"

    def longest_mark(self) -> str:
        """The longest mark a page can get, to reckon with."""
        marks = [
            self.anchors.tag(d, page.number)
            for d, document in enumerate(self.documents)
            for page in document.pages
        ]
        return max(marks, key=len, default="[p. 1]")

    def text(self, blocks: Sequence[Block], *, marked: bool = True) -> str:
        """The blocks, with a page mark before each page if `marked`."""
        out: list[str] = []
        before: Block | None = None
        for block in blocks:
            if before is None or (before.document, before.page) != (block.document, block.page):
                tag = f"{self.anchors.tag(block.document, block.page)}\n" if marked else ""
                out.append(("\n\n" if out else "") + tag + neutral(block.text))
            else:
                out.append(glue(before, block) + neutral(block.text))
            before = block
        return "".join(out)

    def wheres(self, blocks: Sequence[Block]) -> list[str]:
        """The stretches of pages these blocks are from, one per document."""
        ends: dict[int, tuple[int, int]] = {}
        for block in blocks:
            first, last = ends.get(block.document, (block.page, block.page))
            ends[block.document] = (min(first, block.page), max(last, block.page))
        return [self.anchors.where(d, first, last) for d, (first, last) in ends.items()]

    def where(self, blocks: Sequence[Block]) -> str:
        """The same as one text."""
        return "; ".join(self.wheres(blocks))

    def title(self, blocks: Sequence[Block]) -> str:
        """The first three headings on these blocks' pages."""
        pages = places(blocks)
        titles = [
            heading.title
            for d, document in enumerate(self.documents)
            for page in document.pages
            if (d, page.number) in pages
            for heading in page.headings
        ]
        return "; ".join(list(dict.fromkeys(titles))[:3])

    def mark(self, blocks: Sequence[Block]) -> str:
        """The page mark shown as an example: a page in the middle of what is there."""
        middle = blocks[len(blocks) // 2]
        return self.anchors.tag(middle.document, middle.page)

    def coverage(self, heard: Sequence[Block]) -> float:
        """Mean over all pages of the share of their text the model read; unreadable pages are 0."""
        read: dict[tuple[int, int], int] = {}
        for block in heard:
            place = (block.document, block.page)
            read[place] = read.get(place, 0) + len("".join(block.text.split()))
        shares = []
        for d, document in enumerate(self.documents):
            for page in document.pages:
                there = len("".join(page.text.split()))
                share = read.get((d, page.number), 0) / there if there else 1.0
                shares.append(0.0 if page.number in document.unread else min(1.0, share))
        return sum(shares) / len(shares)

    def explained(self) -> tuple[str, ...]:
        """What `sec. 3` stands for, in documents that have no pages."""
        return tuple(
            f"{self.anchors.where(d, page.number)}: "
            + (page.headings[0].title if page.headings else page.text.split("\n")[0][:60] + "...")
            for d, document in enumerate(self.documents)
            if document.unit == "section"
            for page in document.pages
            if page.text
        )


def places(blocks: Sequence[Block]) -> set[tuple[int, int]]:
    """(document, page) of all blocks."""
    return {(block.document, block.page) for block in blocks}


def _narrowed(document: Document, spec: str | None) -> Document:
    """Only the pages of a range; they must exist in the document and have been read from it."""
    if spec is None:
        return document
    chosen = set(parse_pages(spec, document.page_count, name=document.name))
    pages = tuple(page for page in document.pages if page.number in chosen)
    if not pages:
        raise DocumentError(
            f"p. {page_list(sorted(chosen))} of {document.name} were not read",
            hint="read the document with the same page range",
        )
    unread = tuple(n for n in document.unread if n in chosen)
    return replace(document, pages=pages, unread=unread)
