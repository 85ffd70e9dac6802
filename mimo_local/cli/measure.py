"""`mimo measure`, and the quality report as tables: what a pack lost, and what that does to texts.

Data come from `quant.quality` and `mimo_local.fidelity`; `mimo quantize` prints the same tables.
"""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated

import typer

from mimo_local.cli.models import JsonOption, ThreadsOption
from mimo_local.cli.status import Status, say
from mimo_local.errors import ExitCode, UsageError
from mimo_local.settings import Paths

if TYPE_CHECKING:
    from quant.measure import Loss
    from quant.quality import Reading, Report

Text = Annotated[
    Path | None,
    typer.Option("--text", help="read this file, not the shipped texts", metavar="FILE"),
]
Tokens = Annotated[
    int | None, typer.Option("--tokens", min=2, help="most tokens of each text", metavar="N")
]


def measure(
    pack: Annotated[Path, typer.Argument(help="folder of a pack, or its name", metavar="PACK")],
    source: Annotated[
        Path | None,
        typer.Argument(help="the checkpoint it was made of, or another pack", metavar="SOURCE"),
    ] = None,
    text: Text = None,
    tokens: Tokens = None,
    stored: Annotated[
        bool, typer.Option("--stored", help="read nothing: print what the pack's quality.json says")
    ] = False,
    threads: ThreadsOption = None,
    json: JsonOption = False,
) -> int:
    """Measure what a pack lost: errors of its weights, KL, top-1 agreement and perplexity.

    Both models read the same texts layer by layer, in little memory: with SOURCE of any size.
    Without SOURCE the pack reads alone. Ctrl-C keeps what was done for the next run.
    """
    folder = find_pack(pack)
    report = _stored(folder) if stored else run(folder, source, text, tokens, threads)
    show(folder, report, json=json)
    return ExitCode.OK


def find_pack(pack: Path) -> Path:
    """A folder, or the name of one in the packs folder."""
    named = Paths.default().packs_dir / pack
    return named if not pack.exists() and named.exists() else pack


def run(
    pack: Path,
    source: Path | None,
    text: Path | None = None,
    tokens: int | None = None,
    threads: int | None = None,
) -> Report:
    """Measure with progress on stderr."""
    from mimo_local.fidelity.run import measure as measured
    from mimo_local.loading import set_threads

    set_threads(threads)
    status, keep = Status(), Paths.default().cache_dir / "measure"
    notes: list[str] = []
    try:
        return measured(
            pack, source, text=text, tokens=tokens, keep=keep, on_progress=status, note=notes.append
        )
    finally:
        status.clear()
        for note in notes:
            say(f"note: {note}")


def _stored(pack: Path) -> Report:
    from mimo_local.fidelity.run import stored_report

    found = stored_report(pack)
    if found is None:
        raise UsageError(
            f"{pack} has no quality report, or one of another pack",
            hint="`mimo measure PACK SOURCE` makes one",
        )
    return found


def show(pack: Path, report: Report, *, json: bool = False) -> None:
    """The report on stdout, as tables or one JSON document; warnings on stderr."""
    from quant import quality

    if json:
        print(jsonlib.dumps({"pack": str(pack), **quality.to_json(report)}, sort_keys=True))
        return
    print(tables_of(report))
    for warning in quality.warnings(report):
        say(f"warning: {warning}")


def tables_of(report: Report) -> str:
    """Weights, then texts, as far as they were measured."""
    parts = []
    if report.losses:
        parts += [_weights(report) + (f"\n{report.method}" if report.method else "")]
    if report.reading is not None:
        parts += [_texts(report.reading)]
    return "\n\n".join(parts) or "nothing was measured"


def _weights(report: Report) -> str:
    from mimo_local.cli.tables import table

    groups: dict[tuple[str, str], list[Loss]] = {}
    for loss in report.losses:
        if loss.role != "exact":
            groups.setdefault((loss.role, loss.format), []).append(loss)
    rows = []
    for (role, fmt), mine in groups.items():
        worst = max(mine, key=lambda loss: loss.worst)
        rows.append(
            (
                role, fmt, f"{sum(loss.matrices for loss in mine):,}",
                _share(median(loss.rms for loss in mine)), _share(worst.worst),
                f"< {_share(report.usual(role, fmt))}", _short(worst.worst_name),
            )
        )  # fmt: skip
    head = ("weights", "format", "matrices", "error", "worst", "usual", "worst matrix")
    return table(head, rows)


def _share(value: float) -> str:
    """A relative error as per cent, three digits of it."""
    return f"{100 * value:.3g} %" if value >= 1e-6 else "0 %"


def _short(name: str) -> str:
    """A tensor's name without what all of them share: `22.experts.14.gate_proj`."""
    for common in ("model.", "layers.", "mlp.", "self_attn."):
        name = name.replace(common, "")
    return name.removesuffix(".weight")


def _texts(reading: Reading) -> str:
    from mimo_local.cli.tables import table

    rows: list[tuple[str, ...]] = []
    for name, found in sorted(reading.texts.items(), key=lambda item: (item[0] == "all", item[0])):
        row: tuple[str, ...] = (name, f"{found.positions:,}", f"{found.perplexity:.4g}")
        if (
            found.source_perplexity is not None and found.change is not None
            and found.change_error is not None and found.kl is not None
            and found.kl_99 is not None and found.top1 is not None
        ):  # fmt: skip
            row += (
                f"{found.source_perplexity:.4g}",
                f"{100 * found.change:+.2f} ± {100 * found.change_error:.2f} %",
                f"{found.kl:.3g}", f"{found.kl_99:.3g}", f"{found.top1:.1%}",
            )  # fmt: skip
        rows.append(row)
    if reading.source is None:
        return table(("text", "tokens", "perplexity"), rows)
    head = ("text", "tokens", "perplexity", "source's", "change", "KL", "KL 99 %", "same top-1")
    lines = [table(head, rows), "", f"against {reading.source}; {reading.kernels} kernels"]
    if reading.drift:
        last = len(reading.drift) - 1
        lines.append(
            f"hidden states differ by {_share(reading.drift[0])} behind layer 0, "
            f"{_share(reading.drift[-1])} behind layer {last}"
        )
    return "\n".join(lines)
