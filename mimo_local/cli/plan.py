"""`mimo plan`: where every byte would live, how fast that would be, and how right that was.

Decisions come from `mimo_local.plan`, rates from this machine's own decode loop if it has been
calibrated; `plan_text` draws.
"""

from __future__ import annotations

import json as jsonlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mimo_local.cli import models
from mimo_local.cli.models import JsonOption
from mimo_local.cli.status import Status, say
from mimo_local.errors import ExitCode, UsageError
from mimo_local.settings import PACK_MANIFEST, Paths, Settings, parse_size

if TYPE_CHECKING:
    from mimo_local.config import ModelConfig
    from mimo_local.loading import Loaded
    from mimo_local.plan import Budget
    from mimo_local.sizes import PackSizes

SHOWN = 10  # answers in `--check`'s table


def size(text: str) -> int:
    """`24GB`, `24G`, `23.5 GiB`, `1TB` in bytes; GB is 10^9, GiB is 2^30."""
    try:
        return parse_size(text)
    except ValueError:
        raise UsageError(
            f"`{text}` is not a size", hint="write it like 24GB, 23.5GiB or 1TB"
        ) from None


def _size_option(name: str, what: str) -> object:
    return typer.Option(f"--{name}", help=f"{what}; left out: this machine's", metavar="SIZE")


Vram = Annotated[str | None, _size_option("vram", "GPU memory, like 24GB; 0 for none")]
Ram = Annotated[str | None, _size_option("ram", "memory, like 64GB")]
Disk = Annotated[str | None, _size_option("disk", "free disk, like 1TB")]
Cores = Annotated[int | None, typer.Option("--cores", help="CPU cores", min=1, metavar="N")]
VramRate = Annotated[
    str | None,
    typer.Option(
        "--vram-rate", help="GPU memory's rate a second, like 1008GB: its data sheet's",
        metavar="SIZE",
    ),
]  # fmt: skip
RamRate = Annotated[
    str | None, typer.Option("--ram-rate", help="memory's rate a second, like 80GB", metavar="SIZE")
]
DiskRate = Annotated[
    str | None, typer.Option("--disk-rate", help="disk's rate a second, like 7GB", metavar="SIZE")
]
Model = Annotated[
    Path | None,
    typer.Option(
        "-m", "--model", help="pack or checkpoint; left out: MiMo-V2-Flash", metavar="PATH"
    ),
]
Repo = Annotated[
    str | None,
    typer.Argument(
        help="repository on the hub, as owner/name: sizes are read there, nothing is fetched",
        metavar="REPO",
    ),
]
Revision = Annotated[
    str, typer.Option("--revision", help="branch, tag or commit of REPO", metavar="REV")
]
Context = Annotated[
    int | None,
    typer.Option("--context", help="tokens to keep room for; left out: what fits", metavar="N"),
]
KvDtype = Annotated[
    str | None,
    typer.Option(
        "--kv-dtype", help="keys and values in f32, bf16 or int8; left out: bf16", metavar="T"
    ),
]
Pages = Annotated[int, typer.Option("--pages", help="pages of the document to read", metavar="N")]
Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        help="nf4 or mxfp4 (experts, rest int8), int8, bf16; left out: nf4, or mxfp4 where "
        "experts are stored so",
        metavar="F",
    ),
]
Measure = Annotated[bool, typer.Option("--measure", help="measure this RAM and disk, ~2 s")]
Calibrate = Annotated[
    bool,
    typer.Option(
        "--calibrate", help="run the pack for some tokens and keep the rates it shows, 1-2 min"
    ),
]
Check = Annotated[
    bool, typer.Option("--check", help="compare the last answers with what was predicted")
]


def plan(
    repo: Repo = None,
    vram: Vram = None,
    ram: Ram = None,
    disk: Disk = None,
    cores: Cores = None,
    vram_rate: VramRate = None,
    ram_rate: RamRate = None,
    disk_rate: DiskRate = None,
    model: Model = None,
    context: Context = None,
    pages: Pages = 100,
    format: Format = None,  # noqa: A002 - the option's name
    kv_dtype: KvDtype = None,
    revision: Revision = "main",
    measure: Measure = False,
    calibrate: Calibrate = False,
    check: Check = False,
    json: JsonOption = False,
) -> int:
    """Show where every byte of a model would live, and how fast that would be.

    Speeds are estimates between uniform routing and that of similar models. Loads nothing, unless
    asked to calibrate: then they rest on the pack's own decode loop on this machine.
    """
    from mimo_local.plan.planner import PAGE_TOKENS
    from mimo_local.sizes import KV_ITEMSIZES

    if check:
        return checked(json=json)
    if repo is not None and model is not None:
        raise UsageError(
            "a repository and --model were given: only one can be planned", hint="leave out one"
        )
    if calibrate:
        model = calibrated(model, context, None if ram is None else size(ram))
    config, pack, name = remote(repo, revision, format) if repo else subject(model, format)
    budget = this_machine(model, measure=measure)
    rates = {"vram_rate": vram_rate, "ram_rate": ram_rate, "disk_rate": disk_rate}
    given = {key: _rate(text) for key, text in rates.items() if text is not None}
    if given or cores is not None:
        budget = replace(budget, calibration=None)  # of another machine than this one
    if vram is not None:
        budget = other_gpu(budget, size(vram))
    budget = replace(
        budget,
        ram=budget.ram if ram is None else size(ram),
        disk=budget.disk if disk is None else size(disk),
        cores=cores or budget.cores,
        pack_present=disk is None and model is not None and (model / PACK_MANIFEST).exists(),
        given=tuple(key.removesuffix("_rate") for key in given),
        vram_rate=given.get("vram_rate", budget.vram_rate),
        ram_rate=given.get("ram_rate", budget.ram_rate),
        disk_rate=given.get("disk_rate", budget.disk_rate),
    )
    wish = Settings.resolve(kv_dtype=kv_dtype).kv_dtype
    kept = {"context": context, "kv_itemsize": KV_ITEMSIZES.get(wish, KV_ITEMSIZES["bf16"])}
    return shown(config, pack, name, budget, kept, pages * PAGE_TOKENS, json=json)


def shown(
    config: ModelConfig,
    pack: PackSizes,
    name: str,
    budget: Budget,
    kept: dict[str, Any],
    tokens: int,
    *,
    json: bool,
) -> int:
    """Print the plan; raises what makes it impossible. `kept`: context and bytes of a number."""
    from mimo_local.cli import plan_text
    from mimo_local.plan import plan as planned

    found, without = planned(config, pack, budget, **kept, tokens=tokens), None
    if found.device.layers:
        kept = kept | {"context": found.context}
        without = planned(config, pack, replace(budget, vram=0), **kept, tokens=tokens)
    if json:
        data = {"model": name, **found.to_dict()}
        data["without_gpu"] = None if without is None else without.to_dict()["prediction"]
        print(jsonlib.dumps(data))
    else:
        print(plan_text.plan(found, name, without))
    if remote := Settings.resolve().remote:
        say(f"a plan for this machine: chat and summarize ask {remote} (setting `remote`)")
    found.check()
    return ExitCode.OK


def other_gpu(budget: Budget, vram: int) -> Budget:
    """`budget` with so much VRAM: of this machine's card as far as it has that, else of another."""
    from mimo_local.plan import here

    if vram <= budget.vram:
        return replace(budget, vram=vram)
    measured = tuple(name for name in budget.measured if name != "gpu")
    return here.with_gpu(replace(budget, measured=measured), vram)


def _rate(text: str) -> float:
    found = size(text.removesuffix("/s"))
    if found <= 0:
        raise UsageError(f"`{text}` is not a rate", hint="write bytes a second, like 7GB")
    return float(found)


def subject(model: Path | None, fmt: str | None) -> tuple[ModelConfig, PackSizes, str]:
    """(config, bytes, what to call it) of a pack, a checkpoint to be packed, or the real model."""
    from mimo_local.config import ModelConfig
    from mimo_local.family import member, named
    from mimo_local.sizes import PackSizes
    from quant.recipe import Recipe, usual

    if model is None:
        fmt = fmt or "nf4"
        data = Path(__file__).parent.with_name("real_config.json").read_text(encoding="utf-8")
        config = ModelConfig.from_dict(jsonlib.loads(data))
        sizes = PackSizes.estimate(config, Recipe.for_format(fmt))
        return config, sizes, f"{member(config)}, {fmt} pack"
    config = ModelConfig.from_dir(model)
    manifest = model / PACK_MANIFEST
    if manifest.is_file():
        found = PackSizes.of_pack(jsonlib.loads(manifest.read_text(encoding="utf-8")))
        return config, found, f"the pack {named(model.resolve().name, config)}"
    raw = jsonlib.loads((model / "config.json").read_text(encoding="utf-8"))
    fmt = fmt or usual(raw)
    sizes = PackSizes.estimate(config, Recipe.for_format(fmt))
    return config, sizes, f"{named(model.resolve().name, config)} as {fmt} pack"


def remote(repo: str, revision: str, fmt: str | None) -> tuple[ModelConfig, PackSizes, str]:
    """The same of a checkpoint on the hub: exact, from the headers of its files."""
    from mimo_local.config import ModelConfig
    from mimo_local.family import named
    from mimo_local.pull.hub import Hub, check_repo
    from mimo_local.pull.remote import exact_sizes, read_remote
    from mimo_local.pull.staging import Staging
    from quant.jobs import checkpoint_notes
    from quant.recipe import Recipe, usual

    nowhere, status = Staging(Path(check_repo(repo))), Status()
    hub = Hub()
    try:
        found = read_remote(hub.snapshot(repo, revision), hub, nowhere, status)
    finally:
        status.clear()
        hub.close()
    config = ModelConfig.from_dict(found.checkpoint.config)
    fmt = fmt or usual(found.checkpoint.config)
    name = f"{named(repo, config)} at {found.snapshot.commit[:12]} as {fmt} pack"
    for note in checkpoint_notes(found.checkpoint):
        say(note)
    return config, exact_sizes(found, Recipe.for_format(fmt)), name


def this_machine(model: Path | None = None, *, measure: bool) -> Budget:
    """This machine as a budget: calibrated with this pack, or its RAM and disk measured, or not."""
    from mimo_local import hardware
    from mimo_local.plan import here

    data = Paths.default().data_dir
    facts = hardware.detect(model or data)
    known = None
    if model is not None:
        known = here.calibration_of(data, here.machine_key(facts), here.model_key(model))
    budget = here.whole_machine(facts, known)
    if not measure:
        return budget
    ram, disk = hardware.measure_ram(), hardware.measure_disk(hardware.disk(data).path)
    return replace(
        budget,
        ram_rate=ram.bytes_per_s,
        disk_rate=disk.bytes_per_s,
        measured=("ram", "disk"),
    )


def calibrated(model: Path | None, context: int | None, ram: int | None) -> Path:
    """Measure the chosen pack's decode loop and keep what it showed; returns the pack's folder.

    `ram`: most bytes the model may take, as in an answer with `--ram`.
    """
    from mimo_local import hardware
    from mimo_local.cli import plan_text
    from mimo_local.plan import here

    loaded, folder = load(Settings.resolve(model=model, context=context, ram=ram))
    from mimo_local.benchmark import ModelRunner
    from mimo_local.calibrate import calibrate

    if loaded.plan is None:
        raise UsageError(
            f"{folder.name} is a checkpoint: only packs are planned and calibrated",
            hint="make a pack of it with `mimo quantize`",
        )
    status = Status()
    try:
        runner = ModelRunner(loaded.model, loaded.new_cache)
        found = calibrate(runner, loaded.model.experts, loaded.plan, on_progress=status)
    finally:
        status.clear()
    data, facts = Paths.default().data_dir, hardware.detect(folder)
    here.keep_calibration(data, here.machine_key(facts), here.model_key(folder), found)
    say(plan_text.calibrated(found))
    return folder


def load(settings: Settings) -> tuple[Loaded, Path]:
    """The chosen model with its stores, and its folder: the seam the tests replace."""
    chosen = models.choose(settings)
    from mimo_local.loading import load as loaded

    status = Status()
    try:
        found = loaded(chosen, status)
    finally:
        status.clear()
    assert chosen.model is not None
    return found, chosen.model


def checked(*, json: bool) -> int:
    """Print the last answers of this machine beside their predictions."""
    from mimo_local import hardware, runs, verdicts
    from mimo_local.cli import plan_text
    from mimo_local.plan import here

    data = Paths.default().data_dir
    mine = here.machine_key(hardware.detect(data))
    found = [run for run in runs.recent(data, runs.LIMIT) if run.machine == mine][-SHOWN:]
    judged = [(run, verdicts.judge(run)) for run in found]
    if json:
        lines = [
            asdict(run) | {"findings": [asdict(f) | {"off": f.off} for f in findings]}
            for run, findings in judged
        ]
        print(jsonlib.dumps({"runs": lines}))
    elif judged:
        print(plan_text.check(judged))
    else:
        print("no answer of a pack has been recorded on this machine yet")
    return ExitCode.OK
