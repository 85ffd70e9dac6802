"""`mimo plan`, `mimo doctor`, `mimo bench`: what this machine can do, should do and does.

Facts come from `hardware`, decisions from `plan` and `doctor`, figures from `benchmark`; the tables
are drawn in `tables`.
"""

from __future__ import annotations

import json as jsonlib
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mimo_local.cli import models, shapes
from mimo_local.cli.models import JsonOption, ModelOption
from mimo_local.cli.status import Status, say
from mimo_local.errors import ExitCode, UsageError
from mimo_local.settings import PACK_MANIFEST, Paths, Settings

if TYPE_CHECKING:
    from mimo_local.benchmark import ModelRunner
    from mimo_local.config import ModelConfig
    from mimo_local.plan import Budget
    from mimo_local.sizes import PackSizes

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def size(text: str) -> int:
    """`24GB`, `24G`, `23.5 GiB`, `1TB` in bytes; GB is 10^9, GiB is 2^30."""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)(i?)b?\s*", text, re.I)
    if not found or (found[3] and not found[2]):
        raise UsageError(f"`{text}` is not a size", hint="write it like 24GB, 23.5GiB or 1TB")
    unit = UNITS[found[2].lower()]
    if found[3]:
        unit = 1024 ** ("kmgt".index(found[2].lower()) + 1)
    return int(float(found[1]) * unit)


def counts(text: str) -> tuple[int, ...]:
    """`128,512` as numbers."""
    fields = text.replace(" ", "").split(",")
    if not all(re.fullmatch("[0-9]{1,9}", field) for field in fields):
        raise UsageError(f"`{text}` is not a list of numbers", hint="write it like 128,512")
    return tuple(int(field) for field in fields)


def _size_option(name: str, what: str) -> object:
    return typer.Option(f"--{name}", help=f"{what}; left out: this machine's", metavar="SIZE")


Vram = Annotated[str | None, _size_option("vram", "GPU memory, like 24GB; 0 for none")]
Ram = Annotated[str | None, _size_option("ram", "memory, like 64GB")]
Disk = Annotated[str | None, _size_option("disk", "free disk, like 1TB")]
Cores = Annotated[int | None, typer.Option("--cores", help="CPU cores", metavar="N")]
PlanModel = Annotated[
    Path | None,
    typer.Option(
        "-m", "--model", help="pack or checkpoint; left out: MiMo-V2-Flash", metavar="PATH"
    ),
]
Context = Annotated[int, typer.Option("--context", help="tokens to keep room for", metavar="N")]
Format = Annotated[
    str, typer.Option("--format", help="nf4 or mxfp4 (experts, rest int8), int8, bf16", metavar="F")
]
Measure = Annotated[bool, typer.Option("--measure", help="measure this RAM and disk, ~2 s")]


def plan(
    vram: Vram = None,
    ram: Ram = None,
    disk: Disk = None,
    cores: Cores = None,
    model: PlanModel = None,
    context: Context = 8192,
    format: Format = "nf4",  # noqa: A002 - the option's name
    measure: Measure = False,
    json: JsonOption = False,
) -> int:
    """Show where every byte of a model would live.

    Estimates speeds from bandwidths; loads and downloads nothing.
    """
    from mimo_local.cli import tables
    from mimo_local.plan import plan as planned

    config, pack, name = subject(model, format)
    budget = this_machine(measure=measure)
    budget = replace(
        budget,
        vram=budget.vram if vram is None else size(vram),
        ram=budget.ram if ram is None else size(ram),
        disk=budget.disk if disk is None else size(disk),
        cores=cores or budget.cores,
        pack_present=disk is None and model is not None and (model / PACK_MANIFEST).exists(),
    )
    found = planned(config, pack, budget, context=context)
    if json:
        print(jsonlib.dumps({"model": name, **found.to_dict()}))
    else:
        print(tables.plan(found, name))
    found.check()
    return ExitCode.OK


def subject(model: Path | None, fmt: str) -> tuple[ModelConfig, PackSizes, str]:
    """(config, bytes, what to call it) of a pack, a checkpoint to be packed, or the real model."""
    from mimo_local.config import ModelConfig
    from mimo_local.sizes import PackSizes
    from quant.recipe import Recipe

    recipe = Recipe.for_format(fmt)
    if model is None:
        data = Path(__file__).parent.with_name("real_config.json").read_text(encoding="utf-8")
        config = ModelConfig.from_dict(jsonlib.loads(data))
        return config, PackSizes.estimate(config, recipe), f"MiMo-V2-Flash, {fmt} pack"
    config = ModelConfig.from_dir(model)
    manifest = model / PACK_MANIFEST
    if manifest.is_file():
        found = PackSizes.of_pack(jsonlib.loads(manifest.read_text(encoding="utf-8")))
        return config, found, f"the pack {model.resolve().name}"
    return config, PackSizes.estimate(config, recipe), f"{model.resolve().name} as {fmt} pack"


def this_machine(*, measure: bool) -> Budget:
    """This machine as a budget; RAM and disk speeds measured on request."""
    from mimo_local import hardware
    from mimo_local.plan import Budget

    data = Paths.default().data_dir
    facts = hardware.detect(data)
    budget = Budget(
        ram=facts.ram_total,
        disk=facts.disk.free,
        vram=facts.vram,
        cores=min(facts.cores_physical, facts.cores_usable),
    )
    if not measure:
        return budget
    ram, disk = hardware.measure_ram(), hardware.measure_disk(facts.disk.path)
    return replace(
        budget,
        ram_rate=ram.bytes_per_s,
        disk_rate=disk.bytes_per_s,
        measured=("ram", "disk"),
    )


def doctor(json: JsonOption = False) -> int:
    """Check this machine and this installation.

    Its output is the first thing to paste into a bug report.
    """
    from mimo_local.cli import tables
    from mimo_local.doctor import examine

    report = examine()
    print(jsonlib.dumps(report.to_dict(), ensure_ascii=False) if json else tables.doctor(report))
    return ExitCode.OK if report.ok else ExitCode.FAILED


Prompts = Annotated[str, typer.Option("-p", "--n-prompt", help="prompt lengths", metavar="N,N")]
Generate = Annotated[str, typer.Option("-n", "--n-gen", help="tokens to make", metavar="N,N")]
Depths = Annotated[
    str, typer.Option("-d", "--n-depth", help="tokens already in the context", metavar="N,N")
]
Threads = Annotated[
    str | None,
    typer.Option(
        "-t",
        "--threads",
        help="thread counts; left out: as for answers, and 1 with --shape",
        metavar="N,N",
    ),
]
Reps = Annotated[int, typer.Option("-r", "--reps", help="repetitions", metavar="N")]


def bench(
    n_prompt: Prompts = "128,512",
    n_gen: Generate = "32",
    n_depth: Depths = "0",
    threads: Threads = None,
    reps: Reps = 3,
    model: ModelOption = None,
    shape: shapes.Shape = None,
    layers: shapes.Layers = None,
    vocab: shapes.Vocab = None,
    experts: shapes.Experts = None,
    rest: shapes.Rest = None,
    context: shapes.Context = None,
    prefill: shapes.Prefill = None,
    quick: shapes.Quick = False,
) -> int:
    """Measure tokens per second, as llama-bench does or on the real model's shapes.

    Prints a table, then one line of JSON. `--shape real` needs no model: it makes layers of random
    weights and measures them beside what memory, processor and disk can do in the same minutes;
    Ctrl-C ends that early and keeps what was measured.
    """
    from mimo_local import benchmark, hardware
    from mimo_local.cli import tables

    wished = {
        "layers": layers, "vocab": vocab, "experts": experts, "rest": rest,
        "context": counts(context) if context else None,
        "prefill": counts(prefill) if prefill else None,
        "quick": quick or None,
    }  # fmt: skip
    if shape is not None:
        if model is not None:
            raise UsageError("--shape measures no --model", hint="leave one of them out")
        return shapes.run(shape, counts(threads) if threads else (), wished)
    for name, value in wished.items():
        if value is not None:
            raise UsageError(f"--{name} is for real shapes", hint="add `--shape real`")
    tests = benchmark.plan_tests(counts(n_prompt), counts(n_gen), counts(n_depth))
    counted = counts(threads) if threads else ()
    facts = hardware.detect()
    runner, name, load_s = load_runner(Settings.resolve(model=model))
    status = Status()
    try:
        results = benchmark.run(
            runner,
            tests,
            threads=counted,
            reps=reps,
            on_progress=status,
        )
    finally:
        status.clear()
    print(tables.bench(results))
    print(jsonlib.dumps(benchmark.document(results, hardware=facts, model=name, load_s=load_s)))
    return ExitCode.OK


def load_runner(settings: Settings) -> tuple[ModelRunner, str, float]:
    """(runner, what it is, seconds to load) of the chosen model: the seam the tests replace."""
    chosen = models.choose(settings)
    from mimo_local.benchmark import ModelRunner
    from mimo_local.loading import load

    status, start = Status(), time.perf_counter()
    try:
        loaded = load(chosen, status)
    finally:
        status.clear()
    seconds = time.perf_counter() - start
    say(f"{loaded.description}, loaded in {seconds:.1f} s")
    return ModelRunner(loaded.model, loaded.new_cache), loaded.description, seconds
