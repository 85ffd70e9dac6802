"""Single timed runs of a real-shape slice: a step, its experts alone, a prompt, one attention.

Each gives the seconds of one run with new random ids and experts; how often and beside what is for
`shape_bench`, its only caller, to say.
"""

from __future__ import annotations

import ctypes
import random
import time

import torch

from mimo_local import kernels, ops
from mimo_local.benchmark import SEED, ModelRunner
from mimo_local.config import LayerSpec
from mimo_local.experts.store import ExpertStore
from mimo_local.model import Model, Segment
from mimo_local.random_weights import RandomWeights

START = 16
"""Tokens in the context of a decode step or of rows to verify."""


class Slice:
    """A model of random weights and one sequence of it."""

    def __init__(
        self, weights: RandomWeights, model: Model, store: ExpertStore, *, most_rows: int
    ) -> None:
        """`store` runs the model's experts; a step has at most `most_rows` rows."""
        self.weights, self.model, self.store = weights, model, store
        self.config = weights.config
        self.runner = ModelRunner(
            model, lambda: model.new_cache(dtype=torch.bfloat16, slack=most_rows), whole=True
        )
        self._random = random.Random(SEED)

    def restart(self) -> None:
        """A new sequence of a few tokens."""
        self.runner.reset()
        self.runner.prefill(self.ids(START))

    def rows(self, n: int, *, same: bool = False) -> float:
        """A step of `n` rows up to their logits; the sequence is afterwards as it was.

        `same`: all rows go to the same experts of a mixture layer, other ones in every run, because
        the last ones may still be in the processor's cache.
        """
        if same:
            self.weights.steer(self._chosen)
        cache = self.runner.cache
        segment = Segment(torch.tensor(self.ids(n), dtype=torch.int64), cache)
        start = time.perf_counter()
        self.model.logits(self.model.forward([segment]))
        seconds = time.perf_counter() - start
        cache.truncate(cache.length - n)
        if same:
            self.weights.steer(None)
        return seconds

    def experts(self, n: int, *, same: bool = False) -> float:
        """The experts of all mixture layers alone, for `n` rows, chosen at random."""
        k = self.config.experts_per_token
        x, w = torch.randn(n, self.config.hidden_size), torch.full((n, k), 1 / k)
        seconds = 0.0
        for spec in self.config.layers:
            if spec.mlp == "moe":
                first = self._chosen()
                ids = torch.tensor([first if same else self._chosen() for _ in range(n)])
                with ops.threads_for(n), torch.inference_mode():  # as in a step of the model
                    start = time.perf_counter()
                    self.store.run(spec.index, x, ids, w)
                    seconds += time.perf_counter() - start
        return seconds

    def prompt(self, tokens: int) -> float:
        """A new sequence of `tokens` ids up to the logits of the last."""
        ids = self.ids(tokens)
        self.runner.reset()
        start = time.perf_counter()
        self.runner.prefill(ids)
        return time.perf_counter() - start

    def ids(self, n: int) -> list[int]:
        """Random ids."""
        return [self._random.randrange(self.config.vocab_size) for _ in range(n)]

    def _chosen(self) -> list[int]:
        k = self.config.experts_per_token
        return sorted(self._random.sample(range(self.config.n_experts), k))


class AttentionCase:
    """One layer's keys and values of `context` positions, in more copies than a cache can hold."""

    def __init__(self, spec: LayerSpec, context: int, *, cold: int = 256 << 20) -> None:
        """bfloat16 numbers near one. `cold`: bytes all copies have together, at least."""
        self.spec, self.context = spec, context
        row = spec.kv_heads * (spec.head_dim + spec.v_head_dim) * 2
        self.nbytes = context * row
        """Bytes of keys and values one step reads."""
        # A step of the real model reads gigabytes between two looks at the same keys.
        copies = max(2, -(-cold // self.nbytes))
        self.k = _filled(copies, context, spec.kv_heads, spec.head_dim)
        self.v = _filled(copies, context, spec.kv_heads, spec.v_head_dim)
        self.q = torch.randn(1, spec.heads, spec.head_dim)
        self.out = torch.empty(1, spec.heads * spec.v_head_dim)
        self._sink = torch.zeros(spec.heads) if spec.has_sink else None
        self._next = 0

    def seconds(self) -> float:
        """Of one step; the next copy is read each time."""
        copy = self._next % self.k.shape[0]
        self._next += 1
        start = time.perf_counter()
        self.attend(copy)
        return time.perf_counter() - start

    def attend(self, copy: int) -> torch.Tensor:
        """(1, H * dv) f32 of the query that follows all keys."""
        spec, k, v = self.spec, self.k[copy], self.v[copy]
        native, last = kernels.get(), self.context - 1
        if native is None:
            with torch.inference_mode():
                return ops.attention(
                    self.q, k, v, start=last, first=0, window=spec.window, sink=self._sink
                )
        sink = None if self._sink is None else self._sink.data_ptr()
        heads = kernels.Heads(
            spec.heads, spec.kv_heads, spec.head_dim, spec.v_head_dim, spec.window or 0, sink, 1
        )
        sequence = kernels.Sequence(k.data_ptr(), v.data_ptr(), 0, last, 1)
        native.call(
            "attend", ctypes.byref(heads), self.q.data_ptr(), spec.heads * spec.head_dim,
            ctypes.byref(sequence), 1, self.out.data_ptr(), spec.heads * spec.v_head_dim,
        )  # fmt: skip
        return self.out


def _filled(copies: int, context: int, heads: int, dim: int) -> torch.Tensor:
    """(copies, context, heads, dim) bfloat16: some random numbers over and over."""
    out = torch.empty((copies, context, heads, dim), dtype=torch.bfloat16)
    flat, drawn = out.view(-1), torch.randn(min(out.numel(), 1 << 20)).bfloat16()
    for start in range(0, flat.numel(), drawn.numel()):
        part = flat[start : start + drawn.numel()]
        part.copy_(drawn[: part.numel()])
    return out
