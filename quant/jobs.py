"""Which file of a pack holds what, in which format and how large: a conversion's plan.

Pure: looks at names, shapes and stored dtypes only. Called by `convert`, and by `mimo quantize`
(through `plan_bytes`) before the first byte is written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from mimo_local.errors import CheckpointError
from quant.checkpoint import Checkpoint
from quant.formats import FORMATS
from quant.inventory import (
    EXPERT_PARTS,
    expected,
    expected_mtp,
    expert_name,
    expert_of,
    file_of,
    role_of,
    select,
)
from quant.layout import TensorSpec, plan_experts, plan_tensors
from quant.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Job:
    """One file of the pack: `specs`, or a layer's experts (`layer`, `count`, `fmt`, `shapes`).

    `experts`: only these of them, the file's other parts being other jobs'; empty: all.
    """

    file: str
    specs: tuple[TensorSpec, ...] = ()
    layer: int = 0
    count: int = 0
    fmt: str = ""
    shapes: Mapping[str, tuple[int, int]] | None = None
    fallbacks: tuple[dict[str, str], ...] = ()
    experts: tuple[int, ...] = ()

    @property
    def key(self) -> str:
        """What tells it from all other jobs."""
        return f"{self.file}#{self.experts[0]}" if self.experts else self.file

    def nbytes(self) -> int:
        """Size of the file, or of this part of it."""
        if self.shapes is None:
            return plan_tensors(self.file, self.specs)[1]
        # Names of equal length make headers of equal length: one layer stands for all like it.
        alike = 10 ** (len(str(self.layer)) - 1)
        shapes = tuple(sorted(self.shapes.items()))
        size, first, stride = _expert_bytes(alike, self.count, self.fmt, shapes)
        if not self.experts:
            return size
        return stride * len(self.experts) + (first if 0 in self.experts else 0)

    def stored(self) -> tuple[int, int]:
        """(bytes of the parts, without headers and padding; weights) in it."""
        if self.shapes is None:
            parts = [part for spec in self.specs for part in spec.parts().values()]
            nbytes = sum(dtype.itemsize * math.prod(shape) for dtype, shape in parts)
            return nbytes, sum(math.prod(spec.shape) for spec in self.specs)
        nbytes = sum(FORMATS[self.fmt].nbytes(*shape) for shape in self.shapes.values())
        weights = sum(math.prod(shape) for shape in self.shapes.values())
        return nbytes * self.count, weights * self.count

    def names(self) -> Iterator[str]:
        """Hub names of the tensors in it."""
        if self.shapes is None:
            yield from (spec.name for spec in self.specs)
        else:
            for expert in self.experts or range(self.count):
                yield from self.names_of(expert)

    def names_of(self, expert: int) -> Iterator[str]:
        """Those of one expert's matrices."""
        return (expert_name(self.layer, expert, part) for part in EXPERT_PARTS)


@lru_cache(maxsize=64)
def _expert_bytes(
    layer: int, count: int, fmt: str, shapes: tuple[tuple[str, tuple[int, int]], ...]
) -> tuple[int, int, int]:
    """(size of the file, where its first expert begins, bytes from one to the next)."""
    _, size, layout = plan_experts("", layer, count, fmt, dict(shapes))
    return size, layout.offset0, layout.stride


def split(source: Checkpoint, job: Job) -> list[Job]:
    """The job in parts that each need other files of the checkpoint: itself, if that is one.

    V2.5 and V2.6 keep some experts of all layers in a file: a layer as a whole needs every file.
    """
    if job.shapes is None:
        return [job]
    groups: dict[frozenset[str], list[int]] = {}
    for expert in range(job.count):
        files = frozenset(source.files_of(job.names_of(expert)))
        groups.setdefault(files, []).append(expert)
    if len(groups) == 1:
        return [job]
    parts = [replace(job, experts=tuple(experts), fallbacks=()) for experts in groups.values()]
    return [replace(parts[0], fallbacks=job.fallbacks), *parts[1:]]


def checkpoint_notes(source: Checkpoint) -> list[str]:
    """What people should know of a checkpoint before they use it: whatever of it is not used."""
    shapes = {name: source.shape(name) for name in source.names()}
    found = select(source.config, shapes)
    notes = []
    if skipped := source.skipped():
        notes.append(
            f"{len(skipped)} tensors of vision, audio and speech are left out: only text is read"
        )
    promised = source.config.get("num_nextn_predict_layers", 0)
    if found.unused:
        notes.append(
            f"{len(found.unused)} tensors of drafting layers are left out, among them "
            f"{found.unused[0]}: {found.mtp_layers} drafting layers are used"
        )
    elif isinstance(promised, int) and promised > found.mtp_layers:
        notes.append(
            f"config.json promises {promised} drafting layers, {found.mtp_layers} are there whole"
        )
    return notes


def plan_bytes(source: Checkpoint | Mapping[str, Any], recipe: Recipe) -> int:
    """Bytes of the pack's safetensors files, headers and padding included.

    For an opened checkpoint exactly what `convert` writes; for a config.json nothing is downloaded,
    and the MTP layers it implies are counted.
    """
    if isinstance(source, Checkpoint):
        shapes = {name: source.shape(name) for name in source.names()}
        shapes = {name: shapes[name] for name in select(source.config, shapes).used}
        stored = {name: source.dtype(name) for name in shapes}
    else:
        shapes = expected(source) | expected_mtp(source)
        stored = {name: "F32" if ".mlp.gate." in name else "BF16" for name in shapes}
    return sum(job.nbytes() for job in plan_jobs(shapes, stored, recipe))


def plan_jobs(
    shapes: Mapping[str, tuple[int, ...]], stored: Mapping[str, str], recipe: Recipe
) -> list[Job]:
    """Files in the order they are written: model, then each layer and its experts, then MTP."""
    files: dict[str, list[str]] = {}
    for name in sorted(shapes):
        files.setdefault(file_of(name), []).append(name)

    def order(file: str) -> tuple[int, str, str]:
        kind, _, layer = file.removesuffix(".safetensors").partition("-")
        return ({"model": 0, "mtp": 2}.get(kind, 1), layer, "" if kind == "layer" else kind)

    jobs = []
    for file in sorted(files, key=order):
        names = files[file]
        if expert_of(names[0]):
            jobs.append(_expert_job(file, names, shapes, recipe))
        else:
            jobs.append(_tensor_job(file, names, shapes, stored, recipe))
    return jobs


def _tensor_job(
    file: str,
    names: list[str],
    shapes: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, str],
    recipe: Recipe,
) -> Job:
    specs, fallbacks = [], []
    for name in names:
        shape = shapes[name]
        fmt = recipe.format_of(role_of(name, shape), stored[name])
        if len(shape) == 2:
            used = _supported(fmt, [(shape[0], shape[1])])
            if used != fmt:
                fallbacks.append(_fallback(name, fmt, used, shape))
            fmt = used
        specs.append(TensorSpec(name, fmt, shape))
    return Job(file, tuple(specs), fallbacks=tuple(fallbacks))


def _expert_job(
    file: str, names: list[str], shapes: Mapping[str, tuple[int, ...]], recipe: Recipe
) -> Job:
    found: dict[str, tuple[int, int]] = {}
    numbers, layer = set(), 0
    for name in names:
        layer, expert, matrix = expert_of(name) or (0, 0, "")
        numbers.add(expert)
        rows, cols = shapes[name]
        if found.setdefault(matrix, (rows, cols)) != (rows, cols):
            raise CheckpointError(
                f"{name} has shape {[rows, cols]}, its layer's others {list(found[matrix])}",
                hint="a pack needs the experts of a layer to be alike",
            )
    if numbers != set(range(len(numbers))) or len(names) != len(numbers) * len(EXPERT_PARTS):
        raise CheckpointError(
            f"layer {layer} has {len(names)} expert matrices for {len(numbers)} experts",
            hint="a shard may be missing: compare the folder with the hub's file list",
        )
    wanted = recipe.experts_of(layer)
    fmt = _supported(wanted, list(found.values()))
    fallbacks: tuple[dict[str, str], ...] = ()
    if fmt != wanted:
        worst = next(s for s in found.values() if not FORMATS[wanted].supports(*s))
        label = f"model.layers.{layer}.mlp.experts"
        fallbacks = (_fallback(label, wanted, fmt, worst),)
    return Job(file, (), layer, len(numbers), fmt, found, fallbacks)


def _supported(fmt: str, shapes: list[tuple[int, int]]) -> str:
    """The format, or the next one that can hold all these shapes: int8, then bf16."""
    return next(f for f in (fmt, "int8", "bf16") if all(FORMATS[f].supports(*s) for s in shapes))


def _fallback(name: str, wanted: str, used: str, shape: tuple[int, ...]) -> dict[str, str]:
    reason = f"{wanted} cannot hold {shape[0]} x {shape[1]}"
    return {"tensor": name, "wanted": wanted, "stored": used, "reason": reason}
