"""`mimo quantize`, `mimo verify`, `mimo demo`: making and checking packs.

Predicts size and time before it writes; shows progress on stderr and the pack's path on stdout.
"""

from __future__ import annotations

import json as jsonlib
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mimo_local.cli import measure as measuring
from mimo_local.cli import models
from mimo_local.cli.measure import find_pack
from mimo_local.cli.models import JsonOption
from mimo_local.cli.status import Status, amount, duration, say
from mimo_local.errors import CancelledError, ExitCode, UsageError
from mimo_local.settings import Paths

if TYPE_CHECKING:
    from mimo_local.fidelity.calibration import Calibration
    from quant.checkpoint import Checkpoint
    from quant.convert import Recipe
    from quant.pack import Pack

Source = Annotated[Path, typer.Argument(help="folder of a checkpoint", metavar="SRC")]
Target = Annotated[
    Path, typer.Argument(help="folder for the pack, or a name for it", metavar="DST")
]
Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        help="nf4, mxfp4 (experts, rest int8), int8, bf16; left out: nf4, or mxfp4 where experts "
        "are stored so",
        metavar="F",
    ),
]
NoSearch = Annotated[
    bool, typer.Option("--no-search", help="plain largest-value scales: faster, less exact")
]
Calibrate = Annotated[
    bool,
    typer.Option(
        "--calibrate/--no-calibrate",
        help="nf4 experts: read texts first and lose less where it matters",
    ),
]
Bits = Annotated[
    float | None,
    typer.Option(
        "--bits", help="most bits a weight: 8 for the layers that lose most, say 4.5", metavar="B"
    ),
]
Yes = Annotated[bool, typer.Option("-y", "--yes", help="do not ask before a long conversion")]
Measure = Annotated[
    bool, typer.Option("--measure", help="then read texts with source and pack: KL, perplexity")
]
ASK_S = 600  # a conversion predicted to take longer is confirmed first


def _part(name: str, what: str) -> object:
    return typer.Option(f"--{name}", help=f"format of {what}: nf4, mxfp4, int8, bf16", metavar="F")


Attention = Annotated[str | None, _part("attention", "the attention matrices")]
Dense = Annotated[str | None, _part("dense", "dense layers")]
Head = Annotated[str | None, _part("head", "the output head and the embedding")]
Mtp = Annotated[str | None, _part("mtp", "the drafting layers")]


def quantize(
    src: Source,
    dst: Target,
    format: Format = None,  # noqa: A002 - the option's name
    attention: Attention = None,
    dense: Dense = None,
    head: Head = None,
    mtp: Mtp = None,
    no_search: NoSearch = False,
    calibrate: Calibrate = False,
    bits: Bits = None,
    measure: Measure = False,
    yes: Yes = False,
) -> int:
    """Make a pack of a checkpoint, and say what it lost.

    Run the same command again to resume an interrupted conversion.
    """
    from quant.checkpoint import Checkpoint
    from quant.convert import Recipe, convert
    from quant.recipe import usual

    source, target = Checkpoint.open(src), folder_for(dst)
    parts = {"attention": attention, "dense": dense, "head": head, "embedding": head, "mtp": mtp}
    chosen: dict[str, Any] = {k: value for k, value in parts.items() if value is not None}
    format = format or usual(source.config)  # noqa: A001
    recipe = replace(Recipe.for_format(format), search=not no_search, **chosen)
    if bits is not None:
        recipe = within(source, recipe, target, bits)
    learnt = calibration_of(source, recipe, target) if calibrate else None
    announce(source, recipe, target, learnt, yes=yes)
    status = Status()
    try:
        pack = convert(source, target, recipe, on_progress=status, calibration=learnt)
    except KeyboardInterrupt:
        raise CancelledError(
            "the conversion was stopped", hint="run the same command again: it resumes"
        ) from None
    finally:
        status.clear()
    say(f"{amount(pack.nbytes, 'bytes')} written")
    layout_of(pack)
    report_on(pack, src if measure else None)
    print(target)
    return ExitCode.OK


def layout_of(pack: Pack) -> None:
    """What the conversion found about the layout of FP8 scales, where that was in question."""
    from quant import evidence

    layout = pack.manifest.get("layout")
    if layout is not None:
        say(evidence.told(layout))


def report_on(pack: Pack, source: Path | None) -> None:
    """What the conversion found about the weights, on stderr; with `source` also about texts."""
    from quant import quality

    report = quality.read(pack) if source is None else measuring.run(pack.path, source)
    if report is None:  # a pack that was there already, made by an older version
        return
    say(measuring.tables_of(report))
    for warning in quality.warnings(report):
        say(f"warning: {warning}")


def folder_for(dst: Path) -> Path:
    """A bare name means a pack in the packs folder; anything else is a path."""
    bare = len(dst.parts) == 1 and not dst.is_absolute() and dst.name not in (".", "..")
    return Paths.default().packs_dir / dst if bare and not dst.exists() else dst


def within(source: Checkpoint, recipe: Recipe, target: Path, bits: float) -> Recipe:
    """The recipe with experts of some layers widened, as a table says; measured unless known."""
    from mimo_local.cli.tables import table
    from mimo_local.fidelity import budget

    if recipe.experts != "nf4":
        raise UsageError(
            f"--bits widens experts at nf4, these are at {recipe.experts}",
            hint="leave out --bits, or take --format nf4",
        )
    budget.check(source, recipe, bits)
    known = budget.chosen_before(target, recipe, bits)
    if known is None:
        status = Status()
        try:
            losses = budget.probe(source, recipe, status)
        except KeyboardInterrupt:
            raise CancelledError(
                "stopped before anything was written", hint="run the same command again"
            ) from None
        finally:
            status.clear()
        known = budget.spend(source, recipe, bits, losses)
        rows = [
            (str(loss.layer), f"{100 * loss.loss:.3g} %", known.experts_of(loss.layer))
            for loss in losses
        ]
        say(table(("layer", "experts' error", "stored as"), rows))
    say(f"{len(known.wide)} layers' experts at int8: {budget.mean_bits(source, known):.3f} bits a "
        f"weight, {bits:g} allowed")  # fmt: skip
    if known.wide:
        say("note: experts have two sizes: where not all of them fit in memory, each takes the "
            "room of a larger one")  # fmt: skip
    return known


def calibration_of(source: Checkpoint, recipe: Recipe, target: Path) -> Calibration | None:
    """What reads the calibration texts; nothing where it would not be asked."""
    if recipe.experts != "nf4":
        say("note: only experts at nf4 are calibrated; there are none")
        return None
    if not recipe.search:
        raise UsageError(
            "--no-search and --calibrate exclude each other",
            hint="calibration is a better scale search: leave out one of the two",
        )
    from mimo_local.fidelity.calibration import Calibration

    return Calibration.of_checkpoint(source, target)


def announce(
    source: Checkpoint, recipe: Recipe, target: Path, learnt: Calibration | None, *, yes: bool
) -> None:
    """Say what will be written and how long it should take; ask first if that is long."""
    from quant.convert import plan_bytes
    from quant.jobs import checkpoint_notes

    for note in checkpoint_notes(source):
        say(note)
    weights = sum(_count(source.shape(name)) for name in source.names())
    seconds = weights / quantize_rate(recipe, source.config)
    if learnt is not None:
        more = learnt.predicted_seconds()
        say(f"calibration reads {len(learnt.ids):,} tokens: about {duration(more)} more")
        seconds += more
    size = plan_bytes(source, recipe)
    before, after = amount(source.nbytes, "bytes"), amount(size, "bytes")
    say(f"{before} -> {after} in {target}, about {duration(seconds)} (estimated)")
    if seconds > ASK_S and not yes and sys.stdin.isatty():
        typer.confirm("continue?", default=True, abort=True, err=True)


def quantize_rate(recipe: Recipe, config: Mapping[str, Any]) -> float:
    """Weights per second this machine quantises in the experts' format, measured on one matrix.

    Where the experts of the checkpoint that `config` describes are in it already: copies.
    """
    import torch

    from quant.formats import get_format
    from quant.mxfp4 import swap_nibbles
    from quant.recipe import usual

    if recipe.experts == usual(config) == "mxfp4":
        codes = torch.zeros(1 << 24, dtype=torch.uint8)
        start = time.perf_counter()
        swap_nibbles(codes)
        return 2 * codes.numel() / (time.perf_counter() - start)
    chosen = get_format(recipe.experts)
    # 1 M weights: 20 ms in the kernels, a second or two in the torch reference.
    sample = torch.randn(256, 4096, generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    chosen.pack(sample, search=recipe.search)
    return sample.numel() / (time.perf_counter() - start)


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count


def verify(
    pack: Annotated[Path, typer.Argument(help="folder of a pack, or its name", metavar="PACK")],
    json: JsonOption = False,
) -> int:
    """Compare every byte of a pack with its checksums."""
    from quant.pack import Pack

    status = Status()
    opened = Pack.open(find_pack(pack))
    try:
        opened.verify(status)
    finally:
        status.clear()
    found = {"pack": str(opened.path), "bytes": opened.nbytes, "ok": True}
    text = f"{opened.path}: {amount(opened.nbytes, 'bytes')}, all bytes right"
    print(jsonlib.dumps(found) if json else text)
    return ExitCode.OK


def demo(
    variant: Annotated[
        str, typer.Option("--variant", help="swa, or exact: the original's logits", metavar="NAME")
    ] = "swa",
    format: Annotated[  # noqa: A002 - the option's name
        str, typer.Option("--format", help="int8, nf4 or bf16", metavar="F")
    ] = "int8",
    rebuild: Annotated[bool, typer.Option("--rebuild", help="build it again")] = False,
) -> int:
    """Build the demo pack (once) and print where it is."""
    say(models.DEMO_NOTE)
    print(models.demo_pack(variant=variant, fmt=format, rebuild=rebuild))
    return ExitCode.OK
