"""The weights of a model by name: from a pack, or straight from an unquantised or FP8 checkpoint.

Turns names into `QuantLinear`, `Embedding`, `Expert` and plain tensors; `quant` knows the bytes
behind them. Knows no forward pass and no placement. Opened by `engine` and `api`, read by `model`
and `experts`. Everything a config promises is checked against the headers before anything is read.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

import torch

from mimo_local import kernels
from mimo_local.config import LayerSpec, ModelConfig
from mimo_local.errors import CheckpointError, ModelFilesError, PackError
from mimo_local.events import Progress
from quant.buffers import huge_tensor
from quant.checkpoint import Checkpoint
from quant.formats import Format, Parts, get_format
from quant.pack import JOURNAL, Pack, expert_views
from quant.writer import MANIFEST

OnProgress: TypeAlias = Callable[[Progress], None]

_STORED = {"F32": "f32", "F16": "f32", "F64": "f32", "BF16": "bf16", "MXFP4": "mxfp4"}
"""Checkpoint dtype -> the format it runs in. FP8 times its scales fits no 8 bits: bf16."""
_DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}
EXPERT_PARTS = ("gate_proj", "up_proj", "down_proj")


class QuantLinear:
    """A stored matrix W (rows, cols) that multiplies: x (T, cols) f32 -> x W^T (T, rows) f32."""

    __slots__ = ("cols", "format", "parts", "rows")

    def __init__(self, fmt: Format, parts: Parts, rows: int, cols: int) -> None:
        self.format, self.parts, self.rows, self.cols = fmt, parts, rows, cols

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """X (T, cols) f32 -> (T, rows) f32."""
        return self.format.matmul(x, self.parts)

    def matrix(self) -> kernels.Matrix:
        """The addresses of the parts, which this object keeps alive."""
        self.parts = {name: part.contiguous() for name, part in self.parts.items()}
        return self.format.matrix(self.parts)

    def below(self, first: int) -> QuantLinear:
        """The matrix of the rows from `first` on; the bytes are shared."""
        parts = {name: part[first:] for name, part in self.parts.items()}
        return QuantLinear(self.format, parts, self.rows - first, self.cols)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts.values())


def stack(linears: list[QuantLinear]) -> QuantLinear:
    """One matrix whose rows are those of all: one product instead of several. Copies the bytes.

    Matrices stored in different formats are widened to f32 first.
    """
    first = linears[0]
    fmt, parts = first.format, [linear.parts for linear in linears]
    if any(linear.format.name != fmt.name for linear in linears):
        fmt = get_format("f32")
        parts = [{"weight": linear.format.unpack(linear.parts)} for linear in linears]
    joined = {name: _cat([p[name] for p in parts]) for name in parts[0]}
    return QuantLinear(fmt, joined, sum(linear.rows for linear in linears), first.cols)


def _cat(tensors: list[torch.Tensor]) -> torch.Tensor:
    first, rows = tensors[0], sum(tensor.shape[0] for tensor in tensors)
    return torch.cat(tensors, out=huge_tensor((rows, *first.shape[1:]), first.dtype))


class Embedding:
    """A stored matrix read by rows."""

    __slots__ = ("linear",)

    def __init__(self, linear: QuantLinear) -> None:
        self.linear = linear

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids (T,) int64 -> (T, D) f32; only those rows are unpacked."""
        parts = {name: part.index_select(0, ids) for name, part in self.linear.parts.items()}
        return self.linear.format.unpack(parts)


@dataclasses.dataclass(frozen=True, slots=True)
class Expert:
    """One expert's three matrices: down(silu(gate x) * up x)."""

    gate: QuantLinear
    up: QuantLinear
    down: QuantLinear

    @property
    def nbytes(self) -> int:
        """Bytes of the three."""
        return self.gate.nbytes + self.up.nbytes + self.down.nbytes


class Weights(Protocol):
    """Where a model's numbers come from."""

    config: ModelConfig
    kind: Literal["pack", "checkpoint"]

    @property
    def nbytes(self) -> int:
        """Bytes in memory once the main model is loaded whole."""

    @property
    def expert_nbytes(self) -> int:
        """Those of all experts."""

    def has(self, name: str) -> bool:
        """Whether the tensor is there."""

    def tensor(self, name: str) -> torch.Tensor:
        """A small tensor as float32."""

    def linear(self, name: str) -> QuantLinear:
        """A matrix as stored."""

    def embedding(self, name: str) -> Embedding:
        """A matrix to be read by rows."""

    def expert(self, layer: int, e: int) -> Expert:
        """One expert, its bytes freshly read."""


def open_weights(
    path: Path | str,
    *,
    on_progress: OnProgress | None = None,
    window: int | None = None,
    dtype: torch.dtype | None = None,
) -> PackWeights | CheckpointWeights:
    """Open a pack or a checkpoint folder and check that it holds what its config promises.

    `window` (keys incl. self) overrides the config's. `dtype` (float32 or bfloat16) is what a
    checkpoint's matrices are held in; by default as stored, FP8 as bfloat16. Reads headers only.
    Raises ConfigError, PackError, CheckpointError.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ModelFilesError(
            f"no model folder at `{folder}`",
            hint="give the folder of a pack (`mimo quantize` makes one) or of a checkpoint",
        )
    if on_progress is not None:
        on_progress(Progress("opening the model", 0, 1, "files"))
    config = ModelConfig.from_dir(folder, window=window)
    opened: PackWeights | CheckpointWeights
    if (folder / MANIFEST).exists() or (folder / JOURNAL).exists():
        opened = PackWeights(Pack.open(folder), config)
    else:
        opened = CheckpointWeights(Checkpoint.open(folder, known=True), config, dtype)
    if on_progress is not None:
        on_progress(Progress("opening the model", 1, 1, "files"))
    return opened


class CheckpointWeights:
    """Weights over a Hugging Face checkpoint."""

    kind: Literal["pack", "checkpoint"] = "checkpoint"

    def __init__(
        self, checkpoint: Checkpoint, config: ModelConfig, dtype: torch.dtype | None = None
    ) -> None:
        self.checkpoint = checkpoint
        self.config = _with_mtp(config, self.has)
        self.asked = None if dtype is None else _DTYPES[dtype]
        _check(
            config,
            lambda name: checkpoint.shape(name) if name in checkpoint else None,
            CheckpointError,
            "fetch the missing files of the checkpoint again",
        )

    def has(self, name: str) -> bool:
        """Whether the tensor is there."""
        return name in self.checkpoint

    def tensor(self, name: str) -> torch.Tensor:
        """A small tensor as float32."""
        return self.checkpoint.read(name)

    def _format(self, name: str) -> str:
        return self.asked or _STORED.get(self.checkpoint.dtype(name), "bf16")

    def linear(self, name: str) -> QuantLinear:
        """A matrix in its stored precision, MXFP4 as it is; FP8 with its scales applied."""
        fmt = get_format(self._format(name))
        if self.asked is None and self.checkpoint.dtype(name) in ("BF16", "MXFP4"):
            parts = self.checkpoint.read_parts(name)
        else:
            parts = fmt.pack(self.checkpoint.read(name))
        return QuantLinear(fmt, parts, *self.checkpoint.shape(name))

    def embedding(self, name: str) -> Embedding:
        """A matrix to be read by rows."""
        return Embedding(self.linear(name))

    def expert(self, layer: int, e: int) -> Expert:
        """One expert, its bytes freshly read."""
        return Expert(*(self.linear(expert_name(layer, e, part)) for part in EXPERT_PARTS))

    @property
    def expert_nbytes(self) -> int:
        """Bytes in memory of all experts."""
        return self._sum(experts=True)

    @property
    def nbytes(self) -> int:
        """Bytes in memory once the main model is loaded whole."""
        return self._sum(experts=True) + self._sum(experts=False)

    def _sum(self, *, experts: bool) -> int:
        total = 0
        for name, shape in shapes(self.config, experts=experts):
            fmt = get_format(self._format(name) if len(shape) == 2 else "f32")
            total += fmt.nbytes(math.prod(shape[:-1]), shape[-1])
        return total


class PackWeights:
    """Weights over a pack."""

    kind: Literal["pack", "checkpoint"] = "pack"

    def __init__(self, pack: Pack, config: ModelConfig) -> None:
        self.pack = pack
        self.config = _with_mtp(config, self.has)
        _check(
            config,
            lambda name: pack.tensors[name].shape if name in pack.tensors else None,
            PackError,
            "run `mimo verify` on the pack, and `mimo quantize` again if it fails",
            experts=False,
        )
        for spec in config.layers:
            if spec.mlp == "moe":
                self._check_experts(spec)

    def _check_experts(self, spec: LayerSpec) -> None:
        layout = self.pack.expert_layout(spec.index)
        fmt, found = get_format(layout.format), {n: p[:2] for n, p in layout.parts.items()}
        wanted = {
            f"{matrix}.{part}": (dtype, shape)
            for matrix, (rows, cols) in _mlp_shapes(spec.intermediate, self.config.hidden_size)
            for part, (dtype, shape) in fmt.parts(rows, cols).items()
        }
        if layout.count != self.config.n_experts or found != wanted:
            raise PackError(
                f"layer {spec.index} holds {layout.count} experts of other shapes or number than "
                f"the config's {self.config.n_experts} x {spec.intermediate}",
                hint="config.json and weights are not of one model; make the pack again",
            )

    def has(self, name: str) -> bool:
        """Whether the tensor is there (experts have their own accessor)."""
        return name in self.pack.tensors

    def tensor(self, name: str) -> torch.Tensor:
        """A small tensor as float32."""
        return get_format(self.pack.tensors[name].format).unpack(self.pack.read(name))

    def linear(self, name: str) -> QuantLinear:
        """A matrix as packed."""
        entry = self.pack.tensors[name]
        rows, cols = entry.shape
        return QuantLinear(get_format(entry.format), self.pack.read(name), rows, cols)

    def embedding(self, name: str) -> Embedding:
        """A matrix to be read by rows."""
        return Embedding(self.linear(name))

    def expert(self, layer: int, e: int) -> Expert:
        """One expert: views of one freshly read, contiguous buffer."""
        layout = self.pack.expert_layout(layer)
        views = expert_views(self.pack.read_expert(layer, e), layout)
        fmt, config = get_format(layout.format), self.config
        narrow, wide = config.moe_intermediate_size, config.hidden_size
        return Expert(
            QuantLinear(fmt, views["gate_proj"], narrow, wide),
            QuantLinear(fmt, views["up_proj"], narrow, wide),
            QuantLinear(fmt, views["down_proj"], wide, narrow),
        )

    @property
    def expert_nbytes(self) -> int:
        """Bytes in memory of all experts."""
        layers = [spec.index for spec in self.config.layers if spec.mlp == "moe"]
        return sum(self.pack.expert_layout(i).stride for i in layers) * self.config.n_experts

    @property
    def nbytes(self) -> int:
        """Bytes in memory once the main model is loaded whole."""
        total = self.expert_nbytes
        for name, _ in shapes(self.config, experts=False):
            for dtype, shape, _ in self.pack.tensors[name].parts.values():
                total += math.prod(shape) * dtype.itemsize
        return total


# ---- names and shapes ----------------------------------------------------------------------------


def expert_name(layer: int, e: int, part: str) -> str:
    """Tensor name of one matrix of one expert."""
    return f"model.layers.{layer}.mlp.experts.{e}.{part}.weight"


def shapes(config: ModelConfig, *, experts: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every tensor of the main model that is, or is not, an expert's."""
    hidden = config.hidden_size
    if not experts:
        yield "model.embed_tokens.weight", (config.vocab_size, hidden)
        yield "model.norm.weight", (hidden,)
        if not config.tie_embeddings:
            yield "lm_head.weight", (config.vocab_size, hidden)
    for spec in config.layers:
        if not experts:
            yield from _layer_shapes(f"model.layers.{spec.index}.", spec, config)
        elif spec.mlp == "moe":
            for e in range(config.n_experts):
                for part, shape in _mlp_shapes(spec.intermediate, hidden):
                    yield expert_name(spec.index, e, part), shape


def _mlp_shapes(width: int, hidden: int) -> Iterator[tuple[str, tuple[int, int]]]:
    yield "gate_proj", (width, hidden)
    yield "up_proj", (width, hidden)
    yield "down_proj", (hidden, width)


def _layer_shapes(
    prefix: str, spec: LayerSpec, config: ModelConfig
) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden = config.hidden_size
    yield prefix + "input_layernorm.weight", (hidden,)
    yield prefix + "post_attention_layernorm.weight", (hidden,)
    yield prefix + "self_attn.q_proj.weight", (spec.heads * spec.head_dim, hidden)
    yield prefix + "self_attn.k_proj.weight", (spec.kv_heads * spec.head_dim, hidden)
    yield prefix + "self_attn.v_proj.weight", (spec.kv_heads * spec.v_head_dim, hidden)
    yield prefix + "self_attn.o_proj.weight", (hidden, spec.heads * spec.v_head_dim)
    if spec.has_sink:
        yield prefix + "self_attn.attention_sink_bias", (spec.heads,)
    if spec.mlp == "moe":
        yield prefix + "mlp.gate.weight", (config.n_experts, hidden)
        yield prefix + "mlp.gate.e_score_correction_bias", (config.n_experts,)
    else:
        for part, shape in _mlp_shapes(spec.intermediate, hidden):
            yield f"{prefix}mlp.{part}.weight", shape


def _with_mtp(config: ModelConfig, has: Callable[[str], bool]) -> ModelConfig:
    """The config with as many MTP layers as there are tensors for."""
    n = 0
    while n < config.n_mtp_layers and has(f"model.mtp.layers.{n}.eh_proj.weight"):
        n += 1
    return dataclasses.replace(config, n_mtp_layers=n, mtp_layer=config.mtp_layer if n else None)


def _check(
    config: ModelConfig,
    shape_of: Callable[[str], tuple[int, ...] | None],
    error: type[ModelFilesError],
    hint: str,
    *,
    experts: bool = True,
) -> None:
    """Refuse weights that lack a tensor the config promises, or hold it in another shape."""
    missing = []
    for kind in (False, True) if experts else (False,):
        for name, shape in shapes(config, experts=kind):
            found = shape_of(name)
            if found is None:
                missing.append(name)
            elif tuple(found) != shape:
                raise error(
                    f"`{name}` has shape {tuple(found)}, the config says {shape}",
                    hint="config.json and weights are not of one model; fetch both again",
                )
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        named = ", ".join(f"`{name}`" for name in missing[:3])
        raise error(f"{len(missing)} tensors are missing: {named}{more}", hint=hint)
