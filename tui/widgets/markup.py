"""Markdown to lines of styled text: markdown-it's tokens and a width in, Content out. Pure.

One text per block instead of a widget per list item and table cell: a layout of the screen costs a
tenth, so that an answer can grow twenty times a second. Called by the blocks of an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from markdown_it import MarkdownIt
from markdown_it.token import Token
from markdown_it.tree import SyntaxTreeNode
from textual.content import Content, Span
from textual.style import Style

Highlighter = Callable[[str, str], Content]
"""Code and the name of its language to coloured code."""

STYLES = {"em": "italic", "strong": "bold", "s": "strike"}
CODE = "$text-warning on $warning 10%"
HEADINGS = {"h1": "bold underline $primary", "h2": "bold $primary", "h3": "bold"}
BULLETS = ("• ", "▪ ", "‣ ", "◦ ")
LEAST = 8
"""Cells a column or a nested text gets, however narrow the screen is."""


def markdown_parser() -> MarkdownIt:
    """GitHub's Markdown, but HTML stays visible text instead of vanishing."""
    return MarkdownIt("gfm-like", {"html": False})


def code_blocks(text: str) -> tuple[str, ...]:
    """The code of every fenced or indented block, also of those in lists and quotes."""
    found = markdown_parser().parse(text)
    return tuple(t.content for t in found if t.type in ("fence", "code_block") and t.content)


def lay(tokens: Sequence[Token], width: int, highlight: Highlighter) -> list[Content]:
    """The lines of these blocks, none wider than `width` cells."""
    return _Layout(highlight).blocks(SyntaxTreeNode(tokens).children, max(width, LEAST))


def inline(node: SyntaxTreeNode) -> Content:
    """The words of a paragraph, a heading or a cell."""
    parts, spans = [""], []
    length = 0

    def walk(nodes: Iterable[SyntaxTreeNode]) -> None:
        nonlocal length
        for child in nodes:
            start = length
            if child.children:
                walk(child.children)
            else:
                text = {"softbreak": " ", "hardbreak": "\n"}.get(child.type, child.content)
                parts.append(text)
                length += len(text)
            style: str | Style = CODE if child.type == "code_inline" else STYLES.get(child.type, "")
            if child.type in ("link", "image"):
                href = str(child.attrs.get("href" if child.type == "link" else "src", ""))
                style = Style(underline=True) + Style.from_meta({"@click": f"copy_link({href!r})"})
            if style and length > start:
                spans.append(Span(start, length, style))

    walk(node.children)
    return Content("".join(parts), spans)


class _Layout:
    def __init__(self, highlight: Highlighter) -> None:
        self._highlight = highlight

    def blocks(
        self, nodes: Sequence[SyntaxTreeNode], width: int, *, tight: bool = False, depth: int = 0
    ) -> list[Content]:
        lines: list[Content] = []
        for node in nodes:
            if lines and not tight:
                lines.append(Content(""))
            lines += self._block(node, width, depth)
        return lines

    def _block(self, node: SyntaxTreeNode, width: int, depth: int) -> list[Content]:
        match node.type:
            case "paragraph" | "heading":
                words = inline(node.children[0]) if node.children else Content("")
                return words.stylize(HEADINGS.get(node.tag, "")).wrap(width)
            case "bullet_list" | "ordered_list":
                return self._list(node, width, depth)
            case "blockquote":
                inner = self.blocks(node.children, max(LEAST, width - 2), depth=depth)
                return [Content.assemble(("▌ ", "$primary"), line) for line in inner]
            case "fence" | "code_block":
                return self._code(node, width)
            case "table":
                return self._table(node, width)
            case "hr":
                return [Content("─" * width).stylize("dim")]
            case _:
                return Content(node.content).wrap(width)

    def _code(self, node: SyntaxTreeNode, width: int) -> list[Content]:
        words = node.info.split() if node.type == "fence" else []
        code = self._highlight(node.content.rstrip("\n"), words[0] if words else "")
        return [part for line in code.split("\n", allow_blank=True) for part in line.fold(width)]

    def _list(self, node: SyntaxTreeNode, width: int, depth: int) -> list[Content]:
        ordered = node.type == "ordered_list"
        first = int(node.attrs.get("start", 1)) if ordered else 0
        marks = [
            f"{first + i}. " if ordered else BULLETS[depth % len(BULLETS)]
            for i in range(len(node.children))
        ]
        room = max(map(len, marks), default=0)
        lines: list[Content] = []
        for mark, item in zip(marks, node.children, strict=True):
            tight = all(child.hidden for child in item.children if child.type == "paragraph")
            if lines and not tight:
                lines.append(Content(""))
            inner = self.blocks(
                item.children, max(LEAST, width - room), tight=tight, depth=depth + 1
            ) or [Content("")]
            lead = (mark.rjust(room), "$text-muted")
            lines.append(Content.assemble(lead, inner[0]))
            lines += [Content.assemble(" " * room, line) for line in inner[1:]]
        return lines

    def _table(self, node: SyntaxTreeNode, width: int) -> list[Content]:
        rows = [
            [inline(cell.children[0]) if cell.children else Content("") for cell in row.children]
            for part in node.children
            for row in part.children
        ]
        columns = max(map(len, rows))
        rows = [row + [Content("")] * (columns - len(row)) for row in rows]
        widths = fit([max(row[c].cell_length for row in rows) for c in range(columns)], width)
        lines: list[Content] = []
        for n, row in enumerate(rows):
            cells = [
                cell.wrap(w) if cell else [Content("")] for cell, w in zip(row, widths, strict=True)
            ]
            for y in range(max(map(len, cells))):
                parts = [
                    (c[y] if y < len(c) else Content("")).truncate(w, pad=True)
                    for c, w in zip(cells, widths, strict=True)
                ]
                line = Content.assemble(" ", Content(" │ ").join(parts))
                lines.append(line.stylize("bold") if n == 0 else line)
            if n == 0:
                lines.append(Content("─" + "─┼─".join("─" * w for w in widths)).stylize("dim"))
        return lines


def fit(wanted: Sequence[int], width: int) -> list[int]:
    """Column widths that fit with their separators: the widest give way first, down to a little."""
    widths = [max(1, w) for w in wanted]
    room = width - 1 - 3 * (len(widths) - 1)
    while sum(widths) > room and max(widths) > LEAST:
        widths[widths.index(max(widths))] -= 1
    return widths
