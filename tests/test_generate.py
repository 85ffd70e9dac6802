"""The loop on a model that answers from a hash of its cache: any slip changes the next id."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest
import torch
from fakes import FakeCache, FakeModel
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_local.errors import ContextOverflowError, UsageError
from mimo_local.events import FinishReason
from mimo_local.generate import generate
from mimo_local.model import Segment
from mimo_local.sampler import Sampler, SamplingParams

torch.set_num_threads(1)  # tiny products: a second thread only waits
PROMPT = [5, 6, 7, 8, 9]


def run(steps: Generator[int, None, FinishReason]) -> tuple[list[int], FinishReason]:
    out = []
    while True:
        try:
            out.append(next(steps))
        except StopIteration as end:
            return out, end.value


def start(
    model: Any, cache: Any, ids: list[int], n: int = 6, seed: int = 1, **kwargs: Any
) -> Generator[int, None, FinishReason]:
    more = {k: kwargs.pop(k) for k in ("repetition_penalty", "temperature") if k in kwargs}
    params = SamplingParams(max_tokens=n, seed=seed, **more)
    return generate(model, cache, ids, params, **kwargs)


def agree(cache: FakeCache, ids: list[int]) -> bool:
    return cache.held == ids


def test_equals_a_plain_loop_without_a_cache() -> None:
    model, params = FakeModel(), SamplingParams(max_tokens=8, seed=3, repetition_penalty=1.3)
    ids, cache = list(PROMPT), model.new_cache()
    got, reason = run(generate(model, cache, ids, params))  # type: ignore[arg-type]
    context, sampler = list(PROMPT), Sampler(params)
    for _ in range(8):
        fresh = Segment(torch.tensor(context), FakeCache())  # type: ignore[arg-type]
        logits = model.logits(model.forward([fresh])[-1:])[0]
        context.append(sampler.draw(logits, len(context), context[len(PROMPT) :]))
    assert (got, reason) == (context[len(PROMPT) :], "length")
    assert ids == context[:-1]
    assert agree(cache, ids)


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(1, 12), how=st.sampled_from(["close", "cancel", "fail"]))
def test_any_exit_leaves_ids_and_cache_equal_and_able_to_go_on(cut: int, how: str) -> None:
    whole, _ = run(start(FakeModel(), FakeCache(), list(PROMPT), 16))
    model = FakeModel(fail_at=len(PROMPT) + cut - 1 if how == "fail" else None)
    ids, cache = list(PROMPT), model.new_cache()
    taken: list[int] = []
    steps = start(model, cache, ids, 16, cancel=lambda: how == "cancel" and len(taken) >= cut)
    try:
        for token in steps:
            taken.append(token)
            if how == "close" and len(taken) == cut:
                steps.close()
    except RuntimeError:
        assert how == "fail"
    assert agree(cache, ids)
    assert taken == whole[:cut]
    # Going on from there gives the same answer: the drawn id that was never forwarded comes again.
    model.fail_at = None
    ids += whole[len(ids) - len(PROMPT) : cut]
    rest, _ = run(start(model, cache, ids, 16 - cut)) if cut < 16 else ([], "length")
    assert taken + rest == whole


def test_a_prompt_half_in_the_cache_gives_the_same_answer_and_less_work() -> None:
    whole, _ = run(start(FakeModel(), FakeCache(), list(PROMPT)))
    model = FakeModel()
    cache = model.new_cache()
    model.forward([Segment(torch.tensor(PROMPT[:3]), cache)])  # type: ignore[arg-type]
    model.rows = 0
    again, _ = run(start(model, cache, list(PROMPT)))
    assert again == whole
    assert model.rows == 2 + len(whole) - 1


def test_stop_ids_end_it_and_are_not_yielded() -> None:
    model = FakeModel(script={5: 40, 6: 41, 7: 2})
    ids, cache = list(PROMPT), model.new_cache()
    assert run(start(model, cache, ids, stop_ids={2, 3})) == ([40, 41], "stop")
    assert ids == [*PROMPT, 40, 41]
    assert agree(cache, ids)


def test_the_context_ends_it() -> None:
    ids = list(PROMPT)
    out, reason = run(start(FakeModel(), FakeCache(), ids, 50, context_limit=8))
    assert (len(out), reason) == (3, "context")
    out, reason = run(start(FakeModel(), FakeCache(), list(PROMPT), 3, context_limit=8))
    assert (len(out), reason) == (3, "length")


def test_prefill_reports_and_cancels_between_chunks() -> None:
    reports: list[tuple[int, int]] = []
    ids = list(range(30))
    cache = FakeCache()
    steps = start(
        FakeModel(),
        cache,
        ids,
        cancel=lambda: len(reports) >= 3,
        on_prefill=lambda done, total: reports.append((done, total)),
    )
    assert run(steps) == ([], "cancelled")
    assert reports == [(0, 30), (8, 30), (16, 30)]
    assert ids == list(range(16))
    assert agree(cache, ids)


def test_cached_ids_count_as_done() -> None:
    model, reports = FakeModel(), []
    cache = model.new_cache()
    model.forward([Segment(torch.tensor(PROMPT[:3]), cache)])  # type: ignore[arg-type]
    run(start(model, cache, list(PROMPT), on_prefill=lambda done, _: reports.append(done)))
    assert reports == [3, 5]


def test_a_cancel_before_the_start_does_nothing() -> None:
    model, ids = FakeModel(), list(PROMPT)
    cache = model.new_cache()
    assert run(start(model, cache, ids, cancel=lambda: True)) == ([], "cancelled")
    assert (model.rows, ids, cache.held) == (0, [], [])


def test_the_penalty_sees_the_answer_and_leaves_the_prompt_alone() -> None:
    flat = dict.fromkeys(range(5, 20), 9)  # the model always prefers 9, by a logit of 50
    model = FakeModel(script=flat)
    out, _ = run(start(model, FakeCache(), [1, 2, 3, 4, 5], 4, temperature=0.0))
    assert out == [9, 9, 9, 9]
    out, _ = run(
        start(model, FakeCache(), [1, 2, 3, 4, 5], 4, temperature=0.0, repetition_penalty=100.0)
    )
    assert out[0] == 9
    assert 9 not in out[1:]
    out, _ = run(
        start(model, FakeCache(), [1, 2, 9, 9, 5], 4, temperature=0.0, repetition_penalty=100.0)
    )
    assert out[0] == 9


def test_impossible_prompts_are_refused_before_any_work() -> None:
    model = FakeModel()
    with pytest.raises(UsageError, match="empty"):
        run(start(model, FakeCache(), []))
    with pytest.raises(ContextOverflowError, match="5 tokens"):
        run(start(model, FakeCache(), list(PROMPT), context_limit=5))
    cache = FakeCache()
    cache.extend(PROMPT)
    with pytest.raises(ValueError, match="rows"):
        run(start(model, cache, list(PROMPT)))
    assert model.rows == 0
