"""From logits to one id: pure filters, and a draw whose random number is keyed by (seed, position).

Order, the field's usual one: penalties, temperature, top-k, top-p, min-p, draw. Knows
nothing of models, caches or text; `generate` calls it. It imports no torch: tensors bring their
methods, so that parameters cost the command line nothing.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Protocol

from mimo_local.errors import ModelFilesError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

MAX_SEED: Final = (1 << 63) - 1
_MASK: Final = (1 << 64) - 1
_GOLDEN: Final = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: SplitMix64's step


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How an answer is drawn; impossible values raise UsageError."""

    temperature: float = 0.8
    """0 is greedy: the likeliest id, no randomness."""
    top_p: float = 0.95
    """Keep the smallest set of ids with at least this probability; 1 keeps all."""
    top_k: int = 0
    """Keep the k likeliest ids; 0 keeps all."""
    min_p: float = 0.0
    """Drop ids less likely than this share of the likeliest one."""
    repetition_penalty: float = 1.0
    """Above 1 disfavours every id already in the answer; the prompt's words stay free."""
    seed: int | None = None
    """None: `Sampler` chooses one and reports it in its own `params`."""
    max_tokens: int = 512
    """Longest answer in ids."""
    presence_penalty: float = 0.0
    """Taken from the logit of every id already in the answer."""
    frequency_penalty: float = 0.0
    """Taken from it once more for each time the id is there."""

    def __post_init__(self) -> None:
        rules = (
            ("temperature", 0 <= self.temperature <= 100, "from 0 to 100"),
            ("top_p", 0 < self.top_p <= 1, "above 0, up to 1"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty <= 100, "above 0, up to 100"),
            ("seed", self.seed is None or 0 <= self.seed <= MAX_SEED, "from 0 to 2^63 - 1"),
            ("max_tokens", self.max_tokens >= 1, "1 or more"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "from -2 to 2"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "from -2 to 2"),
        )
        for name, ok, wanted in rules:
            if not ok:
                raise UsageError(
                    f"{name} is {getattr(self, name)}", hint=f"{name} must be {wanted}"
                )


class Constraint(Protocol):
    """What an answer may consist of, id by id: a grammar. Used by one request, from one thread."""

    def mask(self, logits: Tensor) -> Tensor:
        """Logits (V,) f32 with -inf for ids that must not come next; at least one is left."""

    def advance(self, token: int) -> bool:
        """This id was drawn; whether the answer is complete and must end behind it."""


class Sampler:
    """Parameters with a fixed seed; stateless otherwise, so any position can be drawn again."""

    def __init__(self, params: SamplingParams) -> None:
        seed = secrets.randbits(63) if params.seed is None else params.seed
        self.params = replace(params, seed=seed)
        self._seed = seed

    def draw(self, logits: Tensor, position: int, recent_ids: Sequence[int] | Tensor = ()) -> int:
        """Draw the id for `position` from logits (V,) f32; `recent_ids`: the answer's."""
        params = self.params
        logits = repetition_penalty(logits, recent_ids, params.repetition_penalty)
        counted = params.presence_penalty, params.frequency_penalty
        logits = counted_penalties(logits, recent_ids, *counted)
        _require_finite(float(logits.max()))  # the maximum is NaN if any logit is
        if params.temperature == 0:
            return int(logits.argmax())
        ids, weights = candidates(logits, params)
        # Weights need no normalising: the random number is scaled by their sum instead. Summed in
        # double, because a float32 running sum over 152k ids is off by up to 1e-3.
        edges = weights.double().cumsum(0)
        total = float(edges[-1])
        point = uniform(self._seed, position) * total
        index = int((edges <= point).sum())
        # `point` may round up to the total itself; the last id with any weight takes it.
        last = int((edges < total).sum())
        return int(ids[min(index, last)])


def logprobs_of(logits: Tensor, token: int, n: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Logprob of `token` and the n likeliest ids with theirs, of logits (V,) as they came."""
    logprobs = logits.log_softmax(0)
    values, ids = logprobs.topk(min(n, len(logits)))
    return float(logprobs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True))


def uniform(seed: int, position: int) -> float:
    """A random number in [0, 1) that depends on (seed, position) alone: SplitMix64, 53 bits."""
    return (_mix(_mix(seed) + position * _GOLDEN) >> 11) * 2.0**-53


def repetition_penalty(logits: Tensor, ids: Sequence[int] | Tensor, penalty: float) -> Tensor:
    """Divide positive and multiply negative logits (V,) of `ids` by `penalty`, each id once."""
    if penalty == 1.0 or len(ids) == 0:
        return logits
    index = logits[:0].long().new_tensor(ids) if isinstance(ids, Sequence) else ids
    seen = logits[index]
    # An id that occurs twice writes the same value twice, so no de-duplication is needed.
    return logits.index_put((index,), (seen / penalty).where(seen > 0, seen * penalty))


def counted_penalties(
    logits: Tensor, ids: Sequence[int] | Tensor, presence: float, frequency: float
) -> Tensor:
    """Logits (V,) minus `presence` for each of `ids`, and `frequency` for each time it occurs."""
    if (presence == 0 and frequency == 0) or len(ids) == 0:
        return logits
    index = logits[:0].long().new_tensor(ids) if isinstance(ids, Sequence) else ids
    distinct, counts = index.unique(return_counts=True)  # type: ignore[no-untyped-call]
    return logits.index_add(0, distinct, -(presence + frequency * counts).to(logits.dtype))


def candidates(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Ids (n,) int64 and unnormalised probabilities (n,) f32 that survive all filters, n >= 1."""
    logits = logits / params.temperature
    ids = None
    if 0 < params.top_k < len(logits):
        logits, ids = logits.topk(params.top_k)
    weights = (logits - logits.max()).exp()  # the likeliest has weight 1
    if params.top_p < 1:
        kept = nucleus(weights, params.top_p)
        weights, ids = weights[kept], kept if ids is None else ids[kept]
    if params.min_p > 0:
        (kept,) = (weights >= params.min_p).nonzero(as_tuple=True)
        weights, ids = weights[kept], kept if ids is None else ids[kept]
    if ids is None:
        ids = weights.new_ones(len(weights)).nonzero().squeeze(1)
    return ids, weights


def nucleus(weights: Tensor, top_p: float) -> Tensor:
    """Indices (n,) of the smallest set holding `top_p` of the sum of weights (V,), likeliest first.

    Ids below (1 - top_p) / V of the sum cannot be in it: all of them together hold less than
    1 - top_p. Dropping them first turns a sort of 152k ids into one of a few hundred.
    """
    total = weights.sum()
    (likely,) = (weights >= total * ((1 - top_p) / len(weights))).nonzero(as_tuple=True)
    ordered, order = weights[likely].sort(descending=True, stable=True)
    before = ordered.double().cumsum(0) - ordered  # probability above each id
    n = max(1, int((before < top_p * total.double()).sum()))
    return likely[order[:n]]


def _mix(value: int) -> int:
    """SplitMix64's finaliser: every input bit changes every output bit with probability 1/2."""
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _require_finite(value: float) -> None:
    if not abs(value) < float("inf"):
        raise ModelFilesError(
            f"the model's output is {value}: no token can be chosen",
            hint="check the files with `mimo verify`",
        )
