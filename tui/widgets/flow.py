"""A growing Markdown text as one small widget per block: what is finished is never laid out again.

`split` finds what is finished in a text whose end is still coming; `Flow` shows it. Called by the
answer widget; knows nothing of where text comes from.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from markdown_it import MarkdownIt
from markdown_it.token import Token
from textual.app import ComposeResult, RenderResult
from textual.containers import Vertical
from textual.content import Content
from textual.geometry import Size
from textual.highlight import (
    ANSIDarkHighlightTheme,
    ANSILightHighlightTheme,
    HighlightTheme,
    highlight,
)
from textual.widget import Widget

from tui.widgets.figures import plain
from tui.widgets.markup import lay, markdown_parser

LONG_BLOCK = 2000
"""A list or code longer than this is cut inside: the growing block is drawn anew each time."""
CHAPTER = 12
"""Blocks per container: a layout asks each child of each container that changed."""


@dataclass(frozen=True, slots=True)
class Piece:
    """The source of one block and its tokens. `goes_on`: the next one is the same code or list."""

    source: str
    tokens: tuple[Token, ...]
    goes_on: bool = False


def split(text: str, parser: MarkdownIt) -> list[Piece]:
    """The blocks of a text; only the last one can still change when more text comes.

    Very long code is cut between two lines: the rest repeats the fence that opens it. A very long
    list is cut between two items.
    """
    tokens = parser.parse(text)
    lines = text.splitlines(keepends=True)
    tops = [i for i, t in enumerate(tokens) if t.level == 0 and t.map and t.nesting >= 0]
    starts = [_line(tokens[i]) for i in tops]
    pieces = []
    for n, top in enumerate(tops):
        last = n + 1 == len(tops)
        block = tuple(tokens[top:] if last else tokens[top : tops[n + 1]])
        source = lines[starts[n] if n else 0 : None if last else starts[n + 1]]
        if last and len(text) - sum(map(len, lines[: starts[n]])) > LONG_BLOCK:
            pieces += _cut(source, block, starts[n] if n else 0, parser)
        else:
            pieces.append(Piece("".join(source), block))
    return pieces


def _line(token: Token) -> int:
    return token.map[0] if token.map else 0


def _cut(
    source: list[str], block: tuple[Token, ...], first: int, parser: MarkdownIt
) -> list[Piece]:
    """A long block in two: lines that are finished, and the rest; whole if that cannot be."""
    kind, at, opening, closing = block[0], 0, "", ""
    if kind.type == "fence" and kind.map:
        # The last two lines: one may be unfinished, one may be the closing fence.
        at = max(0, kind.map[1] - first - 2)
        opening, closing = source[_line(kind) - first], f"{kind.markup}\n"
    elif kind.type in ("bullet_list_open", "ordered_list_open"):
        items = [_line(t) for t in block if t.type == "list_item_open" and t.level == 1]
        at = items[-1] - first
    if at <= 1:
        return [Piece("".join(source), block)]
    halves = ("".join(source[:at]) + closing, opening + "".join(source[at:]))
    return [Piece(half, tuple(parser.parse(half)), goes_on=n == 0) for n, half in enumerate(halves)]


class Block(Widget):
    """One block of an answer; a link is copied, never opened: nothing leaves by itself."""

    def __init__(self, piece: Piece) -> None:
        super().__init__()
        self._piece = piece
        self._lines: tuple[object, Content] = (None, Content(""))
        """What the lines were made for, and the lines."""
        self._classify()

    def show(self, piece: Piece) -> None:
        """Show this instead."""
        if piece != self._piece:
            self._piece = piece
            self._lines = (None, Content(""))
            self._classify()
            self.refresh(layout=True)

    def _classify(self) -> None:
        kind = self._piece.tokens[0].type if self._piece.tokens else ""
        self.set_class(kind in ("fence", "code_block"), "code")
        self.set_class(self._piece.goes_on, "goes-on")

    def notify_style_update(self) -> None:
        """Another theme has other colours for code."""
        self._lines = (None, Content(""))
        super().notify_style_update()

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        """Lines at this width."""
        return self._laid(width).plain.count("\n") + 1

    def render(self) -> RenderResult:
        """The lines at the width there is."""
        return self._laid(self.content_size.width)

    def _laid(self, width: int) -> Content:
        if self._lines[0] != width:
            lines = lay(self._piece.tokens, width, self._highlight)
            self._lines = (width, Content("\n").join(lines))
        return self._lines[1]

    def _highlight(self, code: str, language: str) -> Content:
        theme: type[HighlightTheme] = HighlightTheme
        if self.app.native_ansi_color:
            dark = self.app.current_theme.dark
            theme = ANSIDarkHighlightTheme if dark else ANSILightHighlightTheme
        # Without a name Textual guesses, and its first guess imports every lexer: 2 s standstill.
        return highlight(code, language=language or "text", theme=theme)

    def action_copy_link(self, href: str) -> None:
        """Copy where a link leads."""
        self.app.copy_to_clipboard(href)
        self.notify(plain(href), title="Link copied", markup=False)


class Chapter(Vertical):
    """Some blocks."""


_REFERENCE = re.compile(r"^ {0,3}\[[^\]\n]+\]:", re.M)


class Flow(Vertical):
    """A growing Markdown text."""

    def __init__(self, text: str = "") -> None:
        super().__init__()
        self.text = text
        self._parser = markdown_parser()
        self._tail = ""
        """Source of the block that still grows."""
        self._growing: Block | None = None
        self._chapter: Chapter | None = None

    def compose(self) -> ComposeResult:
        """A text given at the start is complete."""
        pieces = split(plain(self.text), self._parser) if self.text else []
        for n in range(0, len(pieces), CHAPTER):
            yield Chapter(*map(Block, pieces[n : n + CHAPTER]))

    async def add(self, text: str) -> None:
        """Show more text."""
        self.text += text
        self._tail += plain(text)
        pieces = split(self._tail, self._parser)
        if not pieces:
            return
        self._tail = pieces[-1].source
        with self.app.batch_update():
            for piece in pieces[:-1]:
                await self._show(piece)
                self._growing = None
            await self._show(pieces[-1])

    async def finish(self) -> None:
        """No more text comes."""
        if _REFERENCE.search(self.text):
            # What a reference link points to may lie in another block: parsed whole it is right.
            with self.app.batch_update():
                await self.remove_children()
                self._chapter = self._growing = None
                for piece in split(plain(self.text), self._parser):
                    await self._show(piece)
                    self._growing = None

    async def _show(self, piece: Piece) -> None:
        if self._growing is not None:
            self._growing.show(piece)
        else:
            if self._chapter is None or len(self._chapter.children) >= CHAPTER:
                self._chapter = Chapter()
                await self.mount(self._chapter)
            self._growing = Block(piece)
            await self._chapter.mount(self._growing)
