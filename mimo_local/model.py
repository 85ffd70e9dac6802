"""MiMo-V2-Flash itself: embedding, layers of attention and MLP or experts, head.

One forward serves everything: T rows, all tokens of this step of one or several sequences; only
attention looks at which rows belong to whom. Constant after loading: caches and experts are passed
in. Knows ids and tensors, no text and no sampling. Called by `generate` and `engine`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mimo_local import kernels, ops, prefill
from mimo_local.blocks import NativeLayers
from mimo_local.cache import KVCache
from mimo_local.device import HOST, Devices, moved
from mimo_local.device_linear import placed, placed_tensor
from mimo_local.errors import CancelledError, ContextOverflowError, UsageError
from mimo_local.events import Progress
from mimo_local.experts.store import Store
from mimo_local.layers import Layer, MoE, Step, Trace, served
from mimo_local.prefill import Cancel
from mimo_local.weights import Embedding, OnProgress, QuantLinear, Weights
from quant.on_device import activations


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


class Model:
    """The main model, MTP layers left out."""

    def __init__(
        self,
        weights: Weights,
        experts: Store,
        *,
        devices: Devices | None = None,
        hidden_budget: int | None = None,
        device_budget: int | None = None,
        on_progress: OnProgress | None = None,
    ) -> None:
        """Read everything but the experts; their store is already loaded.

        `devices`: where layers and head run, None: all on the host. `hidden_budget` and
        `device_budget`: bytes of a long prompt's hidden states here and there, see `prefill.How`.
        """
        config = self.config = weights.config
        self.devices = devices or Devices.all_on(HOST, config.n_layers)
        self.experts = experts
        self.hidden_budget, self.device_budget = hidden_budget, device_budget
        self.embedding = weights.embedding("model.embed_tokens.weight")
        self.layers: list[Layer] = []
        for spec, where in zip(config.layers, self.devices.layers, strict=True):
            device = self.devices.of(where)
            self.layers.append(Layer(weights, spec, config, experts, device=device))
            if on_progress is not None:
                on_progress(Progress("loading layers", len(self.layers), config.n_layers, "layers"))
        mixtures = [layer for layer in self.layers if isinstance(layer.mlp, MoE)]
        self._mixtures = [layer.moe.layer for layer in mixtures]
        self._foreseen = next((layer for layer in mixtures[:1] if layer.device is None), None)
        """The first layer with experts: what it will want is guessed from the embedding."""
        for layer, following in itertools.pairwise(mixtures):
            layer.following = following
        self._last = self.devices.of(self.devices.head)
        """Where the last norm and the head are; None: on the host."""
        self.norm = placed_tensor(weights.tensor("model.norm.weight"), self._last)
        self.head = placed(head_of(weights, self.embedding), self._last)
        self._calls: dict[torch.dtype, NativeLayers] = {}
        self.ropes = {
            spec.attention: ops.RopeTable(spec.rope_theta, spec.rotary_dim)
            for spec in config.layers
        }

    def new_cache(
        self, *, dtype: torch.dtype = torch.float32, slack: int = 4, capacity_hint: int = 0
    ) -> KVCache:
        """An empty cache for one sequence of this model, each layer's rows beside its weights."""
        return KVCache(
            self.config, dtype=dtype, slack=slack, capacity_hint=capacity_hint,
            device=self.devices.layers,
        )  # fmt: skip

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
        caches = [segment.cache for segment in segments]
        x = self.embedding.rows(ids)
        if trace is None and cancel is None and self._at_once(caches, counts):
            self._native_layers(caches[0].dtype)(x, caches, counts, self.ropes)
        else:
            x = self._one_by_one(x, Step(caches, counts, self.ropes), trace, cancel)
        x = self._normed(moved(x, self._last))
        if trace is not None:
            trace("norm", x)
        for cache, n in zip(caches, counts, strict=True):
            cache.advance(n)
        return x

    def _one_by_one(
        self, x: torch.Tensor, step: Step, trace: Trace | None, cancel: Cancel | None
    ) -> torch.Tensor:
        """x (T, D) through all layers, in place."""
        if trace is not None:
            trace("embedding", x.clone())
        first = self._foreseen
        if first is not None and step.sequences is not None and first.moe.experts.wants_guesses:
            # The disk would rest until the first mixture is reached: attention and a dense layer.
            first.moe.experts.expect(first.moe.layer, first.native_routing.likeliest(x))
        for layer in self.layers:
            if cancel is not None and cancel():
                raise CancelledError(
                    "stopped while reading the prompt", hint="what was read so far is kept"
                )
            x = layer(moved(x, layer.device), step, trace)
        return x

    def _at_once(self, caches: list[KVCache], counts: list[int]) -> bool:
        """Whether all layers can be one native call: few rows, every expert in RAM for good."""
        if sum(counts) > ops.EXACT_ROWS or self.devices.accelerator or not served(caches):
            return False
        resident = self.experts.resident
        return all(resident(layer) for layer in self._mixtures)

    def _native_layers(self, dtype: torch.dtype) -> NativeLayers:
        """The call for caches of this dtype, built when a step first needs it."""
        if dtype not in self._calls:
            halves = [layer.native_halves for layer in self.layers]
            self._calls[dtype] = NativeLayers(kernels.loaded(), halves, dtype)
        return self._calls[dtype]

    @torch.inference_mode()
    def _normed(self, x: torch.Tensor) -> torch.Tensor:
        """x (T, D) -> its final norm (T, D), in place."""
        ops.norm_into(x, self.norm, self.config.rms_eps, x)
        return x

    def _check(self, segments: Sequence[Segment]) -> torch.Tensor:
        """All ids in one tensor, after refusing what no forward can process."""
        if not segments or any(segment.ids.numel() == 0 for segment in segments):
            raise UsageError("there are no tokens to process", hint="give at least one token")
        if len({id(segment.cache) for segment in segments}) != len(segments):
            raise UsageError("two segments share one cache", hint="join them into one segment")
        ids = segments[0].ids if len(segments) == 1 else torch.cat([s.ids for s in segments])
        few = ids.tolist() if len(ids) <= ops.EXACT_ROWS else [int(i) for i in torch.aminmax(ids)]
        low, high = min(few), max(few)
        if low < 0 or high >= self.config.vocab_size:
            wrong = low if low < 0 else high
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
        tail: int = 1,
        chunk: int = 512,
        layer_major_from: int = prefill.LEAST_ROWS,
        how: prefill.How | None = None,
        on_progress: OnProgress | None = None,
        cancel: Cancel | None = None,
    ) -> torch.Tensor:
        """Process a prompt -> hidden (n, D) of its last `tail` rows, or of as many as there are.

        From `layer_major_from` rows on, if there are experts, layer by layer (`prefill.Reader`):
        `cancel` is asked between experts, and a prompt that is stopped or fails leaves the cache as
        it was. Else in chunks, `cancel` asked before every layer, the cache keeping the chunks
        finished before. Raises CancelledError, UsageError, ContextOverflowError, DiskSpaceError.
        """
        ids, total = segment.ids, segment.ids.shape[0]
        if total >= layer_major_from and self.config.is_moe:
            self._check([segment])
            how = how or prefill.How(chunk, self.hidden_budget, device_budget=self.device_budget)
            reader = prefill.Reader(
                self.layers, self.embedding, self.ropes, segment.cache, how,
                on_progress=on_progress, cancel=cancel,
            )  # fmt: skip
            return self._normed(moved(reader.read(ids, tail), self._last))
        if segment.positions.stop > self.config.max_context:
            self._check([segment])
        kept: torch.Tensor | None = None
        for start in range(0, max(total, 1), chunk):
            part = Segment(ids[start : start + chunk], segment.cache)
            hidden = self._forward([part], None, cancel)
            kept = (hidden if kept is None else torch.cat([kept, hidden]))[-tail:]
            if on_progress is not None:
                done = start + part.ids.shape[0]
                on_progress(Progress("reading the prompt", done, total, "tokens"))
        assert kept is not None
        return kept

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden (T, D) of `forward` -> logits (T, V) f32 on the host, for the caller to change."""
        if self._last is None:
            return self.head(hidden)
        return moved(self.head(hidden.to(activations(self._last))), None).float()


def head_of(weights: Weights, embedding: Embedding) -> QuantLinear:
    """The matrix from hidden states to logits, on the host."""
    return embedding.linear if weights.config.tie_embeddings else weights.linear("lm_head.weight")
