"""HTML to Markdown-like text: every word that shows is kept, scripts and styles are not.

No "main content" guessing: extractors that guess drop a tenth of a manual, and a summary must see
the whole. Walks the tree without recursion, so a page nested 100 000 deep cannot break it.
Knows no files; called by the package's `read`.
"""

from __future__ import annotations

import codecs
import re
from typing import TYPE_CHECKING

from mimo_local.documents.text import decode, from_bom

if TYPE_CHECKING:
    from selectolax.lexbor import LexborNode

_SILENT = frozenset(
    (
        "script", "style", "noscript", "template", "head", "svg", "math", "canvas",
        "object", "iframe", "audio", "video", "select", "datalist"
    )
)  # fmt: skip
_BLOCKS = frozenset(
    (
        "p", "div", "section", "article", "aside", "header", "footer", "nav", "main", "ul",
        "ol", "dl", "dt", "dd", "table", "thead", "tbody", "tfoot", "caption", "figure",
        "figcaption", "blockquote", "form", "fieldset", "address", "hr", "details",
        "summary", "body", "html", "center"
    )
)  # fmt: skip
_HEADINGS = {f"h{n}": n for n in range(1, 7)}
# What browsers do with these names, by the WHATWG encoding table.
_AS_BROWSERS = {"iso8859-1": "cp1252", "ascii": "cp1252", "utf-16": "utf-8", "gb2312": "gb18030"}


def decode_html(data: bytes, name: str) -> tuple[str, tuple[str, ...]]:
    """Text and warnings: byte order mark, `<meta charset>` or XML declaration, UTF-8, Western."""
    if from_bom(data) is None:
        declared = re.search(
            rb"""(?:<meta[^>]{0,200}?charset|<\?xml[^>]{0,100}?encoding)\s*=\s*["']?\s*([\w.:-]+)""",
            data[:4096],
            re.IGNORECASE,
        )
        if declared:
            label = declared[1].decode("ascii", "replace")
            try:
                codec = codecs.lookup(label).name
                text = data.decode(_AS_BROWSERS.get(codec, codec), "replace")
            except LookupError:
                return decode(data, name)
            bad = text.count("\ufffd")
            lost = (
                (f"{name} says it is {label}, but {bad} characters in it are not",) if bad else ()
            )
            return text, lost
    return decode(data, name)


def to_text(markup: str) -> str:
    """The words of a page as text with `#` headings, `-` items, ` | ` cells and fenced `pre`."""
    from selectolax.lexbor import LexborHTMLParser

    root = LexborHTMLParser(markup).root
    if root is None:
        return ""
    out = _Writer()
    node: LexborNode | None = root
    while node is not None:
        child = None if _enter(node, out) else node.first_child
        while child is None and node is not None:
            _leave(node, out)
            if node.mem_id == root.mem_id:
                return out.text()
            child, node = node.next, node.parent
        node = child
    return out.text()


def _enter(node: LexborNode, out: _Writer) -> bool:
    """Write what comes before the children; True means: skip them."""
    tag = node.tag or ""
    if tag == "-text":
        out.words(node.text_content or "")
    elif tag in _SILENT or tag.startswith(("-", "!", "_")):
        return tag not in ("-document", "-undef")
    elif tag in _HEADINGS:
        out.block("#" * _HEADINGS[tag] + " ")
    elif tag == "pre":
        out.block("```\n")
        out.verbatim += 1
    elif tag == "li":
        out.line("- ")
    elif tag == "tr":
        out.line()
    elif tag in ("td", "th"):
        out.cell()
    elif tag == "br":
        out.line()
    elif tag == "img" and (alt := node.attributes.get("alt")):
        out.words(f" [image: {alt}] ")
    elif tag in _BLOCKS:
        out.block()
    return False


def _leave(node: LexborNode, out: _Writer) -> None:
    tag = node.tag or ""
    if tag == "pre" and out.verbatim:
        out.verbatim -= 1
        out.fence()
    elif tag in _HEADINGS or tag in _BLOCKS:
        out.close(2)
    elif tag == "li":
        out.close(1)


class _Writer:
    """Collects words; knows where a line or a paragraph has to begin."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.verbatim = 0
        self.gap = 0
        """Line ends owed before the next word."""
        self.prefix = ""
        self.fresh = True

    def block(self, prefix: str = "") -> None:
        self.gap, self.prefix, self.fresh = 2, prefix or self._kept(), True

    def line(self, prefix: str = "") -> None:
        self.gap, self.prefix, self.fresh = max(self.gap, 1), prefix or self._kept(), True

    def fence(self) -> None:
        """End of a `pre`."""
        if not self.prefix:
            self.parts.append("\n```")
        self.close(2)

    def close(self, gap: int) -> None:
        """End a block: a mark nobody wrote behind (an empty heading or item) is dropped."""
        self.gap, self.prefix, self.fresh = max(self.gap, gap), "", True

    def cell(self) -> None:
        if not self.fresh:
            self.parts.append(" | ")
            self.fresh = True

    def _kept(self) -> str:
        """`<li><p>` : the item's mark survives the paragraph inside it."""
        return self.prefix if self.fresh and self.prefix else ""

    def words(self, text: str) -> None:
        if not self.verbatim:
            text = re.sub(r"\s+", " ", text)
            if self.fresh:
                text = text.lstrip()
        if not text or (self.fresh and not text.strip()):
            return
        if self.parts:
            self.parts.append("\n" * self.gap)
        self.parts.append(self.prefix + text)
        self.gap, self.prefix, self.fresh = 0, "", False

    def text(self) -> str:
        return "".join(self.parts)
