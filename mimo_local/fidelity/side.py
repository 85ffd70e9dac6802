"""Side: one of two models on the way through the same texts, a layer in memory at a time.

All texts' rows go through a layer together, each text with its own keys and values. Knows no second
model and no figures. Called by `run`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from mimo_local import kernels, ops
from mimo_local.cache import KVCache
from mimo_local.config import LayerSpec
from mimo_local.experts.passing import PassingStore
from mimo_local.layers import Layer, MoE, Step
from mimo_local.loading import kv_dtype
from mimo_local.prefill import pieces
from mimo_local.weights import CheckpointWeights, PackWeights, QuantLinear
from quant.formats import NATIVE_ROWS, get_format

CHUNK = 512
"""Rows that go through attention and dense layers at once, as when a prompt is read."""
VOCABULARY = 2048
"""Logits of a row at once: as float64 of 3 000 rows 50 MB, and a few such are needed."""
EMBEDDING = "model.embed_tokens.weight"


class Side:
    """Weights and the little state of one model: keys and values of the layer at hand."""

    def __init__(
        self, weights: PackWeights | CheckpointWeights, lengths: list[int], *, exact: bool
    ) -> None:
        """`lengths`: rows of each text. `exact`: float32 throughout, by torch; else as it runs."""
        self.weights, self.lengths, self.exact = weights, lengths, exact
        config = self.config = weights.config
        dtype = torch.float32 if exact else kv_dtype("auto", weights.kind)
        self.caches = [KVCache(config, dtype=dtype) for _ in lengths]
        self.store = PassingStore(weights, exact=exact)
        self.ropes = {
            spec.attention: ops.RopeTable(spec.rope_theta, spec.rotary_dim)
            for spec in config.layers
        }

    @torch.inference_mode()
    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids (T,) -> (T, D) f32."""
        if isinstance(self.weights, PackWeights):
            return self.weights.embedding(EMBEDDING).rows(ids)
        read = self.weights.checkpoint.read
        found = {i: read(EMBEDDING, slice(i, i + 1)) for i in set(ids.tolist())}
        return torch.cat([found[i] for i in ids.tolist()])

    @torch.inference_mode()
    def through(
        self, spec: LayerSpec, x: torch.Tensor, tell: Callable[[float], None]
    ) -> torch.Tensor:
        """x (T, D) before a layer -> (T, D) behind it; `tell` hears the part that is done."""
        layer = Layer(self.weights, spec, self.config, self.store)
        x, n, moe = x.clone(), x.shape[0], isinstance(layer.mlp, MoE)
        k = self.config.experts_per_token if moe else 0
        normed = torch.empty_like(x) if moe else x
        chosen, share = torch.empty((n, k), dtype=torch.int32), torch.empty((n, k))
        # The kernels have threads of their own; the exact side multiplies by torch.
        with ops.threads_for(n if self.exact else 1):
            for rows, step in self._steps():
                layer.attend(x[rows], step)
                if moe:
                    layer.route(x[rows], step, normed[rows], chosen[rows], share[rows])
                else:
                    layer.mix(x[rows], step)
                    tell(rows.stop / n)
            if moe:
                self.store.on_expert = tell
                x.add_(self.store.sweep(spec.index, normed, chosen, share))
        return x

    def _steps(self) -> Iterator[tuple[slice, Step]]:
        """Every piece of every text: which rows of all it has, and its step."""
        first = 0
        for cache, length in zip(self.caches, self.lengths, strict=True):
            for a, b in pieces(length, CHUNK):
                step = Step([cache], [b - a], self.ropes, a, native=not self.exact)
                yield slice(first + a, first + b), step
            first += length

    @torch.inference_mode()
    def normed(self, x: torch.Tensor) -> torch.Tensor:
        """x (T, D) behind the last layer -> its final norm."""
        return ops.rms_norm(x, self.weights.tensor("model.norm.weight"), self.config.rms_eps)

    @torch.inference_mode()
    def logits(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        """x (T, D) normed -> its logits (T, B), VOCABULARY of them at a time."""
        few = not self.exact and kernels.get() is not None
        for matrix in self._head():
            # As when answering: few rows meet the packed head, rounded the way they are there.
            parts = torch.split(x, NATIVE_ROWS) if few else (x,)
            yield torch.cat([matrix(part) for part in parts])

    def _head(self) -> Iterator[QuantLinear]:
        name = EMBEDDING if self.config.tie_embeddings else "lm_head.weight"
        size, width = self.config.vocab_size, self.config.hidden_size
        whole = self.weights.linear(name) if isinstance(self.weights, PackWeights) else None
        for a in range(0, size, VOCABULARY):
            rows = slice(a, min(a + VOCABULARY, size))
            n = rows.stop - a
            if whole is not None:
                parts = {key: part[rows] for key, part in whole.parts.items()}
                yield QuantLinear(whole.format, parts, n, width)
            elif isinstance(self.weights, CheckpointWeights):
                values = {"weight": self.weights.checkpoint.read(name, rows)}
                yield QuantLinear(get_format("f32"), values, n, width)
