"""Documents to text: `read(source)` gives pages with anchors, and says what it could not read.

PDF (in a subprocess with limits), Markdown, HTML, plain text, and bytes from stdin whose kind is
found by looking. Called by summarize, cli and tui; knows no model, no tokens, no network.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

from mimo_local.documents.types import (
    Document,
    Heading,
    Kind,
    Limits,
    OutlineEntry,
    Page,
    Unit,
    page_list,
    parse_pages,
)
from mimo_local.errors import DocumentError

__all__ = [
    "Document",
    "Heading",
    "Kind",
    "Limits",
    "OutlineEntry",
    "Page",
    "Unit",
    "page_list",
    "parse_pages",
    "read",
]

_SUFFIXES: dict[str, Kind] = {
    ".pdf": "pdf",
    ".md": "markdown",
    ".markdown": "markdown",
    ".html": "html",
    ".htm": "html",
    ".xhtml": "html",
}
# First bytes of what people try; the answer names the thing instead of "binary".
_FOREIGN: tuple[tuple[bytes, str, str], ...] = (
    (b"PK\x03\x04", "a zip file: a Word, OpenDocument or EPUB document, or an archive",
     "DOCX, ODT and EPUB are not read yet: save it as PDF, HTML or text"),
    (b"\xd0\xcf\x11\xe0", "an old Office document", "save it as PDF or text"),
    (b"{\\rtf", "an RTF document", "save it as PDF or text"),
    (b"%!PS", "a PostScript file", "convert it, for example `ps2pdf in.ps out.pdf`"),
    (b"\x1f\x8b", "a gzip file", "unpack it first"),
    (b"\x89PNG", "a PNG picture", "this tool does no OCR; make a PDF with text of it first"),
    (b"\xff\xd8\xff", "a JPEG picture", "this tool does no OCR; make a PDF with text of it first"),
)  # fmt: skip
_KINDS_HINT = "give a PDF, Markdown, HTML or text file, or - for stdin"


def read(
    source: Path | str | bytes,
    *,
    name: str | None = None,
    pages: str | None = None,
    limits: Limits | None = None,
    cancel: Callable[[], bool] | None = None,
) -> Document:
    """Read a file or bytes. `pages`: a range like `3-9,12`; `cancel` is polled while a PDF is read.

    DocumentError: missing, empty, binary, encrypted, hostile, nothing readable in it, over a limit.
    UsageError: `pages` names pages that are not there. CancelledError: `cancel` said so.
    """
    limits = limits or Limits()
    if isinstance(source, bytes):
        name = name or "stdin"
        data, path = _within(source, name, limits), None
    else:
        path = Path(source)
        name = name or path.name
        data, path = _load(path, name, limits)
    kind = _kind(data, name)
    if kind == "pdf":
        from mimo_local.documents.pdf import read_pdf

        if path is not None:
            return read_pdf(path, name, pages, limits, cancel)
        with tempfile.TemporaryDirectory(prefix="mimo-") as folder:
            copy = Path(folder) / "document.pdf"
            copy.write_bytes(data)
            return read_pdf(copy, name, pages, limits, cancel)
    return _read_text(data, kind, name, pages, limits)


def _load(path: Path, name: str, limits: Limits) -> tuple[bytes, Path | None]:
    """First bytes and path of a PDF on disk; all bytes and None of any other file or of a pipe."""
    try:
        info = path.stat()
        if stat.S_ISDIR(info.st_mode):
            raise DocumentError(f"{name} is a folder", hint="name the files in it")
        with path.open("rb") as file:
            if stat.S_ISREG(info.st_mode):
                if info.st_size > limits.file_bytes:
                    raise _too_big(name, info.st_size, limits)
                head = file.read(1 << 16)
                if b"%PDF-" in head[:1024]:
                    return head, path  # PDFium reads the rest by itself
                return _within(head + file.read(limits.file_bytes), name, limits), None
            return _within(file.read(limits.file_bytes + 1), name, limits), None
    except FileNotFoundError as error:
        raise DocumentError(
            f"there is no file {path}",
            hint=f"the current folder is {os.getcwd()}",  # noqa: PTH109
        ) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DocumentError(f"{name} cannot be opened: {reason}", hint=_KINDS_HINT) from error


def _within(data: bytes, name: str, limits: Limits) -> bytes:
    if not data.strip():
        raise DocumentError(f"{name} is empty", hint=_KINDS_HINT)
    if len(data) > limits.file_bytes:
        raise _too_big(name, len(data), limits)
    return data


def _too_big(name: str, size: int, limits: Limits) -> DocumentError:
    return DocumentError(
        f"{name} has at least {size} bytes, the limit is {limits.file_bytes}",
        hint="split the file",
    )


def _kind(head: bytes, name: str) -> Kind:
    """What the bytes are, the name where bytes cannot tell; DocumentError if foreign."""
    for magic, what, hint in _FOREIGN:
        if head.startswith(magic):
            raise DocumentError(f"{name} is {what}", hint=hint)
    if b"%PDF-" in head[:1024]:
        return "pdf"
    named = _SUFFIXES.get(Path(name).suffix.lower())
    if named == "pdf":
        raise DocumentError(
            f"{name} is called a PDF but does not begin like one", hint="fetch or export it again"
        )
    if named:
        return named
    start = head[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if (
        start.startswith((b"<!doctype html", b"<html", b"<?xml"))
        and b"<html" in head[:4096].lower()
    ):
        return "html"
    if start.startswith(b"<!doctype html"):
        return "html"
    lines = head.split(b"\n")
    if any(line.startswith((b"# ", b"## ")) for line in lines) and Path(name).suffix == "":
        return "markdown"
    return "text"


def _read_text(data: bytes, kind: Kind, name: str, spec: str | None, limits: Limits) -> Document:
    from mimo_local.documents.html import decode_html, to_text
    from mimo_local.documents.text import clean, decode, paginate, seen

    markup, warnings = decode_html(data, name) if kind == "html" else decode(data, name)
    if kind == "html":
        markup = to_text(markup)
    if len(markup) > limits.characters:
        raise DocumentError(
            f"{name} has {len(markup)} characters, the limit is {limits.characters}",
            hint="split the file",
        )
    if kind == "text" and "\f" in markup.strip("\f\n"):
        # Form feeds: the output of pdftotext and man pages; they are real pages.
        sheets = [clean(sheet) for sheet in markup.rstrip("\f\n").split("\f")]
        found = tuple(Page(n, str(n), text) for n, text in enumerate(sheets, 1))
        outline: tuple[OutlineEntry, ...] = ()
        unit: Unit = "page"
    else:
        text = clean(markup.replace("\f", "\n"))
        found, outline = paginate(text, markdown=kind != "text")
        unit = "section"
    if not any(page.text for page in found):
        raise DocumentError(f"{name} has no text in it", hint=_KINDS_HINT)
    if len(found) > limits.pages:
        raise DocumentError(
            f"{name} has {len(found)} {unit}s, the limit is {limits.pages}", hint="split the file"
        )
    chosen = found
    if spec is not None:
        numbers = set(parse_pages(spec, len(found), name=name))
        chosen = tuple(page for page in found if page.number in numbers)
    source = seen(markup.replace("\f", "\n")) if kind != "html" and spec is None else ""
    return Document(
        *(name, kind, chosen, outline, warnings),
        page_count=len(found),
        unit=unit,
        source=source,
    )
