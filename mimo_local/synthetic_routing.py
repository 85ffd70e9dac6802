"""Routing traces out of a seed: skewed, sticky and drifting like those of real models.

For tests and benches: nobody has to own the real model to compare policies at its size. What it
cannot show is the real model's own skew; `mimo trace` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mimo_local.routing_trace import Facts, RoutingTrace, Text


@dataclass(frozen=True, slots=True)
class Routing:
    """How tokens choose.

    As it stands, LRU hits 35, 44, 52, 60, 67, 75 and 82 % with 5, 8, 12, 18, 25, 37 and 50 % of all
    experts held, and neighbours share 32 % of theirs. Reported for 256 experts and 8 chosen: 24,
    42, 48, 57, 67, then 72 % with 30 %, and 26 to 41 % shared. Pins lose here, as reported; a
    smaller `topic_share` gives every text the same favourites, and pins win.
    """

    zipf: float = 1.0
    """Popularity of the i-th most popular expert ~ 1 / i^zipf; 0: all alike."""
    reuse: float = 0.2
    """Probability that a token keeps an expert of the token before, whatever its popularity.

    Neighbours then share this and what popularity alone makes them share.
    """
    topic_share: float = 0.95
    """Part of the choices that goes by the topic's own popularity, the rest by everybody's."""
    topic_tokens: int = 100
    """Mean length of a topic; a new one has another popularity order."""
    recall: float = 0.72
    """Of the guesses: what peers report for the next layer's router, one attention early."""


def synthetic(
    tokens: int,
    *,
    layers: int = 47,
    n_experts: int = 256,
    k: int = 8,
    expert_nbytes: int = 13_369_344,
    routing: Routing | None = None,
    guesses: bool = False,
    seed: int = 0,
) -> RoutingTrace:
    """A trace of `tokens` answer tokens; the real model's shape unless told otherwise."""
    routing = routing or Routing()
    rng = np.random.default_rng(seed)
    weights = _zipf(n_experts, routing.zipf)
    common = _shuffled(rng, weights, layers)
    facts = Facts(
        model=f"synthetic {seed}",
        layers=tuple(range(1, layers + 1)),
        n_experts=n_experts,
        k=k,
        expert_nbytes=expert_nbytes,
        n_guesses=k if guesses else 0,
    )
    ids = np.empty((tokens, layers, k), facts.dtype)
    rows = np.arange(layers)[:, None]
    log_p = np.zeros((layers, n_experts))
    for t in range(tokens):
        if t == 0 or rng.random() < 1 / routing.topic_tokens:
            topic = _shuffled(rng, weights, layers)
            log_p = np.log((1 - routing.topic_share) * common + routing.topic_share * topic)
        # The K largest of log p + Gumbel noise are K draws without putting back.
        score = log_p + rng.gumbel(size=log_p.shape)
        if t:
            kept = rng.random((layers, k)) < routing.reuse
            score[rows, ids[t - 1]] += np.where(kept, 1e6, 0.0)
        ids[t] = np.sort(np.argpartition(score, -k, axis=1)[:, -k:], axis=1)
    made = _guesses(rng, ids, n_experts, routing.recall) if guesses else None
    return RoutingTrace(facts, (Text(facts.model, 0, tokens),), ids, made)


def _zipf(n: int, exponent: float) -> npt.NDArray[Any]:
    weights = np.arange(1, n + 1) ** -exponent
    return np.asarray(weights / weights.sum())


def _shuffled(rng: np.random.Generator, weights: npt.NDArray[Any], layers: int) -> Any:
    """(layers, E): every layer its own order."""
    return rng.permuted(np.tile(weights, (layers, 1)), axis=1)


def _guesses(
    rng: np.random.Generator, ids: npt.NDArray[Any], n_experts: int, recall: float
) -> npt.NDArray[Any]:
    """(N, L - 1, K): `recall` of them right, and the right ones more often among the first."""
    wanted = ids[:, 1:]
    wrong = (wanted + rng.integers(1, n_experts, wanted.shape)) % n_experts
    right = rng.random(wanted.shape) < recall
    order = np.argsort(rng.random(wanted.shape) + np.where(right, 0.0, 0.3), axis=-1)
    return np.take_along_axis(np.where(right, wanted, wrong).astype(ids.dtype), order, axis=-1)
