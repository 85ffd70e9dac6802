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
from mimo_local.blocks import KV_DTYPES
from mimo_local.cache_layers import FullKV, View, stored_dtype
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

    def __init__(
        self,
        spec: LayerSpec,
        context: int,
        *,
        dtype: torch.dtype = torch.bfloat16,
        rows: int = 1,
        cold: int = 256 << 20,
    ) -> None:
        """Numbers near one kept as a cache of `dtype` keeps them; `rows` of queries come last.

        `cold`: bytes all copies have together, at least.
        """
        self.spec, self.context, self.rows = spec, context, rows
        dtype = stored_dtype(spec, dtype)
        row = spec.kv_heads * (spec.head_dim + spec.v_head_dim) * dtype.itemsize
        if dtype == torch.int8:
            row += spec.kv_heads * 2 * 4  # scales
        self.nbytes = context * row
        """Bytes of keys and values one step reads."""
        # A step of the real model reads gigabytes between two looks at the same keys.
        copies = max(2, -(-cold // self.nbytes))
        self.views = [_filled(spec, context, dtype) for _ in range(copies)]
        self.q = torch.randn(rows, spec.heads, spec.head_dim)
        self.out = torch.empty(rows, spec.heads * spec.v_head_dim)
        self._sink = torch.zeros(spec.heads) if spec.has_sink else None
        self._kind = KV_DTYPES[dtype]
        self._next = 0

    def seconds(self, native: kernels.Kernels | None = None) -> float:
        """Of one step; the next copy is read each time. `native`: by these kernels."""
        copy = self._next % len(self.views)
        self._next += 1
        start = time.perf_counter()
        self.attend(copy, native)
        return time.perf_counter() - start

    def attend(self, copy: int, native: kernels.Kernels | None = None) -> torch.Tensor:
        """(rows, H * dv) f32 of the queries that see all keys up to their own."""
        spec, view = self.spec, self.views[copy]
        native, start = native or kernels.get(), self.context - self.rows
        if native is None:
            k, v = view.numbers()
            with torch.inference_mode():
                return ops.attention(
                    self.q, k, v, start=start, first=0, window=spec.window, sink=self._sink
                )
        sink = None if self._sink is None else self._sink.data_ptr()
        heads = kernels.Heads(
            spec.heads, spec.kv_heads, spec.head_dim, spec.v_head_dim, spec.window or 0, sink,
            self._kind,
        )  # fmt: skip
        sequence = kernels.Sequence(*view.where, 0, start, self.rows)
        native.call(
            "attend", ctypes.byref(heads), self.q.data_ptr(), spec.heads * spec.head_dim,
            ctypes.byref(sequence), 1, self.out.data_ptr(), spec.heads * spec.v_head_dim,
        )  # fmt: skip
        return self.out


def _filled(spec: LayerSpec, context: int, dtype: torch.dtype) -> View:
    """Keys and values of `context` positions: some random rows over and over."""
    store = FullKV(spec, context, dtype, torch.device("cpu"))
    most = 1024
    k = torch.randn(most, spec.kv_heads, spec.head_dim)
    v = torch.randn(most, spec.kv_heads, spec.v_head_dim)
    for start in range(0, context, most):
        n = min(most, context - start)
        store.room(start, n).write(k[:n], v[:n])
    return store.room(context, 0)
