"""One layer: attention, then an MLP or experts, each on the normed residual stream.

Two ways through the same layer: native calls of half a layer each (`blocks`), and the torch way,
taken where there is no library, against which the calls are tested. Constant after loading: caches
come with the step. Called by `model` for all layers of a few rows, by `prefill` layer by layer.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
import torch.nn.functional as F

from mimo_local import kernels, ops
from mimo_local.blocks import (
    KV_DTYPES,
    NativeAttention,
    NativeMixture,
    NativeRouting,
    SplitMixture,
    mlp_of,
    sequences_of,
)
from mimo_local.cache import KVCache
from mimo_local.config import Attention as Kind
from mimo_local.config import LayerSpec, ModelConfig
from mimo_local.experts.store import Store
from mimo_local.weights import QuantLinear, Weights, stack

Trace: TypeAlias = Callable[[str, torch.Tensor], None]


@dataclass(frozen=True, slots=True)
class Step:
    """What the layers of one forward share."""

    caches: list[KVCache]
    counts: list[int]
    rope: dict[Kind, tuple[torch.Tensor, torch.Tensor]]
    """cos and sin (T, 1, r) by kind of attention."""
    sequences: ctypes.Array[kernels.Sequence] | None
    """The caches as the native library sees them; None where it cannot be used."""
    at: int = 0
    """Rows of each cache that came before these and are not committed."""

    @classmethod
    def of(
        cls,
        caches: list[KVCache],
        counts: list[int],
        ropes: dict[Kind, ops.RopeTable],
        device: torch.device,
        at: int = 0,
    ) -> Step:
        """The next `counts` rows of these caches."""
        spans = [(cache.length + at, n) for cache, n in zip(caches, counts, strict=True)]
        rope = {kind: table.rows(spans) for kind, table in ropes.items()}
        sequences = sequences_of(caches, counts, at) if served(caches, device) else None
        return cls(caches, counts, rope, sequences, at)


def served(caches: list[KVCache], device: torch.device) -> bool:
    """Whether the library serves them: this machine's memory, one dtype of keys and values."""
    if kernels.get() is None or device.type != "cpu":
        return False
    dtype = caches[0].dtype
    return dtype in KV_DTYPES and all(cache.dtype == dtype for cache in caches)


class Attention:
    """Grouped attention of one layer; queries, keys and values come from one product."""

    def __init__(self, weights: Weights, spec: LayerSpec, config: ModelConfig, prefix: str) -> None:
        """`prefix`: of the layer's tensors; `spec.index`: its number in the caches it is given."""
        prefix += "self_attn."
        self.spec = spec
        self.qkv = stack([weights.linear(f"{prefix}{part}_proj.weight") for part in "qkv"])
        self.out = weights.linear(prefix + "o_proj.weight")
        self.sink = weights.tensor(prefix + "attention_sink_bias") if spec.has_sink else None
        self.value_scale = config.value_scale

    def __call__(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        """x (T, D) normed -> (T, D); appends to every sequence's cache."""
        spec, n = self.spec, x.shape[0]
        joint = self.qkv(x)
        turned = (spec.heads + spec.kv_heads) * spec.head_dim
        qk = joint[:, :turned].view(n, -1, spec.head_dim)
        ops.rotate_(qk, *step.rope[spec.attention])
        q, k = qk[:, : spec.heads], qk[:, spec.heads :]
        v = joint[:, turned:].view(n, spec.kv_heads, spec.v_head_dim)
        if self.value_scale != 1.0:
            v.mul_(self.value_scale)
        if len(step.caches) == 1:
            return self.out(self._attend(step.at, step.caches[0], q, k, v))
        pieces = zip(step.caches, *(torch.split(y, step.counts) for y in (q, k, v)), strict=True)
        return self.out(torch.cat([self._attend(step.at, *piece) for piece in pieces]))

    def remember(self, x: torch.Tensor, step: Step) -> None:
        """x (T, D) normed, of one sequence: its keys and values into the cache, nothing more."""
        spec, n = self.spec, x.shape[0]
        joint = self.kv(x)
        k = joint[:, : spec.kv_heads * spec.head_dim].view(n, -1, spec.head_dim)
        ops.rotate_(k, *step.rope[spec.attention])
        v = joint[:, spec.kv_heads * spec.head_dim :].view(n, -1, spec.v_head_dim)
        if self.value_scale != 1.0:
            v.mul_(self.value_scale)
        step.caches[0].append(spec.index, k, v, at=step.at)

    @cached_property
    def kv(self) -> QuantLinear:
        """The rows of `qkv` that make keys and values."""
        return self.qkv.below(self.spec.heads * self.spec.head_dim)

    def _attend(
        self, at: int, cache: KVCache, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        view = cache.append(self.spec.index, k, v, at=at)
        keys, values = view.numbers()
        return ops.attention(
            q, keys, values,
            start=cache.length + at, first=view.first_position,
            window=self.spec.window, sink=self.sink,
        )  # fmt: skip


class MLP:
    """down(silu(gate x) * up x)."""

    def __init__(self, weights: Weights, prefix: str) -> None:
        self.gate = weights.linear(prefix + "mlp.gate_proj.weight")
        self.up = weights.linear(prefix + "mlp.up_proj.weight")
        self.down = weights.linear(prefix + "mlp.down_proj.weight")

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x (T, D) -> (T, D)."""
        return self.down(F.silu(self.gate(x)).mul_(self.up(x)))


class MoE:
    """A router and the experts it chooses from."""

    def __init__(
        self, weights: Weights, spec: LayerSpec, config: ModelConfig, experts: Store
    ) -> None:
        prefix = f"model.layers.{spec.index}.mlp.gate."
        self.layer, self.config, self.experts = spec.index, config, experts
        self.router = weights.tensor(prefix + "weight")
        self.bias = weights.tensor(prefix + "e_score_correction_bias")

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x (T, D) -> (T, D)."""
        ids, w = ops.route(x, self.router, self.bias, self.config)
        return self.experts.run(self.layer, x, ids, w)


class Layer:
    """Attention, then MLP or experts, each on the normed residual stream and added to it."""

    def __init__(
        self,
        weights: Weights,
        spec: LayerSpec,
        config: ModelConfig,
        experts: Store | None,
        *,
        prefix: str | None = None,
        post_norm: str = "post_attention_layernorm",
    ) -> None:
        """`prefix` and `post_norm`: names of the weights, where they are not those of layer N.

        `experts`: None for a dense layer.
        """
        prefix = prefix or f"model.layers.{spec.index}."
        self.name = f"layers.{spec.index}"
        self.config = config
        self.input_norm = weights.tensor(prefix + "input_layernorm.weight")
        self.post_norm = weights.tensor(f"{prefix}{post_norm}.weight")
        self.attention = Attention(weights, spec, config, prefix)
        self.mlp: MLP | MoE
        if experts is None or spec.mlp == "dense":
            self.mlp = MLP(weights, prefix)
        else:
            self.mlp = MoE(weights, spec, config, experts)
        self.following: Layer | None = None
        """The next layer with experts: what it will want is guessed while this one's are run."""

    def __call__(self, x: torch.Tensor, step: Step, trace: Trace | None) -> torch.Tensor:
        """x (T, D) -> (T, D), in place."""
        if trace is None:
            self.attend(x, step)
            self.mix(x, step)
            return x
        attended = self._attended(x, step)
        x.add_(attended)
        mixed = self._mixed(x, step)
        x.add_(mixed)
        trace(f"{self.name}.attention", attended)
        trace(f"{self.name}.mlp", mixed)
        trace(self.name, x.clone())
        return x

    # The parts of a call, for who has many rows and takes a layer apart.

    def attend(self, x: torch.Tensor, step: Step) -> None:
        """x (T, D) += attention, in place."""
        if step.sequences is None:
            x.add_(self._attended(x, step))
        else:
            self._native_attention(x, step.caches, step.sequences, self._rope(step), None)

    def mix(self, x: torch.Tensor, step: Step) -> None:
        """x (T, D) += MLP or experts, in place."""
        if step.sequences is None:
            x.add_(self._mixed(x, step))
        else:
            self._native_mix(x, None)

    def route(
        self,
        x: torch.Tensor,
        step: Step,
        normed: torch.Tensor,
        ids: torch.Tensor,
        w: torch.Tensor,
    ) -> None:
        """x (T, D) -> normed (T, D), ids (T, K) int32, w (T, K) f32: what the experts get."""
        if step.sequences is not None:
            self.native_routing.into(x, normed, ids, w)
            return
        part = self.moe
        normed.copy_(ops.rms_norm(x, self.post_norm, self.config.rms_eps))
        chosen, weights = ops.route(normed, part.router, part.bias, part.config)
        ids.copy_(chosen)
        w.copy_(weights)

    def remember(self, x: torch.Tensor, step: Step) -> None:
        """x (T, D) of one sequence: keys and values into the cache; x stays."""
        self.attention.remember(ops.rms_norm(x, self.input_norm, self.config.rms_eps), step)

    @property
    def moe(self) -> MoE:
        """The router and experts of a layer that has them."""
        assert isinstance(self.mlp, MoE)
        return self.mlp

    def _rope(self, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        return step.rope[self.attention.spec.attention]

    def _attended(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        if step.sequences is None:
            return self.attention(ops.rms_norm(x, self.input_norm, self.config.rms_eps), step)
        delta = torch.empty_like(x)
        self._native_attention(x, step.caches, step.sequences, self._rope(step), delta)
        return delta

    def _mixed(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        if step.sequences is None:
            return self.mlp(ops.rms_norm(x, self.post_norm, self.config.rms_eps))
        delta = torch.empty_like(x)
        self._native_mix(x, delta)
        return delta

    @property
    def native_halves(self) -> tuple[NativeAttention, NativeMixture]:
        """The calls of a layer whose experts are resident."""
        return self._native_attention, self._native_mlp

    def _native_mix(self, x: torch.Tensor, delta: torch.Tensor | None) -> None:
        part = self.mlp
        if isinstance(part, MLP) or part.experts.resident(part.layer):
            self._native_mlp(x, delta)
        else:
            self._split_mlp(x, delta)

    # Built when a step first needs them; they hold addresses into the parts above.

    @cached_property
    def _native_attention(self) -> NativeAttention:
        part = self.attention
        return NativeAttention(
            kernels.loaded(), part.spec, self.config, norm=self.input_norm,
            qkv=part.qkv, out=part.out, sink=part.sink, value_scale=part.value_scale,
        )  # fmt: skip

    @cached_property
    def _native_mlp(self) -> NativeMixture:
        part, native = self.mlp, kernels.loaded()
        if isinstance(part, MLP):
            mlp = (kernels.Mlp * 1)(mlp_of(part.gate, part.up, part.down))
            return NativeMixture(
                native, self.config, norm=self.post_norm, mlps=mlp, router=None, keep=part
            )
        mlps, keep = part.experts.mlps(part.layer)
        router = (part.router, part.bias)
        return NativeMixture(
            native, part.config, norm=self.post_norm, mlps=mlps, router=router, keep=keep
        )

    @cached_property
    def _split_mlp(self) -> SplitMixture:
        part, following = self.moe, self.following
        guess = None if following is None else (following.moe.layer, following.native_routing)
        return SplitMixture(part.layer, part.experts, self.native_routing, guess)

    @cached_property
    def native_routing(self) -> NativeRouting:
        """Norm and router of a layer with experts."""
        part = self.moe
        return NativeRouting(
            kernels.loaded(), part.config, norm=self.post_norm, router=(part.router, part.bias)
        )
