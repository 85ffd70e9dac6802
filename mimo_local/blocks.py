"""Half a layer in one native call: attention, or MLP or mixture, each with its norm and residual.

Or all layers in one, where nothing has to be asked between them (`NativeLayers`).
A mixture whose experts are not all in RAM is split: norm and router here, the experts by their
store. Turns loaded weights into the structs of addresses the library reads (`kernels/src/mimo.h`)
and keeps them alive; knows no arithmetic. The torch way through the same layer stands in `layers`:
it is taken where there is no library, and is what these calls are tested against.
"""

from __future__ import annotations

import ctypes
from array import array

import torch

from mimo_local import kernels, ops
from mimo_local.cache import KVCache
from mimo_local.cache_layers import stored_dtype
from mimo_local.config import Attention as Kind
from mimo_local.config import LayerSpec, ModelConfig
from mimo_local.experts.store import Store
from mimo_local.weights import QuantLinear

KV_DTYPES = {
    torch.float32: kernels.KV_F32,
    torch.bfloat16: kernels.KV_BF16,
    torch.int8: kernels.KV_INT8,
}
"""Dtypes of a layer's rows the library reads -> `mimo_heads.kv_type`."""


def sequences_of(
    caches: list[KVCache], counts: list[int], at: int = 0
) -> ctypes.Array[kernels.Sequence]:
    """What every layer of a step shares: where each cache stands and how many rows it gets.

    `at` rows came before in the same step and are not committed.
    """
    sequences = (kernels.Sequence * len(caches))()
    for sequence, cache, n in zip(sequences, caches, counts, strict=True):
        sequence.start, sequence.T = cache.length + at, n
    return sequences


class NativeAttention:
    """norm, q/k/v, rotary positions, new rows into the cache, attention, output, residual."""

    def __init__(
        self,
        native: kernels.Kernels,
        spec: LayerSpec,
        config: ModelConfig,
        *,
        norm: torch.Tensor,
        qkv: QuantLinear,
        out: QuantLinear,
        sink: torch.Tensor | None,
        value_scale: float,
    ) -> None:
        self._native, self._layer = native, spec.index
        self.kind = spec.attention
        self._keep = (norm, qkv, out, sink)
        self._block = {
            dtype: kernels.AttentionBlock(
                kernels.Heads(
                    spec.heads, spec.kv_heads, spec.head_dim, spec.v_head_dim,
                    spec.window or 0, None if sink is None else sink.data_ptr(),
                    KV_DTYPES[stored_dtype(spec, dtype)],
                ),
                qkv.matrix(), out.matrix(), norm.data_ptr(),
                config.rms_eps, value_scale, spec.rotary_dim,
            )
            for dtype in KV_DTYPES
        }  # fmt: skip

    def address(self, dtype: torch.dtype) -> int:
        """Of the `mimo_attention_block` for caches of this dtype; good while this object lives."""
        return ctypes.addressof(self._block[dtype])

    def __call__(
        self,
        x: torch.Tensor,
        caches: list[KVCache],
        sequences: ctypes.Array[kernels.Sequence],
        rope: tuple[torch.Tensor, torch.Tensor],
        delta: torch.Tensor | None,
    ) -> None:
        """x (T, D) f32 in place; or the change to it into `delta` (T, D) and x stays.

        rope: cos, sin (T, 1, r). Caches have a dtype of KV_DTYPES, all the same.
        """
        layer, block = self._layer, self._block[caches[0].dtype]
        for cache, sequence in zip(caches, sequences, strict=True):
            view = cache.room(layer, sequence.T, at=sequence.start - cache.length)
            sequence.k, sequence.v, sequence.k_scales, sequence.v_scales = view.where
            sequence.first = view.first_position
        self._native.call(
            "attention", ctypes.addressof(block), x.data_ptr(), x.shape[0],
            rope[0].data_ptr(), rope[1].data_ptr(), ctypes.addressof(sequences), len(caches),
            None if delta is None else delta.data_ptr(),
        )  # fmt: skip
        for cache in caches:
            cache.settle(layer)


class NativeMixture:
    """norm, router (if there is one), experts or the one MLP, residual."""

    def __init__(
        self,
        native: kernels.Kernels,
        config: ModelConfig,
        *,
        norm: torch.Tensor,
        mlps: ctypes.Array[kernels.Mlp],
        router: tuple[torch.Tensor, torch.Tensor] | None,
        keep: object,
    ) -> None:
        """`router`: weight (E, D) and election bias (E,), float32; None for a dense layer."""
        self._native = native
        self._keep = (norm, mlps, router, keep)
        self._router = None if router is None else _router_of(config, *router)
        self._block = kernels.MlpBlock(
            norm.data_ptr(), ctypes.addressof(mlps), len(mlps),
            None if self._router is None else ctypes.addressof(self._router),
            config.rms_eps, 0.0,
        )  # fmt: skip
        self.address = ctypes.addressof(self._block)
        """Of the `mimo_mlp_block`; good while this object lives."""

    def __call__(self, x: torch.Tensor, delta: torch.Tensor | None) -> None:
        """As `NativeAttention`."""
        self._native.call(
            "mixture", self.address, x.data_ptr(), x.shape[0],
            None if delta is None else delta.data_ptr(),
        )  # fmt: skip


class NativeLayers:
    """All layers of a step of few rows in one call.

    Between two calls Python is on cold caches, the weights having passed through them: 18 us a
    layer, where a layer of the demo model takes 150.
    """

    def __init__(
        self,
        native: kernels.Kernels,
        halves: list[tuple[NativeAttention, NativeMixture]],
        dtype: torch.dtype,
    ) -> None:
        """`dtype`: of the caches, one of KV_DTYPES."""
        self._native, self._keep = native, halves
        self._kinds = list(dict.fromkeys(attention.kind for attention, _ in halves))
        # `mimo_layer`, one after the other.
        layers = (
            (attention.address(dtype), mixture.address, self._kinds.index(attention.kind))
            for attention, mixture in halves
        )
        self._layers = array("q", [number for layer in layers for number in layer])
        self._at, self._n = self._layers.buffer_info()[0], len(halves)

    def __call__(
        self,
        x: torch.Tensor,
        caches: list[KVCache],
        counts: list[int],
        ropes: dict[Kind, ops.RopeTable],
    ) -> None:
        """x (T, D) f32 in place, T <= SPARE_ROWS."""
        spans = [(cache.length, n) for cache, n in zip(caches, counts, strict=True)]
        tables = [ropes[kind] for kind in self._kinds]
        if len(spans) == 1:
            turns = [table.place(*spans[0]) for table in tables]
        else:
            keep = [table.rows(spans) for table in tables]
            turns = [(cos.data_ptr(), sin.data_ptr()) for cos, sin in keep]
        places = zip(
            *(cache.places(n) for cache, n in zip(caches, counts, strict=True)), strict=True
        )
        # As `mimo_kv` lies in memory: by layers, then by sequences.
        pairs = (pair for layer in places for pair in zip(layer, spans, strict=True))
        sequences = array("q", [number for place, span in pairs for number in place + span])
        rope = array("q", [address for turn in turns for address in turn])
        self._native.call(
            "layers", self._at, self._n, x.data_ptr(), x.shape[0],
            rope.buffer_info()[0], len(tables), sequences.buffer_info()[0], len(caches),
        )  # fmt: skip


class NativeRouting:
    """norm and router: what a mixture does before its experts."""

    def __init__(
        self,
        native: kernels.Kernels,
        config: ModelConfig,
        *,
        norm: torch.Tensor,
        router: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        """`router`: weight (E, D) and election bias (E,), float32."""
        self._native, self._norm, self._eps = native, norm, config.rms_eps
        self._keep = router
        self._router = _router_of(config, *router)
        self._k = config.experts_per_token

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x (T, D) f32 -> normed (T, D), ids (T, K) int32 ascending, weights (T, K) f32."""
        n, normed = x.shape[0], torch.empty_like(x)
        ids, w = torch.empty((n, self._k), dtype=torch.int32), torch.empty((n, self._k))
        self.into(x, normed, ids, w)
        return normed, ids, w

    def likeliest(self, x: torch.Tensor) -> torch.Tensor:
        """x (T, D) -> the ids (T * K,) it chooses, those with the largest weights first."""
        _, ids, w = self(x)
        return ids.flatten()[w.flatten().argsort(descending=True)]

    def into(
        self, x: torch.Tensor, normed: torch.Tensor, ids: torch.Tensor, w: torch.Tensor
    ) -> None:
        """As the call, into contiguous tensors of these shapes."""
        (n, d), at = x.shape, normed.data_ptr()
        self._native.call(
            "rms_norm", x.data_ptr(), d, n, d, self._norm.data_ptr(), self._eps, at, d
        )
        self._native.call(
            "route", ctypes.addressof(self._router), at, d, n, ids.data_ptr(), w.data_ptr()
        )


class SplitMixture:
    """As `NativeMixture` bit for bit, the experts run by their store: it sees who is chosen."""

    def __init__(
        self,
        layer: int,
        store: Store,
        routing: NativeRouting,
        following: tuple[int, NativeRouting] | None,
    ) -> None:
        """`following`: the next mixture layer and its routing, None for the last one."""
        self._layer, self._store, self._routing = layer, store, routing
        self._following = following

    def __call__(self, x: torch.Tensor, delta: torch.Tensor | None) -> None:
        """As `NativeAttention`."""
        normed, ids, w = self._routing(x)
        guess = None
        if self._following is not None and self._store.wants_guesses:
            # What the next layer would choose from x without this layer's experts and its own
            # attention: residuals change slowly, so most of its choices are among them.
            layer, routing = self._following

            def guess() -> None:
                self._store.expect(layer, routing.likeliest(x))

        y = self._store.run(self._layer, normed, ids, w, meanwhile=guess)
        if delta is None:
            x.add_(y)
        else:
            delta.copy_(y)


def _router_of(config: ModelConfig, weight: torch.Tensor, bias: torch.Tensor) -> kernels.Router:
    return kernels.Router(
        weight.data_ptr(), bias.data_ptr(), *weight.shape, config.experts_per_token,
        config.n_group, config.topk_group, config.norm_topk_prob,
        config.routed_scaling_factor, 0.0,
    )  # fmt: skip


def mlp_of(gate: QuantLinear, up: QuantLinear, down: QuantLinear) -> kernels.Mlp:
    """The addresses of one MLP; the matrices must outlive it."""
    return kernels.Mlp(gate.matrix(), up.matrix(), down.matrix())
