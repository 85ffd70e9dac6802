"""The engine: one thread owns the model; requests queue up, answers come back as streams of events.

Turns ids into text pieces, watches for stop strings, reuses what a session's cache already holds.
Knows no messages and no people. `chat`, `summarize`, `api` and the interfaces submit to it; torch
is imported when a model is loaded, not before.
"""

from __future__ import annotations

import atexit
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mimo_local.errors import (
    CancelledError,
    ContextOverflowError,
    MimoError,
    NotEnoughMemoryError,
    UsageError,
)
from mimo_local.events import (
    Done,
    DraftFigures,
    Failed,
    FinishReason,
    Prefill,
    Progress,
    Stats,
    Token,
)
from mimo_local.experts.meters import figures
from mimo_local.sampler import Sampler, SamplingParams
from mimo_local.session import MAX_SNAPSHOTS, Session
from mimo_local.stream import NO_ID, Stream, TextOutput

if TYPE_CHECKING:
    from torch import Tensor

    from mimo_local.cache import KVCache
    from mimo_local.config import ModelConfig
    from mimo_local.events import ExpertFigures
    from mimo_local.experts.meters import Meters
    from mimo_local.generate import Drafting
    from mimo_local.model import Model
    from mimo_local.runs import Recorder
    from mimo_local.sampler import Constraint
    from mimo_local.settings import Settings
    from mimo_local.tokenizer import Tokenizer

__all__ = ["MAX_SNAPSHOTS", "Engine", "Session", "Stream"]


@dataclass
class _Request:
    stream: Stream
    session: Session
    ids: list[int]
    params: SamplingParams
    text: TextOutput
    started: float = 0.0
    cached: int = 0
    tokens: int = 0
    first_token: float = 0.0
    reported: tuple[int, float] = field(default=(0, 0.0))
    meters: Meters | None = None
    """The experts' meters when the request's turn came."""


class Engine:
    """One loaded model and the thread that runs it. Close it, or use it as a context manager."""

    def __init__(
        self,
        model: Model,
        *,
        name: str,
        description: str,
        context_limit: int,
        tokenizer: Tokenizer | None = None,
        new_cache: Callable[[], KVCache] | None = None,
        kernel: str = "",
        recorder: Recorder | None = None,
        drafting: Drafting | None = None,
    ) -> None:
        """`new_cache`: how sessions keep keys and values; by default the model's own way.

        `recorder`: told what each answer took. `drafting`: for caches that have its part.
        """
        self.name, self.description, self.kernel = name, description, kernel
        self.tokenizer, self.context_limit = tokenizer, context_limit
        self.config: ModelConfig = model.config
        self.stop_ids = frozenset(model.config.eos_ids) | set(
            tokenizer.stop_ids if tokenizer else ()
        )
        self._model = model
        self._new_cache = new_cache or model.new_cache
        self._recorder = recorder
        self._drafting = drafting
        self._meters: Meters | None = None
        self._work: deque[_Request | tuple[Future[Tensor], list[int]]] = deque()
        self._ready = threading.Condition()
        self._closing = False
        # A daemon, and closed at exit: a forgotten engine must not keep the interpreter alive.
        self._thread = threading.Thread(target=self._run, name="mimo-engine", daemon=True)
        atexit.register(self.close)
        self._thread.start()

    @classmethod
    def load(cls, settings: Settings, on_event: Callable[[Progress], None] | None = None) -> Engine:
        """Open the pack or checkpoint folder `settings.model` and start; raises MimoError.

        An exception that `on_event` raises stops the load.
        """
        from mimo_local.draft_control import DraftController
        from mimo_local.generate import Drafting
        from mimo_local.loading import load  # brings torch, 2-3 s

        found = load(settings, on_event)
        drafting = None
        if found.drafter is not None:
            drafting = Drafting(found.drafter, DraftController(len(found.drafter.layers)))
        return cls(
            found.model,
            name=found.name,
            description=found.description,
            context_limit=found.context_limit,
            tokenizer=found.tokenizer,
            new_cache=found.new_cache,
            kernel=found.kernel,
            recorder=found.recorder,
            drafting=drafting,
        )

    def new_session(self) -> Session:
        """An empty conversation."""
        return Session(self._new_cache)

    def submit(
        self,
        session: Session | None,
        ids: Sequence[int],
        params: SamplingParams,
        *,
        stop: Sequence[str] = (),
        constraint: Constraint | None = None,
        logprobs: int | None = None,
    ) -> Stream:
        """Ask for the continuation of `ids`; answers are made one after another, in this order.

        Without a `session` the engine takes one of its own. `constraint`: which ids are allowed.
        `logprobs`: tokens come with their own logprob and so many of the likeliest ids'.
        The answer ends before the first of the `stop` texts. Whatever `ids` share with the
        session's cache is not processed again. Raises UsageError, ContextOverflowError.
        """
        ids = self._checked(ids, room=1)
        if any(stop) and self.tokenizer is None:
            raise UsageError("stop texts need a tokenizer", hint="use stop ids, or add the files")
        params = Sampler(params).params
        session = session or self.new_session()
        stream = Stream(params.seed or 0, self._drop)
        decoder = self.tokenizer.stream() if self.tokenizer else None
        self._enqueue(_Request(stream, session, ids, params, TextOutput(decoder, stop)))
        return stream

    def experts_now(self) -> ExpertFigures | None:
        """Where the experts of the running answer came from so far, or of the last one.

        None where all of them lie in RAM, and before the first answer. For any thread.
        """
        return figures(self._model.experts, self._meters)

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Logits (T, V) f32 after each of `ids`; touches no session. Waits for its turn."""
        future: Future[Tensor] = Future()
        self._enqueue((future, self._checked(ids, room=0)))
        return future.result()

    def close(self) -> None:
        """Cancel everything and wait for the thread; the engine cannot be used afterwards."""
        with self._ready:
            self._closing = True
            self._ready.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()
            self._model.experts.close()
        atexit.unregister(self.close)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- any thread ------------------------------------------------------------------------------

    def _checked(self, ids: Sequence[int], *, room: int) -> list[int]:
        checked = [int(i) for i in ids]
        if not checked:
            raise UsageError("the prompt is empty", hint="give at least one token")
        wrong = next((i for i in checked if not 0 <= i < self.config.vocab_size), None)
        if wrong is not None:
            raise UsageError(
                f"token id {wrong} is outside the vocabulary of {self.config.vocab_size}",
                hint="use the tokenizer that belongs to this model",
            )
        if len(checked) + room > self.context_limit:
            raise ContextOverflowError(
                f"the prompt has {len(checked)} tokens, the context has room for "
                f"{self.context_limit} in all",
                hint=f"shorten it, raise --context (this model: up to {self.config.max_context}), "
                "or use `mimo summarize`",
            )
        return checked

    def _enqueue(self, work: _Request | tuple[Future[Tensor], list[int]]) -> None:
        with self._ready:
            if self._closing:
                raise UsageError("the engine is closed", hint="load the model again")
            self._work.append(work)
            self._ready.notify()

    def _drop(self, stream: Stream) -> None:
        """A cancelled request that is still waiting ends at once, not when its turn comes."""
        with self._ready:
            for work in self._work:
                if isinstance(work, _Request) and work.stream is stream:
                    self._work.remove(work)
                    stream.put(Done("cancelled", self._stats(work)))
                    return

    def _stats(self, request: _Request) -> Stats:
        now = time.monotonic()
        first = request.first_token or now
        return Stats(
            prompt_tokens=len(request.ids),
            cached_tokens=request.cached,
            completion_tokens=request.tokens,
            prefill_s=first - request.started if request.started else 0.0,
            decode_s=now - first if request.started else 0.0,
            context_used=len(request.session.ids),
            context_limit=self.context_limit,
            cache_bytes=sum(request.session.cache.nbytes.values()),
            experts=figures(self._model.experts, request.meters),
            draft=self._drafts(request),
            kernel=self.kernel,
        )

    def _drafts(self, request: _Request) -> DraftFigures | None:
        """Of the request that was just answered; none for one whose turn never came."""
        if self._drafting is None or not request.started:
            return None
        return self._drafting.controller.report()

    # ---- the engine's own thread -----------------------------------------------------------------

    def _run(self) -> None:
        while (work := self._next()) is not None:
            try:
                if isinstance(work, _Request):
                    done = Done(self._answer(work), self._stats(work))
                    work.stream.put(done)
                    if self._recorder is not None:
                        self._recorder.end(done.stats)
                else:
                    work[0].set_result(self._all_logits(work[1]))
            except BaseException as error:
                # Whatever happened, the request must end and the thread must live on.
                failure = _as_mimo_error(error)
                if isinstance(work, _Request):
                    work.stream.put(Failed(failure))
                else:
                    work[0].set_exception(failure)
            del work
        self._refuse_rest()

    def _next(self) -> _Request | tuple[Future[Tensor], list[int]] | None:
        with self._ready:
            self._ready.wait_for(lambda: self._work or self._closing)
            return None if self._closing else self._work.popleft()

    def _refuse_rest(self) -> None:
        with self._ready:
            rest, self._work = self._work, deque()
        for work in rest:
            if isinstance(work, _Request):
                work.stream.put(Done("cancelled", self._stats(work)))
            else:
                work[0].set_exception(
                    CancelledError("the engine was closed", hint="load the model again")
                )

    def _answer(self, request: _Request) -> FinishReason:
        from mimo_local.generate import generate

        session, stream, text = request.session, request.stream, request.text
        if self._recorder is not None:
            self._recorder.begin()
        request.started = time.monotonic()
        request.meters = self._meters = self._model.experts.meters.copy()
        # At least one id must go through the model again: its logits are where the answer starts.
        session.rewind(min(session.common_prefix(request.ids), len(request.ids) - 1))
        request.cached = session.cache.length
        session.ids[:] = request.ids
        steps = generate(
            self._model,
            session.cache,
            session.ids,
            request.params,
            stop_ids=self.stop_ids,
            context_limit=self.context_limit,
            cancel=lambda: stream.cancelled.is_set() or self._closing,
            on_prefill=lambda done, total: self._report(request, done, total),
            drafting=self._drafting,
        )
        reason: FinishReason | None = None
        while reason is None:
            try:
                token = next(steps)
            except StopIteration as end:
                reason = end.value
                break
            if not request.tokens:
                request.first_token = time.monotonic()
                if self._recorder is not None:
                    self._recorder.first_token()
                session.remember()
            request.tokens += 1
            piece, stopped = text.push(token)
            stream.put(Token(token, piece))
            if stopped:
                steps.close()
                reason = "stop"
        request.first_token = request.first_token or time.monotonic()
        if rest := text.flush():
            stream.put(Token(NO_ID, rest))
        session.remember()
        return reason

    def _report(self, request: _Request, done: int, total: int) -> None:
        before, then = request.reported
        now = time.monotonic()
        rate = (done - before) / (now - then) if then and now > then else 0.0
        request.reported = (done, now)
        request.stream.put(Prefill(done, total, rate))

    def _all_logits(self, ids: list[int], chunk: int = 512) -> Tensor:
        import torch

        from mimo_local.model import Segment

        cache = self._model.new_cache()
        parts = []
        for start in range(0, len(ids), chunk):
            if self._closing:
                raise CancelledError("the engine was closed", hint="load the model again")
            part = Segment(torch.tensor(ids[start : start + chunk]), cache)
            parts.append(self._model.logits(self._model.forward([part])))
        return torch.cat(parts)


def _as_mimo_error(error: BaseException) -> MimoError:
    """The error itself, or an unexpected one in our terms with the original as its cause."""
    if isinstance(error, MimoError):
        return error
    # torch reports a failed allocation as a RuntimeError with this text.
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        wrapped: MimoError = NotEnoughMemoryError(
            "the memory ran out while answering", hint="use a smaller --context or a smaller format"
        )
    else:
        wrapped = MimoError(
            f"the engine failed: {type(error).__name__}: {error}",
            hint="ask again; if it happens twice, report it with the output of `mimo doctor`",
        )
    wrapped.__cause__ = error
    return wrapped
