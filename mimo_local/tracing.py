"""Records which experts a model chooses while it reads texts and writes answers.

Listens to the expert store (`Store.watch`); with guesses it also asks, after each mixture
layer's attention, the next one's router. Ids in, a trace file out: knows no text. Called by
`mimo trace`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mimo_local import ops
from mimo_local.cache import KVCache
from mimo_local.config import ModelConfig
from mimo_local.errors import UsageError
from mimo_local.experts.store import Store
from mimo_local.layers import MoE
from mimo_local.model import Model, Segment
from mimo_local.routing_trace import Facts, TraceWriter
from mimo_local.sampler import Sampler, SamplingParams

CHUNK = 128  # tokens forwarded, and written, at a time
Cancel = Callable[[], bool]


def facts_of(model: Model, name: str, expert_nbytes: int, *, guesses: bool = False) -> Facts:
    """What a trace of this model says of it; UsageError for a model without experts."""
    store_of(model)
    config = model.config
    layers = tuple(spec.index for spec in config.layers if spec.mlp == "moe")
    return Facts(
        model=name,
        layers=layers,
        n_experts=config.n_experts,
        k=config.experts_per_token,
        expert_nbytes=expert_nbytes,
        config=fingerprint(config),
        n_guesses=config.experts_per_token if guesses and len(layers) > 1 else 0,
    )


def fingerprint(config: ModelConfig) -> str:
    """Digest of every number of a config; equal for equal configs only."""
    text = json.dumps(asdict(config), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def store_of(model: Model) -> Store:
    """The store all mixture layers share."""
    for layer in model.layers:
        if isinstance(layer.mlp, MoE):
            return layer.mlp.experts
    raise UsageError("this model has no experts to trace", hint="choose a mixture-of-experts model")


class Tracer:
    """Reads and writes with one model, appending every finished forward to a trace.

    A context manager: it listens to the model's store, which serves nobody else meanwhile.
    """

    def __init__(
        self, model: Model, new_cache: Callable[[], KVCache], out: TraceWriter, context: int
    ) -> None:
        """`context`: most tokens of one sequence; longer texts are read in parts."""
        self.model, self.out, self.context = model, out, context
        self._new_cache, self._store = new_cache, store_of(model)
        self._chosen: dict[int, list[torch.Tensor]] = {}
        self._guess = _Guesses(model, out.facts) if out.facts.n_guesses else None

    def __enter__(self) -> Tracer:
        self._store.watch(self._watch)
        return self

    def __exit__(self, *_: object) -> None:
        self._store.watch(None)

    def read(
        self,
        ids: Sequence[int],
        source: str,
        *,
        cancel: Cancel = lambda: False,
        on_token: Callable[[int], None] = lambda n: None,
    ) -> None:
        """Read a text; `on_token(n)` after each n more tokens. Ends early when `cancel` says so."""
        for start in range(0, len(ids), self.context):
            cache = self._new_cache()
            self.out.begin(source)
            part = ids[start : start + self.context]
            for at in range(0, len(part), CHUNK):
                if cancel():
                    return
                chunk = part[at : at + CHUNK]
                self._forward(chunk, cache, answer=False)
                on_token(len(chunk))

    def answer(
        self,
        ids: Sequence[int],
        source: str,
        params: SamplingParams,
        *,
        stop_ids: Collection[int] = (),
        cancel: Cancel = lambda: False,
        on_token: Callable[[int], None] = lambda n: None,
    ) -> list[int]:
        """Read a prompt, then write up to `params.max_tokens`; returns the answer's ids.

        The last id is drawn but never forwarded, so the trace lacks it. UsageError: no room left.
        """
        if not 0 < len(ids) < self.context:
            raise UsageError(
                f"a prompt of {len(ids)} tokens does not fit a context of {self.context}",
                hint="shorten it or raise --context",
            )
        cache, sampler, answer = self._new_cache(), Sampler(params), list[int]()
        self.out.begin(source)
        hidden = None
        for at in range(0, len(ids), CHUNK):
            if cancel():
                return answer
            hidden = self._forward(ids[at : at + CHUNK], cache, answer=False)
            on_token(len(ids[at : at + CHUNK]))
        assert hidden is not None
        while True:
            token = sampler.draw(self.model.logits(hidden)[0], cache.length, answer)
            if token in stop_ids:
                return answer
            answer.append(token)
            on_token(1)
            if len(answer) >= params.max_tokens or cache.length >= self.context or cancel():
                return answer
            hidden = self._forward([token], cache, answer=True)

    def _watch(self, layer: int, ids: torch.Tensor) -> None:
        self._chosen.setdefault(layer, []).append(ids.to("cpu", torch.int16, copy=True))

    def _forward(self, ids: Sequence[int], cache: KVCache, *, answer: bool) -> torch.Tensor:
        """Forward and append -> hidden (1, D) of the last row."""
        self._chosen.clear()
        segment = Segment(torch.tensor(ids), cache)
        hidden = self.model.forward([segment], trace=self._guess)
        layers = self.out.facts.layers
        chosen = [torch.cat(self._chosen[layer]).numpy() for layer in layers]
        guesses = None if self._guess is None else self._guess.take()
        self.out.append(np.stack(chosen, axis=1), guesses, answer=answer)
        return hidden[-1:]


class _Guesses:
    """A `trace` callback of `Model.forward`: what each mixture layer's follower would choose now.

    Now = after the layer's attention and before its experts, by the follower's own norm and router:
    the earliest moment the residual stream holds most of what the follower will see.
    """

    def __init__(self, model: Model, facts: Facts) -> None:
        self._eps, self._n, self._config = model.config.rms_eps, facts.n_guesses, model.config
        self._followers = {a: model.layers[b] for a, b in pairwise(facts.layers)}
        self._x: torch.Tensor | None = None
        self._found: list[npt.NDArray[Any]] = []

    def __call__(self, name: str, value: torch.Tensor) -> None:
        """Remember the residual stream (`embedding`, `layers.N`); guess at `layers.N.attention`."""
        head, _, part = name.removeprefix("layers.").partition(".")
        if name == "embedding" or (head.isdigit() and not part):
            self._x = value
        elif part == "attention" and (follower := self._followers.get(int(head))) is not None:
            mlp = follower.mlp
            assert isinstance(mlp, MoE) and self._x is not None
            normed = ops.rms_norm(self._x + value, follower.post_norm, self._eps)
            score = ops.scores(normed, mlp.router)
            best = ops.election(score, mlp.bias, self._config).topk(self._n).indices
            self._found.append(best.cpu().numpy())

    def take(self) -> npt.NDArray[Any]:
        """(T, L - 1, G), best first, of the forward that just ended."""
        found, self._found = self._found, []
        return np.stack(found, axis=1)
