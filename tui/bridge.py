"""Drives the engine for the screen: loads it, asks it, joins its pieces, reports in messages.

The only file of the interface that touches the engine. Knows no widget: it is given a thread-safe
`post` and a `later(seconds, call)`. One daemon thread per job, never two at a time: a daemon,
because leaving the app must not wait for a load of minutes (the interpreter joins other threads).
Called by the chat screen (`load`, `ask`, `cancel`) and the app (`close`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, Protocol

from textual.message import Message

from mimo_local import kernels
from mimo_local.chat import Chat, Piece, Reply, ask, preset
from mimo_local.errors import CancelledError, UsageError
from mimo_local.events import Done, Failed, Prefill, Progress, Stats
from mimo_local.sampler import SamplingParams
from tui.messages import (
    AnswerDelta,
    AnswerDone,
    AnswerFailed,
    LoadFailed,
    Loading,
    ModelInfo,
    Pace,
    Problem,
    Reading,
    Ready,
    TextPiece,
    Tiers,
)

if TYPE_CHECKING:
    from mimo_local.engine import Engine, Session

JOIN_S = 0.05
"""Pieces are joined for this long: 20 screen updates a second, above which Markdown lags behind."""
MAX_JOIN_S = 0.4
"""Two or three updates a second are the least that still looks alive."""
TIERS_S = 0.25
"""Between two looks at where experts come from: four a second can be read."""
SCREEN_SHARE = 0.25
"""Of one core, for drawing an answer while it is generated."""


class EngineFactory(Protocol):
    """Makes the engine, reporting progress on the calling thread."""

    def __call__(self, on_event: Callable[[Progress], None]) -> Engine:
        """Return the engine or raise; `on_event` may raise CancelledError to stop the work."""
        ...


@dataclass(frozen=True, slots=True)
class ChatDefaults:
    """How a new chat starts; `mimo chat`'s flags become one of these."""

    preset: str = "chat"
    system: str = ""
    thinking: bool = False
    overrides: Mapping[str, float | int | None] = field(default_factory=dict)
    """Fields of SamplingParams the user typed; they win over any preset."""
    stop: tuple[str, ...] = ()
    chat_id: int | None = None
    """A saved chat to go on with."""


def screen_cpu() -> Callable[[], float]:
    """A clock of the CPU seconds the main thread, which draws, has used; stands still elsewhere."""
    thread = threading.main_thread().ident
    if thread is None or not hasattr(time, "pthread_getcpuclockid"):
        return lambda: 0.0
    clock = time.pthread_getcpuclockid(thread)
    return lambda: time.clock_gettime(clock)


class Joiner:
    """Joins pieces so that drawing stays cheap; the first piece goes out at once.

    One `AnswerDelta` per JOIN_S, or rarer where drawing costs so much that the screen would take
    more than SCREEN_SHARE of a core: the model wants that core. Measured at 120x40: 1,500 tokens
    cost 82 ms of a busy core per update, nearly all layout; from there MAX_JOIN_S wins and the
    share rises (0.3 of a core at 500 tokens, 0.5 at 1,500).
    """

    def __init__(
        self,
        post: Callable[[Message], None],
        later: Callable[[float, Callable[[], None]], None],
        clock: Callable[[], float] = time.monotonic,
        cpu: Callable[[], float] | None = None,
    ) -> None:
        self._post, self._later, self._clock = post, later, clock
        self._cpu = cpu or screen_cpu()
        self._lock = threading.Lock()
        self._pieces: list[TextPiece] = []
        self._pace = Pace()
        self._sent_at = float("-inf")
        self._cpu_then = 0.0
        self._scheduled = False

    def add(self, pieces: Iterable[TextPiece], pace: Pace) -> None:
        """Take pieces; they reach the screen within MAX_JOIN_S even if nothing follows."""
        with self._lock:
            for piece in pieces:
                if self._pieces and self._pieces[-1].kind == piece.kind:
                    piece = TextPiece(piece.kind, self._pieces.pop().text + piece.text)
                self._pieces.append(piece)
            self._pace = pace
            if not self._scheduled:
                self._send_or_wait()

    def flush(self) -> None:
        """Send what is waiting now."""
        with self._lock:
            self._send()

    def _alarm(self) -> None:
        with self._lock:
            self._scheduled = False
            self._send_or_wait()

    def _send_or_wait(self) -> None:
        if not self._pieces:
            return
        drawing = (self._cpu() - self._cpu_then) / SCREEN_SHARE
        wait = self._sent_at + min(MAX_JOIN_S, max(JOIN_S, drawing)) - self._clock()
        if wait > 0:
            self._scheduled = True
            self._later(wait, self._alarm)
        else:
            self._send()

    def _send(self) -> None:
        if self._pieces:
            self._post(AnswerDelta(tuple(self._pieces), self._pace))
            self._pieces = []
            self._sent_at, self._cpu_then = self._clock(), self._cpu()


class Pacer:
    """Lets one report through per `every`: a loader may report every tensor, nobody reads that."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, *, every: float = JOIN_S
    ) -> None:
        self._clock, self._every = clock, every
        self._sent_at = float("-inf")
        self._stage = ""

    def due(self, stage: str = "", *, last: bool = False) -> bool:
        """Whether to report now; the first and the last of a stage always."""
        now = self._clock()
        if not last and stage == self._stage and now - self._sent_at < self._every:
            return False
        self._sent_at, self._stage = now, stage
        return True


class Meter:
    """Counts the pieces of one answer, about one per token, and times its thinking."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._first = self._thought_until = 0.0
        self.pace = Pace()

    def count(self, kind: Literal["thinking", "answer"]) -> Pace:
        """One more piece."""
        now, p = self._clock(), self.pace
        if p.tokens == 0:
            self._first = self._thought_until = now
        thinking = p.thinking_tokens
        if kind == "thinking":
            thinking += 1
            self._thought_until = now
        elapsed = now - self._first
        rate = p.tokens / elapsed if elapsed > 0 else 0.0
        self.pace = Pace(p.tokens + 1, thinking, self._thought_until - self._first, rate)
        return self.pace

    def final(self, stats: Stats) -> Pace:
        """The same with the engine's count: tags and unfinished characters are tokens as well."""
        p, total = self.pace, stats.completion_tokens
        if not p.tokens or not total:
            return p
        thinking = round(total * p.thinking_tokens / p.tokens)
        return Pace(total, thinking, p.thinking_s, stats.decode_tokens_per_s)


class Bridge:
    """`load` once, then any number of `ask`; `cancel` and `close` at any time."""

    def __init__(
        self,
        post: Callable[[Message], None],
        later: Callable[[float, Callable[[], None]], None],
        factory: EngineFactory,
        defaults: ChatDefaults,
    ) -> None:
        self._post, self._later, self._factory, self._defaults = post, later, factory, defaults
        self._engine: Engine | None = None
        self._session: Session | None = None
        self._reply: Reply | None = None
        self._job: threading.Thread | None = None
        self._lock = threading.Lock()
        self._cancelled = threading.Event()
        self._closing = threading.Event()

    def load(self) -> None:
        """Make the engine: Loading*, then Ready or LoadFailed."""
        self._start(self._load, "mimo-load")

    def ask(self, chat: Chat, *, attempt: int = 0) -> None:
        """Answer the chat's last message: Reading*, AnswerDelta*, then AnswerDone or AnswerFailed.

        `attempt` > 0 asks the same again: with a fixed seed each attempt has its own.
        """
        self._cancelled.clear()
        self._start(lambda: self._ask(chat, attempt), "mimo-answer")

    def cancel(self) -> None:
        """Stop the running answer; it ends with AnswerDone(reason="cancelled") within one step."""
        with self._lock:
            self._cancelled.set()
            if self._reply is not None:
                self._reply.cancel()

    def forget(self) -> None:
        """The next answer starts from an empty session."""
        self._session = None

    def close(self, timeout_s: float = 2.0) -> None:
        """Stop whatever runs and close the engine; gives up waiting after `timeout_s`."""
        self._closing.set()
        self.cancel()
        if self._job is not None:
            self._job.join(timeout_s)
            if self._job.is_alive():
                return
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def _start(self, work: Callable[[], None], name: str) -> None:
        if self._job is not None and self._job.is_alive():
            # The last message of a job is posted just before its thread ends.
            self._job.join(1.0)
        self._job = threading.Thread(target=work, name=name, daemon=True)
        self._job.start()

    def _load(self) -> None:
        pacer = Pacer()

        def on_event(progress: Progress) -> None:
            if self._closing.is_set():
                raise CancelledError("loading was stopped", hint="start `mimo chat` again")
            if pacer.due(progress.stage, last=0 < progress.total <= progress.done):
                self._post(Loading(progress))

        try:
            engine = self._factory(on_event)
            model = ModelInfo(
                engine.name, engine.description, kernels.describe(), engine.context_limit
            )
        except Exception as error:
            # Whatever breaks in there, the window must say so instead of waiting for ever.
            self._post(LoadFailed(Problem.of(error)))
            return
        self._engine = engine
        if self._closing.is_set():
            engine.close()
            return
        self._post(Ready(model))

    def _ask(self, chat: Chat, attempt: int) -> None:
        joiner = Joiner(self._post, self._later)
        try:
            last = self._stream_answer(chat, attempt, joiner)
        except Exception as error:
            last = AnswerFailed(Problem.of(error))
        finally:
            with self._lock:
                self._reply = None
        joiner.flush()
        self._post(last)

    def _stream_answer(self, chat: Chat, attempt: int, joiner: Joiner) -> Message:
        engine = self._engine
        if engine is None:
            raise UsageError(
                "the model is not loaded", hint="wait until the status line says ready"
            )
        if self._session is None:
            self._session = engine.new_session()
        reply = ask(
            engine, self._session, chat, self._params(chat, attempt), stop=self._defaults.stop
        )
        with self._lock:
            self._reply = reply
            if self._cancelled.is_set():
                reply.cancel()
        meter, reading, tiers = Meter(), Pacer(), Pacer(every=TIERS_S)
        for event in reply:
            if tiers.due():
                self._post_tiers(engine, meter.pace.tokens)
            match event:
                case Prefill():
                    if reading.due(last=event.done >= event.total):
                        self._post(Reading(event))
                case Piece(kind, text):
                    joiner.add([TextPiece(kind, text)], meter.count(kind))
                case Done(reason, stats):
                    return AnswerDone(reason, stats, meter.final(stats))
                case Failed(error):
                    return AnswerFailed(Problem.of(error))
        return AnswerDone("cancelled", Stats(), meter.pace)

    def _post_tiers(self, engine: Engine, tokens: int) -> None:
        found = engine.experts_now()
        if found is not None:
            so_far = Stats(completion_tokens=tokens, experts=found)
            self._post(Tiers(found, so_far.disk_bytes_per_token))

    def _params(self, chat: Chat, attempt: int) -> SamplingParams:
        params = preset(chat.preset).params(**self._defaults.overrides)
        if attempt and params.seed is not None:
            params = replace(params, seed=params.seed + attempt)
        return params
