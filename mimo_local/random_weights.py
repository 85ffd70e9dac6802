"""Weights that cost no download: the real model's shapes in the stored formats, random numbers.

Codes go straight into the parts a pack would hold, with scales that keep activations near one, so a
layer of 256 experts is there in seconds. Implements `weights.Weights`, so that Model and
ExpertStore are the real ones. Knows no measurement. Called by `shape_bench` and its tests.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import torch

from mimo_local.config import ModelConfig
from mimo_local.errors import UsageError
from mimo_local.weights import EXPERT_PARTS, Embedding, Expert, QuantLinear, shapes
from quant.buffers import huge_empty, huge_tensor
from quant.formats import NF4_CODES, Format, Parts, get_format
from quant.inventory import role_of
from quant.layout import ExpertLayout, expert_views, plan_experts

EXPERT_FORMATS: Final = ("nf4", "mxfp4", "int8")
REST_FORMATS: Final = ("int8", "nf4", "bf16")
MAX_LAYERS: Final = 48
MIN_VOCAB: Final = 256
_POOL: Final = 1 << 25  # bytes drawn once; parts are copies from random places in it
# Root mean square of a format's values when all codes are equally likely; E2M1's are
# 0, 0.5, 1, 1.5, 2, 3, 4 and 6 and their negatives.
_RMS: Final = {
    "nf4": math.sqrt(sum(code * code for code in NF4_CODES) / 16),
    "mxfp4": math.sqrt(68.5 / 8),
    "int8": 127 / math.sqrt(3),
}
# A model like the real one with everything small, for tests: same kinds of layers, same pattern.
_TINY: Final = {
    "hidden_size": 128, "num_attention_heads": 8, "swa_num_attention_heads": 8,
    "num_key_value_heads": 1, "swa_num_key_value_heads": 2, "head_dim": 48, "swa_head_dim": 48,
    "v_head_dim": 32, "swa_v_head_dim": 32, "intermediate_size": 256, "moe_intermediate_size": 64,
    "n_routed_experts": 16, "num_experts_per_tok": 4, "sliding_window": 16,
    "sliding_window_size": 16, "attention_chunk_size": 16,
}  # fmt: skip
SHAPES: Final[dict[str, dict[str, Any]]] = {"real": {}, "tiny": _TINY}


def shape_config(layers: int, vocab: int, *, shape: str = "real") -> ModelConfig:
    """The real config with its first `layers` layers (1..48) and a vocabulary of `vocab` (256 up).

    `shape` is a key of SHAPES. Raises UsageError.
    """
    if shape not in SHAPES:
        raise UsageError(f"there is no shape `{shape}`", hint="the shape to measure is `real`")
    if not 1 <= layers <= MAX_LAYERS:
        raise UsageError(
            f"{layers} layers cannot be made", hint=f"the model has 1 to {MAX_LAYERS} layers"
        )
    data = json.loads(Path(__file__).with_name("real_config.json").read_text(encoding="utf-8"))
    if not MIN_VOCAB <= vocab <= data["vocab_size"]:
        raise UsageError(
            f"a vocabulary of {vocab} cannot be made",
            hint=f"give {MIN_VOCAB} to {data['vocab_size']}, which is the real one",
        )
    data |= SHAPES[shape] | {"vocab_size": vocab, "num_hidden_layers": layers}
    for key in ("hybrid_layer_pattern", "moe_layer_freq"):
        data[key] = data[key][:layers]
    config = ModelConfig.from_dict(data)
    return dataclasses.replace(config, n_mtp_layers=0, mtp_layer=None)


class RandomWeights:
    """`Weights` of random numbers; the same for the same arguments."""

    kind: Literal["pack", "checkpoint"] = "pack"

    def __init__(
        self, config: ModelConfig, *, experts: str = "nf4", rest: str = "int8", seed: int = 0
    ) -> None:
        """Makes nothing yet but up to 32 MiB of random bytes; UsageError for an unknown format."""
        _check_format("experts", experts, EXPERT_FORMATS)
        _check_format("the rest", rest, REST_FORMATS)
        self.config, self.expert_format, self.rest = config, get_format(experts), get_format(rest)
        self._shapes = dict(shapes(config, experts=False))
        self._torch = torch.Generator().manual_seed(seed)
        self._random = random.Random(seed)
        self._layout = _expert_layout(config, experts) if config.is_moe else None
        pool = min(_POOL, max(1 << 16, self.nbytes))
        drawn = torch.randint(0, 256, (pool,), dtype=torch.uint8, generator=self._torch)
        self._codes = drawn.masked_fill_(drawn == 128, 129)  # as int8 -128, which is no code
        self._scales: dict[tuple[str, float], torch.Tensor] = {}
        self._biases: dict[int, torch.Tensor] = {}

    # -- Weights -------------------------------------------------------------------------------

    def has(self, name: str) -> bool:
        """Whether the main model has such a tensor outside its experts."""
        return name in self._shapes

    def tensor(self, name: str) -> torch.Tensor:
        """Norms near one, a router of unit scores, sinks of a usual size, election biases of 0."""
        shape = self._shapes[name]
        if name.endswith("e_score_correction_bias"):
            # Kept: `steer` writes into it.
            return self._biases.setdefault(_layer(name), torch.zeros(shape))
        values = torch.randn(shape, generator=self._torch)
        if name.endswith("norm.weight"):
            return values.mul_(0.1).add_(1.0)
        return values.mul_(shape[1] ** -0.5) if len(shape) == 2 else values

    def linear(self, name: str) -> QuantLinear:
        """A matrix in the format of the rest; the embedding in int8 as packs have it."""
        fmt = self._format(name)
        rows, cols = self._shapes[name]
        std = 1.0 if name.endswith("embed_tokens.weight") else cols**-0.5
        parts = {
            part: huge_tensor(shape, dtype)
            for part, (dtype, shape) in fmt.parts(rows, cols).items()
        }
        self._fill(fmt, parts, std)
        return QuantLinear(fmt, parts, rows, cols)

    def embedding(self, name: str) -> Embedding:
        """A matrix to be read by rows."""
        return Embedding(self.linear(name))

    def expert(self, layer: int, e: int) -> Expert:
        """One expert: views of one new buffer, laid out as in a pack."""
        if self._layout is None:
            raise KeyError(f"layer {layer} has no experts")
        views = expert_views(huge_empty(self._layout.stride), self._layout)
        made = []
        for matrix, (rows, cols) in _expert_shapes(self.config).items():
            self._fill(self.expert_format, views[matrix], cols**-0.5)
            made.append(QuantLinear(self.expert_format, views[matrix], rows, cols))
        return Expert(*made)

    @property
    def expert_nbytes(self) -> int:
        """Bytes of all experts."""
        layers = sum(spec.mlp == "moe" for spec in self.config.layers)
        return layers * self.config.n_experts * self.one_expert_nbytes

    @property
    def nbytes(self) -> int:
        """Bytes in memory once the model is there."""
        return self.expert_nbytes + sum(map(self._nbytes, self._shapes))

    # -- for the measurement -------------------------------------------------------------------

    @property
    def one_expert_nbytes(self) -> int:
        """Bytes of one expert."""
        shapes = _expert_shapes(self.config).values() if self.config.is_moe else ()
        return sum(self.expert_format.nbytes(*shape) for shape in shapes)

    @property
    def expert_layout(self) -> ExpertLayout | None:
        """How a layer's experts lie in memory; None for a model without."""
        if self._layout is None:
            return None
        return dataclasses.replace(self._layout, count=self.config.n_experts)

    def touched(self) -> dict[str, int]:
        """Bytes a decode step reads: attention, dense, head, experts, exact (routers, norms).

        The one row of the embedding is left out.
        """
        size = dict.fromkeys(("attention", "dense", "head", "experts", "exact"), 0)
        for name, shape in self._shapes.items():
            role = role_of(name, shape)
            if role != "embedding":
                size[role] += self._nbytes(name)
        layers = sum(spec.mlp == "moe" for spec in self.config.layers)
        size["experts"] = layers * self.config.experts_per_token * self.one_expert_nbytes
        return size

    def active(self) -> dict[str, int]:
        """Weights a token multiplies, by the same names; vectors left out."""
        count = dict.fromkeys(("attention", "dense", "head", "experts", "exact"), 0)
        for name, shape in self._shapes.items():
            role = role_of(name, shape)
            if role != "embedding" and len(shape) == 2:
                count[role] += math.prod(shape)
        layers = sum(spec.mlp == "moe" for spec in self.config.layers)
        one = 3 * self.config.hidden_size * self.config.moe_intermediate_size
        count["experts"] = layers * self.config.experts_per_token * one
        return count

    def steer(self, choose: Callable[[], Sequence[int]] | None) -> None:
        """Send every row of each mixture layer to the experts `choose` gives; None: as routed.

        Works on models already made of these weights, by the election biases they hold.
        """
        for bias in self._biases.values():
            bias.zero_()
            if choose is not None:
                bias[list(choose())] = 8.0  # scores are below 1

    # -- helpers -------------------------------------------------------------------------------

    def _format(self, name: str) -> Format:
        return get_format("int8") if name.endswith("embed_tokens.weight") else self.rest

    def _nbytes(self, name: str) -> int:
        shape = self._shapes[name]
        if role_of(name, shape) == "exact":
            return 4 * math.prod(shape)
        return self._format(name).nbytes(shape[0], shape[1])

    def _fill(self, fmt: Format, parts: Parts, std: float) -> None:
        """Random content of a matrix whose weights have this standard deviation."""
        for name, part in parts.items():
            if name == "weight":
                part.normal_(0, std, generator=self._torch)
            elif name == "codes":
                self._copy(self._codes.view(part.dtype), part)
            else:
                self._copy(self._scale_pool(fmt.name, std, part.dtype), part)

    def _copy(self, pool: torch.Tensor, part: torch.Tensor) -> None:
        flat, done = part.view(-1), 0
        while done < flat.numel():
            start = self._random.randrange(pool.numel() // 2)
            n = min(flat.numel() - done, pool.numel() - start)
            flat[done : done + n] = pool[start : start + n]
            done += n

    def _scale_pool(self, fmt: str, std: float, dtype: torch.dtype) -> torch.Tensor:
        key = (fmt, std)
        if key not in self._scales:
            scale = std / _RMS[fmt]
            if dtype == torch.uint8:  # E8M0: a power of two, of the two around the wanted one
                low = 127 + math.floor(math.log2(scale))
                pool = torch.randint(low, low + 2, (1 << 20,), generator=self._torch)
            else:
                pool = torch.rand(1 << 20, generator=self._torch).add_(0.5).mul_(scale)
            self._scales[key] = pool.to(dtype)
        return self._scales[key]


def _layer(name: str) -> int:
    return int(name.split(".")[2])


def _expert_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    narrow, wide = config.moe_intermediate_size, config.hidden_size
    return dict(zip(EXPERT_PARTS, ((narrow, wide), (narrow, wide), (wide, narrow)), strict=True))


def _expert_layout(config: ModelConfig, fmt: str) -> ExpertLayout:
    return plan_experts("", 0, 1, fmt, _expert_shapes(config))[2]


def _check_format(what: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise UsageError(
            f"`{name}` is no format for {what} here", hint=f"formats: {', '.join(known)}"
        )
