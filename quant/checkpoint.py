"""A Hugging Face checkpoint folder, read row by row: names, shapes, float32 values.

Undoes what the training stored: FP8 blocks with their scales (also the tensor-parallel layout of
the full-attention layers' K and V), MXFP4, fused expert tensors, renamed sinks. Knows no pack and
no layer kinds. Called by `convert`, and by `mimo_local.weights` to run a checkpoint unquantised.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mimo_local.errors import CheckpointError
from quant import mxfp4
from quant.formats import Parts, get_format
from quant.fp8 import BLOCK, Fp8Rows, fused_grid, sharded_grid
from quant.inventory import select
from quant.shards import INDEX, REFETCH, Shards, find_shards
from quant.sources import FUSED_QKV, Source, fused_shards, logical
from quant.tensorfile import Scratch, TensorFile, read_json
from quant.twins import MXFP4_MOST

_SCALE = "_scale_inv"
_SKIPPED = re.compile(r"(^|\.)(visual|vision|audio|speech)")
_FLOATS = ("F64", "F32", "F16", "BF16")
_FP8 = ("F8_E4M3", "F8_E5M2")


@dataclass(frozen=True, slots=True)
class _Scales:
    """The scale tensors an FP8 weight needs and, per weight row, its row in their concatenation."""

    sources: tuple[Source, ...]
    rows: torch.Tensor | None = None
    """None: the plain grid, row r uses scale row r // block."""


class Checkpoint:
    """A checkpoint folder, opened and checked; reading is by row ranges and never cached."""

    config: dict[str, Any]
    tp: int | None
    """Shards of the fused qkv_proj; None where q, k and v are stored apart."""

    def __init__(self, path: Path, config: dict[str, Any], files: list[TensorFile]) -> None:
        """Use `Checkpoint.open`."""
        self.path = path
        self.config = config
        self._files = files
        self._sources: dict[str, Source] = {}
        self._scales: dict[str, _Scales] = {}
        self._own_scale: dict[str, Source] = {}
        self._mxfp4: set[str] = set()
        self._skipped: list[str] = []
        quantization = config.get("quantization_config")
        size = quantization.get("weight_block_size") if isinstance(quantization, dict) else None
        self._block = (BLOCK, BLOCK)
        match size:
            case [int(r), int(c)] if r > 0 and c > 0:
                self._block = (r, c)

    @classmethod
    def open(cls, path: str | Path, *, known: bool = False) -> Checkpoint:
        """Open a folder and check every header in it; raises CheckpointError naming the file.

        `known`: refuse tensors its model does not have, drop drafting layers that are not whole.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise CheckpointError(
                f"no checkpoint folder at {folder}",
                hint="give the folder that holds config.json and the .safetensors files",
            )
        config = read_json(
            folder / "config.json",
            error=CheckpointError,
            hint="a checkpoint folder holds config.json beside its .safetensors files",
        )
        found = find_shards(folder)
        files = [TensorFile(folder / n, error=CheckpointError, hint=REFETCH) for n in found.names]
        self = cls.of_files(folder, config, files, found)
        if known:
            for name in select(config, {n: self.shape(n) for n in self.names()}).unused:
                del self._sources[name]
        return self

    @classmethod
    def of_files(
        cls,
        folder: Path,
        config: dict[str, Any],
        files: list[TensorFile],
        shards: Shards,
    ) -> Checkpoint:
        """A checkpoint of these files, whose headers are known; their data may come later."""
        self = cls(folder, config, files)
        self.tp = fused_shards(files, config, shards.tp_size, self._block[0])
        self._collect(shards.weight_map)
        self._match_mxfp4()
        self._match_scales()
        return self

    def names(self) -> list[str]:
        """All logical tensor names (hub names, no scales, nothing skipped), sorted."""
        return sorted(self._sources)

    def skipped(self) -> list[str]:
        """Tensors of other modalities (vision, audio, speech) that are left out."""
        return sorted(self._skipped)

    def __contains__(self, name: object) -> bool:
        return name in self._sources

    @property
    def nbytes(self) -> int:
        """Stored bytes of all logical tensors with their scales."""
        return sum(self.stored_bytes(name) for name in self._sources)

    def stored_bytes(self, name: str) -> int:
        """Bytes the tensor takes in the checkpoint, its own scales included."""
        scale = self._own_scale.get(name)
        return self._source(name).nbytes + (scale.nbytes if scale else 0)

    def shape(self, name: str) -> tuple[int, ...]:
        """Logical shape."""
        shape = self._source(name).shape
        return (shape[0], 2 * shape[1]) if name in self._mxfp4 else shape

    def dtype(self, name: str) -> str:
        """Stored dtype as safetensors names it ("F8_E4M3", "BF16", "F32", ...), or "MXFP4"."""
        return "MXFP4" if name in self._mxfp4 else self._source(name).dtype

    def read_parts(self, name: str) -> Parts:
        """A tensor stored as BF16 or MXFP4 as the parts of that format: the same bytes."""
        if name in self._mxfp4:
            return self.read_mxfp4(name)
        source = self._source(name)
        return {"weight": source.load(0, source.shape[0] if source.shape else 1)}

    def read(
        self, name: str, rows: slice | None = None, *, scratch: Scratch | None = None
    ) -> torch.Tensor:
        """Float32 values, FP8 scales applied; `rows` selects a range of the first axis (step 1).

        With `scratch` the result is valid until the next read with it. Raises CheckpointError
        naming file and tensor for NaN or infinite scales and weights.
        """
        if name in self._mxfp4:
            return get_format("mxfp4").unpack(self.read_mxfp4(name, rows))
        scratch = scratch or Scratch()
        return self.widen(name, self.load(name, rows, scratch=scratch), scratch)

    def load(
        self, name: str, rows: slice | None = None, *, scratch: Scratch | None = None
    ) -> torch.Tensor | Fp8Rows:
        """Rows of a tensor as stored, FP8 with its scales; may be called in several threads.

        With `scratch` the result is valid until the next load with it. Raises CheckpointError for
        what holds no weights and for scales that are NaN or infinite.
        """
        source = self._source(name)
        start, stop = _range(source, rows)
        if source.dtype not in _FP8 + _FLOATS:
            raise CheckpointError(
                f"{source.file.path.name}: {name} is stored as {source.dtype}, not as weights",
                hint="this version reads FP8 (E4M3), MXFP4, BF16, F16 and F32 checkpoints",
            )
        raw = source.load(start, stop, scratch)
        return self._with_scales(name, raw, start, stop) if source.dtype in _FP8 else raw

    def widen(self, name: str, stored: torch.Tensor | Fp8Rows, scratch: Scratch) -> torch.Tensor:
        """What `load` gave as float32, in `scratch`; CheckpointError for NaN and infinity."""
        values = scratch.take("values", torch.float32, tuple(stored.shape))
        if isinstance(stored, Fp8Rows):
            stored.values(values)
        else:
            values.copy_(stored)
        # One sum is 4 times cheaper than isfinite; only a bad (or huge) sum asks for the full look.
        if not bool(values.sum().isfinite()) and not bool(values.isfinite().all()):
            raise CheckpointError(
                f"{self._source(name).file.path.name}: {name} holds NaN or infinite weights",
                hint=REFETCH,
            )
        return values

    def read_mxfp4(self, name: str, rows: slice | None = None) -> Parts:
        """A tensor whose dtype is "MXFP4" as the parts of format mxfp4: the same numbers, exactly.

        Raises CheckpointError for scales that are NaN or beyond float32.
        """
        source, scale = self._source(name), self._own_scale[name]
        start, stop = _range(source, rows)
        scales = scale.load(start, stop).view(torch.uint8)
        if scales.numel() and int(scales.max()) > MXFP4_MOST:
            raise CheckpointError(
                f"{scale.file.path.name}: {scale.stored} holds NaN or infinite scales", hint=REFETCH
            )
        return {"codes": mxfp4.swap_nibbles(source.load(start, stop)), "scales": scales}

    def fingerprint(self) -> str:
        """Hex sha256 of config, headers and samples of the data: which checkpoint this is."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for file in sorted(self._files, key=lambda f: f.path.name):
            digest.update(f"{file.path.name}:{file.size};".encode())
            for start, stop in file.samples():
                piece = bytearray(stop - start)
                file.read_into(memoryview(piece), start, "the fingerprint")
                digest.update(piece)
        return digest.hexdigest()

    def files_of(self, names: Iterable[str]) -> set[str]:
        """Names of the files that hold these tensors and all scales they need."""
        found: set[str] = set()
        for name in names:
            scales = self._scales[name].sources if name in self._scales else ()
            own = [self._own_scale[name]] if name in self._own_scale else []
            found.update(s.file.path.name for s in (self._source(name), *scales, *own))
        return found

    def sharded(self, names: Iterable[str]) -> list[tuple[str, str, str]]:
        """The (q, k, v) among these tensors whose FP8 scales are not on a grid of their own."""
        found = [n for n in names if n.endswith("_proj.weight") and n in self._scales]
        queries = [n for n in found if ".q_proj." in n and self._scales[n].rows is not None]
        return [(q, q.replace(".q_", ".k_"), q.replace(".q_", ".v_")) for q in queries]

    def files(self) -> list[TensorFile]:
        """The safetensors files."""
        return self._files

    def file_count(self) -> int:
        """How many safetensors files the checkpoint has."""
        return len(self._files)

    def _source(self, name: str) -> Source:
        if name not in self._sources:
            raise CheckpointError(
                f"{name} is not in the checkpoint {self.path.name}",
                hint="a shard may be missing: compare the folder with the hub's file list",
            )
        return self._sources[name]

    def _collect(self, weight_map: dict[str, str] | None) -> None:
        seen: dict[str, str] = {}
        for file in self._files:
            for stored in file.entries:
                here = file.path.name
                if weight_map and weight_map.get(stored, here) != here:
                    continue  # the index decides which file holds a tensor stored twice
                if stored in seen:
                    raise CheckpointError(
                        f"{stored} is in both {seen[stored]} and {here}",
                        hint="remove the file that does not belong to this checkpoint",
                    )
                seen[stored] = here
                if _SKIPPED.search(stored):
                    self._skipped.append(stored)
                elif not stored.endswith((_SCALE, "rotary_emb.inv_freq")):
                    self._sources.update(logical(file, stored, self.config, self.tp))
        for stored, shard in (weight_map or {}).items():
            if seen.get(stored) != shard:
                raise CheckpointError(
                    f"{INDEX} says {stored} is in {shard}, but it is not there", hint=REFETCH
                )

    def _match_mxfp4(self) -> None:
        """Find the matrices of bytes that have a scale for every 16 of them; headers only."""
        for name, source in list(self._sources.items()):
            scale = self._sources.get(name + mxfp4.SCALE)
            if source.dtype != "U8" or len(source.shape) != 2 or scale is None:
                continue
            n, half = source.shape
            wanted = (n, 2 * half // mxfp4.BLOCK)
            if scale.shape != wanted or scale.dtype not in mxfp4.SCALE_DTYPES or half % 16:
                raise CheckpointError(
                    f"{scale.file.path.name}: the scales of {name} {[n, half]} are "
                    f"{scale.dtype} {list(scale.shape)}, MXFP4 needs bytes {list(wanted)}",
                    hint="the file may be damaged, or this version does not know its format",
                )
            self._mxfp4.add(name)
            self._own_scale[name] = self._sources.pop(name + mxfp4.SCALE)

    def _match_scales(self) -> None:
        """Find every FP8 weight's scales and check their shapes; headers only."""
        done: set[str] = set()
        for name, source in self._sources.items():
            if source.dtype not in _FP8 or name in done:
                continue
            if FUSED_QKV.fullmatch(source.stored):
                done.update(self._match_fused(source))
                continue
            trio = [name]
            match = re.fullmatch(r"(.*\.self_attn\.)[qkv](_proj\.weight)", name)
            if match:
                names = [match[1] + c + match[2] for c in "qkv"]
                if all(n in self._sources and self._sources[n].dtype in _FP8 for n in names):
                    trio = names
            self._match(trio)
            done.update(trio)

    def _match_fused(self, source: Source) -> list[str]:
        """Scales of q, k and v that are stored as one; their shapes are known to be right."""
        assert self.tp is not None
        prefix = source.stored.removesuffix("qkv_proj.weight")
        names = [f"{prefix}{part}_proj.weight" for part in "qkv"]
        q, k, v = (self._sources[name].shape[0] for name in names)
        scale = self._scale_of(source)
        rows = sharded_grid(q, k, v, self.tp, self._block[0])
        for name, of_part in zip(names, rows, strict=True):
            self._scales[name] = _Scales((scale,), of_part)
        self._own_scale[names[0]] = scale  # counted once
        return names

    def _match(self, names: list[str]) -> None:
        scales = [self._scale_source(name) for name in names]
        self._own_scale.update(zip(names, scales, strict=True))
        plain = [-(-self._sources[name].shape[0] // self._block[0]) for name in names]
        found = [s.shape[0] for s in scales]
        if found == plain:
            for name, scale in zip(names, scales, strict=True):
                self._scales[name] = _Scales((scale,))
            return
        tp = self.config.get("num_key_value_heads")
        sizes = [self._sources[name].shape[0] for name in names]
        if len(names) == 3 and isinstance(tp, int) and tp > 0 and not any(n % tp for n in sizes):
            grid = fused_grid(sizes[0], sizes[1], sizes[2], tp, self._block[0])
            if found == list(grid.counts):
                for name, rows in zip(names, grid.rows, strict=True):
                    self._scales[name] = _Scales(tuple(scales), rows)
                return
        wrong = next(i for i, (a, b) in enumerate(zip(found, plain, strict=True)) if a != b)
        raise self._scale_error(names[wrong], f"{found[wrong]} rows", f"{plain[wrong]}")

    def _scale_source(self, name: str) -> Source:
        source = self._sources[name]
        if source.stored != name:
            raise CheckpointError(
                f"{source.file.path.name}: {source.stored} is FP8 with shape {source.shape}",
                hint="FP8 is read for matrices as the hub's checkpoints store them",
            )
        return self._scale_of(source)

    def _scale_of(self, source: Source) -> Source:
        """The scales of a stored FP8 tensor, here or in another file."""
        name, wanted = source.stored, source.stored + _SCALE
        holders = (f for f in (source.file, *self._files) if wanted in f.entries)
        file = next(holders, None)
        if file is None:
            raise CheckpointError(
                f"{source.file.path.name}: {name} is FP8 but {wanted} is missing",
                hint="FP8 weights mean nothing without their scales; " + REFETCH,
            )
        if len(source.shape) != 2:
            raise CheckpointError(
                f"{source.file.path.name}: {name} is FP8 with shape {source.shape}",
                hint="FP8 is read for matrices as the hub's checkpoints store them",
            )
        entry, cols = file.entries[wanted], -(-source.shape[1] // self._block[1])
        if len(entry.shape) != 2 or entry.shape[1] != cols or entry.dtype not in _FLOATS:
            raise self._scale_error(name, f"{entry.dtype} {list(entry.shape)}", f"{cols} columns")
        return Source(file, wanted, entry.shape, entry.dtype)

    def _scale_error(self, name: str, found: str, wanted: str) -> CheckpointError:
        source = self._sources.get(name) or self._sources[name.replace("qkv_proj", "q_proj")]
        return CheckpointError(
            f"{source.file.path.name}: the scales of {name} {list(source.shape)} have {found}, "
            f"blocks of {self._block[0]} x {self._block[1]} need {wanted}",
            hint="the file may be damaged, or config.json belongs to another checkpoint",
        )

    def _with_scales(self, name: str, raw: torch.Tensor, start: int, stop: int) -> Fp8Rows:
        """Rows start..stop of an FP8 tensor beside their block scales."""
        scales = self._scales[name]
        table = torch.cat([s.load(0, s.shape[0]).float() for s in scales.sources])
        if not bool(table.isfinite().all()):
            bad = next(s for s in scales.sources if not s.load(0, s.shape[0]).isfinite().all())
            raise CheckpointError(
                f"{bad.file.path.name}: {bad.stored} holds NaN or infinite scales", hint=REFETCH
            )
        if scales.rows is None:
            row_of = torch.arange(start, stop, dtype=torch.int32) // self._block[0]
        else:
            row_of = scales.rows[start:stop].int()
        return Fp8Rows(raw, table, row_of, self._block[1])


def _range(source: Source, rows: slice | None) -> tuple[int, int]:
    """First row and the one after the last of a range of the first axis."""
    start, stop, _ = (rows or slice(None)).indices(source.shape[0] if source.shape else 1)
    return start, max(start, stop)
