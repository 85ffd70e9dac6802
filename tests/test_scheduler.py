"""Many requests, one thread: answers as if alone, nobody starves, nobody waits for ever.

Most tests run on the fake model, whose next id depends on every id its cache holds; the last ones
on tiny seeded models, with experts on disk and with MTP layers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from fakes import FakeModel
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_local.engine import Engine
from mimo_local.errors import BusyError, UsageError
from mimo_local.events import Done, Event, Failed, Prefill, Token
from mimo_local.sampler import SamplingParams
from mimo_local.scheduler import UNREAD
from mimo_local.settings import Settings
from mimo_local.stream import Stream
from quant.convert import Recipe, convert

torch.set_num_threads(1)
PROMPT = list(range(5, 25))


def make(model: FakeModel | None = None, **kwargs: Any) -> Engine:
    kwargs = {"context_limit": 8192, "name": "fake", "description": "fake"} | kwargs
    return Engine(model or FakeModel(), **kwargs)  # type: ignore[arg-type]


def params(n: int = 6, seed: int = 1, **kwargs: Any) -> SamplingParams:
    return SamplingParams(max_tokens=n, seed=seed, **kwargs)


def ids_of(events: Sequence[Event]) -> list[int]:
    return [e.id for e in events if isinstance(e, Token)]


class Hooked(FakeModel):
    """Calls back before each pass or piece of a prompt, with the lengths of the caches."""

    def __init__(self, hook: Callable[[list[int]], None], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.hook, self.segments = hook, list[Any]()

    def forward(self, segments: Sequence[Any], *, trace: Any = None) -> torch.Tensor:
        self.segments = list(segments)
        self.hook([segment.cache.length for segment in segments])
        return super().forward(segments, trace=trace)


# ---- company -------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 63), min_size=1, max_size=40),
            st.integers(1, 30),
            st.integers(0, 99),
        ),
        min_size=2,
        max_size=12,
    )
)
def test_answers_in_company_are_those_given_alone(
    asked: list[tuple[list[int], int, int]],
) -> None:
    with make() as engine:
        alone = [ids_of(list(engine.submit(None, ids, params(n, seed)))) for ids, n, seed in asked]
    with make() as engine:
        streams = [engine.submit(None, ids, params(n, seed)) for ids, n, seed in asked]
        together = [list(stream) for stream in streams]
    assert [ids_of(events) for events in together] == alone
    for (ids, n, _), events in zip(asked, together, strict=True):
        done = events[-1]
        assert isinstance(done, Done)
        assert (done.stats.prompt_tokens, done.stats.completion_tokens) == (len(ids), n)


def test_sequences_that_write_share_each_pass() -> None:
    passes: list[int] = []
    with make(Hooked(lambda lengths: passes.append(len(lengths)))) as engine:
        streams = [engine.submit(None, PROMPT, params(50, seed)) for seed in range(4)]
        for stream in streams:
            list(stream)
    assert passes.count(4) >= 40
    assert sum(passes) < 4 * 60


def test_a_long_prompt_does_not_starve_an_answer_and_keeps_half_the_time() -> None:
    """The answer goes on between pieces; the prompt is not stopped by it either."""
    order: list[str] = []
    long = [1] * 800

    def hook(lengths: list[int]) -> None:
        order.append("piece" if lengths[0] % 8 == 0 and lengths[0] < len(long) else "pass")

    with make(Hooked(hook, step_s=0.0005)) as engine:
        first = engine.submit(None, [2] * 801, params(5000))
        while not isinstance(next(first), Token):
            pass
        order.clear()
        second = engine.submit(None, long, params(1))
        list(second)
        pieces, passes = order.count("piece"), order.count("pass")
        first.cancel()
        list(first)
    assert pieces >= 90
    assert passes >= 30, "the answer stood still while the prompt was read"
    middle = order[len(order) // 4 : -len(order) // 4]
    assert "pass" in middle
    assert "piece" in middle


def test_a_short_prompt_is_answered_while_a_long_one_is_read() -> None:
    with make(FakeModel(step_s=0.001)) as engine:
        long = engine.submit(None, [1] * 6000, params(1))
        while not (isinstance(event := next(long), Prefill) and event.done):
            pass
        short = list(engine.submit(None, PROMPT, params(3)))
        assert len(ids_of(short)) == 3
        long.cancel()
        rest = list(long)
        assert isinstance(rest[-1], Done)
        assert rest[-1].reason == "cancelled"
        assert not ids_of(rest)


def test_a_short_prompt_is_cancelled_while_a_long_one_is_read() -> None:
    with make(FakeModel(step_s=0.001)) as engine:
        long = engine.submit(None, [1] * 6000, params(1))
        next(long)
        short = engine.submit(None, [2] * 1500, params(3000))
        next(short)
        short.cancel()
        assert isinstance(list(short)[-1], Done)
        long.cancel()
        assert isinstance(list(long)[-1], Done)


def test_requests_of_one_session_wait_for_each_other() -> None:
    with make() as engine:
        session = engine.new_session()
        first = engine.submit(session, PROMPT, params(20))
        second = engine.submit(session, [*PROMPT, 7], params(20))
        other = engine.submit(None, PROMPT, params(20))
        got = [ids_of(list(stream)) for stream in (second, other, first)]
        assert got[1] == got[2]
        assert got[0] == ids_of(list(engine.submit(None, [*PROMPT, 7], params(20))))


# ---- limits --------------------------------------------------------------------------------------


def test_a_full_inbox_refuses_and_says_so() -> None:
    with make(FakeModel(step_s=0.01), most_waiting=2) as engine:
        streams = [engine.submit(None, PROMPT, params(10_000)) for _ in range(2)]
        for stream in streams:
            next(stream)
        # Two run; up to eight may, so only what does not fit in waits.
        more: list[Stream] = []
        with pytest.raises(BusyError) as caught:
            for _ in range(20):
                more.append(engine.submit(None, PROMPT, params(10_000)))
        assert "waiting" in str(caught.value)
        assert caught.value.hint
        for stream in streams + more:
            stream.cancel()
            assert isinstance(list(stream)[-1], Done)
        assert ids_of(list(engine.submit(None, PROMPT, params(2))))


def test_an_answer_waits_for_its_reader_and_others_go_on() -> None:
    with make() as engine:
        slow = engine.submit(None, PROMPT, params(4000))
        quick = list(engine.submit(None, PROMPT, params(2000)))
        assert len(ids_of(quick)) == 2000
        assert slow.unread <= UNREAD + 8
        assert len(ids_of(list(slow))) == 4000


def test_a_stalled_reader_can_be_cancelled() -> None:
    with make() as engine:
        stalled = engine.submit(None, PROMPT, params(8000))
        list(engine.submit(None, PROMPT, params(1000)))
        stalled.cancel()
        assert engine.logits(PROMPT) is not None
        events = list(stalled)
        assert isinstance(events[-1], Done)
        assert events[-1].reason == "cancelled"
        assert len(events) <= UNREAD + 8


def test_what_runs_at_once_fits_the_room(tmp_path: Path) -> None:
    config = tiny.config("fsfs", "dmmm")
    convert(tiny.write(tmp_path / "m", config), tmp_path / "pack", Recipe.for_format("int8"))
    with Engine.load(Settings(model=tmp_path / "pack", context=512)) as engine:
        pool = engine._scheduler.sessions
        pool.budget = 2 * pool._expected(300)
        most = 0
        streams = [engine.submit(None, [seed + 1] * 200, params(100, seed)) for seed in range(5)]
        for stream in streams:
            for event in stream:
                assert not isinstance(event, Failed)
                most = max(most, engine.running)
        assert most == 2
        # A request that is too large for the room runs all the same, alone.
        assert len(ids_of(list(engine.submit(None, [9] * 400, params(100))))) == 100


def test_one_prompt_asked_several_times_at_once_is_read_once() -> None:
    model = FakeModel()
    with make(model) as engine:
        prompt = [3] * 600
        streams = [engine.submit(None, prompt, params(20, seed)) for seed in range(4)]
        ends = [list(stream)[-1] for stream in streams]
        assert model.rows < 600 + 4 * 30
    cached = [end.stats.cached_tokens for end in ends if isinstance(end, Done)]
    assert sorted(cached)[1:] == [599] * 3


# ---- failures ------------------------------------------------------------------------------------


def test_only_the_sequence_at_fault_fails() -> None:
    def hook(lengths: list[int]) -> None:
        if any(n == 33 for n in lengths):
            raise RuntimeError("row 33 hurts")

    with make(Hooked(hook)) as engine:
        streams = [engine.submit(None, ids, params(30, 3)) for ids in (PROMPT, [1] * 36, [2] * 37)]
        ends = [list(stream) for stream in streams]
    assert isinstance(ends[0][-1], Failed)
    assert "row 33" in str(ends[0][-1].error)
    assert [len(ids_of(events)) for events in ends[1:]] == [30, 30]


def test_a_prompt_that_fails_between_others_fails_alone() -> None:
    def hook(lengths: list[int]) -> None:
        if 104 in lengths and model.segments[0].cache.held[0] == 1:
            raise RuntimeError("no")

    model = Hooked(hook, step_s=0.0005)
    with make(model) as engine:
        long = engine.submit(None, [1] * 103 + [2] * 897, params(1))
        writer = engine.submit(None, [3] * 300, params(400))
        assert isinstance(list(long)[-1], Failed)
        assert len(ids_of(list(writer))) == 400


def test_many_threads_ask_and_vanish() -> None:
    """Every stream ends, whoever cancels when; afterwards nothing runs and nothing waits."""
    before = threading.active_count()
    with make(FakeModel(step_s=0.0002), most_waiting=1000) as engine:
        ended: list[type] = []

        def client(n: int) -> None:
            stream = engine.submit(None, [n % 60] * (1 + 7 * n % 300), params(1 + n % 60, n))
            for i, event in enumerate(stream):
                last = event
                if n % 3 == 0 and i == n % 11:
                    stream.cancel()
            ended.append(type(last))

        threads = [threading.Thread(target=client, args=(n,)) for n in range(60)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(ended) == 60
        assert set(ended) == {Done}
        assert (engine.running, engine.waiting) == (0, 0)
    assert threading.active_count() <= before


# ---- what a request may ask for ------------------------------------------------------------------


class Only:
    """Allows some ids and ends the answer after `most` of them."""

    def __init__(self, allowed: list[int], most: int) -> None:
        self.allowed, self.most, self.seen = allowed, most, list[int]()

    def mask(self, logits: torch.Tensor) -> torch.Tensor:
        masked = torch.full_like(logits, float("-inf"))
        masked[self.allowed] = logits[self.allowed]
        return masked

    def advance(self, token: int) -> bool:
        self.seen.append(token)
        return len(self.seen) == self.most


def test_a_constraint_decides_what_may_come_and_when_it_is_over() -> None:
    with make() as engine:
        rule = Only([40, 41, 42], 5)
        free = engine.submit(None, PROMPT, params(9))
        events = list(engine.submit(None, PROMPT, params(9), constraint=rule))
        assert len(ids_of(list(free))) == 9
    assert ids_of(events) == rule.seen
    assert set(rule.seen) <= {40, 41, 42}
    assert isinstance(events[-1], Done)
    assert (len(rule.seen), events[-1].reason) == (5, "stop")


def test_logprobs_are_those_of_the_model_whatever_the_sampling() -> None:
    with make() as engine:
        hot = params(8, temperature=2.0, top_k=5)
        events = list(engine.submit(None, PROMPT, hot, logprobs=4))
        plain = list(engine.submit(None, PROMPT, hot))
        tokens = [e for e in events if isinstance(e, Token)]
        assert ids_of(plain) == ids_of(events)
        assert all(e.logprob is None for e in plain if isinstance(e, Token))
        whole = [*PROMPT, *ids_of(events)]
        truth = engine.logits(whole).log_softmax(-1)
    for i, token in enumerate(tokens):
        row = truth[len(PROMPT) + i - 1]
        assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-5)
        values, ids = row.topk(4)
        assert [n for n, _ in token.top] == ids.tolist()
        assert [p for _, p in token.top] == pytest.approx(values.tolist(), abs=1e-5)


def test_logits_of_a_text_come_while_others_write() -> None:
    with make(FakeModel(step_s=0.001)) as engine:
        writer = engine.submit(None, PROMPT, params(5000))
        next(writer)
        assert engine.logits([1] * 30).shape == (30, 64)
        writer.cancel()
        list(writer)
    with pytest.raises(UsageError):
        engine.logits(PROMPT)


# ---- real arithmetic -----------------------------------------------------------------------------


@pytest.mark.parametrize("ram", ["all", "few"])
def test_tiny_models_give_the_same_ids_in_company(tmp_path: Path, ram: str) -> None:
    """Two long prompts, layer by layer, beside answers and short prompts; experts on disk too."""
    config = tiny.config("fsfs", "dmmm", experts=16, top_k=4, hidden=64, moe_intermediate=64)
    convert(tiny.write(tmp_path / "m", config), tmp_path / "pack", Recipe.for_format("nf4"))
    g = torch.Generator().manual_seed(5)
    asked = [
        torch.randint(0, config["vocab_size"], (n,), generator=g).tolist()
        for n in (300, 12, 700, 5, 260, 40)
    ]
    engine = _few(tmp_path / "pack") if ram == "few" else _all(tmp_path / "pack")
    with engine:
        alone = [ids_of(list(engine.submit(None, ids, params(40, 7)))) for ids in asked]
        streams = [engine.submit(None, ids, params(40, 7)) for ids in asked]
        together = [list(stream) for stream in streams]
    assert [ids_of(events) for events in together] == alone
    assert all(len(ids) == 40 for ids in alone)


@pytest.mark.parametrize("n", [2, 40, 300])
def test_a_prompt_that_is_known_already_is_answered_as_the_first_time(
    tmp_path: Path, n: int
) -> None:
    """Bit for bit: its last row goes through the model alone, whatever goes before it."""
    config = tiny.config("fsfs", "dmmm", experts=16, top_k=4, hidden=64, moe_intermediate=64)
    convert(tiny.write(tmp_path / "m", config), tmp_path / "pack", Recipe.for_format("nf4"))
    g = torch.Generator().manual_seed(n)
    ids = torch.randint(0, config["vocab_size"], (n,), generator=g).tolist()
    hot = params(40, 3, temperature=3.0, top_p=1.0)
    with _all(tmp_path / "pack") as engine:
        first, again = (list(engine.submit(None, ids, hot, logprobs=3)) for _ in range(2))
    assert first[-1].stats.cached_tokens == 0  # type: ignore[union-attr]
    assert again[-1].stats.cached_tokens == (n - 1 if n > 32 else 0)  # type: ignore[union-attr]
    assert [e for e in first if isinstance(e, Token)] == [e for e in again if isinstance(e, Token)]


def _all(pack: Path) -> Engine:
    return Engine.load(Settings(model=pack, context=2048))


def _few(pack: Path) -> Engine:
    """An engine whose RAM holds a few experts of a pack."""
    from mimo_local.experts.tiered import TieredStore
    from mimo_local.model import Model
    from mimo_local.weights import PackWeights, open_weights

    weights = open_weights(pack)
    assert isinstance(weights, PackWeights)
    slot = weights.pack.expert_layout(1).stride
    store = TieredStore(weights, (6 + 8) * slot, reserve=0)
    return Engine(Model(weights, store), name="few", description="few", context_limit=2048)
