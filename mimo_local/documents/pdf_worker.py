"""The only code that lets PDFium touch a file: a process of its own, with limits, then gone.

Run by path (`python -P pdf_worker.py`), so it imports nothing of this project. Reads one JSON line
(path and limits) from stdin, answers with a header line (page count, outline), reads a list of
page indices, answers with one line per page. A file made to crash or hang it costs one process.
"""

from __future__ import annotations

import itertools
import json
import sys
from typing import Any

OUTLINE_ENTRIES = 5000
OBJECTS_LOOKED_AT = 2000


def limit_self(memory_bytes: int, cpu_seconds: int) -> None:
    """Cap address space and CPU time, forbid core dumps and writing files."""
    try:
        import resource
    except ImportError:  # not a POSIX system: the caller's wall clock is what remains
        return
    for what, value in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
    ):
        _, hard = resource.getrlimit(what)
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        resource.setrlimit(what, (value, value))


def say(**fields: Any) -> None:
    """One JSON line on stdout."""
    line = json.dumps(fields, ensure_ascii=True)
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def outline(document: Any, n_pages: int) -> list[list[Any]]:
    """`[level, title, page index or None]` in reading order, at most OUTLINE_ENTRIES."""
    entries: list[list[Any]] = []
    try:
        for mark in itertools.islice(document.get_toc(max_depth=12), OUTLINE_ENTRIES):
            target = mark.get_dest()
            index = target.get_index() if target else None
            known = index is not None and 0 <= index < n_pages
            entries.append([mark.level, mark.get_title()[:300], index if known else None])
    except Exception:  # a broken outline is no reason to refuse the pages
        return entries
    return entries


def drawn(page: Any, raw: Any) -> tuple[int, int]:
    """Number of images and of drawn paths on a page, looking at OBJECTS_LOOKED_AT objects."""
    images = paths = 0
    objects = page.get_objects(max_depth=4)
    for item in itertools.islice(objects, OBJECTS_LOOKED_AT):
        images += item.type == raw.FPDF_PAGEOBJ_IMAGE
        paths += item.type == raw.FPDF_PAGEOBJ_PATH
    return images, paths


def read_page(document: Any, raw: Any, index: int, most: int) -> dict[str, Any]:
    """What one page holds: `text`, `label`, and counts of images and paths if the text is short."""
    page = document[index]
    try:
        found: dict[str, Any] = {"label": document.get_page_label(index)[:40]}
        text_page = page.get_textpage()
        if (n := text_page.count_chars()) > most:
            return {**found, "error": f"it holds {n} characters, the limit is {most}"}
        # The bounded call leaves out text placed outside of the visible page.
        found["text"] = text_page.get_text_bounded()[: 2 * most]
        text_page.close()
        if len(found["text"].strip()) < 20:
            found["images"], found["paths"] = drawn(page, raw)
        return found
    finally:
        page.close()


def main() -> int:
    """Answer one caller; the exit code is 0 whenever an answer was given."""
    order = json.loads(sys.stdin.readline())
    limit_self(order["memory_bytes"], order["cpu_seconds"])
    try:
        import pypdfium2
        import pypdfium2.raw as raw
    except ImportError as error:
        say(error="import", detail=str(error))
        return 0
    try:
        document = pypdfium2.PdfDocument(order["path"])
        n_pages = len(document)
    except pypdfium2.PdfiumError as error:
        locked = error.err_code in (raw.FPDF_ERR_PASSWORD, raw.FPDF_ERR_SECURITY)
        say(error="password" if locked else "format", detail=str(error))
        return 0
    except MemoryError:
        say(error="memory", detail="")
        return 0
    say(pages=n_pages, outline=outline(document, n_pages) if order["outline"] else [])
    for index in json.loads(sys.stdin.readline() or "[]"):
        try:
            say(index=index, **read_page(document, raw, index, order["page_characters"]))
        except MemoryError:
            say(index=index, error="it needs more memory than a page may take")
        except Exception as error:
            say(index=index, error=f"{error}"[:200] or type(error).__name__)
    say(end=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
