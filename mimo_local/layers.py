"""One layer: attention, then an MLP or experts, each on the normed residual stream.

Two ways through the same layer: native calls of half a layer each (`blocks`), and the torch way,
taken on an accelerator and where there is no library, against which the calls are tested. Constant
after loading: caches come with the step. Called by `model` for all layers of a few rows, by
`prefill` layer by layer.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cached_property
from typing import TypeAlias

import torch
import torch.nn.functional as F

from mimo_local import device_attention, kernels, ops
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
from mimo_local.device_linear import placed, placed_tensor
from mimo_local.experts.store import Store
from mimo_local.weights import QuantLinear, Weights, stack
from quant.on_device import activations

Trace: TypeAlias = Callable[[str, torch.Tensor], None]


class Step:
    """What the layers of one forward share."""

    def __init__(
        self,
        caches: list[KVCache],
        counts: list[int],
        ropes: dict[Kind, ops.RopeTable],
        at: int = 0,
        *,
        native: bool = True,
    ) -> None:
        """The next `counts` rows of these caches; `at` rows of each came before, uncommitted.

        `native`: by the library, where it serves.
        """
        self.caches, self.counts, self.at, self._native = caches, counts, at, native
        self._ropes = ropes
        self._spans = [(cache.length + at, n) for cache, n in zip(caches, counts, strict=True)]
        self._turns: dict[tuple[Kind, torch.device | None], tuple[torch.Tensor, torch.Tensor]] = {}

    @cached_property
    def sequences(self) -> ctypes.Array[kernels.Sequence] | None:
        """The caches as the native library sees them; None where it is not used."""
        if not (self._native and served(self.caches)):
            return None
        return sequences_of(self.caches, self.counts, self.at)

    def turns(self, kind: Kind, device: torch.device | None) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin (T, 1, r) of a kind of attention, on a device; None: on the host."""
        found = self._turns.get((kind, device))
        if found is None:
            found = self._turns[kind, device] = self._ropes[kind].rows(self._spans, device)
        return found


def served(caches: list[KVCache]) -> bool:
    """Whether the library serves them: there is one, and one dtype of keys and values."""
    if kernels.get() is None:
        return False
    dtype = caches[0].dtype
    return dtype in KV_DTYPES and all(cache.dtype == dtype for cache in caches)


class Attention:
    """Grouped attention of one layer; queries, keys and values come from one product."""

    def __init__(
        self,
        weights: Weights,
        spec: LayerSpec,
        config: ModelConfig,
        prefix: str,
        device: torch.device | None,
    ) -> None:
        """`prefix`: of the layer's tensors; `spec.index`: its number in the caches it is given."""
        prefix += "self_attn."
        self.spec, self.device = spec, device
        joint = stack([weights.linear(f"{prefix}{part}_proj.weight") for part in "qkv"])
        self.qkv = placed(joint, device)
        self.out = placed(weights.linear(prefix + "o_proj.weight"), device)
        self.sink: torch.Tensor | None = None
        if spec.has_sink:
            self.sink = placed_tensor(weights.tensor(prefix + "attention_sink_bias"), device)
        self.value_scale = config.value_scale
        self._attention = ops.attention if device is None else device_attention.attention

    def __call__(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        """x (T, D) normed -> (T, D); appends to every sequence's cache."""
        spec, n = self.spec, x.shape[0]
        joint = self.qkv(x)
        turned = (spec.heads + spec.kv_heads) * spec.head_dim
        qk = joint[:, :turned].view(n, -1, spec.head_dim)
        ops.rotate_(qk, *step.turns(spec.attention, self.device))
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
        ops.rotate_(k, *step.turns(spec.attention, self.device))
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
        return self._attention(
            q, keys, values,
            start=cache.length + at, first=view.first_position,
            window=self.spec.window, sink=self.sink,
        )  # fmt: skip


class MLP:
    """down(silu(gate x) * up x)."""

    def __init__(self, weights: Weights, prefix: str, device: torch.device | None) -> None:
        gate, up, down = (
            placed(weights.linear(f"{prefix}mlp.{part}_proj.weight"), device)
            for part in ("gate", "up", "down")
        )
        self.gate, self.up, self.down = gate, up, down

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x (T, D) -> (T, D)."""
        return self.down(F.silu(self.gate(x)).mul_(self.up(x)))


class MoE:
    """A router and the experts it chooses from."""

    def __init__(
        self,
        weights: Weights,
        spec: LayerSpec,
        config: ModelConfig,
        experts: Store,
        device: torch.device | None,
    ) -> None:
        prefix = f"model.layers.{spec.index}.mlp.gate."
        self.layer, self.config, self.device = spec.index, config, device
        # A layer on the host asks the host's own store, which moves nothing.
        self.experts = experts if device is not None else experts.host
        self.router = placed_tensor(weights.tensor(prefix + "weight"), device)
        self.bias = placed_tensor(weights.tensor(prefix + "e_score_correction_bias"), device)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x (T, D) f32 -> (T, D) f32."""
        return self.experts.run(self.layer, x, *self.choose(x))

    def choose(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x (T, D) f32 -> ids (T, K), weights (T, K)."""
        return ops.route(x, self.router, self.bias, self.config)


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
        device: torch.device | None = None,
    ) -> None:
        """`prefix` and `post_norm`: names of the weights, where they are not those of layer N.

        `experts`: None for a dense layer. `device`: where the weights lie and rows are expected;
        None: this machine's memory, and the kernels.
        """
        prefix = prefix or f"model.layers.{spec.index}."
        self.name = f"layers.{spec.index}"
        self.config, self.device = config, device
        self.dtype = torch.float32 if device is None else activations(device)
        """Of what is multiplied; residuals are float32 everywhere."""
        self.input_norm = placed_tensor(weights.tensor(prefix + "input_layernorm.weight"), device)
        self.post_norm = placed_tensor(weights.tensor(f"{prefix}{post_norm}.weight"), device)
        self.attention = Attention(weights, spec, config, prefix, device)
        self.mlp: MLP | MoE
        if experts is None or spec.mlp == "dense":
            self.mlp = MLP(weights, prefix, device)
        else:
            self.mlp = MoE(weights, spec, config, experts, device)
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
        sequences = self._sequences(step)
        if sequences is None:
            x.add_(self._attended(x, step))
        else:
            self._native_attention(x, step.caches, sequences, self._rope(step), None)

    def mix(self, x: torch.Tensor, step: Step) -> None:
        """x (T, D) += MLP or experts, in place."""
        if self._sequences(step) is None:
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
        if self._sequences(step) is not None:
            self.native_routing.into(x, normed, ids, w)
            return
        found = ops.rms_norm(x, self.post_norm, self.config.rms_eps)
        chosen, weights = self.moe.choose(found)
        normed.copy_(found)
        ids.copy_(chosen)
        w.copy_(weights)

    def remember(self, x: torch.Tensor, step: Step) -> None:
        """x (T, D) of one sequence: keys and values into the cache; x stays."""
        self.attention.remember(self._normed(x, self.input_norm), step)

    @property
    def moe(self) -> MoE:
        """The router and experts of a layer that has them."""
        assert isinstance(self.mlp, MoE)
        return self.mlp

    def _sequences(self, step: Step) -> ctypes.Array[kernels.Sequence] | None:
        """What the library needs of the step; None where the layer goes the torch way."""
        return step.sequences if self.device is None else None

    def _rope(self, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        return step.turns(self.attention.spec.attention, None)

    def _normed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return ops.rms_norm(x, weight, self.config.rms_eps).to(self.dtype)

    def _attended(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        sequences = self._sequences(step)
        if sequences is None:
            return self.attention(self._normed(x, self.input_norm), step)
        delta = torch.empty_like(x)
        self._native_attention(x, step.caches, sequences, self._rope(step), delta)
        return delta

    def _mixed(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        if self._sequences(step) is None:
            if isinstance(self.mlp, MLP):
                return self.mlp(self._normed(x, self.post_norm))
            # The router and the CPU's experts want float32.
            normed = ops.rms_norm(x, self.post_norm, self.config.rms_eps)
            return self.mlp.experts.run(
                self.mlp.layer, normed, *self.mlp.choose(normed), guess=self._guess(x)
            )
        delta = torch.empty_like(x)
        self._native_mix(x, delta)
        return delta

    def _guess(self, x: torch.Tensor) -> tuple[int, torch.Tensor] | None:
        """What the next layer with experts would choose from x, likeliest first, and its number."""
        following = self.following
        if self.device is None or following is None or following.device != self.device:
            return None
        if not self.moe.experts.wants_guesses:
            return None
        normed = ops.rms_norm(x, following.post_norm, self.config.rms_eps)
        ids, w = following.moe.choose(normed)
        return following.moe.layer, ids.flatten()[w.flatten().argsort(descending=True)]

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
        part, following, guess = self.moe, self.following, None
        if following is not None and following.device is None:
            guess = (following.moe.layer, following.native_routing)
        return SplitMixture(part.layer, part.experts, self.native_routing, guess)

    @cached_property
    def native_routing(self) -> NativeRouting:
        """Norm and router of a layer with experts."""
        part = self.moe
        return NativeRouting(
            kernels.loaded(), part.config, norm=self.post_norm, router=(part.router, part.bias)
        )
