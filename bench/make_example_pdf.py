"""examples/tour.md -> examples/tour.pdf: the document `make demo` summarises.

    python bench/make_example_pdf.py

Lays out titles, headings and paragraphs in Helvetica with an outline and page numbers, with the
plain PDF writer of the tests (no package needed). The last stdout line is one JSON document.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import pdfs  # noqa: E402  (found through the line above)

LEFT, TOP, BOTTOM, MEASURE = 72, pdfs.HEIGHT - 72, 84, pdfs.WIDTH - 144
# Advance widths of Helvetica for the characters from 32 to 126, in 1/1000 of the font size.
_WIDTHS = (
    278, 278, 355, 556, 556, 889, 667, 191, 333, 333, 389, 584, 278, 333, 278, 278, 556, 556, 556,
    556, 556, 556, 556, 556, 556, 556, 278, 278, 584, 584, 584, 556, 1015, 667, 667, 722, 722, 667,
    611, 778, 722, 278, 500, 667, 556, 833, 722, 778, 667, 778, 722, 667, 611, 722, 667, 944, 667,
    667, 611, 278, 278, 278, 469, 556, 333, 556, 556, 500, 556, 556, 278, 556, 556, 222, 222, 500,
    222, 833, 556, 556, 556, 556, 333, 500, 278, 556, 500, 722, 500, 500, 500, 334, 260, 334, 584,
)  # fmt: skip


def width(text: str, size: float) -> float:
    """Points a line takes; characters outside of ASCII count as a figure."""
    known = (_WIDTHS[ord(c) - 32] if " " <= c <= "~" else 556 for c in text)
    return sum(known) * size / 1000


def wrap(text: str, size: float) -> list[str]:
    """Lines no wider than the measure."""
    lines: list[str] = []
    for word in text.split():
        if lines and width(f"{lines[-1]} {word}", size) <= MEASURE:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def build(markdown: str) -> bytes:
    """The PDF of a text with `#` titles and paragraphs between blank lines."""
    made = pdfs.Pdf(compress=True)
    runs: list[pdfs.Run] = []
    y = float(TOP)

    def turn() -> None:
        nonlocal runs, y
        number = str(len(made.pages) + 1)
        runs.append(pdfs.Run((pdfs.WIDTH - width(number, 9)) / 2, 48, number, 9))
        made.add(*runs)
        runs, y = [], float(TOP)

    for paragraph in markdown.split("\n\n"):
        text = paragraph.strip()
        level = len(text) - len(text.lstrip("#"))
        text = text.lstrip("# ")
        size, font = {0: (11.5, "F1"), 1: (20.0, "F2")}.get(level, (14.0, "F2"))
        lines, leading = wrap(text, size), size * 1.5
        # A heading stays with at least three lines of what follows.
        if y - (leading * len(lines) if not level else 6 * leading) < BOTTOM and y < TOP - 200:
            turn()
        if level:
            made.title = made.title or text
            made.outline.append((level - 1, text, len(made.pages)))
            y -= 8 if y < TOP else 0
        for line in lines:
            if y < BOTTOM:
                turn()
            runs.append(pdfs.Run(LEFT, y, line, size, font))
            y -= leading
        y -= 7
    turn()
    return made.build()


def main() -> None:
    """Write the example."""
    target = ROOT / "examples" / "tour.pdf"
    data = build((ROOT / "examples" / "tour.md").read_text(encoding="utf-8"))
    target.write_bytes(data)
    print(json.dumps({"file": "examples/tour.pdf", "bytes": len(data)}))


if __name__ == "__main__":
    main()
