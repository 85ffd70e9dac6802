"""PDF to pages of text: drives the worker process, then makes reading text out of its raw lines.

Everything PDFium does happens in `pdf_worker.py`, in another process with limits on memory, CPU
and time. A page that crashes or hangs it is given up and the worker started again behind it.
Knows no model; called by the package's `read`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from typing import Any

from mimo_local.documents.lines import Layout
from mimo_local.documents.text import clean
from mimo_local.documents.types import (
    Document,
    Heading,
    Limits,
    OutlineEntry,
    Page,
    page_list,
    parse_pages,
)
from mimo_local.errors import CancelledError, DocumentError

RESTARTS = 3
"""Pages that may kill the worker before the file as a whole is given up."""
SCANNED_CHARACTERS = 20
"""A page with fewer characters and a picture on it is a scan (page numbers are shorter)."""
DRAWN_PATHS = 100
"""Paths on a page without text: letters turned into outlines, or a full-page figure."""
_WORKER = Path(__file__).with_name("pdf_worker.py")
_BROKEN_HINT = "open it in a PDF viewer and print it to a new PDF, or save its text"


@dataclass(slots=True)
class _Raw:
    """What the worker said about one page."""

    text: str = ""
    label: str = ""
    images: int = 0
    paths: int = 0
    error: str = ""


@dataclass(slots=True)
class _Found:
    """What the worker said about the file, gathered over its restarts."""

    count: int = 0
    outline: list[OutlineEntry] = field(default_factory=list)
    pages: dict[int, _Raw] = field(default_factory=dict)
    characters: int = 0


def read_pdf(
    path: Path,
    name: str,
    pages: str | None,
    limits: Limits,
    cancel: Callable[[], bool] | None = None,
) -> Document:
    """The document at `path`; DocumentError for what cannot be read, UsageError for `pages`."""
    found = _extract(path, name, pages, limits, cancel)
    numbers = sorted(found.pages)
    layout = Layout([found.pages[n].text for n in numbers], first_numbers=numbers)
    texts = dict(zip(numbers, layout.texts(), strict=True))
    unread: dict[str, list[int]] = {}
    for n in numbers:
        if reason := _why_unread(found.pages[n]):
            unread.setdefault(reason, []).append(n)
    lost = tuple(sorted(n for group in unread.values() for n in group))
    warnings = tuple(f"{name}: p. {page_list(group)}: {why}" for why, group in unread.items())
    if not any(texts[n].strip() for n in numbers):
        raise _nothing_to_read(name, numbers, unread)
    return Document(
        name=name,
        kind="pdf",
        pages=tuple(
            Page(n, clean(found.pages[n].label), texts[n], _headings(found.outline, n, texts[n]))
            for n in numbers
        ),
        outline=tuple(found.outline),
        warnings=warnings,
        unread=lost,
        page_count=found.count,
        dropped_lines=layout.dropped,
    )


def _why_unread(raw: _Raw) -> str:
    if raw.error:
        return f"could not be read ({raw.error})"
    text = raw.text.strip()
    if len(text) < SCANNED_CHARACTERS and raw.images:
        return "a scan without text: only the picture is there, this tool does no OCR"
    if len(text) < SCANNED_CHARACTERS and raw.paths >= DRAWN_PATHS:
        return "drawn, not written: a figure, or letters turned into outlines"
    odd = sum(c == "\ufffd" or "\ue000" <= c <= "\uf8ff" or c < "\t" for c in text)
    if text and odd * 3 > len(text):
        return "its font has no character table, the text comes out as symbols"
    return ""


def _nothing_to_read(name: str, numbers: list[int], unread: dict[str, list[int]]) -> DocumentError:
    if not unread:
        return DocumentError(
            f"{name} has no text on p. {page_list(numbers)}",
            hint="check that this is the right file",
        )
    why = "; ".join(f"p. {page_list(group)}: {reason}" for reason, group in unread.items())
    scanned = any("scan" in reason for reason in unread)
    return DocumentError(
        f"nothing in {name} can be read. {why}",
        hint="run OCR first, for example `ocrmypdf in.pdf out.pdf`" if scanned else _BROKEN_HINT,
    )


def _headings(outline: list[OutlineEntry], number: int, text: str) -> tuple[Heading, ...]:
    """Outline entries that point to this page, placed where their title stands in its text."""
    folded = text.casefold()
    headings, at = [], 0
    for entry in outline:
        if entry.page == number:
            place = folded.find(entry.title.casefold(), at)
            # casefold can lengthen a text ("ß"); then the place is only roughly right.
            at = min(place, len(text)) if place >= 0 else at
            headings.append(Heading(entry.level, entry.title, at))
    return tuple(headings)


def _extract(
    path: Path, name: str, pages: str | None, limits: Limits, cancel: Callable[[], bool] | None
) -> _Found:
    """Run the worker until every page asked for is read or given up."""
    found, deadline = _Found(), time.monotonic() + limits.seconds
    wanted: list[int] | None = None
    restarts = 0
    while wanted is None or wanted:
        worker = _Worker(path, name, limits, deadline, cancel)
        try:
            worker.order(first=wanted is None)
            head = worker.line()
            if wanted is None:
                if head is None:
                    raise worker.died("the file")
                wanted = _take_header(head, found, name, pages, limits)
            worker.send(json.dumps([n - 1 for n in wanted]))
            while (line := worker.line()) is not None and not line.get("end"):
                number = _take_page(line, found, name, limits)
                if number in wanted:
                    wanted.remove(number)
            if not wanted:
                return found
            if time.monotonic() >= deadline or restarts == RESTARTS:
                raise worker.died(f"p. {wanted[0]}")
            found.pages[wanted.pop(0)] = _Raw(error=worker.why())
            restarts += 1
        finally:
            worker.end()
    return found


def _take_header(
    head: dict[str, Any], found: _Found, name: str, pages: str | None, limits: Limits
) -> list[int]:
    """Page numbers to read; DocumentError if the file cannot be opened or is too long."""
    if error := head.get("error"):
        raise _refusal(str(error), name, str(head.get("detail", "")))
    count = _number(head.get("pages"))
    if count == 0:
        raise DocumentError(f"{name} has no pages", hint="check that this is the right file")
    found.count = count
    for entry in head.get("outline", []):
        level, title, index = entry
        title = " ".join(clean(str(title)).split())
        if title:
            page = None if index is None else _number(index) + 1
            found.outline.append(OutlineEntry(_number(level), title, page))
    if pages is None and count > limits.pages:
        raise DocumentError(
            f"{name} says it has {count} pages, more than the limit of {limits.pages}",
            hint=f"choose some, for example --pages 1-{min(500, limits.pages)}",
        )
    wanted = (
        list(range(1, count + 1)) if pages is None else list(parse_pages(pages, count, name=name))
    )
    if len(wanted) > limits.pages:
        raise DocumentError(
            f"{len(wanted)} pages of {name} were asked for, the limit is {limits.pages}",
            hint="choose fewer with --pages",
        )
    return wanted


def _take_page(line: dict[str, Any], found: _Found, name: str, limits: Limits) -> int:
    number = _number(line.get("index")) + 1
    raw = _Raw(
        text=str(line.get("text", "")),
        label=str(line.get("label", "")),
        images=_number(line.get("images", 0)),
        paths=_number(line.get("paths", 0)),
        error=" ".join(str(line.get("error", "")).split()),
    )
    found.characters += len(raw.text)
    if found.characters > limits.characters:
        raise DocumentError(
            f"{name} has more than {limits.characters} characters up to p. {number}",
            hint=f"choose a part, for example --pages 1-{max(1, number - 1)}",
        )
    found.pages[number] = raw
    return number


def _number(value: object) -> int:
    """A whole number from the worker; what else a taken-over worker may say is an error."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise DocumentError(f"the PDF reader answered {value!r:.40}", hint=_BROKEN_HINT)
    return value


def _refusal(error: str, name: str, detail: str) -> DocumentError:
    if error == "password":
        return DocumentError(
            f"{name} is encrypted and needs a password",
            hint="save a copy without one, for example `qpdf --decrypt --password=... in out.pdf`",
        )
    if error == "import":
        return DocumentError(
            f"{name} cannot be read: the package pypdfium2 is missing ({detail})",
            hint="run `pip install pypdfium2`",
        )
    if error == "memory":
        return DocumentError(f"{name} needs too much memory to open", hint=_BROKEN_HINT)
    inside = detail.split("PDFium: ")[-1].strip(" .)").lower()
    reason = "it has no pages" if inside == "success" else inside or "unknown reason"
    return DocumentError(f"{name} cannot be opened as a PDF: {reason}", hint=_BROKEN_HINT)


class _Worker:
    """One worker process: bounded lines out, killed at a deadline or on silence."""

    def __init__(
        self,
        path: Path,
        name: str,
        limits: Limits,
        deadline: float,
        cancel: Callable[[], bool] | None,
    ) -> None:
        self._path, self._name, self._limits = path, name, limits
        self._deadline, self._cancel = deadline, cancel
        self._buffer = bytearray()
        self._scanned = 0
        self._timed_out = False
        # -P: the worker's folder holds `html.py`, which must not hide the standard library's.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-B", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._selector = DefaultSelector()
        assert self._process.stdout is not None
        self._selector.register(self._process.stdout, EVENT_READ)

    def order(self, *, first: bool) -> None:
        """Tell it which file, with which limits, and whether the outline is wanted."""
        self.send(
            json.dumps(
                {
                    "path": str(self._path.absolute()),
                    "outline": first,
                    "memory_bytes": self._limits.memory_bytes,
                    "cpu_seconds": max(1, int(self._limits.seconds) + 1),
                    "page_characters": self._limits.page_characters,
                }
            )
        )

    def send(self, text: str) -> None:
        """One line to its stdin; a dead worker is found out by the next `line`."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(text.encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return

    def line(self) -> dict[str, Any] | None:
        """Its next line, or None when it is gone or had to be ended. CancelledError on cancel."""
        stdout = self._process.stdout
        assert stdout is not None
        # \uXXXX escapes make a character 6 bytes; the worker caps a page at twice its limit.
        most = 12 * self._limits.page_characters + (4 << 20)
        silent_until = min(self._deadline, time.monotonic() + self._limits.page_seconds)
        while (end := self._buffer.find(b"\n", self._scanned)) < 0:
            self._scanned = len(self._buffer)
            if self._scanned > most:
                raise DocumentError(f"{self._name} has an endless page", hint=_BROKEN_HINT)
            if self._cancel is not None and self._cancel():
                raise CancelledError(f"stopped while reading {self._name}", hint="run it again")
            wait = silent_until - time.monotonic()
            if wait <= 0:
                self._timed_out = True
                self._process.kill()
                return None
            if self._selector.select(min(wait, 0.2)):
                data = stdout.read1(1 << 16)  # type: ignore[attr-defined]
                if not data:
                    return None
                self._buffer += data
        line, self._scanned = bytes(self._buffer[:end]), 0
        del self._buffer[: end + 1]
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise DocumentError(f"the PDF reader gave up on {self._name}", hint=_BROKEN_HINT)
        return found

    def why(self) -> str:
        """Why it went silent."""
        if self._timed_out:
            return f"no answer within {self._limits.page_seconds:g} s"
        return "it makes the PDF reader crash or run out of memory"

    def died(self, where: str) -> DocumentError:
        """The error for a worker that cannot go on at `where`."""
        return DocumentError(
            f"{self._name} cannot be read, at {where}: {self.why()}", hint=_BROKEN_HINT
        )

    def end(self) -> None:
        """End the process, whatever it is doing."""
        self._selector.close()
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue
