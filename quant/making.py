"""One file of a pack, or some experts of one: rows of the checkpoint, each in its format.

Reads ahead while the last piece is quantised, counts, and asks between pieces whether to stop.
Knows no order of files and no journal. Called by `convert`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Protocol, TypeAlias

import torch

from mimo_local.errors import CancelledError, NativeError, PackError
from quant.calibrated import Importance, pack_nf4
from quant.checkpoint import Checkpoint
from quant.evidence import look
from quant.formats import Format, Parts, get_format
from quant.fp8 import Fp8Rows
from quant.inventory import EXPERT_PARTS, expert_name
from quant.jobs import Job
from quant.layout import ExpertLayout, TensorSpec, plan_experts
from quant.measure import Sums, Tally
from quant.meter import Meter, stage_of
from quant.pipeline import ahead
from quant.quality import losses_to_json
from quant.recipe import Recipe
from quant.tensorfile import Scratch
from quant.writer import PackWriter, Record

CHUNK = 1 << 23
"""Weights quantised at once: an expert's matrix, 32 MiB where it has to be widened first."""


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


@dataclass(slots=True)
class Maker:
    """Does one job after the other, counting and asking whether to stop between pieces."""

    source: Checkpoint
    recipe: Recipe
    meter: Meter
    cancel: Callable[[], bool] | None
    scratch: Scratch
    calibration: Calibration | None = None
    kept: str = ""
    """What an error says is kept."""
    tally: Tally = field(default_factory=Tally)

    def write(self, job: Job, writer: PackWriter) -> Record:
        """The file's record for the manifest, or that of some of its experts for the journal."""
        if self.calibration:
            self.calibration.before(job, self._hear)
        found = look(self.source, job.names())
        if job.shapes is None:
            pieces = [
                _Piece(s.name, get_format(s.format), r) for s in job.specs for r in _ranges(s.shape)
            ]
            with closing(ahead(partial(self._load, piece) for piece in pieces)) as loaded:
                record = writer.tensors(job.file, job.specs, lambda spec: self._rows(spec, loaded))
        else:
            fmt = get_format(job.fmt)
            pieces = [_Piece(name, fmt) for name in job.names()]
            with closing(ahead(partial(self._load, piece) for piece in pieces)) as loaded:
                record = self._experts(job, writer, loaded)
        if job.experts:
            return record | {"sums": self.tally.sums()}
        layout = {} if found is None else {"layout": asdict(found)}
        return record | {"losses": losses_to_json(self.tally.take())} | layout

    def _experts(self, job: Job, writer: PackWriter, loaded: Iterator[_Loaded]) -> Record:
        planned = planned_experts(job)

        def produce(expert: int, views: dict[str, Parts]) -> None:
            self._expert(job, expert, views, loaded)

        if not job.experts:
            return writer.experts(job.layer, planned, produce)
        crcs = writer.fill(planned, job.experts, produce)
        return {"piece": job.key, "file": job.file, "bytes": planned[1], "crc32": crcs}

    def close(self, job: Job, parts: list[Record], writer: PackWriter) -> Record:
        """The record of a layer's file whose experts were written in parts."""
        crcs: dict[int, int] = {}
        sums: dict[str, list[float]] = {}
        for part in parts:
            crcs |= {int(expert): crc for expert, crc in part["crc32"].items()}
            sums |= part["sums"]

        def on_bytes(n: int) -> None:
            self._check_cancelled()
            self.meter.add(n, f"checking layer {job.layer}")

        order = [crcs[expert] for expert in range(job.count)]
        record = writer.close(job.layer, planned_experts(job), order, on_bytes)
        for name in job.names():  # as they would have come in one piece
            self.tally.put(name, job.fmt, Sums(*sums[name]))
        return record | {"losses": losses_to_json(self.tally.take())}

    def _rows(self, spec: TensorSpec, loaded: Iterator[_Loaded]) -> Iterator[Parts]:
        """The tensor's parts, CHUNK weights at a time."""
        fmt = get_format(spec.format)
        rows = spec.shape[0] if spec.shape else 1
        per_row = max(1, self.source.stored_bytes(spec.name) // max(rows, 1))
        for part in _ranges(spec.shape):
            self._check_cancelled()
            yield self._parts(_Piece(spec.name, fmt, part), next(loaded))
            self.meter.add((part.stop - part.start) * per_row, stage_of(spec.name))
        self.meter.add(self.source.stored_bytes(spec.name) - rows * per_row, stage_of(spec.name))

    def _expert(
        self, job: Job, expert: int, views: dict[str, Parts], loaded: Iterator[_Loaded]
    ) -> None:
        """Fill the views with the parts of an expert's matrices."""
        self._check_cancelled()
        fmt = get_format(job.fmt)
        for matrix in EXPERT_PARTS:
            name = expert_name(job.layer, expert, matrix)
            self._parts(_Piece(name, fmt), next(loaded), views[matrix])
            self.meter.add(self.source.stored_bytes(name), stage_of(name))

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

    def _hear(self, nbytes: int, stage: str) -> None:
        """Progress of what comes before the job."""
        self._check_cancelled()
        self.meter.add(nbytes, stage)

    def _check_cancelled(self) -> None:
        if self.cancel and self.cancel():
            raise CancelledError(
                f"the conversion was stopped; {self.kept} are finished and kept",
                hint="run the same command again to go on from there",
            )


def planned_experts(job: Job) -> tuple[bytes, int, ExpertLayout]:
    """Header, size and layout of the file of a job's experts."""
    assert job.shapes is not None
    return plan_experts(job.file, job.layer, job.count, job.fmt, job.shapes)
