"""One thread, many requests: prefix reuse, cancel, stop texts, errors that leave it alive.

Most tests run on the fake model, whose next id depends on every id its cache holds; the last ones
load a tiny seeded checkpoint.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import FakeCache, FakeModel, FakeTokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_local.engine import MAX_SNAPSHOTS, Engine, Session
from mimo_local.errors import ContextOverflowError, MimoError, NotEnoughMemoryError, UsageError
from mimo_local.events import Done, Event, Failed, Prefill, Stats, Token
from mimo_local.sampler import SamplingParams
from mimo_local.settings import Settings
from mimo_local.stream import NO_ID, TextOutput

torch.set_num_threads(1)  # tiny products: a second thread only waits
PROMPT = list(range(5, 25))


def make(model: FakeModel | None = None, **kwargs: Any) -> Engine:
    kwargs = {"context_limit": 4096, "name": "fake", "description": "fake"} | kwargs
    return Engine(model or FakeModel(), **kwargs)  # type: ignore[arg-type]


@pytest.fixture
def engine() -> Iterator[Engine]:
    with make() as engine:
        yield engine


def params(n: int = 6, seed: int = 1) -> SamplingParams:
    return SamplingParams(max_tokens=n, seed=seed)


def ids_of(events: list[Event]) -> list[int]:
    return [e.id for e in events if isinstance(e, Token) and e.id != NO_ID]


def ask(engine: Engine, ids: list[int], session: Session | None = None, n: int = 6) -> list[int]:
    events = list(engine.submit(session or engine.new_session(), ids, params(n)))
    assert isinstance(events[-1], Done), events[-1]
    return ids_of(events)


def agree(session: Session) -> bool:
    cache: Any = session.cache
    return bool(cache.held == session.ids)


# ---- a request -----------------------------------------------------------------------------------


def test_events_come_in_order_with_true_figures(engine: Engine) -> None:
    session = engine.new_session()
    events = list(engine.submit(session, PROMPT, params(6)))
    kinds = "".join({Prefill: "p", Token: "t", Done: "d"}[type(e)] for e in events)  # type: ignore[index]
    assert kinds == "pppp" + "tttttt" + "d"
    assert [e.done for e in events if isinstance(e, Prefill)] == [0, 8, 16, 20]
    done = events[-1]
    assert isinstance(done, Done)
    assert done.reason == "length"
    stats = done.stats
    assert (stats.prompt_tokens, stats.cached_tokens, stats.completion_tokens) == (20, 0, 6)
    assert (stats.context_used, stats.context_limit) == (25, 4096)
    assert stats.cache_bytes > 0
    assert stats.prefill_s > 0
    assert stats.decode_s > 0
    assert session.ids == PROMPT + ids_of(events)[:-1]
    assert agree(session)


def test_a_finished_stream_stays_finished(engine: Engine) -> None:
    stream = engine.submit(engine.new_session(), PROMPT, params())
    list(stream)
    assert list(stream) == []


def test_a_stream_reports_the_seed_that_repeats_it(engine: Engine) -> None:
    stream = engine.submit(engine.new_session(), PROMPT, SamplingParams(max_tokens=9))
    first = ids_of(list(stream))
    again = engine.submit(engine.new_session(), PROMPT, params(9, seed=stream.seed))
    assert ids_of(list(again)) == first
    other = engine.submit(engine.new_session(), PROMPT, SamplingParams(max_tokens=9))
    assert other.seed != stream.seed


# ---- sessions ------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    turns=st.lists(
        st.tuples(st.integers(0, 60), st.lists(st.integers(0, 63), min_size=1, max_size=12)),
        min_size=1,
        max_size=8,
    )
)
def test_a_reused_session_answers_as_a_fresh_one(turns: list[tuple[int, list[int]]]) -> None:
    """Any edit at any depth: keep some of what was said, continue differently."""
    with make() as engine:
        session = engine.new_session()
        for keep, more in turns:
            ids = session.ids[:keep] + more
            assert ask(engine, ids, session) == ask(engine, ids)
            assert agree(session)


def test_a_continued_chat_reads_only_what_is_new(engine: Engine) -> None:
    session = engine.new_session()
    answer = ask(engine, PROMPT, session)
    events = list(engine.submit(session, [*PROMPT, *answer, 1, 2, 3], params()))
    done = events[-1]
    assert isinstance(done, Done)
    # The last drawn id was never forwarded, so it is read with the new ones.
    assert done.stats.cached_tokens == len(PROMPT) + len(answer) - 1


def test_an_edit_goes_back_to_the_nearest_restart_point(engine: Engine) -> None:
    session = engine.new_session()
    ask(engine, PROMPT, session, 30)
    edited = [*PROMPT, 60, 61]  # another answer than the one given: 30 rows back, past the ring
    done = list(engine.submit(session, edited, params()))[-1]
    assert isinstance(done, Done)
    assert done.stats.cached_tokens == len(PROMPT)
    # Inside the prompt no restart point is left: everything is read again.
    done = list(engine.submit(session, [*PROMPT[:3], 1], params()))[-1]
    assert isinstance(done, Done)
    assert done.stats.cached_tokens == 0
    assert agree(session)


def test_the_same_prompt_again_forwards_one_row(engine: Engine) -> None:
    session = engine.new_session()
    first = ask(engine, PROMPT, session, 2)
    done = list(engine.submit(session, PROMPT, params(2)))[-1]
    assert isinstance(done, Done)
    assert done.stats.cached_tokens == len(PROMPT) - 1
    assert ask(engine, PROMPT, session, 2) == first


def test_common_prefix_and_restart_points_are_bounded() -> None:
    session = Session(FakeCache)  # type: ignore[arg-type]
    session.ids[:] = [1, 2, 3]
    assert [session.common_prefix(x) for x in ([], [1, 2, 9], [1, 2, 3, 4], [2])] == [0, 2, 3, 0]
    session = Session(FakeCache)  # type: ignore[arg-type]
    cache: Any = session.cache
    for i in range(20):
        cache.extend([i] * 20)
        session.ids.extend([i] * 20)
        session.remember()
        session.remember()
    assert len(session._snapshots) == MAX_SNAPSHOTS
    session.rewind(390)
    assert len(session.ids) == 380
    session.rewind(3)
    assert session.ids == []
    assert agree(session)


# ---- stop ----------------------------------------------------------------------------------------


def test_stop_ids_of_tokenizer_and_config_end_an_answer() -> None:
    model = FakeModel(script={20: 40, 21: 7, 22: 41})
    tokenizer: Any = FakeTokenizer()
    tokenizer.stop_ids = (7,)
    with make(model, tokenizer=tokenizer) as engine:
        assert ask(engine, PROMPT) == [40]
    model.config.eos_ids = (40,)
    with make(model) as engine:
        assert ask(engine, PROMPT) == []


def spell(text: str) -> FakeModel:
    """A model that writes `text` after PROMPT, one character per id."""
    return FakeModel(128, script={len(PROMPT) + i: ord(c) for i, c in enumerate(text)})


def test_stop_texts_end_the_answer_before_them() -> None:
    tokenizer: Any = FakeTokenizer()
    with make(spell("hello END of it."), tokenizer=tokenizer) as engine:
        session = engine.new_session()
        events = list(engine.submit(session, PROMPT, params(30), stop=["END", "it"]))
        assert "".join(e.text for e in events if isinstance(e, Token)) == "hello "
        assert isinstance(events[-1], Done)
        assert events[-1].reason == "stop"
        assert agree(session)


def test_text_held_back_for_a_stop_that_never_comes_is_sent() -> None:
    tokenizer: Any = FakeTokenizer()
    with make(spell("hello EN"), tokenizer=tokenizer) as engine:
        events = list(engine.submit(engine.new_session(), PROMPT, params(8), stop=["END"]))
        assert "".join(e.text for e in events if isinstance(e, Token)) == "hello EN"
        assert events[-2] == Token(NO_ID, "EN")


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(alphabet="abc", max_size=30),
    stop=st.lists(st.text(alphabet="abc", max_size=4), max_size=3),
)
def test_watched_text_is_the_text_before_the_first_stop(text: str, stop: list[str]) -> None:
    output = TextOutput(FakeTokenizer().stream(), stop)  # type: ignore[arg-type]
    out = ""
    for character in text:
        piece, stopped = output.push(ord(character))
        out += piece
        if stopped:
            break
    out += output.flush()
    # A stop that ends first wins; among those ending at once, the one that begins first.
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s and s in text]
    assert out == (text[: min(ends)[1]] if ends else text)


def test_stop_texts_without_a_tokenizer_are_refused(engine: Engine) -> None:
    with pytest.raises(UsageError, match="tokenizer"):
        engine.submit(engine.new_session(), PROMPT, params(), stop=["x"])


# ---- cancel and close ----------------------------------------------------------------------------


def test_cancel_answers_within_a_step_and_keeps_what_was_made() -> None:
    with make(FakeModel(step_s=0.02)) as engine:
        session = engine.new_session()
        stream = engine.submit(session, PROMPT, params(10_000))
        got: list[Event] = []
        for event in stream:
            got.append(event)
            if len(ids_of(got)) == 3:
                stream.cancel()
                asked = time.monotonic()
        assert time.monotonic() - asked < 5  # 10 000 tokens would take 200 s
        assert isinstance(got[-1], Done)
        assert got[-1].reason == "cancelled"
        assert len(ids_of(got)) <= 5
        assert agree(session)
        assert session.ids[: len(PROMPT)] == PROMPT


def test_cancel_works_while_the_prompt_is_read() -> None:
    with make(FakeModel(step_s=0.005)) as engine:
        session = engine.new_session()
        stream = engine.submit(session, [1] * 4000, params())
        for event in stream:
            if isinstance(event, Prefill) and event.done:
                stream.cancel()
        assert isinstance(event, Done)
        assert event.reason == "cancelled"
        assert 0 < len(session.ids) < 4000
        assert agree(session)


def test_waiting_requests_can_be_cancelled_at_once() -> None:
    with make(FakeModel(step_s=0.01)) as engine:
        streams = [engine.submit(engine.new_session(), PROMPT, params(10_000)) for _ in range(8)]
        last = [engine.submit(engine.new_session(), PROMPT, params(3)) for _ in range(2)]
        for stream in streams:
            assert isinstance(next(stream), Prefill)
        assert (engine.running, engine.waiting) == (8, 2)
        last[0].cancel()
        assert [type(e) for e in last[0]] == [Done]
        for stream in streams:
            stream.cancel()
            stream.cancel()
            assert isinstance(list(stream)[-1], Done)
        assert len(ids_of(list(last[1]))) == 3
        assert (engine.running, engine.waiting) == (0, 0)


def test_close_ends_running_and_waiting_requests_and_is_idempotent() -> None:
    engine = make(FakeModel(step_s=0.01))
    streams = [engine.submit(engine.new_session(), PROMPT, params(10_000)) for _ in range(2)]
    next(streams[0])
    engine.close()
    engine.close()
    for stream in streams:
        end = list(stream)[-1]
        assert isinstance(end, Done)
        assert end.reason == "cancelled"
    with pytest.raises(UsageError, match="closed"):
        engine.submit(engine.new_session(), PROMPT, params())
    with pytest.raises(UsageError, match="closed"):
        engine.logits(PROMPT)


def test_a_forgotten_engine_does_not_keep_the_interpreter_alive() -> None:
    code = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from test_engine import *\n"
        "engine = make(FakeModel(step_s=0.01))\n"
        "stream = engine.submit(engine.new_session(), PROMPT, params(10**6))\n"
        "next(stream); print('leaving')\n"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=root
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "leaving\n", "")


# ---- errors --------------------------------------------------------------------------------------


def test_an_error_ends_the_request_not_the_engine() -> None:
    model = FakeModel(fail_at=len(PROMPT) + 2)
    with make(model) as engine:
        session = engine.new_session()
        events = list(engine.submit(session, PROMPT, params()))
        failed = events[-1]
        assert isinstance(failed, Failed)
        assert isinstance(failed.error, MimoError)
        assert isinstance(failed.error.__cause__, RuntimeError)
        assert "the fake model fails here" in str(failed.error)
        assert agree(session)
        with pytest.raises(MimoError, match="fails here"):
            engine.logits([1] * 30)
        model.fail_at = None
        assert ask(engine, PROMPT, session) == ask(engine, PROMPT)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"
            ),
            "the memory ran out",
        ),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "the GPU's"),
    ],
)
def test_running_out_of_memory_says_so(
    monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    model = FakeModel()

    def forward(*_: Any, **__: Any) -> torch.Tensor:
        raise error

    monkeypatch.setattr(model, "forward", forward)
    with make(model) as engine:
        failed = list(engine.submit(engine.new_session(), PROMPT, params()))[-1]
        assert isinstance(failed, Failed)
        assert isinstance(failed.error, NotEnoughMemoryError)
        assert failed.error.message.startswith(said)


def test_impossible_requests_are_refused_at_once() -> None:
    with make(context_limit=10) as engine:
        session = engine.new_session()
        with pytest.raises(UsageError, match="empty"):
            engine.submit(session, [], params())
        with pytest.raises(ContextOverflowError, match="10 tokens"):
            engine.submit(session, [1] * 10, params())
        with pytest.raises(UsageError, match="64"):
            engine.submit(session, [1, 64], params())
        with pytest.raises(UsageError, match="-1"):
            engine.logits([-1])
        assert len(ask(engine, [1] * 9, session)) == 1
        assert engine.logits([1] * 10).shape == (10, 64)


# ---- logits --------------------------------------------------------------------------------------


def test_logits_touch_no_session_and_wait_their_turn(engine: Engine) -> None:
    session = engine.new_session()
    ask(engine, PROMPT, session)
    before = list(session.ids)
    found: list[torch.Tensor] = []
    threads = [
        threading.Thread(target=lambda: found.append(engine.logits(PROMPT))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(rows, found[0]) for rows in found)
    assert found[0].shape == (len(PROMPT), 64)
    assert session.ids == before
    # The answer's first id is drawn from the last row.
    greedy = SamplingParams(temperature=0, max_tokens=1)
    events = list(engine.submit(engine.new_session(), PROMPT, greedy))
    assert ids_of(events) == [int(found[0][-1].argmax())]


# ---- a real model --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import tiny

    return tiny.write(tmp_path_factory.mktemp("tiny") / "tiny-model", tiny.config(window=5))


def test_a_checkpoint_loads_and_sessions_equal_fresh_starts(checkpoint: Path) -> None:
    stages: list[str] = []
    settings = Settings(model=checkpoint)
    with Engine.load(settings, lambda progress: stages.append(progress.stage)) as engine:
        assert engine.name == "tiny-model"
        assert "4 layers, 8 experts" in engine.description
        assert engine.tokenizer is None
        assert engine.context_limit == 4096
        assert stages
        session = engine.new_session()
        assert session.cache.dtype == torch.float32
        first = ask(engine, PROMPT, session, 12)
        assert first == ask(engine, PROMPT, n=12)
        for ids in ([*PROMPT, *first, 3], [*PROMPT, 4, 4], PROMPT[:7], [*PROMPT[:7], 9]):
            assert ask(engine, ids, session, 12) == ask(engine, ids, n=12)
        rows = engine.logits(PROMPT)
        assert rows.dtype == torch.float32
        greedy = list(engine.submit(session, PROMPT, SamplingParams(temperature=0, max_tokens=1)))
        assert ids_of(greedy) == [int(rows[-1].argmax())]


def test_settings_reach_the_engine(checkpoint: Path) -> None:
    settings = Settings(model=checkpoint, context=100, kv_dtype="bf16", window=3, threads=1)
    with Engine.load(settings) as engine:
        assert engine.context_limit == 100
        assert engine.new_session().cache.dtype == torch.bfloat16
        assert {spec.window for spec in engine.config.layers} == {None, 3}
        assert torch.get_num_threads() == 1
    with Engine.load(Settings(model=checkpoint, context=10_000)) as engine:
        assert engine.context_limit == 4096


def test_int8_keys_and_values_reach_every_layer_that_sees_all(checkpoint: Path) -> None:
    with Engine.load(Settings(model=checkpoint, kv_dtype="int8")) as engine:
        session = engine.new_session()
        stored = {type(layer).__name__: layer.k.dtype for layer in session.cache.layers}
        assert stored == {"FullKV": torch.int8, "RingKV": torch.bfloat16}
        greedy = SamplingParams(temperature=0, max_tokens=8)
        answer = ids_of(engine.submit(session, PROMPT, greedy))
        # Read again in one go, it is what one token at a time gave.
        cache = engine.new_session().cache
        assert cache.dtype == torch.int8
        assert session.ids[: len(PROMPT)] == PROMPT and len(answer) == 8


def test_the_context_shrinks_to_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    import tiny

    from mimo_local import loading
    from mimo_local.config import ModelConfig
    from mimo_local.sizes import kv_bytes

    config = ModelConfig.from_dict(tiny.config(context=1 << 18))
    for limit in (32_768, 8192, 2048):
        free = int(kv_bytes(config, limit, 4) / loading.CONTEXT_SHARE) + 1
        monkeypatch.setattr(loading, "available_memory", lambda free=free: free)
        assert loading.context_limit(config, None, torch.float32) == limit
    monkeypatch.setattr(loading, "available_memory", lambda: 0)
    assert loading.context_limit(config, None, torch.float32) == loading.SMALLEST_CONTEXT
    for dtype, hint in ((torch.float32, True), (torch.int8, False)):
        with pytest.raises(NotEnoughMemoryError, match="100000 tokens") as e:
            loading.context_limit(config, 100_000, dtype)
        assert ("int8" in e.value.hint) == hint


def test_loading_can_be_stopped_and_needs_a_model(checkpoint: Path) -> None:
    class StoppedError(Exception):
        pass

    def stop(_: Any) -> None:
        raise StoppedError

    with pytest.raises(StoppedError):
        Engine.load(Settings(model=checkpoint), stop)
    with pytest.raises(UsageError, match="no model"):
        Engine.load(Settings())
    with pytest.raises(MimoError, match="no-such"):
        Engine.load(Settings(model=checkpoint / "no-such"))


def test_importing_the_engine_is_light() -> None:
    code = "import sys, mimo_local.engine; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_where_the_experts_came_from_is_told_per_request() -> None:
    model = FakeModel()
    model.experts.meters.misses = model.experts.meters.disk_bytes = 1000  # from before
    with make(model) as engine:

        def figures() -> Stats:
            stream = engine.submit(engine.new_session(), [1, 2, 3], SamplingParams(max_tokens=3))
            return next(e.stats for e in stream if isinstance(e, Done))

        assert figures().experts is None  # all in RAM
        model.experts.nbytes = {"ram": 70, "disk": 500}
        forward = model.forward

        def counted(*args: Any, **kwargs: Any) -> Any:
            m = model.experts.meters
            m.ram_hits, m.misses, m.disk_bytes = m.ram_hits + 3, m.misses + 1, m.disk_bytes + 40
            return forward(*args, **kwargs)

        model.forward = counted  # type: ignore[method-assign]
        stats = figures()
        assert stats.experts is not None
        assert stats.experts.hit_rate == 0.75
        assert stats.experts.ram_bytes == 70
        assert stats.experts.misses * 40 == stats.experts.disk_bytes < 1000
        assert stats.disk_bytes_per_token > 0
    assert model.experts.closed
