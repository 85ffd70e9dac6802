"""A document cut into parts that fit: at chapters if it can be, else pages, paragraphs, sentences.

Sizes are counted by the model's own tokenizer, handed in as a function. Every block of text ends up
in exactly one part, in order. Knows no model and no prompt; `summarize` calls it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

from mimo_local.documents import Document, Page
from mimo_local.errors import ContextOverflowError
from mimo_local.summarize.sentences import split_sentences

Count = Callable[[str], int]


class Rank(IntEnum):
    """What a block begins with; lower is a better place to cut."""

    DOCUMENT = 0
    CHAPTER = 1
    SECTION = 2
    SUBSECTION = 3
    PAGE = 4
    PARAGRAPH = 5
    LINE = 6
    SENTENCE = 7
    WORD = 8


# What a cut costs, in parts: a part more (1.0) is the price of avoiding any single bad cut.
_PRICE = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.9)
_GLUE = {Rank.LINE: "\n", Rank.SENTENCE: " ", Rank.WORD: ""}
TAG_TOKENS = 12
"""Room for one page mark like `[p. 12]` and its line ends."""


@dataclass(frozen=True, slots=True)
class Block:
    """A stretch of one page; `document` is an index, `page` a page number."""

    document: int
    page: int
    rank: Rank
    text: str
    tokens: int


def blocks_of(documents: Sequence[Document], count: Count, most: int) -> list[Block]:
    """All text of all documents in order, in blocks of at most `most` tokens."""
    out: list[Block] = []
    for d, document in enumerate(documents):
        top = min((h.level for p in document.pages for h in p.headings), default=0)
        first = True
        for page in document.pages:
            for rank, text in _at_headings(page, top):
                for piece_rank, piece, tokens in _fit(text, rank, count, most):
                    out.append(
                        Block(d, page.number, Rank.DOCUMENT if first else piece_rank, piece, tokens)
                    )
                    first = False
    return out


def _at_headings(page: Page, top: int) -> list[tuple[Rank, str]]:
    """The page cut where its headings stand; `top` is the document's highest heading level."""
    cuts: dict[int, Rank] = {0: Rank.PAGE}
    for heading in page.headings:
        rank = Rank(min(Rank.CHAPTER + heading.level - top, Rank.SUBSECTION))
        # A heading in the first lines (behind a running header) is where the page begins.
        at = 0 if not page.text[: heading.offset].strip() else heading.offset
        cuts[at] = min(rank, cuts.get(at, rank))
    places = sorted(cuts)
    pieces = zip(places, [*places[1:], len(page.text)], strict=True)
    return [(cuts[a], page.text[a:b].strip("\n")) for a, b in pieces if page.text[a:b].strip()]


def _fit(text: str, rank: Rank, count: Count, most: int) -> list[tuple[Rank, str, int]]:
    """Cut until every piece has at most `most` tokens, at the best places there are."""
    tokens = count(text)
    if tokens <= most:
        return [(rank, text, tokens)]
    for inner, pieces in (
        (Rank.PARAGRAPH, re.split(r"\n\n+", text)),
        (Rank.LINE, text.split("\n")),
        (Rank.SENTENCE, [s.rstrip() for s in split_sentences(text)]),
    ):
        pieces = [p for p in pieces if p.strip()]
        if len(pieces) > 1:
            return _gather(pieces, inner, rank, count, most)
    # No sentence end in sight: cut between words, or inside of one (CJK, base64).
    half = len(text) // 2
    cut = text.rfind(" ", half // 2, half) + 1 or half
    if cut >= len(text) or cut < 1:
        return [(rank, text, tokens)]
    return _fit(text[:cut], rank, count, most) + _fit(text[cut:], Rank.WORD, count, most)


def _gather(
    pieces: list[str], inner: Rank, rank: Rank, count: Count, most: int
) -> list[tuple[Rank, str, int]]:
    """Neighbouring small pieces together again, as many as fit."""
    out: list[tuple[Rank, str, int]] = []
    glue = _GLUE.get(inner, "\n\n")
    held: list[str] = []
    held_tokens = 0
    for piece in [*pieces, None]:
        tokens = 0 if piece is None else count(piece) + 1
        if held and (piece is None or held_tokens + tokens > most):
            out += _fit(glue.join(held), inner if out else rank, count, most)
            held, held_tokens = [], 0
        if piece is not None:
            held.append(piece)
            held_tokens += tokens
    return out


def pack(blocks: Sequence[Block], limit: int, *, tag_tokens: int = TAG_TOKENS) -> list[list[Block]]:
    """The cheapest division into parts of at most `limit` tokens: few, cut well, of even size.

    Dynamic programming over cuts. ContextOverflowError if a single block is over the limit.
    """
    n = len(blocks)
    best = [0.0] + [float("inf")] * n
    start_of = [0] * (n + 1)
    for end in range(1, n + 1):
        size = tag_tokens
        for start in range(end - 1, -1, -1):
            block = blocks[start]
            new_page = start == 0 or blocks[start - 1].page != block.page
            size += block.tokens + 2 + (tag_tokens if new_page else 0)
            if size > limit:
                break
            # 0.05 (size/limit)^2 makes sizes even; a seventh part of 0.35 never outweighs a part.
            cost = best[start] + 1.0 + _PRICE[block.rank] + 0.05 * (size / limit) ** 2
            if cost < best[end]:
                best[end], start_of[end] = cost, start
        if best[end] == float("inf"):
            raise ContextOverflowError(
                f"a piece of {blocks[end - 1].tokens} tokens does not fit into {limit}",
                hint="give the model more context with --context",
            )
    parts: list[list[Block]] = []
    end = n
    while end:
        parts.append(list(blocks[start_of[end] : end]))
        end = start_of[end]
    return parts[::-1]


def glue(before: Block, after: Block) -> str:
    """What stands between two neighbouring blocks of one page."""
    return _GLUE.get(after.rank, "\n\n")
