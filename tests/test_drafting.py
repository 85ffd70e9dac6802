"""Drafting changes nothing but the time: ids, cache and ends with it are those without it.

On a fake model that answers from a hash of what its cache holds, with drafters of any quality; and
on tiny models with random MTP layers, greedy and sampled, in both ways through the layers.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from fakes import FakeCache, FakeModel
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_local.cache import KVCache
from mimo_local.cli import main
from mimo_local.draft_control import DraftController
from mimo_local.engine import Engine
from mimo_local.errors import ExitCode
from mimo_local.events import Done, FinishReason, Token
from mimo_local.experts.store import ExpertStore
from mimo_local.generate import Drafting, generate
from mimo_local.model import Model
from mimo_local.mtp import Drafter
from mimo_local.sampler import SamplingParams
from mimo_local.weights import open_weights

PROMPT = [5, 6, 7, 8, 9]
STEPS = 3


class Oracle:
    """Drafts the ids of a known answer, each right with a set chance."""

    def __init__(self, answer: Sequence[int], right: float, seed: int = 0) -> None:
        self.answer, self.right, self.dice = answer, right, random.Random(seed)
        self.layers = [None] * STEPS
        self.made = 0

    def drafts(self, cache: Any, ids: Sequence[int]) -> Iterator[tuple[int, float]]:
        at = len(ids) - len(PROMPT)
        for k in range(STEPS):
            known = self.answer[at + k] if at + k < len(self.answer) else 0
            self.made += 1
            good = self.dice.random() < self.right
            yield known if good else (known + 1) % 64, self.right


def drafting(drafter: Any, fixed: int | None = None) -> Drafting:
    return Drafting(drafter, DraftController(STEPS, fixed=fixed))


def answer(
    model: Any, cache: Any, ids: list[int], params: SamplingParams, **kwargs: Any
) -> tuple[list[int], FinishReason]:
    out, steps = [], generate(model, cache, ids, params, **kwargs)
    while True:
        try:
            out.append(next(steps))
        except StopIteration as end:
            return out, end.value


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(1, 30),
    right=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    fixed=st.sampled_from([None, 0, 1, 2, 3]),
    seed=st.integers(0, 99),
    how=st.sampled_from(["length", "context", "stop", "cancel", "close", "penalty", "greedy"]),
    cut=st.integers(1, 30),
)
def test_any_drafter_any_depth_any_end(
    n: int, right: float, fixed: int | None, seed: int, how: str, cut: int
) -> None:
    more = {"repetition_penalty": 1.5} if how == "penalty" else {}
    params = SamplingParams(
        max_tokens=n, seed=seed, temperature=0.0 if how == "greedy" else 2.0, **more
    )
    whole, _ = answer(FakeModel(), FakeCache(), list(PROMPT), params)
    ends: list[Any] = []
    for drafter in (None, Oracle(whole, right, seed)):
        model, ids, taken = FakeModel(), list(PROMPT), list[int]()
        cache = model.new_cache()
        kwargs: dict[str, Any] = {}
        if how == "stop":
            kwargs["stop_ids"] = {whole[min(cut, n) - 1]}
        if how == "context":
            kwargs["context_limit"] = len(PROMPT) + cut
        if how == "cancel":
            kwargs["cancel"] = lambda taken=taken: len(taken) >= cut
        if drafter is not None:
            kwargs["drafting"] = drafting(drafter, fixed)
        steps = generate(model, cache, ids, params, **kwargs)  # type: ignore[arg-type]
        reason: Any = "closed"
        while True:
            if how == "close" and len(taken) == cut:
                steps.close()
                break
            try:
                taken.append(next(steps))
            except StopIteration as end:
                reason = end.value
                break
        assert cache.held == ids
        ends.append((taken, reason, ids))
    assert ends[0] == ends[1]


def test_an_error_in_a_pass_of_several_leaves_ids_and_cache_equal() -> None:
    params = SamplingParams(max_tokens=20, seed=1)
    whole, _ = answer(FakeModel(), FakeCache(), list(PROMPT), params)
    model, ids, taken = FakeModel(fail_at=len(PROMPT) + 9), list(PROMPT), list[int]()
    cache = model.new_cache()
    with pytest.raises(RuntimeError):
        for token in generate(
            model,
            cache,
            ids,
            params,
            drafting=drafting(Oracle(whole, 0.8), 3),  # type: ignore[arg-type]
        ):
            taken.append(token)
    assert cache.held == ids
    assert taken == whole[: len(taken)]
    assert len(taken) >= 6
    model.fail_at = None
    ids += whole[len(ids) - len(PROMPT) : len(taken)]
    rest, _ = answer(model, cache, ids, SamplingParams(max_tokens=20 - len(taken), seed=1))
    assert taken + rest == whole


def test_right_drafts_save_passes_and_none_is_made_for_nothing() -> None:
    params = SamplingParams(max_tokens=21, seed=1)
    whole, _ = answer(FakeModel(), FakeCache(), list(PROMPT), params)
    model, oracle = FakeModel(), Oracle(whole, 1.0)
    both = drafting(oracle, 3)
    got, _ = answer(model, FakeCache(), list(PROMPT), params, drafting=both)
    assert got == whole
    # The prompt gives one id, five passes of four the rest: not a row more than without drafting.
    figures = both.controller.figures
    assert figures.by_drafts == (0, 0, 0, 5)
    assert figures.accepted == figures.judged == (5, 5, 5)
    assert figures.tokens_per_pass == 4
    assert model.rows == len(PROMPT) + 20
    assert oracle.made == 15


class Tiny:
    """A tiny model with MTP layers, whose window is shorter than its answers."""

    def __init__(self, folder: Path) -> None:
        d = tiny.config(window=9, vocab=24, num_nextn_predict_layers=STEPS)
        weights = open_weights(tiny.write(folder, d, seed=5, mtp_layers=STEPS))
        self.model = Model(weights, ExpertStore(weights))
        self.drafter = Drafter(weights, self.model)

    def cache(self, dtype: torch.dtype = torch.float32) -> KVCache:
        cache = self.model.new_cache(dtype=dtype)
        cache.draft = self.drafter.new_cache(dtype, cache.slack)
        return cache


@pytest.fixture
def small(way: str, tmp_path: Path) -> Tiny:
    return Tiny(tmp_path)


PRESETS = [
    SamplingParams(temperature=0.0, max_tokens=40),
    SamplingParams(temperature=0.8, top_p=0.95, seed=3, max_tokens=40),
    SamplingParams(temperature=0.3, top_p=0.95, seed=4, max_tokens=40),
    SamplingParams(temperature=1.5, top_k=5, min_p=0.02, seed=5, max_tokens=40),
    SamplingParams(temperature=0.7, repetition_penalty=1.2, seed=6, max_tokens=40),
]


@pytest.mark.parametrize("params", PRESETS)
@pytest.mark.parametrize("fixed", [None, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_real_model_answers_the_same(
    small: Tiny, way: str, params: SamplingParams, fixed: int | None, dtype: torch.dtype
) -> None:
    dice = random.Random(7)
    for n in (1, 3, 30):
        prompt = dice.choices(range(24), k=n)
        wanted, got = list(prompt), list(prompt)
        plain, cache = small.model.new_cache(dtype=dtype), small.cache(dtype)
        whole = answer(small.model, plain, wanted, params)
        both = drafting(small.drafter, fixed)
        assert answer(small.model, cache, got, params, drafting=both) == whole
        assert got == wanted
        assert cache.length == plain.length
        for a, b in zip(plain.layers, cache.layers, strict=True):
            rows = (a.rows(plain.length)[1], b.rows(cache.length)[1])
            for x, y in zip(*(each.values() for each in rows), strict=True):
                n_both = min(x.shape[0], y.shape[0])  # rings keep a few rows more or less
                x, y = x[-n_both:], y[-n_both:]
                # torch rounds the product of one row otherwise than that of several.
                near = {"atol": 1e-4} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
                assert torch.equal(x, y) if way == "native" else torch.allclose(x, y, **near)
        if fixed:
            assert both.controller.figures.drafted


def test_an_answer_over_a_long_prompt_read_layer_by_layer_is_the_same(small: Tiny) -> None:
    prompt = random.Random(8).choices(range(24), k=400)
    params = SamplingParams(temperature=0.8, seed=1, max_tokens=30)
    whole = answer(small.model, small.model.new_cache(), list(prompt), params)
    both = drafting(small.drafter, 3)
    cache = small.cache()
    assert answer(small.model, cache, list(prompt), params, drafting=both) == whole
    assert cache.draft is not None


def test_a_chat_that_goes_on_back_and_over_is_the_same(small: Tiny) -> None:
    """Through the engine: turns, an edit before the window, a regenerated answer, stop texts."""
    engines = [
        Engine(
            small.model, name="tiny", description="", context_limit=400,
            new_cache=new_cache, drafting=both,
        )
        for new_cache, both in (
            (small.model.new_cache, None),
            (small.cache, drafting(small.drafter, 2)),
        )
    ]  # fmt: skip
    sessions = [[engine.new_session(), engine.new_session()] for engine in engines]
    dice = random.Random(9)
    chats = [dice.choices(range(24), k=n) for n in (20, 35)]
    for turn in range(8):
        which = turn % 2  # two conversations take turns
        params = SamplingParams(temperature=0.9, seed=turn, max_tokens=25)
        outs = []
        for engine, pair in zip(engines, sessions, strict=True):
            events = list(engine.submit(pair[which], chats[which], params))
            assert isinstance(events[-1], Done)
            ids = [event.id for event in events if isinstance(event, Token)]
            outs.append((ids, events[-1].reason, list(pair[which].ids), events[-1].stats))
        assert outs[0][:3] == outs[1][:3]
        assert outs[0][3].draft is None
        figures = outs[1][3].draft
        assert figures is not None
        assert figures.passes + sum(figures.accepted) == len(outs[1][0]) - 1
        if turn % 3 == 2:
            chats[which] = chats[which][: len(chats[which]) // 2]  # an edit far back
        chats[which] = [*chats[which], *outs[0][0], *dice.choices(range(24), k=4)]
    for engine in engines:
        engine.close()


def test_several_at_once_get_what_each_gets_alone_without_drafts(small: Tiny) -> None:
    """Drafts are verified while one writes alone: in company, and alone again, the same ids."""
    dice = random.Random(4)
    asked = [
        (dice.choices(range(24), k=n), SamplingParams(temperature=0.9, seed=n, max_tokens=most))
        for n, most in ((30, 60), (9, 12), (300, 40), (50, 5))
    ]
    with Engine(small.model, name="tiny", description="", context_limit=600) as engine:
        alone = [list(engine.submit(None, ids, params)) for ids, params in asked]
    both = drafting(small.drafter, 2)
    with Engine(
        small.model, name="tiny", description="", context_limit=600,
        new_cache=small.cache, drafting=both,
    ) as engine:  # fmt: skip
        streams = [engine.submit(None, ids, params) for ids, params in asked]
        company = [list(stream) for stream in streams]
    for one, other in zip(alone, company, strict=True):
        assert [e.id for e in one if isinstance(e, Token)] == [
            e.id for e in other if isinstance(e, Token)
        ]
    ends = [events[-1] for events in company]
    drafted = [e.stats.draft.drafted for e in ends if isinstance(e, Done) and e.stats.draft]
    assert sum(drafted) > 20  # the longest answer went on when the others were over


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-r", "0"], "nothing to measure"),
        (["-n", "1"], "nothing to measure"),
        (["--experts", "int8"], "--experts is not for drafts"),
        (["--layers", "99"], "99 layers"),
    ],
)
def test_a_bench_that_cannot_be_is_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--shape", "tiny", "--draft", "-n", "8", *options]) == ExitCode.USAGE
    assert message in capsys.readouterr().err


def test_the_bench_measures_every_depth(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--shape", "tiny", "--draft", "-n", "12", "-r", "1"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(found["regimes"]) == 2
    for depths in found["regimes"].values():
        assert [depth["name"] for depth in depths] == ["off", "1", "2", "3", "auto"]
        for depth in depths:
            passes = sum(depth["by_drafts"])
            assert passes + sum(depth["accepted"]) == depth["tokens"] == 11
