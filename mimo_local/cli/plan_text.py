"""What `mimo plan` prints: the table of places, the estimates, what was measured against them.

Plain data in, a string out; the texts are goldens in the tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mimo_local.cli.tables import table
from mimo_local.plan.planner import PAGE_TOKENS, span
from mimo_local.sizes import GB, KV_ITEMSIZES, gb

if TYPE_CHECKING:
    from mimo_local.plan import Plan, Prediction
    from mimo_local.plan.rates import Calibration
    from mimo_local.runs import Run
    from mimo_local.verdicts import Finding


def plan(found: Plan, name: str, without: Plan | None = None) -> str:
    """The plan as people read it: bytes, places, speeds, and what they rest on.

    `without`: the same machine without its GPU, if there is one.
    """
    budget = found.budget
    machine = f"{gb(budget.vram)} VRAM, " if budget.vram else "no GPU, "
    machine += f"{gb(budget.ram)} RAM, {gb(budget.disk)} free disk, {budget.cores} cores"
    kept = {n: kind for kind, n in KV_ITEMSIZES.items() if kind != "bf16"}
    kept_as = kept.get(found.placement.kv_itemsize)
    context = f"context {found.context}" + (f", keys and values in {kept_as}" if kept_as else "")
    lines = [f"{name}: {gb(found.sizes.total)}, {context}", f"on {machine}", ""]
    rows = [
        (
            row.name,
            gb(row.nbytes),
            *(gb(part) if part else "" for part in (row.vram, row.ram, row.disk)),
        )
        for row in found.table
    ]
    sums = [sum(getattr(row, place) for row in found.table) for place in ("vram", "ram", "disk")]
    rows.append(("total", "", *(gb(part) if part else "" for part in sums)))
    lines += [table(("what", "bytes", "VRAM", "RAM", "disk only"), rows), ""]
    if found.prediction is not None:
        lines += ["estimated:", *(f"  {line}" for line in speeds(found.prediction))]
        if without is not None:
            lines.append(f"  without the GPU: {_short(without)}")
    lines += ["assumed:", *(f"  {text}" for text in found.assumptions)]
    lines += [f"note: {note}" for note in found.notes]
    return "\n".join(lines)


def speeds(found: Prediction) -> list[str]:
    """Lines of estimates: decode, where its time goes, a document, loading."""
    decode, worst, best = found.decode, found.decode[0], found.decode[-1]
    names = "-".join(dict.fromkeys((worst.routing, best.routing)))
    tokens = span([d.tokens_per_s for d in decode])
    line = f"decode {tokens} tokens/s ({names} routing, {found.depth} tokens of context)"
    if worst.disk_bytes >= 1e3:
        ends = _ends(worst.disk_bytes / GB, best.disk_bytes / GB, 2)
        line += f", {ends} GB from disk per token"
    parts = [f"the rest {1e3 * worst.resident_s:.0f} ms"]
    if worst.expert_s:
        parts.append(f"experts {_ends(1e3 * worst.expert_s, 1e3 * best.expert_s)} ms")
    if worst.wait_s:
        parts.append(f"waiting for the disk {_ends(1e3 * worst.wait_s, 1e3 * best.wait_s)} ms")
    if worst.hit < 1:
        parts.append(f"{_ends(100 * worst.hit, 100 * best.hit)} % of experts at hand")
    prompt = found.prefill
    pages = max(1, round(prompt.tokens / PAGE_TOKENS))
    document = f"{pages} page{'s' if pages > 1 else ''} ({prompt.tokens} tokens) read in "
    document += f"{duration(prompt.seconds)}, {prompt.tokens / prompt.seconds:.0f} tokens/s, "
    document += f"bound by {prompt.bound}"
    others = [f"{name} {duration(s)}" for name, s in prompt.limits.items() if s >= 0.5]
    if len(others) > 1:
        document += f" ({', '.join(others)})"
    loading = f"loading {duration(found.load_s)}"
    if found.fill_s:
        loading += f"; the first answers read another {duration(found.fill_s)} of experts"
    return [line, "a token: " + ", ".join(parts), document, loading]


def _short(found: Plan) -> str:
    """Decode and a document in a few words."""
    if found.prediction is None:
        return "it would not run"
    tokens, prompt = span(found.prediction.tokens_per_s), found.prediction.prefill
    return f"decode {tokens} tokens/s, {prompt.tokens} tokens read in {duration(prompt.seconds)}"


def _ends(first: float, last: float, digits: int = 0) -> str:
    """Both numbers in the order of the routings, or one if they read alike."""
    texts = dict.fromkeys((f"{first:.{digits}f}", f"{last:.{digits}f}"))
    return "-".join(texts)


def duration(seconds: float) -> str:
    """`0.4 s`, `48 s`, `29 min`, `2.5 h`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def calibrated(found: Calibration) -> str:
    """What the decode loop showed."""
    lines = [
        f"calibrated with a prompt of {found.prompt} tokens and {found.tokens} more:",
        f"  a token: the rest {1e3 * found.resident_s:.1f} ms, experts "
        f"{1e3 * found.expert_s:.1f} ms, waiting for the disk {1e3 * found.wait_s:.1f} ms",
        f"  RAM {found.ram_rate / GB:.1f} GB/s for experts, {found.rest_rate / GB:.1f} GB/s for "
        f"the rest, {1e6 * found.layer_s:.0f} us a layer besides",
        f"  {found.flops / 1e9:.0f} GFLOP/s in prompts",
    ]
    if found.vram_rate is not None and found.device_layer_s is not None:
        each = f"{1e6 * found.device_layer_s:.0f} us a layer besides"
        lines[2:] = [
            f"  RAM {found.ram_rate / GB:.1f} GB/s for experts",
            f"  VRAM {found.vram_rate / GB:.1f} GB/s for the rest, {each}",
        ]
    if found.disk_rate is not None:
        rate = f"{found.disk_rate / GB:.2f} GB/s"
        lines.append(f"  disk {rate} at {found.reads:.1f} experts in flight")
    return "\n".join(lines)


def check(runs: Sequence[tuple[Run, Sequence[Finding]]]) -> str:
    """Predicted against measured, a line per answer, then what was wrong and why."""
    rows = []
    for run, findings in runs:
        by: dict[str, Finding] = {finding.what: finding for finding in findings}
        cells = [run.at[:16].replace("T", " "), run.model[:24]]
        for what, cost in (("prefill", run.prefill), ("decode", run.decode)):
            finding = by.get(what)
            cells += [str(cost.tokens)]
            if finding is None:
                cells += ["", "", ""]
            else:
                predicted = span([finding.low, finding.high])
                cells += [f"{finding.measured:.1f}", predicted, f"{finding.ratio:.2f}"]
        per_token = run.decode.disk_bytes / max(1, run.decode.tokens)
        cells.append(gb(per_token) if per_token else "")
        rows.append(cells)
    each = ("t/s", "planned", "ratio")
    head = ("when", "model", "prompt", *each, "answer", *each, "disk/token")
    lines = [table(head, rows, width=160), ""]
    last, findings = runs[-1]
    lines.append(
        f"last answer: peak memory {gb(last.peak_rss)}, planned {gb(last.planned_ram)} at most"
    )
    lines += [finding.sentence() for finding in findings]
    if not findings:
        lines.append("too few tokens to compare")
    return "\n".join(lines)
