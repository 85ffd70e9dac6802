"""`plan`: places a model on a machine, refuses what cannot work, predicts what can. Pure.

The same function answers `mimo plan` and sets the tiers' budgets when a model is loaded.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace

from mimo_local.config import ModelConfig
from mimo_local.errors import UsageError
from mimo_local.plan import prediction
from mimo_local.plan.placement import fitting_context, place, problems, rows
from mimo_local.plan.rates import Rates
from mimo_local.plan.routing import BOUNDS, HitCurve
from mimo_local.plan.types import Budget, Placement, Plan, Prediction
from mimo_local.settings import Draft
from mimo_local.sizes import PackSizes, gb, kv_bytes

PAGES, PAGE_TOKENS = 100, 550  # a page of a printed document has 500 to 600 tokens
ASKED, ANSWERED = 1024, 256  # tokens of a request that stands for others


def plan(
    config: ModelConfig,
    pack: PackSizes | None,
    budget: Budget,
    *,
    context: int | None = None,
    tokens: int = PAGES * PAGE_TOKENS,
    kv_itemsize: int = 2,
    drafting: Draft = "auto",
    curves: Sequence[HitCurve] = BOUNDS,
) -> Plan:
    """Place `pack` (estimated if None) on `budget` for one sequence of `context` tokens.

    `context` None: 32k, less if the RAM is small. `tokens`: the document whose reading is
    predicted. `drafting`: see `place`. `curves`: hit rates to predict with, worst first. UsageError
    for an impossible context.
    """
    if context is not None and not 0 < context <= config.max_context:
        raise UsageError(
            f"a context of {context} tokens is outside the model's 1 to {config.max_context}",
            hint=f"use `--context {config.max_context}` or less",
        )
    if tokens < 1:
        raise UsageError(f"{tokens} tokens are no document", hint="use `--pages 1` or more")
    sizes = pack or PackSizes.estimate(config)
    chosen = context or fitting_context(config, sizes, budget, kv_itemsize)

    def solve(length: int) -> tuple[Placement, bool]:
        found = place(
            config, sizes, budget,
            context=length, kv_itemsize=kv_itemsize, drafting=drafting,
        )  # fmt: skip
        return found, not problems(config, sizes, budget, found)

    found, fits = solve(chosen)
    answer = Plan(
        budget,
        sizes,
        placement=found,
        table=rows(sizes, found),
        problems=problems(config, sizes, budget, found),
        prediction=None,
        assumptions=(*rates_of(budget, found).lines, *_routing(sizes, curves)),
        notes=found.notes,
    )
    if not fits:
        return answer
    predicted = forecast(config, answer, tokens=tokens, curves=curves)
    notes = [*found.notes, *_hints(found, predicted)]
    if chosen < config.max_context:
        line = _cost_of(config.max_context, found, config, kv_itemsize)
        longer, longer_fits = solve(config.max_context)
        if longer_fits:
            there = replace(answer, placement=longer)
            at_end = forecast(config, there, tokens=1, depth=longer.context, curves=curves)
            line += f"; at its end {span(at_end.tokens_per_s)} tokens/s"
        notes.append(line if longer_fits else f"{line}: too much here")
    return replace(answer, prediction=predicted, notes=tuple(notes))


def forecast(
    config: ModelConfig,
    made: Plan,
    *,
    tokens: int,
    depth: int = prediction.DEPTH,
    curves: Sequence[HitCurve] = BOUNDS,
) -> Prediction:
    """What `made` predicts for one request: a prompt of `tokens`, an answer at `depth` tokens."""
    return prediction.predict(
        config, made.sizes, made.placement, rates_of(made.budget, made.placement),
        curves=curves, tokens=tokens, depth=depth,
    )  # fmt: skip


def gains(config: ModelConfig, there: Plan, here: Plan) -> bool:
    """Whether a prompt of a page or two and its answer take less time by `there` than by `here`."""
    if not (there.fits and here.fits):
        return there.fits

    def seconds(made: Plan) -> float:
        found = forecast(config, made, tokens=ASKED)
        return found.prefill.seconds + ANSWERED / statistics.fmean(found.tokens_per_s)

    return seconds(there) < seconds(here)


def rates_of(budget: Budget, found: Placement) -> Rates:
    """The rates that matter to a placement."""
    layers = found.device.layers
    return Rates.of(budget, gpu=layers > 0, cpu=not found.device.streams or not found.device.head)


def _hints(found: Placement, predicted: Prediction) -> list[str]:
    notes, document = [], predicted.prefill
    rows = found.device.rows
    if found.device.streams and found.context > rows:
        notes.append(
            f"prompts of more than {rows} tokens are read in parts by the GPU, and the experts "
            "come over PCIe for each"
        )
    elif found.context > found.hidden_tokens:
        notes.append(f"hidden states spill to disk from {found.hidden_tokens + 1} tokens on")
    if document.parts > 1:
        notes.append(
            f"{document.tokens} tokens are more than the context: read in {document.parts} parts, "
            "each reads the experts again"
        )
    return notes


def _cost_of(longest: int, found: Placement, config: ModelConfig, itemsize: int) -> str:
    more = kv_bytes(config, longest, itemsize) - kv_bytes(config, found.context, itemsize)
    return f"a context of {longest} takes {gb(more)} more"


def span(values: Sequence[float], digits: int = 1) -> str:
    """`1.9-3.4`, or one number if both ends read alike."""
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low}-{high}"


def _routing(sizes: PackSizes, curves: Sequence[HitCurve]) -> tuple[str, ...]:
    if not sizes.experts:
        return ()
    told = {
        "uniform": "every expert equally likely (uniform)",
        "skewed": "caches hit as in public traces of similar models (skewed)",
    }
    names = [told.get(curve.name, f"routing as in {curve.name}") for curve in curves]
    return (" to ".join(names) + "; no drafting",)
