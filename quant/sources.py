"""Where a logical tensor's rows lie in the files: the hub's names for what is stored under others.

Undoes fused tensors by arithmetic on rows: transformers' stacked experts, and `qkv_proj`, which
V2.5 and later store one tensor-parallel shard after the other, each [q | k | v]. Knows one file
and one name at a time; no scales. Called by `checkpoint`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mimo_local.errors import CheckpointError
from quant.inventory import Qkv, qkv_of
from quant.tensorfile import DTYPES, Scratch, TensorFile, bytes_of

FUSED_QKV = re.compile(r"(.*\.self_attn\.)qkv_proj\.weight")
_FUSED_EXPERTS = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)")


@dataclass(frozen=True, slots=True)
class Source:
    """Where a logical tensor lies: rows are counted in the stored tensor seen as a matrix.

    From `row` on, all in one; or in runs of `run` rows, `step` rows from one start to the next.
    """

    file: TensorFile
    stored: str
    shape: tuple[int, ...]
    dtype: str
    row: int = 0
    run: int = 0
    step: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the values, without scales."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def load(self, start: int, stop: int, scratch: Scratch | None = None) -> torch.Tensor:
        """Rows start..stop in the stored dtype."""
        dtype = DTYPES[self.dtype]
        tail = self.shape[1:]
        width = math.prod(tail) * dtype.itemsize
        first = self.file.entries[self.stored].offset + self.row * width
        shape = (stop - start, *tail) if self.shape else ()
        if not self.run:
            return self.file.load(first + start * width, dtype, shape, self.stored, scratch)
        out = (scratch or Scratch()).take("raw", dtype, shape)
        at = start
        while at < stop:
            run, within = divmod(at, self.run)
            n = min(self.run - within, stop - at)
            view = bytes_of(out[at - start : at - start + n])
            self.file.read_into(view, first + (run * self.step + within) * width, self.stored)
            at += n
        return out


def logical(
    file: TensorFile, stored: str, config: Mapping[str, Any], tp: int | None
) -> Iterator[tuple[str, Source]]:
    """The hub's names for one stored tensor; `tp`: shards of a fused qkv_proj."""
    entry = file.entries[stored]
    if (match := FUSED_QKV.fullmatch(stored)) and len(entry.shape) == 2:
        assert tp is not None  # `fused_shards` has said so, or refused
        yield from _qkv(file, stored, qkv_of(config, match[1]), tp, match[1])
        return
    fused = _FUSED_EXPERTS.fullmatch(stored)
    if fused is None or len(entry.shape) != 3:
        name = re.sub(r"\.self_attn\.sinks$", ".self_attn.attention_sink_bias", stored)
        yield name, Source(file, stored, entry.shape, entry.dtype)
        return
    experts, rows, cols = entry.shape
    parts = ("gate_proj", "up_proj") if fused[2] == "gate_up_proj" else ("down_proj",)
    n = rows // len(parts)
    for expert in range(experts):
        for i, part in enumerate(parts):
            name = f"{fused[1]}.{expert}.{part}.weight"
            yield name, Source(file, stored, (n, cols), entry.dtype, expert * rows + i * n)


def _qkv(
    file: TensorFile, stored: str, qkv: Qkv, tp: int, prefix: str
) -> Iterator[tuple[str, Source]]:
    entry = file.entries[stored]
    per_shard = [n // tp for n in qkv.rows]
    start = 0
    for part, total, n in zip("qkv", qkv.rows, per_shard, strict=True):
        shape = (total, entry.shape[1])
        place = {"row": start, "run": n, "step": sum(per_shard)}
        yield f"{prefix}{part}_proj.weight", Source(file, stored, shape, entry.dtype, **place)
        start += n


def fused_shards(
    files: list[TensorFile], config: Mapping[str, Any], declared: int | None, block: int
) -> int | None:
    """How many tensor-parallel shards the fused qkv_proj are made of; None if there are none.

    `declared`: what the index says. The shapes of scales must agree with it, and decide where it
    is silent: a shard has ceil(rows / block) of them. CheckpointError where they contradict or
    leave it open.
    """
    found: dict[str, tuple[TensorFile, Qkv, int | None]] = {}
    shapes = {name: entry.shape for file in files for name, entry in file.entries.items()}
    for file in files:
        for stored, entry in file.entries.items():
            match = FUSED_QKV.fullmatch(stored)
            if match is None or len(entry.shape) != 2:
                continue
            qkv = qkv_of(config, match[1])
            if sum(qkv.rows) != entry.shape[0]:
                raise CheckpointError(
                    f"{file.path.name}: {stored} has {entry.shape[0]} rows, config.json says "
                    f"{' + '.join(map(str, qkv.rows))}",
                    hint="config.json and the weights belong to different checkpoints",
                )
            scale = shapes.get(stored + "_scale_inv")
            found[stored] = (file, qkv, scale[0] if scale else None)
    if not found:
        return None
    possible = set(range(1, min(qkv.kv_heads for _, qkv, _ in found.values()) + 1))
    for stored, (file, qkv, scale_rows) in found.items():
        fitting = {tp for tp in possible if fits(qkv, scale_rows, tp, block)}
        if not fitting or (declared is not None and declared not in fitting):
            raise CheckpointError(
                f"{file.path.name}: the shape of {stored} and its scales "
                + (f"fits {_listed(fitting)} shards" if fitting else "fits no number of shards")
                + ("" if declared is None else f", the index says tp_size {declared}"),
                hint="the index belongs to another checkpoint, or a tool has rewritten the weights",
            )
        possible = fitting
    if declared is None and len(possible) > 1:
        raise CheckpointError(
            f"qkv_proj is stored in tensor-parallel shards, and nothing says in how many: "
            f"{_listed(possible)} would fit",
            hint='fetch model.safetensors.index.json: its metadata says "tp_size"',
        )
    return declared if declared is not None else possible.pop()


def fits(qkv: Qkv, scale_rows: int | None, tp: int, block: int) -> bool:
    """Whether so many shards hold whole heads and need just these rows of scales."""
    if qkv.kv_heads % tp or any(n % tp for n in qkv.rows):
        return False
    return scale_rows is None or scale_rows == tp * -(-(sum(qkv.rows) // tp) // block)


def _listed(numbers: set[int]) -> str:
    return " or ".join(map(str, sorted(numbers)))
