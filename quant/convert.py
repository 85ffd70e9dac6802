"""Checkpoint -> pack, one file at a time: bounded memory, resumable after any kind of death.

Decides what is stored how (`Recipe`) and in which file; asks `checkpoint` for rows and gives parts
to the writer. Knows no arithmetic of a format. Called by the command line, the demo and tests.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch

from mimo_local import kernels
from mimo_local.errors import (
    CancelledError,
    CheckpointError,
    ConfigError,
    DiskSpaceError,
    NativeError,
    PackError,
    UsageError,
)
from quant.calibrated import Importance, pack_nf4
from quant.checkpoint import Checkpoint
from quant.formats import Format, Parts, get_format
from quant.fp8 import Fp8Rows
from quant.inventory import EXPERT_PARTS, expected, expert_name, layer_of
from quant.jobs import Job, plan_bytes, plan_jobs
from quant.journal import Journal
from quant.layout import TensorSpec, plan_experts
from quant.measure import Tally
from quant.meter import Meter
from quant.pack import JOURNAL, OnProgress, Pack
from quant.pipeline import ahead
from quant.quality import losses_to_json, write_conversion
from quant.recipe import Recipe
from quant.tensorfile import Scratch
from quant.writer import MANIFEST, PART, PackWriter, Record

__all__ = ["Recipe", "Supply", "check_target", "checked_jobs", "convert", "copied", "plan_bytes"]

CHUNK = 1 << 23
"""Weights quantised at once: an expert's matrix, 32 MiB where it has to be widened first."""
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
    meter = Meter(source.nbytes + (calibration.nbytes if calibration else 0), on_progress)
    writer = PackWriter(target)
    journal = Journal(target / JOURNAL, head)
    try:
        done = _resumable(journal, target, jobs)
        left = sum(job.nbytes() for job in jobs if job.file not in done)
        _check_space(target, left + (calibration.room if calibration and left else 0))
        scratch = Scratch()
        for job in supply.order(jobs, done) if supply else jobs:
            if job.file in done:
                meter.skip(sum(source.stored_bytes(name) for name in job.names()))
                if supply:
                    supply.done(job)
                continue
            if supply:
                supply.need(job)
            kept = f"{len(done)} of {len(jobs)} files"
            run = _Run(source, recipe, meter, cancel, kept, scratch, calibration)
            if calibration:
                calibration.before(job, run.hear)
            done[job.file] = run.write(job, writer) | {"losses": losses_to_json(run.tally.take())}
            journal.add(done[job.file])
            if supply:
                supply.done(job)
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


class Supply(Protocol):
    """Brings the files a conversion reads while it runs, and may take them away afterwards."""

    identity: str
    """Says which checkpoint this is before all of it is here; a resumed run must find the same."""

    def order(self, jobs: list[Job], done: Iterable[str]) -> list[Job]:
        """The same jobs in the order their files come; `done`: files of the pack that are there."""

    def need(self, job: Job) -> None:
        """Return when all the job reads is here."""

    def done(self, job: Job) -> None:
        """The job's file is durable."""


class Calibration(Protocol):
    """Knows what the experts of the job at hand are multiplied with."""

    identity: dict[str, Any]
    """What makes two of them the same."""

    @property
    def nbytes(self) -> int:
        """Bytes of the source it reads for itself."""

    @property
    def room(self) -> int:
        """Bytes it keeps in the pack's folder meanwhile."""

    def before(self, job: Job, tell: Callable[[int, str], None]) -> None:
        """Return when `of` can be asked for the job's matrices; `tell` hears bytes and a stage."""

    def of(self, name: str) -> Importance | None:
        """For one matrix, if anything is known."""

    def finish(self) -> None:
        """The pack is whole."""


_Loaded: TypeAlias = torch.Tensor | Fp8Rows | Parts


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows of one tensor, and what they are to become."""

    name: str
    fmt: Format
    rows: slice | None = None


def _ranges(shape: tuple[int, ...]) -> Iterator[slice]:
    """The rows of a tensor in steps of CHUNK weights."""
    rows = shape[0] if shape else 1
    step = max(1, CHUNK // max(shape[1] if len(shape) > 1 else 1, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


@dataclass(frozen=True, slots=True)
class _Run:
    """Writes one job's file, counting and asking whether to stop between pieces."""

    source: Checkpoint
    recipe: Recipe
    meter: Meter
    cancel: Callable[[], bool] | None
    kept: str
    scratch: Scratch
    calibration: Calibration | None = None
    tally: Tally = field(default_factory=Tally)

    def write(self, job: Job, writer: PackWriter) -> Record:
        if job.shapes is None:
            pieces = [
                _Piece(s.name, get_format(s.format), r) for s in job.specs for r in _ranges(s.shape)
            ]
            with closing(ahead(partial(self._load, piece) for piece in pieces)) as loaded:
                return writer.tensors(job.file, job.specs, lambda spec: self._rows(spec, loaded))
        fmt = get_format(job.fmt)
        pieces = [_Piece(name, fmt) for name in job.names()]
        planned = plan_experts(job.file, job.layer, job.count, job.fmt, job.shapes)
        with closing(ahead(partial(self._load, piece) for piece in pieces)) as loaded:
            return writer.experts(
                job.layer, planned, lambda e, views: self._expert(job, e, views, loaded)
            )

    def _rows(self, spec: TensorSpec, loaded: Iterator[_Loaded]) -> Iterator[Parts]:
        """The tensor's parts, CHUNK weights at a time."""
        fmt = get_format(spec.format)
        rows = spec.shape[0] if spec.shape else 1
        per_row = max(1, self.source.stored_bytes(spec.name) // max(rows, 1))
        for part in _ranges(spec.shape):
            self._check_cancelled()
            yield self._parts(_Piece(spec.name, fmt, part), next(loaded))
            self.meter.add((part.stop - part.start) * per_row, _stage(spec.name))
        self.meter.add(self.source.stored_bytes(spec.name) - rows * per_row, _stage(spec.name))

    def _expert(
        self, job: Job, expert: int, views: dict[str, Parts], loaded: Iterator[_Loaded]
    ) -> None:
        """Fill the views with the parts of an expert's matrices."""
        self._check_cancelled()
        fmt = get_format(job.fmt)
        for matrix in EXPERT_PARTS:
            name = expert_name(job.layer, expert, matrix)
            self._parts(_Piece(name, fmt), next(loaded), views[matrix])
            self.meter.add(self.source.stored_bytes(name), _stage(name))

    def _load(self, piece: _Piece, scratch: Scratch) -> _Loaded:
        """What is to be read of a piece; runs beside the rest. MXFP4 stays what it is."""
        if self.source.dtype(piece.name) != "MXFP4":
            return self.source.load(piece.name, piece.rows, scratch=scratch)
        if piece.fmt.name == "mxfp4":
            return self.source.read_mxfp4(piece.name, piece.rows)
        return self.source.read(piece.name, piece.rows)

    def _parts(self, piece: _Piece, stored: _Loaded, out: Parts | None = None) -> Parts:
        """A piece in its format, in memory of its own or in `out`."""
        if isinstance(stored, dict):
            self.tally.same(piece.name, piece.fmt)
            return stored if out is None else {k: out[k].copy_(v) for k, v in stored.items()}
        if isinstance(stored, torch.Tensor):
            stored = self.source.widen(piece.name, stored, self.scratch)
        try:
            known = self.calibration.of(piece.name) if self.calibration else None
            if known is not None and piece.fmt.name == "nf4":
                parts = pack_nf4(stored, known, out=out)
            else:
                parts = piece.fmt.pack(stored, search=self.recipe.search, out=out)
        except (NativeError, PackError):
            self.source.read(piece.name, piece.rows)  # knows which file holds NaN, and says so
            raise
        self.tally.add(piece.name, piece.fmt, stored, parts)
        return parts

    def hear(self, nbytes: int, stage: str) -> None:
        """Progress of what comes before the job."""
        self._check_cancelled()
        self.meter.add(nbytes, stage)

    def _check_cancelled(self) -> None:
        if self.cancel and self.cancel():
            raise CancelledError(
                f"the conversion was stopped; {self.kept} are finished and kept",
                hint="run the same command again to go on from there",
            )


def _stage(name: str) -> str:
    layer = layer_of(name)
    if layer is not None:
        return f"converting layer {layer}"
    return "converting MTP layers" if ".mtp." in name else "converting embedding and head"


def checked_jobs(source: Checkpoint, recipe: Recipe) -> list[Job]:
    """The plan for an opened checkpoint, after asking whether it holds a whole model."""
    model_type = source.config.get("model_type")
    if model_type not in _MODEL_TYPES:
        raise ConfigError(
            f"config.json: model_type is {model_type!r}",
            hint=f"this version converts {' and '.join(_MODEL_TYPES)} checkpoints",
        )
    for name, shape in expected(source.config).items():
        if source.shape(name) != shape:  # raises CheckpointError when there is none
            raise CheckpointError(
                f"{name} has shape {list(source.shape(name))}, config.json says {list(shape)}",
                hint="config.json and the weights belong to different checkpoints",
            )
    shapes = {name: source.shape(name) for name in source.names()}
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


def _resumable(journal: Journal, target: Path, jobs: list[Job]) -> dict[str, Record]:
    """Records of files that are there in full; leftovers of a killed run are removed."""
    for leftover in target.glob("*" + PART):
        leftover.unlink()
    wanted = {job.file for job in jobs}
    done = {}
    for record in journal.records:
        path = target / str(record.get("file"))
        if path.name in wanted and path.is_file() and path.stat().st_size == record.get("bytes"):
            done[path.name] = record
    return done


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
    writer.finish({**head, "fallbacks": fallbacks}, records)
