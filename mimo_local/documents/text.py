"""Bytes to clean text, and text without pages to sections: Markdown and plain text.

`decode` finds the encoding, `clean` takes out what no reader sees (control, bidi and tag
characters), `sections` cuts at headings so that a citation can point somewhere. Knows no files
and no PDF; called by the package's `read` and, for its text, by html.py and pdf.py.
"""

from __future__ import annotations

import codecs
import re

from mimo_local.documents.types import Heading, OutlineEntry, Page
from mimo_local.errors import DocumentError

SECTION_CHARACTERS = 3000
"""A stretch without headings is cut into sections of about this size: one printed page."""

_BOMS = (
    # UTF-32 first: its little-endian mark begins with UTF-16's.
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_LIGATURES = {
    0xFB00: "ff",
    0xFB01: "fi",
    0xFB02: "fl",
    0xFB03: "ffi",
    0xFB04: "ffl",
    0xFB05: "st",
    0xFB06: "st",
}
# Nothing of this shows on paper, and some of it is used to hide orders to a model: C0 and C1
# controls, soft hyphen, zero-width space, bidi overrides, line separators, byte order mark,
# noncharacters, the tag block. ZWJ and ZWNJ stay: Indic scripts, Persian and emoji need them.
_UNSEEN_RANGES = (
    (0x00, 0x08), (0x0B, 0x0B), (0x0E, 0x1F), (0x7F, 0x84), (0x86, 0x9F), (0xAD, 0xAD),
    (0x180E, 0x180E), (0x200B, 0x200B), (0x200E, 0x200F), (0x202A, 0x202E), (0x2060, 0x206F),
    (0xD800, 0xDFFF), (0xFEFF, 0xFEFF), (0xFFF9, 0xFFFB), (0xFFFE, 0xFFFF), (0xE0000, 0xE007F),
)  # fmt: skip
_UNSEEN = dict.fromkeys(c for low, high in _UNSEEN_RANGES for c in range(low, high + 1))
_TABLE = {**_UNSEEN, **_LIGATURES, 0x85: "\n", 0x2028: "\n", 0x2029: "\n", 0xA0: " "}


# Windows-1252 is Latin-1 with quotes and dashes where Latin-1 has controls.
_WINDOWS = {b: bytes([b]).decode("cp1252", "replace") for b in range(0x80, 0xA0)}


def seen(text: str) -> str:
    """Every line as it is, with unix line ends and without invisible characters."""
    return text.replace("\r\n", "\n").replace("\r", "\n").translate(_TABLE)


def clean(text: str) -> str:
    """The same text as a reader sees it: unix line ends, no invisible characters, no long gaps."""
    text = seen(text)
    text = re.sub(r"(?:\. ?){6,}", " ... ", text)  # leaders of a table of contents
    # Not a regex: one on trailing blanks takes quadratic time on a line of blanks.
    text = "\n".join(line.rstrip() for line in text.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n")


def from_bom(data: bytes) -> str | None:
    """The encoding a byte order mark announces, or None."""
    return next((encoding for bom, encoding in _BOMS if data.startswith(bom)), None)


def decode(data: bytes, name: str) -> tuple[str, tuple[str, ...]]:
    """Text and warnings: byte order mark, else UTF-8, else Western; DocumentError if binary."""
    encoding = from_bom(data)
    if encoding is None and _looks_binary(data[: 1 << 16]):
        raise DocumentError(
            f"{name} is not text: it holds bytes no text has",
            hint="give a PDF, Markdown, HTML or text file",
        )
    if encoding is not None:
        try:
            return data.decode(encoding), ()
        except UnicodeDecodeError as error:
            raise DocumentError(
                f"{name} announces {encoding.upper()} but breaks it at byte {error.start}",
                hint="save the file again as UTF-8",
            ) from error
    try:
        return data.decode("utf-8"), ()
    except UnicodeDecodeError as error:
        text = data.decode("latin-1").translate(_WINDOWS)
        warning = (
            f"{name} is not UTF-8 (byte {error.start} is 0x{data[error.start]:02x}): "
            "read as Western European (Latin-1), some letters may be wrong"
        )
        return text, (warning,)


def _looks_binary(head: bytes) -> bool:
    """Zero bytes, or more than 2 % control bytes, do not occur in text files."""
    controls = sum(head.count(b) for b in range(32) if b not in (7, 8, 9, 10, 12, 13, 27))
    return b"\0" in head or controls * 50 > len(head)


def paginate(text: str, *, markdown: bool) -> tuple[tuple[Page, ...], tuple[OutlineEntry, ...]]:
    """Sections of a text without pages; label = number. `markdown`: headings are anchors."""
    headings = markdown_headings(text) if markdown else []
    cuts = [0]
    for heading in headings:
        # A heading directly under another one (title, subtitle) stays in the same section.
        if heading.level <= 3 and _has_body(text[cuts[-1] : heading.offset]):
            cuts.append(heading.offset)
    pages: list[Page] = []
    outline: list[OutlineEntry] = []
    for start, end in zip(cuts, [*cuts[1:], len(text)], strict=True):
        for low, high in _pieces(text, start, end):
            body = text[low:high]
            lead = len(body) - len(body.lstrip())
            inside = [h for h in headings if low <= h.offset < high]
            number = len(pages) + 1
            moved = tuple(Heading(h.level, h.title, max(0, h.offset - low - lead)) for h in inside)
            pages.append(Page(number, str(number), body.strip(), moved))
            outline += [OutlineEntry(h.level, h.title, number) for h in inside]
    return tuple(pages), tuple(outline)


def markdown_headings(text: str) -> list[Heading]:
    """`# Title` and underlined titles, outside of code fences, with their offsets."""
    found: list[Heading] = []
    fence, offset, before, before_at = "", 0, "", 0
    for line in text.split("\n"):
        mark = re.match(r" {0,3}(`{3,}|~{3,})", line)
        if mark and (not fence or mark[1].startswith(fence)):
            fence = "" if fence else mark[1]
        elif not fence and (atx := re.match(r" {0,3}(#{1,6})[ \t]+(\S.*)", line)):
            title = atx[2].rstrip()
            closed = title.rstrip("#")
            title = closed.rstrip() if closed.endswith((" ", "\t")) else title
            found.append(Heading(len(atx[1]), title[:200], offset))
        elif (
            not fence
            and before.strip()
            and not before.lstrip().startswith(("#", "-", "*", "|", ">"))
            and re.fullmatch(r" {0,3}(=+|-{2,})[ \t]*", line)
        ):
            found.append(Heading(1 if "=" in line else 2, before.strip()[:200], before_at))
        before, before_at = ("" if mark else line), offset
        offset += len(line) + 1
    return found


def _has_body(text: str) -> bool:
    """Whether there is more than headings in it."""
    lines = (line.strip() for line in text.split("\n"))
    return any(line and not line.startswith("#") and set(line) - set("=-") for line in lines)


def _pieces(text: str, start: int, end: int) -> list[tuple[int, int]]:
    """Cut [start, end) near SECTION_CHARACTERS, at a paragraph or line end where there is one."""
    pieces = []
    while end - start > 2 * SECTION_CHARACTERS:
        low, high = start + SECTION_CHARACTERS // 2, start + SECTION_CHARACTERS
        cut = next(
            (at + len(sep) for sep in ("\n\n", "\n", ". ", " ")
             if (at := text.rfind(sep, low, high)) >= 0),
            high,
        )  # fmt: skip
        pieces.append((start, cut))
        start = cut
    if text[start:end].strip():
        pieces.append((start, end))
    return pieces
