"""Drives the engine for the screen: loads it, asks it, joins its pieces, reports in messages.

The only file of the interface that touches the engine. Knows no widget: it is given a thread-safe
`post` and a `later(seconds, call)`. One daemon thread per job, never two at a time: a daemon,
because leaving the app must not wait for a load of minutes (the interpreter joins other threads).
Called by the chat screen and the app (`close`). Reading a document has a thread of its own as well.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from textual.message import Message

from mimo_local import kernels
from mimo_local.chat import Backend, Chat, Piece, Reply, ask, preset
from mimo_local.errors import BusyError, CancelledError, UsageError
from mimo_local.events import Done, Failed, Prefill, Progress, Stats
from mimo_local.remote import Remote
from mimo_local.sampler import SamplingParams
from tui.machine import Gauge
from tui.messages import (
    AnswerDone,
    AnswerFailed,
    Attached,
    AttachFailed,
    Drafts,
    FileInfo,
    LoadFailed,
    Loading,
    Machine,
    MachineNow,
    ModelInfo,
    Noted,
    Pace,
    Problem,
    Queued,
    Reading,
    Ready,
    TextPiece,
    Tiers,
)
from tui.pacing import Joiner, Meter, Pacer

TIERS_S = 0.25
"""Between two looks at where experts come from: four a second can be read."""
MACHINE_S = 2.0
"""Between two looks at the memory in use."""
BUSY_S = 0.5
"""Between two tries with an engine that is busy with others."""


class EngineFactory(Protocol):
    """Makes the engine, reporting progress on the calling thread."""

    def __call__(self, on_event: Callable[[Progress], None]) -> Backend:
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


def _described(engine: Backend) -> ModelInfo:
    if isinstance(engine, Remote):
        where = f"{engine.privacy[:1].upper()}{engine.privacy[1:]}."
        return ModelInfo(engine.name, engine.description, "remote", engine.context_limit, where)
    kernel = getattr(engine, "kernel", "") or kernels.describe()
    return ModelInfo(engine.name, engine.description, kernel, engine.context_limit)


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
        self._engine: Backend | None = None
        self._reply: Reply | None = None
        self._disk = (0.0, 0)
        """When experts were last looked at, and how many bytes had come from disk."""
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

    def attach(self, ticket: int, path: Path) -> None:
        """Read a document and count its tokens: Attached or AttachFailed."""
        threading.Thread(
            target=self._attach, args=(ticket, path), name="mimo-read", daemon=True
        ).start()

    def count(self, file: FileInfo) -> None:
        """Count the tokens of a document read before there was a model: Attached."""
        threading.Thread(target=self._count, args=(file,), name="mimo-count", daemon=True).start()

    def watch(self, read: Callable[[], Machine] | None = None) -> None:
        """Report memory in use from now on: MachineNow*."""
        threading.Thread(
            target=self._watch, args=(read or Gauge().read,), name="mimo-gauge", daemon=True
        ).start()

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
            model = _described(engine)
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
        for note in self._engine.take_notes() if isinstance(self._engine, Remote) else ():
            self._post(Noted(note))

    def _stream_answer(self, chat: Chat, attempt: int, joiner: Joiner) -> Message:
        engine = self._engine
        if engine is None:
            raise UsageError(
                "the model is not loaded", hint="wait until the status line says ready"
            )
        reply = self._submit(engine, chat, self._params(chat, attempt))
        if reply is None:
            return AnswerDone("cancelled", Stats(), Pace())
        with self._lock:
            self._reply = reply
            if self._cancelled.is_set():
                reply.cancel()
        meter, reading, tiers = Meter(), Pacer(), Pacer(every=TIERS_S)
        for event in reply:
            if tiers.due():
                self._post_figures(engine, meter.pace.tokens)
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

    def _submit(self, engine: Backend, chat: Chat, params: SamplingParams) -> Reply | None:
        """Ask, again and again while the engine is busy with others; None: the user gave up."""
        queued = False
        while True:
            try:
                # No session: the engine finds the one that knows most of this branch.
                return ask(engine, None, chat, params, stop=self._defaults.stop)
            except BusyError:
                if not queued:
                    self._post(Queued())
                queued = True
            if self._cancelled.wait(BUSY_S):
                return None

    def _attach(self, ticket: int, path: Path) -> None:
        from mimo_local import documents

        try:
            found = documents.read(path, cancel=self._closing.is_set)
        except Exception as error:
            self._post(AttachFailed(ticket, Problem.of(error)))
            return
        unread = len(found.unread)
        notes = [*found.warnings]
        if unread and not notes:
            notes = [f"{unread} of {found.page_count} {found.unit}s could not be read"]
        self._count(FileInfo(ticket, found.name, None, found.text, "; ".join(notes)))

    def _count(self, file: FileInfo) -> None:
        tokens = None
        tokenizer = self._engine.tokenizer if self._engine is not None else None
        if tokenizer is not None and file.text is not None:
            tokens = len(tokenizer.encode(file.text))
        self._post(Attached(replace(file, tokens=tokens)))

    def _watch(self, read: Callable[[], Machine]) -> None:
        last = None
        while True:
            try:
                now = read()
            except Exception:
                # Meters are no reason to stop a chat; without figures they are not shown.
                self._post(MachineNow(Machine(0, 0, 0)))
                return
            if now != last:
                self._post(MachineNow(now))
                last = now
            if self._closing.wait(MACHINE_S):
                return

    def _post_figures(self, engine: Backend, tokens: int) -> None:
        drafts = engine.drafts_now()
        if drafts is not None and tokens:
            self._post(Drafts(drafts))
        found = engine.experts_now()
        if found is None:
            return
        now, (then, before) = time.monotonic(), self._disk
        self._disk = (now, found.disk_bytes)
        # A new request counts from zero again.
        speed = (found.disk_bytes - before) / (now - then) if found.disk_bytes >= before else 0.0
        so_far = Stats(completion_tokens=tokens, experts=found)
        self._post(Tiers(found, so_far.disk_bytes_per_token, speed))

    def _params(self, chat: Chat, attempt: int) -> SamplingParams:
        params = preset(chat.preset).params(**self._defaults.overrides)
        if attempt and params.seed is not None:
            params = replace(params, seed=params.seed + attempt)
        return params
