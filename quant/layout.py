"""Where every byte of a pack is: entries of single tensors, the stride of a layer's experts.

Pure arithmetic on shapes and formats; reads and writes no file. Called by `pack` (writer and
reader) and `convert` (sizes before the first byte). Described in docs/format.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from quant.formats import FORMATS, Parts, Plain, get_format
from quant.inventory import EXPERT_PARTS, expert_name
from quant.tensorfile import DTYPE_NAMES, DTYPES, Layout

PAGE = 4096
"""Bytes; data starts and experts start at multiples of it, so that a read can bypass the cache."""
ALIGN = 64
"""Bytes; every other tensor starts at a multiple of a cache line, counted from the data's start."""

PartPlace: TypeAlias = tuple[torch.dtype, tuple[int, ...], int]
"""(dtype, shape, offset in bytes)."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to be written: hub name, format name, logical shape."""

    name: str
    format: str
    shape: tuple[int, ...]

    def parts(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Part name -> (dtype, shape); a vector is stored plain, as one part."""
        fmt = get_format(self.format)
        if len(self.shape) == 2:
            return fmt.parts(self.shape[0], self.shape[1])
        if not isinstance(fmt, Plain):
            raise ValueError(f"{self.name} is no matrix: {self.format} cannot store it")
        return {"weight": (fmt.dtype, self.shape)}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A stored tensor; offsets of its parts count from the start of `file`."""

    file: str
    format: str
    shape: tuple[int, ...]
    parts: dict[str, PartPlace]
    crc32: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part_bytes(p) for p in self.parts.values())


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """A layer's experts: expert e is `stride` bytes from `offset0 + e * stride` in `file`.

    `nbytes` of them are used, the rest is padding. `parts`: "gate_proj.codes" -> (dtype, shape,
    offset inside the expert); `format` is that of all three matrices.
    """

    file: str
    format: str
    count: int
    offset0: int
    stride: int
    nbytes: int
    parts: dict[str, PartPlace]
    crc32: tuple[int, ...] = ()


def part_bytes(part: PartPlace) -> int:
    """Bytes of one part."""
    return math.prod(part[1]) * part[0].itemsize


def stored_name(name: str, part: str) -> str:
    """A part's name inside the safetensors file: `weight` is the tensor itself."""
    return name if part == "weight" else f"{name}.{part}"


def plan_tensors(
    file: str, specs: Iterable[TensorSpec]
) -> tuple[bytes, int, dict[str, TensorEntry]]:
    """Header, file size in bytes and entries of a file of single tensors, in the given order."""
    specs = list(specs)
    layout = Layout(ALIGN)
    placed = {
        (spec.name, part): layout.place(stored_name(spec.name, part), dtype, shape)
        for spec in specs
        for part, (dtype, shape) in spec.parts().items()
    }
    header = layout.header({"format": "mimo-pack"}, PAGE)
    entries = {}
    for spec in specs:
        parts: dict[str, PartPlace] = {}
        for part in spec.parts():
            p = placed[spec.name, part]
            parts[part] = (p.dtype, p.shape, len(header) + p.offset)
        entries[spec.name] = TensorEntry(file, spec.format, spec.shape, parts)
    return header, len(header) + layout.end, entries


def plan_experts(
    file: str, layer: int, count: int, fmt: str, shapes: Mapping[str, tuple[int, int]]
) -> tuple[bytes, int, ExpertLayout]:
    """Header, file size in bytes and layout of a layer's experts; `shapes` of gate, up, down."""
    layout = Layout(ALIGN)
    first: dict[str, PartPlace] = {}
    nbytes = 0
    for expert in range(count):
        start = layout.end
        for matrix in EXPERT_PARTS:
            name = expert_name(layer, expert, matrix)
            for part, (dtype, shape) in get_format(fmt).parts(*shapes[matrix]).items():
                placed = layout.place(stored_name(name, part), dtype, shape)
                if expert == 0:
                    first[f"{matrix}.{part}"] = (dtype, shape, placed.offset - start)
        nbytes = layout.end - start
        layout.pad_to(PAGE)
    stride = layout.end // count
    header = layout.header({"format": "mimo-pack"}, PAGE)
    return (
        header,
        len(header) + layout.end,
        ExpertLayout(file, fmt, count, len(header), stride, nbytes, first),
    )


def expert_views(buffer: torch.Tensor, layout: ExpertLayout) -> dict[str, Parts]:
    """Views into an expert's bytes: "gate_proj" | "up_proj" | "down_proj" -> parts; no copy."""
    views: dict[str, Parts] = {matrix: {} for matrix in EXPERT_PARTS}
    for key, part in layout.parts.items():
        matrix, name = key.split(".")
        dtype, shape, offset = part
        flat = buffer[offset : offset + part_bytes(part)]
        views[matrix][name] = flat.view(dtype).view(shape)
    return views


def _place_json(parts: Mapping[str, PartPlace]) -> dict[str, Any]:
    return {
        name: {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "offset": offset}
        for name, (dtype, shape, offset) in parts.items()
    }


def _place(value: Any) -> dict[str, PartPlace]:
    return {
        str(name): (DTYPES[p["dtype"]], _shape(p["shape"]), _count(p["offset"]))
        for name, p in value.items()
    }


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(_count(n) for n in value)


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a count")
    return value


def tensor_to_json(entry: TensorEntry) -> dict[str, Any]:
    """The manifest's form of an entry."""
    return {
        "file": entry.file,
        "format": entry.format,
        "shape": list(entry.shape),
        "parts": _place_json(entry.parts),
        "crc32": entry.crc32,
    }


def tensor_from_json(value: Any) -> TensorEntry:
    """An entry out of a manifest; KeyError, TypeError, ValueError or PackError if it is none."""
    get_format(value["format"])
    return TensorEntry(
        str(value["file"]),
        value["format"],
        _shape(value["shape"]),
        _place(value["parts"]),
        _count(value["crc32"]),
    )


def experts_to_json(layout: ExpertLayout) -> dict[str, Any]:
    """The manifest's form of a layer's experts."""
    return {
        "file": layout.file,
        "format": layout.format,
        "count": layout.count,
        "offset": layout.offset0,
        "stride": layout.stride,
        "nbytes": layout.nbytes,
        "parts": _place_json(layout.parts),
        "crc32": list(layout.crc32),
    }


def experts_from_json(value: Any) -> ExpertLayout:
    """A layout out of a manifest; KeyError, TypeError, ValueError or PackError if it is none."""
    get_format(value["format"])
    layout = ExpertLayout(
        str(value["file"]),
        value["format"],
        _count(value["count"]),
        _count(value["offset"]),
        _count(value["stride"]),
        _count(value["nbytes"]),
        _place(value["parts"]),
        tuple(_count(c) for c in value["crc32"]),
    )
    wanted = {f"{m}.{p}" for m in EXPERT_PARTS for p in FORMATS[layout.format].parts(64, 64)}
    ends = [p[2] + part_bytes(p) for p in layout.parts.values()]
    if set(layout.parts) != wanted or max(ends) > layout.nbytes or layout.nbytes > layout.stride:
        raise ValueError("impossible expert layout")
    if layout.stride % PAGE or layout.offset0 % PAGE or len(layout.crc32) != layout.count:
        raise ValueError("impossible expert layout")
    return layout
