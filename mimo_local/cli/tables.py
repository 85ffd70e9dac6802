"""Tables and lines as plain text for the terminal: no colours, no markup.

Plain data in, a string out; rich draws the columns. The texts are goldens in the tests.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mimo_local.sizes import gb

if TYPE_CHECKING:
    from mimo_local.benchmark import Result
    from mimo_local.doctor import Report

WIDTH = 100


def doctor(report: Report) -> str:
    """Sections of facts, then what is wrong and what to do."""
    lines: list[str] = []
    for name, facts in report.sections:
        width = max(len(label) for label, _ in facts)
        lines += [name, *(f"  {label:<{width}}  {value}" for label, value in facts), ""]
    if not report.problems:
        return "\n".join([*lines, "no problems found"])
    for problem in report.problems:
        lines += [f"{problem.level}: {problem.message}", f"  fix: {problem.fix}"]
    return "\n".join(lines)


def bench(results: Sequence[Result]) -> str:
    """llama-bench's columns, test, threads, t/s; with tiers also where the experts came from."""
    head: tuple[str, ...] = ("test", "threads", "t/s")
    rows: list[tuple[str, ...]] = []
    tiers = any(result.experts is not None for result in results)
    if tiers:
        head += ("VRAM", "RAM", "ahead", "disk", "from disk/token")
    for result in results:
        row = (result.test.name, str(result.threads), f"{result.mean:.2f} ± {result.sd:.2f}")
        rows.append((*row, *_tiers(result)) if tiers else row)
    return table(head, rows)


def _tiers(result: Result) -> tuple[str, ...]:
    m = result.experts
    if m is None:
        return ("", "", "", "", "")
    # A long prompt reads each expert once and asks for none: only its bytes mean something.
    counts = (m.vram_hits, m.ram_hits, m.staged_hits, m.misses)
    shares = (f"{n / m.wanted:.0%}" if m.wanted else "" for n in counts)
    return (*shares, gb(result.disk_bytes_per_token))


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, width: int = WIDTH) -> str:
    """Left column as text, the others to the right, without trailing blanks."""
    drawn = Table(box=box.MARKDOWN, pad_edge=True)
    for i, name in enumerate(head):
        drawn.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row))
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False)
    with console.capture() as shown:
        console.print(drawn)
    return "\n".join(text.rstrip() for text in shown.get().splitlines()).strip("\n")


def fit(line: str) -> str:
    """A line cut to the terminal, where a Chinese character takes two places."""
    room = max(20, shutil.get_terminal_size().columns)
    if cell_len(line.translate({2: None, 3: None})) <= room:
        return line.rstrip()
    kept, used = "", 1  # the sign of the cut
    for char in line:
        used += 0 if char in "\x02\x03" else cell_len(char)
        if used > room:
            break
        kept += char
    kept += "\x03" * (kept.count("\x02") - kept.count("\x03"))  # a match that is cut ends here
    return kept.rstrip() + "…"
