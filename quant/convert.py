"""Checkpoint -> pack, one file at a time: bounded memory, resumable after any kind of death.

Decides what is stored how (`Recipe`) and in which file; asks `checkpoint` for rows and gives parts
to the writer. Knows no arithmetic of a format. Called by the command line, the demo and tests.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from mimo_local import kernels
from mimo_local.errors import ConfigError, DiskSpaceError, UsageError
from quant import evidence
from quant.checkpoint import Checkpoint
from quant.inventory import require, select
from quant.jobs import Job, plan_bytes, plan_jobs, split
from quant.journal import Journal
from quant.making import Calibration, Maker
from quant.meter import Meter
from quant.pack import JOURNAL, OnProgress, Pack
from quant.quality import write_conversion
from quant.recipe import Recipe
from quant.tensorfile import Scratch
from quant.writer import MANIFEST, PART, PackWriter, Record

__all__ = ["Recipe", "Supply", "check_target", "checked_jobs", "convert", "copied", "plan_bytes"]

SPARE = 16 << 20
"""Bytes left free on the target beyond what the pack needs: journal, manifest, tokenizer files."""

_COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
_MODEL_TYPES = ("mimo_v2_flash", "mimo_v2")


def convert(
    src: str | Path | Checkpoint,
    dst: str | Path,
    recipe: Recipe | None = None,
    *,
    on_progress: OnProgress | None = None,
    cancel: Callable[[], bool] | None = None,
    supply: Supply | None = None,
    calibration: Calibration | None = None,
) -> Pack:
    """Make a pack of a checkpoint in folder `dst` and open it; run again after a death to resume.

    Two runs give the same bytes, interrupted or not. Progress counts bytes of the source; `supply`
    brings them while the conversion runs; `calibration` knows which columns matter. Raises
    CheckpointError, ConfigError, UsageError (folders), DiskSpaceError (before the first byte, or
    when the disk fills up), CancelledError; finished files are always kept for the next run.
    """
    recipe = recipe or Recipe()
    source = src if isinstance(src, Checkpoint) else Checkpoint.open(src)
    target = Path(dst).absolute()
    jobs = checked_jobs(source, recipe)
    heard = calibration.identity if calibration else None
    head = _head(source, recipe, supply.identity if supply else source.fingerprint(), heard)
    if (target / MANIFEST).exists():
        return _finished(target, head)
    check_target(source.path, target)
    # A supply takes files away when they are used up: what needs few of them goes on its own.
    parts = {job.file: split(source, job) if supply else [job] for job in jobs}
    units = [unit for found in parts.values() for unit in found]
    writer = PackWriter(target)
    journal = Journal(target / JOURNAL, head)
    try:
        done = finished(target, journal.records, units)
        _tidy(target, {str(record["file"]) for record in done.values() if "piece" in record})
        left = sum(unit.nbytes() for unit in units if unit.key not in done)
        _check_space(target, left + (calibration.room if calibration and left else 0))
        apart = [job for job in jobs if len(parts[job.file]) > 1]
        used = sum(source.stored_bytes(name) for job in jobs for name in job.names())
        used += sum(job.nbytes() for job in apart) + (calibration.nbytes if calibration else 0)
        meter = Meter(used, on_progress)
        maker = Maker(source, recipe, meter, cancel, Scratch(), calibration)
        _do(supply.order(units, done) if supply else units, done, maker, writer, journal, supply)
        for job in apart:
            if job.file not in done:
                done[job.file] = maker.close(job, [done[u.key] for u in parts[job.file]], writer)
                journal.add(done[job.file])
        if supply:
            head = _head(source, recipe, source.fingerprint(), heard)
        _finish(writer, source, head, jobs, done)
    finally:
        journal.close()
    journal.path.unlink(missing_ok=True)
    if calibration:
        calibration.finish()
    meter.finish()
    return Pack.open(target)


def _do(
    units: list[Job],
    done: dict[str, Record],
    maker: Maker,
    writer: PackWriter,
    journal: Journal,
    supply: Supply | None,
) -> None:
    """Make what is not in `done` yet, unit after unit, and note it there and in the journal."""
    for unit in units:
        maker.kept = f"{len(done)} of {len(units)} files"
        if unit.key in done:
            maker.meter.skip(sum(maker.source.stored_bytes(name) for name in unit.names()))
        else:
            if supply:
                supply.need(unit)
            done[unit.key] = maker.write(unit, writer)
            journal.add(done[unit.key])
        if supply:
            supply.done(unit)


class Supply(Protocol):
    """Brings the files a conversion reads while it runs, and may take them away afterwards."""

    identity: str
    """Says which checkpoint this is before all of it is here; a resumed run must find the same."""

    def order(self, jobs: list[Job], done: Iterable[str]) -> list[Job]:
        """The same jobs in the order their files come; `done`: keys of those that are done."""

    def need(self, job: Job) -> None:
        """Return when all the job reads is here."""

    def done(self, job: Job) -> None:
        """What the job makes is durable."""


def checked_jobs(source: Checkpoint, recipe: Recipe) -> list[Job]:
    """The plan for an opened checkpoint, after asking whether it holds a whole model."""
    model_type = source.config.get("model_type")
    if model_type not in _MODEL_TYPES:
        raise ConfigError(
            f"config.json: model_type is {model_type!r}",
            hint=f"this version converts {' and '.join(_MODEL_TYPES)} checkpoints",
        )
    shapes = {name: source.shape(name) for name in source.names()}
    require(source.config, shapes)
    shapes = {name: shapes[name] for name in select(source.config, shapes).used}
    return plan_jobs(shapes, {name: source.dtype(name) for name in shapes}, recipe)


def copied(listing: Iterable[str]) -> list[str]:
    """Which of a checkpoint's files go into the pack as they are."""
    names = set(listing)
    extra = sorted(name for name in names if name.startswith("LICENSE"))
    return ["config.json", *(name for name in _COPIED if name in names), *extra]


def _head(
    source: Checkpoint, recipe: Recipe, fingerprint: str, heard: dict[str, Any] | None
) -> dict[str, Any]:
    """What makes two conversions the same; the journal's first line and part of the manifest."""
    try:
        version = metadata.version("mimo-local")
    except metadata.PackageNotFoundError:
        version = "unknown"
    return {
        "tool": f"mimo-local {version}",
        "quantizer": "reference" if kernels.get() is None else "native",
        "model_type": source.config["model_type"],
        "recipe": recipe.to_json(),
        "source": {
            "fingerprint": fingerprint,
            "files": source.file_count(),
            "bytes": source.nbytes,
            "tensors": len(source.names()),
            "skipped": len(source.skipped()),
        },
    } | ({} if heard is None else {"calibration": heard})


def _finished(target: Path, head: dict[str, Any]) -> Pack:
    """The pack that is already there, if it is the one asked for."""
    pack = Pack.open(target)
    other = [k for k in ("recipe", "calibration", "source") if pack.manifest.get(k) != head.get(k)]
    if other:
        raise UsageError(
            f"{target} already holds a finished pack with another {' and '.join(other)}",
            hint="choose another folder, or delete this one to make the pack anew",
        )
    (target / JOURNAL).unlink(missing_ok=True)
    return pack


def check_target(src: Path, target: Path) -> None:
    """Refuse folders where a pack would mix with the source or with somebody's files."""
    source, real = src.resolve(), target.resolve()
    if real == source or source in real.parents or real in source.parents:
        raise UsageError(
            f"the target {target} and the checkpoint {src} lie inside each other",
            hint="choose a folder outside the checkpoint",
        )
    if target.exists() and not target.is_dir():
        raise UsageError(f"{target} is a file", hint="choose a folder for the pack")
    if target.is_dir() and not (target / JOURNAL).exists() and any(target.iterdir()):
        raise UsageError(
            f"{target} is not empty", hint="choose an empty or a new folder for the pack"
        )


def finished(target: Path, records: Iterable[Record], units: Iterable[Job]) -> dict[str, Record]:
    """Records of the jobs whose work is there in full, by key; and of whole files made in parts."""
    keys = {unit.key: unit.file for unit in units}
    files = set(keys.values())
    done: dict[str, Record] = {}
    for record in records:
        file, piece = str(record.get("file")), record.get("piece")
        path = target / (file if piece is None else file + PART)
        with suppress(OSError):
            whole = path.stat().st_size == record.get("bytes")
            if whole and (file in files if piece is None else keys.get(piece) == file):
                done[file if piece is None else piece] = record
    return done | {key: done[file] for key, file in keys.items() if file in done}


def _tidy(target: Path, begun: set[str]) -> None:
    """Remove leftovers of a killed run, but not files that are filled in over several runs."""
    for leftover in target.glob("*" + PART):
        if leftover.name.removesuffix(PART) not in begun:
            leftover.unlink()


def _check_space(target: Path, need: int) -> None:
    free = shutil.disk_usage(target).free
    if free < need + SPARE:
        raise DiskSpaceError(
            f"the pack needs {need / 1e9:.2f} GB more in {target}, {free / 1e9:.2f} GB are free",
            hint=f"free {(need + SPARE - free) / 1e9:.2f} GB, or choose a folder on another disk",
        )


def _finish(
    writer: PackWriter,
    source: Checkpoint,
    head: dict[str, Any],
    jobs: list[Job],
    done: dict[str, Record],
) -> None:
    """Copy the small files, then write pack.json."""
    records = [done[job.file] for job in jobs]
    write_conversion(writer, head, records)
    listing = {p.name for p in source.path.iterdir() if p.is_file()}
    records += [writer.copy(source.path / name) for name in copied(listing)]
    fallbacks = [fallback for job in jobs for fallback in job.fallbacks]
    layout = evidence.summary(records)
    told = {} if layout is None else {"layout": layout}
    writer.finish({**head, "fallbacks": fallbacks, **told}, records)
