"""Tables for `mimo plan`, `mimo doctor` and `mimo bench` as plain text: no colours, no markup.

Plain data in, a string out; rich draws the columns. The texts are goldens in the tests.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mimo_local.sizes import gb

if TYPE_CHECKING:
    from mimo_local.benchmark import Result
    from mimo_local.doctor import Report
    from mimo_local.plan import Plan, Prediction

WIDTH = 100


def plan(found: Plan, name: str) -> str:
    """The plan as people read it: bytes, places, speeds, and what this version can do of it."""
    budget = found.budget
    machine = f"{gb(budget.vram)} VRAM, " if budget.vram else "no GPU, "
    machine += f"{gb(budget.ram)} RAM, {gb(budget.disk)} free disk, {budget.cores} cores"
    lines = [f"{name}: {gb(found.sizes.total)}, context {found.context}", f"on {machine}", ""]
    rows = [
        (
            row.name,
            gb(row.nbytes),
            *(gb(part) if part else "" for part in (row.vram, row.ram, row.disk)),
            "built" if row.today else "planned",
        )
        for row in found.rows()
    ]
    sums = [sum(getattr(row, place) for row in found.rows()) for place in ("vram", "ram", "disk")]
    rows.append(("total", "", *(gb(part) if part else "" for part in sums), ""))
    lines.append(table(("what", "bytes", "VRAM", "RAM", "disk only", "this version"), rows))
    if found.prediction is not None and found.prediction != found.today:
        lines += ["", f"estimated as planned: {speeds(found.prediction)}"]
    lines.append(_today(found))
    lines += ["", "assumed:", *(f"  {text}" for text in found.assumptions)]
    lines += [f"note: {note}" for note in found.notes]
    return "\n".join(lines)


def _today(found: Plan) -> str:
    if found.today_missing:
        return (
            f"this version holds all experts in RAM: {gb(found.today_needs)} needed, "
            f"{gb(found.budget.ram)} there, {gb(found.today_missing)} missing; "
            "VRAM and disk tiers are planned"
        )
    if found.today is None:
        return "this version cannot run it either"
    return (
        f"this version runs it from RAM on the CPU ({gb(found.today_needs)} needed), "
        f"at best: {speeds(found.today)}"
    )


def speeds(found: Prediction) -> str:
    """One line of estimates."""
    return (
        f"{found.decode_tokens_per_s:.1f} tokens/s, a {found.prefill_tokens}-token prompt at "
        f"{found.prefill_tokens_per_s:.0f} tokens/s, loading {found.load_s:.0f} s"
    )


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


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Left column as text, the others to the right, without trailing blanks."""
    drawn = Table(box=box.MARKDOWN, pad_edge=True)
    for i, name in enumerate(head):
        drawn.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row))
    console = Console(file=io.StringIO(), width=WIDTH, color_system=None, force_terminal=False)
    with console.capture() as shown:
        console.print(drawn)
    return "\n".join(text.rstrip() for text in shown.get().splitlines()).strip("\n")
