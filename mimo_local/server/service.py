"""What all requests share: the engine (once it is loaded), who is being answered, figures.

Loads the model in a thread of its own, so that the port answers at once; admits so many answers at
a time; ends them when the server stops. Lives on the event loop. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

from mimo_local.errors import CancelledError, MimoError
from mimo_local.events import Done, Event, Failed, Progress, Token
from mimo_local.grammar import Grammars
from mimo_local.server.failures import ApiError, refuse
from mimo_local.server.feed import Feed
from mimo_local.server.metrics import Metrics
from mimo_local.server.translate import Asked, seeded

if TYPE_CHECKING:
    from mimo_local.engine import Engine
    from mimo_local.server.options import Options
    from mimo_local.stream import Stream

_T = TypeVar("_T")
WORKERS: Final = 2
"""Threads that turn requests into ids; they live as long as the server."""
Opener = Callable[[Callable[[Progress], None]], "Engine"]
"""Loads the model, telling its progress; what the callback raises stops it."""


class Service:
    """One model and the requests to it."""

    def __init__(self, options: Options, connections: Callable[[], int] = lambda: 0) -> None:
        self.options = options
        self.engine: Engine | None = None
        self._grammars: Grammars | None = None
        self.progress: Progress | None = None
        self.error: MimoError | None = None
        """Why the model could not be loaded."""
        self.created = int(time.time())
        self.stopping: Literal["", "finishing", "cancelling"] = ""
        self.metrics = Metrics(
            lambda: self.active - self.running, lambda: self.running, connections
        )
        self._feeds: set[Feed] = set()
        self.reading = 0
        """Bytes of bodies that are being read now."""
        self._taken = 0
        """Answers promised to requests that are still being read."""
        self._durations: deque[float] = deque([5.0], maxlen=16)
        self._workers = ThreadPoolExecutor(WORKERS, thread_name_prefix="mimo-request")
        self._loader: threading.Thread | None = None
        self._opened: Engine | None = None
        """Set by the loader's own thread: it must be closed even if the loop never hears of it."""

    # ---- the model -------------------------------------------------------------------------------

    def load(self, opener: Opener, on_failure: Callable[[], None]) -> None:
        """Begin to load; `on_failure` is called on the loop if that does not succeed."""
        loop = asyncio.get_running_loop()

        def tell(progress: Progress) -> None:
            self.progress = progress  # one assignment: nothing to lock
            if self.stopping:
                raise CancelledError("the server was stopped", hint="start it again")

        def run() -> None:
            try:
                engine = self._opened = opener(tell)
            except MimoError as error:
                if self.stopping and isinstance(error, CancelledError):
                    return  # as it was asked to
                self.error = error
            except BaseException as error:
                self.error = MimoError(
                    f"the model could not be loaded: {type(error).__name__}: {error}",
                    hint="`mimo chat` with the same model may say more",
                )
                self.error.__cause__ = error
            with suppress(RuntimeError):  # the loop may be closed
                loop.call_soon_threadsafe(on_failure if self.error else lambda: self.use(engine))

        self._loader = threading.Thread(target=run, name="mimo-load", daemon=True)
        self._loader.start()

    def use(self, engine: Engine) -> None:
        """Answer with this engine from now on."""
        self.engine = engine
        if engine.tokenizer is not None:
            self._grammars = Grammars(engine.tokenizer, engine.config.vocab_size)
        self.metrics.loaded.set(1)

    def ready(self) -> Engine:
        """The engine; ApiError while there is none, or none any more."""
        if self.stopping:
            raise ApiError(503, "the server is being stopped", code="stopping")
        if self.engine is None:
            raise ApiError(
                503, f"the model is loading: {self.state()}", code="loading",
                headers={"Retry-After": "5"},
            )  # fmt: skip
        return self.engine

    def grammars(self) -> Grammars:
        """Of the engine's vocabulary; ApiError where it has none."""
        if self._grammars is None:
            raise refuse("the model has no tokenizer files: it takes ids only, in /v1/completions")
        return self._grammars

    def state(self) -> str:
        """How far the loading is, in words."""
        now = self.progress
        if now is None:
            return "it has just begun"
        share = f" {now.done / now.total:.0%}" if now.total else ""
        return f"{now.stage}{share}"

    def knows(self, model: str | None) -> str:
        """The model's name if that is what was asked for; 404 otherwise."""
        name = self.ready().name
        if model and model not in (name, *self.options.aliases):
            raise ApiError(
                404,
                f"there is no model `{model[:200]}` here, only `{name}`: use that name, or start "
                "the server with --alias",
                code="model_not_found",
                param="model",
            )
        return name

    # ---- requests --------------------------------------------------------------------------------

    @property
    def active(self) -> int:
        """Answers being made or waiting for their turn."""
        return sum(feed.open for feed in self._feeds)

    @property
    def running(self) -> int:
        """Answers whose turn has come."""
        return sum(feed.begun for feed in self._feeds)

    @property
    def retry_after(self) -> int:
        """Seconds after which a place may be free: what an answer took lately."""
        return max(1, min(60, round(sum(self._durations) / len(self._durations))))

    def admit(self, answers: int) -> Place:
        """A place for so many answers; ApiError 429 if there is none."""
        held = self.active + self._taken
        if held and held + answers > self.options.max_requests:
            raise ApiError(
                429,
                f"{held} answers are being made or waiting: try again in {self.retry_after} s",
                code="queue_full",
                headers={"Retry-After": str(self.retry_after)},
            )
        return Place(self, answers)

    async def work(self, task: Callable[[], _T], undo: Callable[[_T], None] | None = None) -> _T:
        """Run `task` in a worker. If nobody waits for its result any more, `undo` gets it."""
        future = self._workers.submit(task)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if undo is not None:
                future.add_done_callback(lambda done: _undo(done, undo))
            raise

    async def start(self, asked: Sequence[Asked]) -> Feed:
        """Submit all answers of a request; all or none."""
        engine = self.ready()
        streams = await self.work(lambda: _submit(engine, asked), _cancel)
        begun = time.monotonic()
        first = [True] * len(streams)

        def note(index: int, event: Event) -> None:
            seconds = time.monotonic() - begun
            if isinstance(event, Token) and first[index]:
                first[index] = False
                self.metrics.first_token.observe(seconds)
            elif isinstance(event, (Done, Failed)):
                self._durations.append(seconds)
                self.metrics.ended(
                    event.reason if isinstance(event, Done) else "failed",
                    event.stats if isinstance(event, Done) else None,
                    seconds,
                )

        feed = Feed(
            streams,
            max_waiting=self.options.max_waiting,
            ping_s=self.options.ping_s,
            on_event=note,
            on_end=self._feeds.discard,
        )
        self._feeds.add(feed)
        if self.stopping == "cancelling":
            feed.cancel()
        return feed

    # ---- the end ---------------------------------------------------------------------------------

    def stop(self) -> None:
        """Take nothing more; what waits ends now, what runs after the grace."""
        if self.stopping:
            return
        self.stopping = "finishing"
        for feed in list(self._feeds):
            feed.cancel_waiting()
        asyncio.get_running_loop().call_later(self.options.grace_s, self._cancel_all)

    def _cancel_all(self) -> None:
        self.stopping = "cancelling"
        for feed in list(self._feeds):
            feed.cancel()

    async def close(self) -> None:
        """Free the model; waits for the threads."""
        self.stopping = "cancelling"
        self._cancel_all()
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._workers, self._close)
        self._workers.shutdown(wait=False)

    def _close(self) -> None:
        if self._loader is not None:
            self._loader.join()
        if self._opened is not None:
            self._opened.close()


class Place:
    """Room for some answers of a request that is still being read."""

    def __init__(self, service: Service, answers: int) -> None:
        self._service, self._answers = service, answers

    def __enter__(self) -> Place:
        self._service._taken += self._answers
        return self

    def __exit__(self, *_: object) -> None:
        self._service._taken -= self._answers


def _submit(engine: Engine, asked: Sequence[Asked]) -> list[Stream]:
    streams: list[Stream] = []
    try:
        for one in asked:
            opened = False
            if one.chat is not None and engine.tokenizer is not None:
                opened = one.splitter(engine.tokenizer).mode == "thinking"
            for index in range(one.n):
                constraint = None
                if one.grammar is not None:
                    constraint = one.grammar.constraint(thinking=one.thinking, opened=opened)
                streams.append(
                    engine.submit(
                        None,
                        one.ids,
                        seeded(one.params, index),
                        stop=one.stop,
                        constraint=constraint,
                        logprobs=one.logprobs,
                    )
                )
    except BaseException:
        _cancel(streams)
        raise
    return streams


def _cancel(streams: Sequence[Stream]) -> None:
    for stream in streams:
        stream.cancel()


def _undo(done: Future[Any], undo: Callable[[Any], None]) -> None:
    if not done.cancelled() and done.exception() is None:
        undo(done.result())
