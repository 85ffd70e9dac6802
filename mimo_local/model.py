"""MiMo-V2-Flash itself: embedding, layers of attention and MLP or experts, head.

One forward serves everything: T rows, all tokens of this step of one or several sequences; only
attention looks at which rows belong to whom. Constant after loading: caches and experts are passed
in. Knows ids and tensors, no text and no sampling. Called by `generate` and `engine`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
import torch.nn.functional as F

from mimo_local import kernels, ops
from mimo_local.blocks import KV_DTYPES, NativeAttention, NativeMixture, mlp_of, sequences_of
from mimo_local.cache import KVCache
from mimo_local.config import Attention as Kind
from mimo_local.config import LayerSpec, ModelConfig
from mimo_local.errors import CancelledError, ContextOverflowError, UsageError
from mimo_local.events import Progress
from mimo_local.experts.store import ExpertStore
from mimo_local.weights import OnProgress, QuantLinear, Weights, stack

Trace: TypeAlias = Callable[[str, torch.Tensor], None]
Cancel: TypeAlias = Callable[[], bool]


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows of a step that belong to one sequence: they continue its cache."""

    ids: torch.Tensor
    """(T,) int64."""
    cache: KVCache

    @property
    def positions(self) -> range:
        """Positions the rows will have."""
        return range(self.cache.length, self.cache.length + self.ids.shape[0])


@dataclass(frozen=True, slots=True)
class _Step:
    """What the layers of one forward share."""

    caches: list[KVCache]
    counts: list[int]
    rope: dict[Kind, tuple[torch.Tensor, torch.Tensor]]
    """cos and sin (T, 1, r) by kind of attention."""
    sequences: ctypes.Array[kernels.Sequence] | None
    """The caches as the native library sees them; None where it cannot be used."""


class Attention:
    """Grouped attention of one layer; queries, keys and values come from one product."""

    def __init__(self, weights: Weights, spec: LayerSpec, config: ModelConfig) -> None:
        prefix = f"model.layers.{spec.index}.self_attn."
        self.spec = spec
        self.qkv = stack([weights.linear(f"{prefix}{part}_proj.weight") for part in "qkv"])
        self.out = weights.linear(prefix + "o_proj.weight")
        self.sink = weights.tensor(prefix + "attention_sink_bias") if spec.has_sink else None
        self.value_scale = config.value_scale

    def __call__(self, x: torch.Tensor, step: _Step) -> torch.Tensor:
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
            return self.out(self._attend(step.caches[0], q, k, v))
        pieces = zip(step.caches, *(torch.split(y, step.counts) for y in (q, k, v)), strict=True)
        return self.out(torch.cat([self._attend(*piece) for piece in pieces]))

    def _attend(
        self, cache: KVCache, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        view = cache.append(self.spec.index, k, v)
        return ops.attention(
            q, view.k, view.v,
            start=cache.length, first=view.first_position,
            window=self.spec.window, sink=self.sink,
        )  # fmt: skip


class MLP:
    """down(silu(gate x) * up x)."""

    def __init__(self, weights: Weights, spec: LayerSpec) -> None:
        prefix = f"model.layers.{spec.index}.mlp."
        self.gate = weights.linear(prefix + "gate_proj.weight")
        self.up = weights.linear(prefix + "up_proj.weight")
        self.down = weights.linear(prefix + "down_proj.weight")

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x (T, D) -> (T, D)."""
        return self.down(F.silu(self.gate(x)).mul_(self.up(x)))


class MoE:
    """A router and the experts it chooses from."""

    def __init__(
        self, weights: Weights, spec: LayerSpec, config: ModelConfig, experts: ExpertStore
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
        self, weights: Weights, spec: LayerSpec, config: ModelConfig, experts: ExpertStore
    ) -> None:
        prefix = f"model.layers.{spec.index}."
        self.name = f"layers.{spec.index}"
        self.config = config
        self.input_norm = weights.tensor(prefix + "input_layernorm.weight")
        self.post_norm = weights.tensor(prefix + "post_attention_layernorm.weight")
        self.attention = Attention(weights, spec, config)
        self.mlp: MLP | MoE = (
            MLP(weights, spec) if spec.mlp == "dense" else MoE(weights, spec, config, experts)
        )

    def __call__(self, x: torch.Tensor, step: _Step, trace: Trace | None) -> torch.Tensor:
        """x (T, D) -> (T, D), in place."""
        if step.sequences is not None and trace is None:
            self._native_attention(x, step.caches, step.sequences, self._rope(step), None)
            self._native_mlp(x, None)
            return x
        attended = self._attended(x, step)
        x.add_(attended)
        mixed = self._mixed(x, step)
        x.add_(mixed)
        if trace is not None:
            trace(f"{self.name}.attention", attended)
            trace(f"{self.name}.mlp", mixed)
            trace(self.name, x.clone())
        return x

    def _rope(self, step: _Step) -> tuple[torch.Tensor, torch.Tensor]:
        return step.rope[self.attention.spec.attention]

    def _attended(self, x: torch.Tensor, step: _Step) -> torch.Tensor:
        if step.sequences is None:
            return self.attention(ops.rms_norm(x, self.input_norm, self.config.rms_eps), step)
        delta = torch.empty_like(x)
        self._native_attention(x, step.caches, step.sequences, self._rope(step), delta)
        return delta

    def _mixed(self, x: torch.Tensor, step: _Step) -> torch.Tensor:
        if step.sequences is None:
            return self.mlp(ops.rms_norm(x, self.post_norm, self.config.rms_eps))
        delta = torch.empty_like(x)
        self._native_mlp(x, delta)
        return delta

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


class Model:
    """The main model, MTP layers left out."""

    def __init__(
        self, weights: Weights, experts: ExpertStore, *, on_progress: OnProgress | None = None
    ) -> None:
        """Read everything but the experts; their store is already loaded."""
        config = self.config = weights.config
        self.embedding = weights.embedding("model.embed_tokens.weight")
        self.layers: list[Layer] = []
        for spec in config.layers:
            self.layers.append(Layer(weights, spec, config, experts))
            if on_progress is not None:
                on_progress(Progress("loading layers", len(self.layers), config.n_layers, "layers"))
        self.norm = weights.tensor("model.norm.weight")
        self.head: QuantLinear = (
            self.embedding.linear if config.tie_embeddings else weights.linear("lm_head.weight")
        )
        self.ropes = {
            spec.attention: ops.RopeTable(spec.rope_theta, spec.rotary_dim)
            for spec in config.layers
        }

    def new_cache(
        self, *, dtype: torch.dtype = torch.float32, slack: int = 4, capacity_hint: int = 0
    ) -> KVCache:
        """An empty cache for one sequence of this model."""
        return KVCache(self.config, dtype=dtype, slack=slack, capacity_hint=capacity_hint)

    def forward(self, segments: Sequence[Segment], *, trace: Trace | None = None) -> torch.Tensor:
        """Process the next rows of one or several sequences -> hidden (T, D) f32, finally normed.

        Rows come back in the order of the segments. Caches advance at the very end: a forward that
        raises leaves them as they were. Raises UsageError and ContextOverflowError. `trace` is
        called with a name and a tensor after the embedding, in every layer, and after the norm.
        """
        return self._forward(segments, trace, None)

    def _forward(
        self, segments: Sequence[Segment], trace: Trace | None, cancel: Cancel | None
    ) -> torch.Tensor:
        with ops.threads_for(sum(segment.ids.shape[0] for segment in segments)):
            return self._step(segments, trace, cancel)

    @torch.inference_mode()
    def _step(
        self, segments: Sequence[Segment], trace: Trace | None, cancel: Cancel | None
    ) -> torch.Tensor:
        ids = self._check(segments)
        counts = [segment.ids.shape[0] for segment in segments]
        spans = [(s.cache.length, n) for s, n in zip(segments, counts, strict=True)]
        rope = {kind: table.rows(spans) for kind, table in self.ropes.items()}
        caches = [segment.cache for segment in segments]
        step = _Step(caches, counts, rope, self._sequences(caches, counts))
        x = self.embedding.rows(ids)
        if trace is not None:
            trace("embedding", x.clone())
        for layer in self.layers:
            if cancel is not None and cancel():
                raise CancelledError(
                    "stopped while reading the prompt", hint="what was read so far is kept"
                )
            x = layer(x, step, trace)
        x = ops.rms_norm(x, self.norm, self.config.rms_eps)
        if trace is not None:
            trace("norm", x)
        for cache, n in zip(step.caches, counts, strict=True):
            cache.advance(n)
        return x

    def _sequences(
        self, caches: list[KVCache], counts: list[int]
    ) -> ctypes.Array[kernels.Sequence] | None:
        """The step for the native library, which serves this machine's memory and one KV dtype."""
        if kernels.get() is None or self.norm.device.type != "cpu":
            return None
        if len({cache.dtype for cache in caches}) > 1 or caches[0].dtype not in KV_DTYPES:
            return None
        return sequences_of(caches, counts)

    def _check(self, segments: Sequence[Segment]) -> torch.Tensor:
        """All ids in one tensor, after refusing what no forward can process."""
        if not segments or any(segment.ids.numel() == 0 for segment in segments):
            raise UsageError("there are no tokens to process", hint="give at least one token")
        if len({id(segment.cache) for segment in segments}) != len(segments):
            raise UsageError("two segments share one cache", hint="join them into one segment")
        ids = segments[0].ids if len(segments) == 1 else torch.cat([s.ids for s in segments])
        low, high = torch.aminmax(ids)
        if int(low) < 0 or int(high) >= self.config.vocab_size:
            wrong = int(low) if int(low) < 0 else int(high)
            raise UsageError(
                f"token id {wrong} is outside the vocabulary of {self.config.vocab_size}",
                hint="use the tokenizer that belongs to this model",
            )
        for segment in segments:
            end = segment.positions.stop
            if end > self.config.max_context:
                raise ContextOverflowError(
                    f"{end} tokens do not fit the model's context of {self.config.max_context}",
                    hint="shorten the text; `mimo summarize` reads long documents in parts",
                )
        return ids

    def prefill(
        self,
        segment: Segment,
        *,
        chunk: int = 512,
        on_progress: OnProgress | None = None,
        cancel: Cancel | None = None,
    ) -> torch.Tensor:
        """Process a long prompt in chunks -> hidden (1, D) of its last row.

        Asks `cancel` before every layer and raises CancelledError when it says so; the cache then
        holds the chunks finished before.
        """
        ids, total = segment.ids, segment.ids.shape[0]
        end = segment.positions.stop
        if end > self.config.max_context:
            self._check([segment])
        hidden = None
        for start in range(0, max(total, 1), chunk):
            part = Segment(ids[start : start + chunk], segment.cache)
            hidden = self._forward([part], None, cancel)
            if on_progress is not None:
                done = start + part.ids.shape[0]
                on_progress(Progress("reading the prompt", done, total, "tokens"))
        assert hidden is not None
        return hidden[-1:]

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden (T, D) of `forward` -> logits (T, V) f32, a tensor the caller may change."""
        return self.head(hidden)
