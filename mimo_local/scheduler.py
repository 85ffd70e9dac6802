"""Who runs next on the engine's thread: prompts are read one by one, answers written together.

Sequences that decode share each pass of the model: up to EXACT_ROWS rows are computed each as if it
were alone, so nobody's answer depends on the company. Reading a long prompt stops between two of
its pieces for a pass of those that write, and for a step of a short prompt: it takes half the time
at most, whatever else goes on. Drafts are verified while one sequence writes alone: in company
their rows would cost others. Used by `engine`, whose thread runs it; knows ids and pieces of text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final

import torch

from mimo_local.errors import CancelledError, as_mimo_error
from mimo_local.events import Done, Failed, FinishReason, Prefill, Stats, Token
from mimo_local.generate import Decoding, Drafting, condition, forward, read_prompt
from mimo_local.inbox import Fit, Inbox, Item, Request, Scoring
from mimo_local.model import Model, Segment
from mimo_local.ops import EXACT_ROWS, threads_for
from mimo_local.prefill import LEAST_ROWS
from mimo_local.stream import NO_ID

if TYPE_CHECKING:
    from mimo_local.experts.meters import Meters
    from mimo_local.runs import Recorder
    from mimo_local.session_pool import SessionPool

STEP: Final = LEAST_ROWS - 1
"""Rows of a prompt that go through all layers in one step."""
SHORT: Final = 8 * STEP
"""Prompts of fewer new rows are read step by step while a much longer one is under way."""
MUCH: Final = 4
"""Times as many rows are much longer: step by step costs more than reading layer by layer."""
UNREAD: Final = 256
"""Events somebody may be behind before the answer waits for the reader."""
STALLED_S: Final = 0.05
"""Between two looks whether a reader has caught up."""
IDLE_S: Final = 5.0
"""Without work for so long, sessions are saved."""
SHARED: Final = 256
"""Rows of a prompt that are worth waiting for, if another request is just reading them."""


class Scheduler:
    """Everything that runs; only `inbox` is for other threads too."""

    def __init__(
        self,
        model: Model,
        inbox: Inbox,
        sessions: SessionPool,
        *,
        stop_ids: Iterable[int],
        context_limit: int,
        stats: Callable[[Request], Stats],
        drafting: Drafting | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        """`stats`: a request's figures, whenever it ends."""
        self.model, self.inbox, self.sessions = model, inbox, sessions
        self.stop_ids, self.context_limit = frozenset(stop_ids), context_limit
        self.drafting, self.recorder = drafting, recorder
        self.meters: Meters | None = None
        """The experts' meters when the last request's turn came."""
        self._stats = stats
        self._active: list[Request] = []
        self._prompts: list[Request] = []
        """Of the active ones those whose prompt is still to be read."""
        self._reading: Request | None = None
        self._took, self._ended = 0.0, 0.0
        """Seconds of the last interruption of a prompt, and when it was over."""

    def run(self) -> None:
        """Until the inbox closes; everything that was asked ends with an event."""
        while not self.inbox.closing:
            self._admit()
            if self._prompts:
                self._read(min(self._prompts, key=self._rank))
            elif not self._pass_of_all():
                self._wait()
        for request in list(self._active):
            self._finish(request, "cancelled")
        for item in self.inbox.rest():
            self._refuse(item)
        self.sessions.close()

    @property
    def running(self) -> int:
        """Requests that have begun and not ended; for any thread."""
        return len(self._active)

    # ---- beginning -------------------------------------------------------------------------------

    def _admit(self) -> None:
        while (item := self.inbox.pop(self._fit)) is not None:
            if isinstance(item, Scoring):
                self._score(item)
            else:
                self._begin(item)

    def _fit(self, item: Item) -> Fit:
        if isinstance(item, Scoring):
            return "block" if self._reading is not None else "now"
        if len(self._active) >= EXACT_ROWS:
            return "block"
        if not self._active:
            return "now"
        if any(item.session is r.session for r in self._active if item.session is not None):
            return "later"
        if item.session is None and not self.sessions.fits(self._most_tokens(item)):
            return "block"
        return "later" if self._is_being_read(item) else "now"

    def _most_tokens(self, request: Request) -> int:
        return min(len(request.ids) + request.params.max_tokens, self.context_limit)

    def _is_being_read(self, item: Request) -> bool:
        """Whether another request is about to know so much of this prompt that it can wait."""
        if item.session is not None:
            return False
        return any(_common(r.ids, item.ids) >= SHARED for r in self._prompts)

    def _begin(self, request: Request) -> None:
        request.started = time.monotonic()
        request.meters = self.meters = self.model.experts.meters.copy()
        for other in self._active:
            other.alone = request.alone = False
        try:
            if request.session is None:
                most = self._most_tokens(request)
                request.session = self.sessions.take(request.ids, tokens=most)
                request.pooled = True
            session = request.session
            # One id at least must go through the model again: its logits begin the answer.
            session.rewind(min(session.common_prefix(request.ids), len(request.ids) - 1))
            request.cached = session.cache.length
            session.ids[:] = request.ids
            request.decoding = Decoding(
                session.cache, session.ids, request.params, stop_ids=self.stop_ids,
                limit=self.context_limit, constraint=request.constraint, logprobs=request.logprobs,
            )  # fmt: skip
        except Exception as error:
            self._fail(request, error)
            return
        self._active.append(request)
        self._prompts.append(request)
        if self.recorder is not None and request.alone:
            self.recorder.begin()

    def _rank(self, request: Request) -> int:
        """Prompts that take one step first, then in order."""
        return 0 if self._left(request) <= STEP else 1

    # ---- reading ---------------------------------------------------------------------------------

    def _read(self, request: Request) -> None:
        self._reading = request
        try:
            self._read_on(request, None, lambda: self._between(request))
        finally:
            self._reading = None

    def _read_on(self, request: Request, end: int | None, cancel: Callable[[], bool]) -> None:
        """Up to `end` or all of it; then the answer begins."""
        session = request.session
        assert session is not None
        try:
            hidden = read_prompt(
                self.model, session.cache, session.ids, limit=self.context_limit, cancel=cancel,
                on_prefill=lambda done, total: _report(request, done, total), end=end,
            )  # fmt: skip
            if end is None:
                self._prompts.remove(request)
                session.remember()
                self._take([request], [hidden])
        except CancelledError:
            self._finish(request, "cancelled")
        except BaseException as error:
            self._fail(request, error)

    def _between(self, reading: Request) -> bool:
        """Asked between pieces of a prompt: whether to stop. Here the others get their turn."""
        if reading.stream.cancelled.is_set() or self.inbox.closing:
            return True
        if not (len(self._active) > 1 or len(self.inbox)):
            return False
        if time.monotonic() - self._ended < self._took:
            return False
        start = time.monotonic()
        # The prompt is read in inference mode; what is made here has to live longer.
        with torch.inference_mode(False):
            self._admit()
            self._pass_of_all()
            self._step_of_another(reading)
        self._ended = time.monotonic()
        self._took = self._ended - start
        return False

    def _step_of_another(self, reading: Request) -> None:
        most = min(SHORT, self._left(reading) // MUCH)
        short = (r for r in self._prompts if r is not reading and self._left(r) <= max(most, STEP))
        request = next(short, None)
        if request is not None:
            end = len(request.ids) - self._left(request) + STEP
            self._read_on(
                request, end if end < len(request.ids) else None,
                lambda: request.stream.cancelled.is_set() or self.inbox.closing,
            )  # fmt: skip

    def _left(self, request: Request) -> int:
        assert request.session is not None
        return len(request.ids) - request.session.cache.length

    # ---- writing ---------------------------------------------------------------------------------

    def _pass_of_all(self) -> bool:
        """One pass of the model for those that write; False if there is nobody."""
        batch = []
        for request in [r for r in self._active if r not in self._prompts]:
            if request.stream.cancelled.is_set():
                self._finish(request, "cancelled")
            elif request.stream.unread <= UNREAD:
                batch.append(request)
        self._choose_drafter(batch)
        if batch:
            self._pass(batch)
        return bool(batch)

    def _choose_drafter(self, batch: list[Request]) -> None:
        drafter = batch[0] if len(batch) == 1 else None
        for request in self._active:
            if request is not drafter and request.decoding is not None:
                request.decoding.draft_with(None)
        if drafter is not None and drafter.decoding is not None and self.drafting is not None:
            drafter.decoding.draft_with(self.drafting, condition(self.model))

    def _pass(self, batch: list[Request]) -> None:
        try:
            news = [(r.decoding.cache, r.decoding.next_ids()) for r in batch if r.decoding]
            hidden = forward(self.model, news)
        except BaseException as error:
            if len(batch) == 1:
                self._fail(batch[0], error)
                return
            # A pass that fails leaves all caches as they were: whose fault it was shows alone.
            for request in batch:
                self._pass([request])
            return
        self._take(batch, hidden)

    def _take(self, batch: list[Request], hidden: list[torch.Tensor]) -> None:
        with threads_for(1):
            logits = self.model.logits(hidden[0] if len(hidden) == 1 else torch.cat(hidden))
        for request, rows in zip(batch, torch.split(logits, [len(h) for h in hidden]), strict=True):
            try:
                self._write(request, rows)
            except BaseException as error:
                self._fail(request, error)

    def _write(self, request: Request, rows: torch.Tensor) -> None:
        """What the logits give goes out."""
        stream, decoding = request.stream, request.decoding
        assert decoding is not None
        if not request.tokens and len(self._active) == 1:
            decoding.draft_with(self.drafting, condition(self.model))
        stopped = False
        for drawn in decoding.take(rows):
            if not request.tokens:
                request.first_token = time.monotonic()
                if self.recorder is not None and request.alone:
                    self.recorder.first_token()
            request.tokens += 1
            piece, stopped = request.text.push(drawn.id)
            stream.put(Token(drawn.id, piece, drawn.logprob, drawn.top))
            if stopped or stream.cancelled.is_set():
                break
        if stopped:
            self._finish(request, "stop")
        elif decoding.reason is not None:
            self._finish(request, decoding.reason)
        elif stream.cancelled.is_set():
            self._finish(request, "cancelled")

    # ---- ending ----------------------------------------------------------------------------------

    def _finish(self, request: Request, reason: FinishReason) -> None:
        try:
            if request.decoding is not None and request.session is not None:
                request.decoding.close()
                request.session.remember()
            request.first_token = request.first_token or time.monotonic()
            if rest := request.text.flush():
                request.stream.put(Token(NO_ID, rest))
            done = Done(reason, self._stats(request))
        except BaseException as error:
            self._fail(request, error)
            return
        self._leave(request)
        request.stream.put(done)
        if self.recorder is not None and request.alone:
            self.recorder.end(done.stats)

    def _fail(self, request: Request, error: BaseException) -> None:
        """Whatever happened, the request must end and the thread must live on."""
        failure = as_mimo_error(error)
        try:
            if request.decoding is not None:
                request.decoding.close()
        except BaseException as worse:
            failure = as_mimo_error(worse)
        self._leave(request)
        request.stream.put(Failed(failure))

    def _leave(self, request: Request) -> None:
        for running in (self._active, self._prompts):
            if request in running:
                running.remove(request)
        if request.pooled and request.session is not None:
            self.sessions.give_back(request.session)
        request.decoding = None

    def _refuse(self, item: Item) -> None:
        if isinstance(item, Request):
            item.stream.put(Done("cancelled", self._stats(item)))
        else:
            item.future.set_exception(
                CancelledError("the engine was closed", hint="load the model again")
            )

    # ---- other work ------------------------------------------------------------------------------

    def _score(self, item: Scoring, chunk: int = 512) -> None:
        """Logits (T, V) of a whole text, the others getting their turn between its chunks."""
        try:
            cache, parts = self.model.new_cache(), []
            for start in range(0, len(item.ids), chunk):
                if self.inbox.closing:
                    raise CancelledError("the engine was closed", hint="load the model again")
                part = Segment(torch.tensor(item.ids[start : start + chunk]), cache)
                parts.append(self.model.logits(self.model.forward([part])))
                self._pass_of_all()
            item.future.set_result(torch.cat(parts))
        except BaseException as error:
            item.future.set_exception(as_mimo_error(error))

    def _wait(self) -> None:
        """Nothing can go on: readers are behind, or there is nothing to do."""
        if self._active:
            self.inbox.wait(STALLED_S)
        elif not self.inbox.wait(IDLE_S):
            # Saved while nobody asks for anything: a model on the same disk needs all of it.
            while self.sessions.rest(self._interrupted):
                pass
            self.inbox.wait()

    def _interrupted(self) -> bool:
        return len(self.inbox) > 0 or self.inbox.closing


def _common(a: list[int], b: list[int]) -> int:
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)


def _report(request: Request, done: int, total: int) -> None:
    before, then = request.reported
    now = time.monotonic()
    rate = (done - before) / (now - then) if then and now > then else 0.0
    request.reported = (done, now)
    request.stream.put(Prefill(done, total, rate))
