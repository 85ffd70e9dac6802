"""From the lines a PDF has to the text somebody wrote: no running headers, no broken words.

PDFium gives lines as printed. `Layout` takes out lines that repeat on most pages, mends words cut
at line ends, and joins the lines of a paragraph. Knows nothing of files; called by pdf.py.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

from mimo_local.documents.text import clean

HYPHEN_MARKS = "\ufffe\x02"
"""What PDFium puts where it took out a hyphen at a line end (which one depends on the call)."""
EDGE_LINES = 2
"""A running header or footer is among this many first or last lines of its page."""
_BULLET = re.compile(r"(?:[•‣▪●○◦–—*·-]|\(?\d{1,3}[.)]|\(?[a-z][.)])\s")


class Layout:
    """Raw page texts in, reading text out; `dropped` holds one example per removed line."""

    def __init__(self, raw: Sequence[str], *, first_numbers: Sequence[int] | None = None) -> None:
        """`first_numbers`: the page number of each text (1, 2, ... if not given)."""
        numbers = list(first_numbers or range(1, len(raw) + 1))
        pages = [_lines(text) for text in raw]
        running = _running_lines(pages, numbers)
        examples = {re.sub(r"\d+", "#", pages[p][i].strip()): (p, i) for p, i in reversed(running)}
        self.dropped = tuple(pages[p][i].strip() for p, i in sorted(examples.values()))
        gone = set(running)
        self._pages = [
            [line for i, line in enumerate(lines) if (p, i) not in gone]
            for p, lines in enumerate(pages)
        ]

    def texts(self) -> list[str]:
        """The text of each page."""
        words: set[str] = set()
        for lines in self._pages:
            for line in lines:
                words.update(w.casefold() for w in re.findall(r"\w+(?:-\w+)*", line))
        return [
            clean(unwrap([mend_hyphens(line, words) for line in lines])) for lines in self._pages
        ]


def _lines(text: str) -> list[str]:
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return [line for line in lines if line.strip()]


def mend_hyphens(text: str, words: set[str]) -> str:
    """Join words cut at a line end; the hyphen stays if the joined word is nowhere else."""
    pieces = re.split(f"[{HYPHEN_MARKS}]", text)
    out = [pieces[0]]
    for piece in pieces[1:]:
        # 40 characters are enough for a word; a whole page of letters would cost quadratic time.
        before = re.search(r"\w*$", out[-1][-40:])
        after = re.match(r"\w*", piece[:40])
        left, right = before[0] if before else "", after[0] if after else ""
        joined = (left + right).casefold() in words
        out.append(("" if joined or not (left and right) else "-") + piece)
    return "".join(out)


def unwrap(lines: Sequence[str]) -> str:
    """Lines of a paragraph joined by blanks: a line near full width goes on in the next one."""
    lengths = sorted(len(line) for line in lines)
    width = lengths[len(lengths) * 9 // 10] if lengths else 0
    out: list[str] = []
    open_line = False
    for line in lines:
        line = line.strip()
        if open_line and not _BULLET.match(line) and not _is_row(line):
            out[-1] += " " + line
        else:
            out.append(line)
        # 0.75: ragged right margins differ by a long word; below 40 characters lines are verse,
        # code or table cells.
        open_line = len(line) >= max(40, 0.75 * width) and not _is_row(line)
    return "\n".join(out)


def _is_row(line: str) -> bool:
    """A row of a table or of a table of contents: figures and leaders, not prose."""
    return sum(c.isdigit() for c in line) * 4 > len(line) or ". . ." in line or "...." in line


def _running_lines(pages: list[list[str]], numbers: list[int]) -> list[tuple[int, int]]:
    """(page, line) of headers and footers: the same line, digits apart, on most pages.

    "Most" is 60 % of all pages or 80 % of the even or odd ones (books alternate), at least 3.
    Where the digits differ they must count pages: a column of totals stays.
    """
    spots: dict[tuple[str, int, str], list[tuple[int, int]]] = defaultdict(list)
    for p, lines in enumerate(pages):
        for i in range(len(lines)):
            from_end = len(lines) - 1 - i
            if min(i, from_end) >= EDGE_LINES or len(lines[i]) > 160:
                continue
            folded = re.sub(r"\d+", "#", " ".join(lines[i].split()))
            edge = "top" if i < from_end else "bottom"
            spots[edge, 0, folded].append((p, i))
    running: list[tuple[int, int]] = []
    for where in spots.values():
        on = sorted({p for p, _ in where})
        if not _most(on, len(pages)) or not _same_or_counting(where, pages, numbers):
            continue
        running += where
    return [(p, i) for p, i in running if len(pages[p]) > 2 * EDGE_LINES or len(pages[p]) > 1]


def _most(on: list[int], n_pages: int) -> bool:
    if len(on) < 3:
        return False
    if len(on) >= 0.6 * n_pages:
        return True
    for parity in (0, 1):
        side = range(parity, n_pages, 2)
        if sum(p % 2 == parity for p in on) >= max(3, 0.8 * len(side)):
            return True
    return False


def _same_or_counting(
    where: list[tuple[int, int]], pages: list[list[str]], numbers: list[int]
) -> bool:
    """All the same line, or one of its numbers moves with the page number nearly everywhere."""
    if len({" ".join(pages[p][i].split()) for p, i in where}) == 1:
        return True
    figures = [[int(d) for d in re.findall(r"\d{1,9}", pages[p][i])] for p, i in where]
    for column in range(min(len(row) for row in figures)):
        offsets = [row[column] - numbers[p] for row, (p, _) in zip(figures, where, strict=True)]
        commonest = max(offsets.count(o) for o in set(offsets))
        if commonest >= 0.8 * len(offsets):
            return True
    return False
