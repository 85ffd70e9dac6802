from __future__ import annotations

import threading
import time
from collections.abc import Callable
from itertools import pairwise

import pytest
from fakes import FakeEngine
from hypothesis import given
from hypothesis import strategies as st
from stage import SlowReader, chunks
from textual.message import Message as TextualMessage

from mimo_local.chat import PRESETS, Chat, Message
from mimo_local.errors import BusyError, ContextOverflowError
from mimo_local.events import DraftFigures, ExpertFigures, Progress, Stats
from tui import bridge
from tui.bridge import Bridge, ChatDefaults
from tui.machine import Gauge
from tui.messages import (
    AnswerDelta,
    AnswerDone,
    AnswerFailed,
    Attached,
    AttachFailed,
    Drafts,
    LoadFailed,
    Loading,
    Machine,
    MachineNow,
    Pace,
    Queued,
    Reading,
    Ready,
    TextPiece,
    Tiers,
)
from tui.pacing import JOIN_S, MAX_JOIN_S, Joiner, Meter, Pacer


class Clock:
    """A clock and a timer that only move when told to."""

    def __init__(self) -> None:
        self.now = 0.0
        self.due: list[tuple[float, Callable[[], None]]] = []

    def __call__(self) -> float:
        return self.now

    def later(self, seconds: float, call: Callable[[], None]) -> None:
        self.due.append((self.now + seconds, call))

    def advance(self, seconds: float) -> None:
        self.now += seconds
        ready = [call for at, call in self.due if at <= self.now + 1e-9]
        self.due = [d for d in self.due if d[0] > self.now + 1e-9]
        for call in ready:
            call()


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["thinking", "answer"]),
            st.text(min_size=1, max_size=3),
            st.sampled_from([0.0, 0.01, 0.03, 0.2]),
        ),
        max_size=40,
    )
)
def test_joined_is_the_same_text_in_fewer_messages(steps) -> None:
    clock, sent = Clock(), []
    joiner = Joiner(lambda m: sent.append((clock.now, m)), clock.later, clock, lambda: 0.0)
    for i, (kind, text, pause) in enumerate(steps):
        joiner.add([TextPiece(kind, text)], Pace(tokens=i + 1))
        clock.advance(pause)
    joiner.flush()
    flat = [(p.kind, c) for _, m in sent for p in m.pieces for c in p.text]
    assert flat == [(kind, c) for kind, text, _ in steps for c in text]
    assert all(m.pieces and all(p.text for p in m.pieces) for _, m in sent)
    times = [at for at, _ in sent[:-1]]  # the last one may be the forced flush
    assert all(b - a >= JOIN_S - 1e-9 for a, b in pairwise(times))


def test_a_piece_never_waits_longer_than_the_joining_time() -> None:
    clock, sent = Clock(), []
    joiner = Joiner(sent.append, clock.later, clock, lambda: 0.0)
    joiner.add([TextPiece("answer", "a")], Pace())
    assert len(sent) == 1  # the first piece goes out at once
    clock.advance(0.01)
    joiner.add([TextPiece("answer", "b")], Pace())
    assert len(sent) == 1
    clock.advance(JOIN_S)  # and nothing else came
    assert [p.text for m in sent for p in m.pieces] == ["a", "b"]


@pytest.mark.parametrize(("cost", "gap"), [(0.001, JOIN_S), (0.04, 0.16), (5.0, MAX_JOIN_S)])
def test_dear_drawing_makes_updates_rarer_but_never_stops_them(cost: float, gap: float) -> None:
    clock, times = Clock(), []
    spent = [0.0]

    def post(message: TextualMessage) -> None:
        times.append(clock.now)
        spent[0] += cost  # drawing it

    def cpu() -> float:
        """Drawing happens after the message was taken, so its cost shows up a moment later."""
        return spent[0] - cost * bool(times and clock.now == times[-1])

    joiner = Joiner(post, clock.later, clock, cpu)
    for _ in range(2000):
        joiner.add([TextPiece("answer", "x")], Pace())
        clock.advance(0.002)
    gaps = [b - a for a, b in pairwise(times)]
    assert all(abs(g - gap) <= 0.0045 for g in gaps), gaps[:5]


def test_the_meter_stops_its_thinking_clock_at_the_answer_and_ends_with_the_engines_count() -> None:
    clock = Clock()
    meter = Meter(clock)
    for kind in ("thinking", "thinking", "thinking", "answer", "answer"):
        pace = meter.count(kind)
        clock.advance(1.0)
    assert (pace.tokens, pace.thinking_tokens, pace.thinking_s) == (5, 3, 2.0)
    assert pace.tokens_per_s == 1.0
    final = meter.final(Stats(completion_tokens=10, decode_s=3.0))
    assert (final.tokens, final.thinking_tokens, final.tokens_per_s) == (10, 6, 3.0)
    assert Meter(clock).final(Stats(completion_tokens=3)) == Pace()  # tokens, but no text


def test_reports_are_thinned_but_never_the_first_or_last_of_a_stage() -> None:
    clock = Clock()
    pacer = Pacer(clock)
    sent = []
    for stage in ("open", "read"):
        for n in range(1000):
            if pacer.due(stage, last=n == 999):
                sent.append((stage, n))
            clock.advance(0.001)
    assert next(n for s, n in sent if s == "read") == 0
    assert [n for s, n in sent if s == "read"][-1] == 999
    assert len(sent) <= 2 * (1.0 / JOIN_S + 2)


class Driver:
    """A bridge whose messages land in a list."""

    def __init__(self, factory, defaults: ChatDefaults | None = None) -> None:
        self.messages: list[TextualMessage] = []
        self._timers: list[threading.Timer] = []
        self.bridge = Bridge(self.messages.append, self._later, factory, defaults or ChatDefaults())

    def _later(self, seconds: float, call: Callable[[], None]) -> None:
        timer = threading.Timer(seconds, call)
        self._timers.append(timer)
        timer.start()

    def wait_for(self, kind: type, timeout_s: float = 5.0) -> TextualMessage:
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            for message in self.messages:
                if isinstance(message, kind):
                    return message
            time.sleep(0.005)
        raise AssertionError(f"no {kind.__name__} among {self.messages}")

    def text(self, kind: str) -> str:
        deltas = [m for m in self.messages if isinstance(m, AnswerDelta)]
        return "".join(p.text for m in deltas for p in m.pieces if p.kind == kind)

    def close(self) -> None:
        self.bridge.close()
        for timer in self._timers:
            timer.join(1.0)


@pytest.fixture
def drive():
    made: list[Driver] = []

    def make(factory, defaults: ChatDefaults | None = None) -> Driver:
        made.append(Driver(factory, defaults))
        made[-1].bridge.load()
        return made[-1]

    yield make
    for driver in made:
        driver.close()


def asked(text: str = "hello", **kwargs) -> Chat:
    return Chat(messages=[Message("user", text)], **kwargs)


def test_loading_reports_progress_then_the_model(drive) -> None:
    def factory(on_event):
        on_event(Progress("opening", 1, 2))
        return FakeEngine()

    driver = drive(factory)
    ready = driver.wait_for(Ready)
    assert isinstance(driver.messages[0], Loading)
    assert ready.model.name == "fake"
    assert ready.model.context_limit == 4096
    assert ready.model.kernel


@pytest.mark.parametrize(
    ("error", "message", "hint"),
    [
        (ContextOverflowError("too long", hint="cut it"), "too long", "cut it"),
        (ZeroDivisionError("oops"), "ZeroDivisionError: oops", "mimo doctor"),
    ],
)
def test_a_failed_load_says_why(drive, error: Exception, message: str, hint: str) -> None:
    def factory(on_event):
        raise error

    problem = drive(factory).wait_for(LoadFailed).problem
    assert problem.message == message
    assert hint in problem.hint
    assert problem.exit_code == getattr(error, "exit_code", 1)


def test_closing_stops_a_load_at_its_next_report() -> None:
    stopped = threading.Event()

    def factory(on_event):
        try:
            while True:
                on_event(Progress("fetching", 0, 0))
                time.sleep(0.01)
        finally:
            stopped.set()

    driver = Driver(factory)
    driver.bridge.load()
    driver.wait_for(Loading)
    started = time.monotonic()
    driver.bridge.close()
    assert stopped.wait(1.0)
    assert time.monotonic() - started < 1.5


def test_closing_does_not_wait_for_a_load_that_never_reports() -> None:
    gate = threading.Event()
    engine = FakeEngine()

    def factory(on_event):
        gate.wait()
        return engine

    driver = Driver(factory)
    driver.bridge.load()
    started = time.monotonic()
    driver.bridge.close(timeout_s=0.1)
    assert time.monotonic() - started < 1.0
    gate.set()  # the engine that comes too late is closed all the same
    end = time.monotonic() + 2
    while not engine.closed and time.monotonic() < end:
        time.sleep(0.005)
    assert engine.closed
    assert driver.messages == []


def test_an_answer_is_split_joined_and_ended(drive) -> None:
    engine = FakeEngine(chunks("<think>\nshort\n</think>\n\nThe answer."))
    driver = drive(lambda on_event: engine)
    driver.wait_for(Ready)
    driver.bridge.ask(asked())
    done = driver.wait_for(AnswerDone)
    assert isinstance(driver.messages[-1], AnswerDone)
    assert driver.text("thinking").strip() == "short"
    assert driver.text("answer").strip() == "The answer."
    assert driver.wait_for(Reading).prefill.total == len(engine.requests[0].ids)
    assert done.reason == "stop"
    assert 0 < done.pace.thinking_tokens < done.pace.tokens


def test_cancel_before_during_and_after(drive) -> None:
    engine = SlowReader()
    driver = drive(lambda on_event: engine)
    driver.wait_for(Ready)
    driver.bridge.cancel()  # nothing runs: nothing happens, and the next answer is not harmed
    driver.bridge.ask(asked())
    driver.wait_for(Reading)
    assert not [m for m in driver.messages if isinstance(m, AnswerDone)]
    started = time.monotonic()
    driver.bridge.cancel()
    assert driver.wait_for(AnswerDone).reason == "cancelled"
    assert time.monotonic() - started < 1.0


def test_a_failure_comes_as_a_problem_after_the_text(drive) -> None:
    engine = FakeEngine()
    engine.queue("par", "tial", error=ContextOverflowError("full", hint="clear"))
    driver = drive(lambda on_event: engine)
    driver.wait_for(Ready)
    driver.bridge.ask(asked())
    assert driver.wait_for(AnswerFailed).problem.hint == "clear"
    assert driver.text("answer") == "partial"
    assert isinstance(driver.messages[-1], AnswerFailed)


def test_typed_parameters_win_over_the_preset_and_a_seed_moves_with_the_attempt(drive) -> None:
    engine = FakeEngine()
    driver = drive(
        lambda on_event: engine,
        ChatDefaults(overrides={"temperature": 0.1, "seed": 7}, stop=("X",)),
    )
    driver.wait_for(Ready)
    for attempt in (0, 2):
        driver.messages.clear()
        driver.bridge.ask(asked(preset="code"), attempt=attempt)
        driver.wait_for(AnswerDone)
    params = [r.params for r in engine.requests]
    assert [p.seed for p in params] == [7, 9]
    assert params[0].temperature == 0.1
    assert params[0].top_p == PRESETS["code"].top_p
    assert params[0].max_tokens == PRESETS["code"].max_tokens
    assert params[0].repetition_penalty == PRESETS["code"].repetition_penalty
    assert engine.requests[0].stop == ("X",)


class Busy(FakeEngine):
    """Refuses the first `times` requests, as an engine does that others keep busy."""

    def __init__(self, times: int) -> None:
        super().__init__(["at last"])
        self.times = times

    def submit(self, *args, **kwargs):
        self.times -= 1
        if self.times >= 0:
            raise BusyError("5 requests are waiting", hint="ask again later")
        return super().submit(*args, **kwargs)


def test_a_busy_engine_is_asked_again_until_it_answers(drive, monkeypatch) -> None:
    monkeypatch.setattr(bridge, "BUSY_S", 0.01)
    driver = drive(lambda on_event: Busy(3))
    driver.wait_for(Ready)
    driver.bridge.ask(asked())
    driver.wait_for(AnswerDone)
    assert driver.text("answer") == "at last"
    assert len([m for m in driver.messages if isinstance(m, Queued)]) == 1


def test_waiting_for_a_busy_engine_can_be_given_up(drive) -> None:
    engine = Busy(10**9)
    driver = drive(lambda on_event: engine)
    driver.wait_for(Ready)
    driver.bridge.ask(asked())
    driver.wait_for(Queued)
    started = time.monotonic()
    driver.bridge.cancel()
    done = driver.wait_for(AnswerDone)
    assert done.reason == "cancelled"
    assert time.monotonic() - started < 1.0
    assert engine.requests == []


def test_no_session_is_held_above_the_engine(drive) -> None:
    seen = []

    class Watching(FakeEngine):
        def submit(self, session, *args, **kwargs):
            seen.append(session)
            return super().submit(session, *args, **kwargs)

    driver = drive(lambda on_event: Watching())
    driver.wait_for(Ready)
    driver.bridge.ask(asked())
    driver.wait_for(AnswerDone)
    assert seen == [None]


def test_documents_are_read_and_counted_in_the_background(drive, tmp_path) -> None:
    gate = threading.Event()

    def factory(on_event):
        gate.wait(5)
        return FakeEngine()

    driver = drive(factory)
    (tmp_path / "a.txt").write_text("twelve chars")
    driver.bridge.attach(1, tmp_path / "a.txt")
    file = driver.wait_for(Attached).file
    assert (file.ticket, file.name, file.tokens) == (1, "a.txt", None), "no model to count with"
    gate.set()
    driver.wait_for(Ready)
    driver.messages.clear()
    driver.bridge.count(file)
    assert driver.wait_for(Attached).file.tokens == 12
    driver.bridge.attach(2, tmp_path / "missing.txt")
    failed = driver.wait_for(AttachFailed)
    assert failed.ticket == 2
    assert "no file" in failed.problem.message


def test_memory_is_reported_when_it_changed_and_a_broken_gauge_ends_it(drive, monkeypatch) -> None:
    monkeypatch.setattr(bridge, "MACHINE_S", 0.005)
    figures = [Machine(1, 2, 3), Machine(1, 2, 3), Machine(2, 2, 3)]
    driver = drive(lambda on_event: FakeEngine())

    def read() -> Machine:
        if not figures:
            raise OSError("no /proc here")
        return figures.pop(0)

    driver.bridge.watch(read)
    end = time.monotonic() + 5
    while not any(isinstance(m, MachineNow) and not m.machine.total for m in driver.messages):
        assert time.monotonic() < end
        time.sleep(0.005)
    seen = [m.machine for m in driver.messages if isinstance(m, MachineNow)]
    assert seen == [Machine(1, 2, 3), Machine(2, 2, 3), Machine(0, 0, 0)]


def test_the_gauge_reads_this_machine() -> None:
    now = Gauge().read()
    assert 10_000_000 < now.process < now.total
    assert 0 < now.used <= now.total
    assert now.vram_used <= now.vram_total


def test_disk_speed_is_what_came_between_two_looks(drive, monkeypatch) -> None:
    monkeypatch.setattr(bridge, "TIERS_S", 0.0)
    engine = FakeEngine(["a", "b", "c", "d"], delay_s=0.01)
    steps = iter([1_000_000, 3_000_000, 3_000_000, 5_000_000, 500])
    engine.experts_now = lambda: ExpertFigures(  # type: ignore[method-assign]
        wanted=1, disk_bytes=next(steps, 500)
    )
    driver = drive(lambda on_event: engine)
    driver.wait_for(Ready)
    driver.bridge.ask(asked())
    driver.wait_for(AnswerDone)
    speeds = [m.disk_bytes_per_s for m in driver.messages if isinstance(m, Tiers)]
    assert speeds[1] > 0
    assert speeds[2] == 0.0
    assert all(s >= 0 for s in speeds), "counting anew is no negative speed"


def test_how_often_drafts_are_right_is_seen_while_the_answer_runs(drive, monkeypatch) -> None:
    monkeypatch.setattr(bridge, "TIERS_S", 0.0)
    engine = FakeEngine(["a", "b", "c"])
    engine.drafts = DraftFigures((1, 4), (4,), (3,))
    driver = drive(lambda on_event: engine)
    driver.wait_for(Ready)
    driver.bridge.ask(asked())
    driver.wait_for(AnswerDone)
    kinds = [type(m) for m in driver.messages]
    assert Drafts in kinds[: kinds.index(AnswerDone)]
    assert all(m.figures == engine.drafts for m in driver.messages if isinstance(m, Drafts))
