"""The engine: one thread owns the model; requests wait, share it, come back as streams of events.

Turns ids into text pieces, watches for stop strings, reuses what a session's cache already holds.
Knows no messages and no people. `chat`, `summarize`, `api`, `server` and the screens submit to it;
who runs when is `scheduler`'s. torch is imported when a model is loaded, not before.
"""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Final

from mimo_local.errors import ContextOverflowError, UsageError
from mimo_local.events import Done, Progress, Stats
from mimo_local.experts.meters import figures
from mimo_local.inbox import MOST_WAITING, Inbox, Request, Scoring
from mimo_local.sampler import Sampler, SamplingParams
from mimo_local.session import MAX_SNAPSHOTS, Session
from mimo_local.stream import Stream, TextOutput

if TYPE_CHECKING:
    from torch import Tensor

    from mimo_local.cache import KVCache
    from mimo_local.config import ModelConfig
    from mimo_local.events import DraftFigures, ExpertFigures
    from mimo_local.generate import Drafting
    from mimo_local.model import Model
    from mimo_local.runs import Recorder
    from mimo_local.sampler import Constraint
    from mimo_local.scheduler import Scheduler
    from mimo_local.session_files import SessionFiles
    from mimo_local.settings import Settings
    from mimo_local.tokenizer import Tokenizer

SESSION_BYTES: Final = 1 << 30
"""Memory for conversations where no plan says how much there is."""

__all__ = ["MAX_SNAPSHOTS", "Engine", "Session", "Stream"]


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
        session_bytes: int = SESSION_BYTES,
        session_files: SessionFiles | None = None,
        most_waiting: int = MOST_WAITING,
    ) -> None:
        """`new_cache`: how sessions keep keys and values; by default the model's own way.

        `recorder`: told what each answer took. `drafting`: for caches that have its part.
        `session_bytes`: of all conversations, those that are answered at once (one always may be)
        and those that rest, in memory; `session_files`: where they rest on disk. `most_waiting`:
        requests before `submit` raises BusyError.
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
        self._inbox = Inbox(most_waiting)
        self._scheduler = self._scheduling(session_bytes, session_files)
        # A daemon, and closed at exit: a forgotten engine must not keep the interpreter alive.
        self._thread = threading.Thread(target=self._scheduler.run, name="mimo-engine", daemon=True)
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
        from mimo_local.session_files import first_words, open_files

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
            session_bytes=found.session_bytes,
            session_files=open_files(
                settings, found.new_cache, name=found.name, describe=first_words(found.tokenizer)
            ),
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
        """Ask for the continuation of `ids`: prompts are read in turn, answers written together.

        Without a `session` the engine takes one of its own. Whatever `ids` share with the session's
        cache is not processed again. `constraint`: which ids are allowed. `logprobs`: tokens come
        with their own logprob and so many of the likeliest ids'. The answer ends before the first
        of the `stop` texts, and waits while its reader is far behind.
        Raises UsageError, ContextOverflowError, BusyError.
        """
        ids = self._checked(ids, room=1)
        if any(stop) and self.tokenizer is None:
            raise UsageError("stop texts need a tokenizer", hint="use stop ids, or add the files")
        params = Sampler(params).params
        stream = Stream(params.seed or 0, self._drop)
        text = TextOutput(self.tokenizer.stream() if self.tokenizer else None, stop)
        self._inbox.put(Request(stream, session, ids, params, text, constraint, logprobs))
        return stream

    @property
    def waiting(self) -> int:
        """Requests whose turn has not come."""
        return len(self._inbox)

    @property
    def running(self) -> int:
        """Requests that are being answered."""
        return self._scheduler.running

    def experts_now(self) -> ExpertFigures | None:
        """Where experts came from since the last answer began, whoever wanted them.

        None where all of them lie in RAM, and before the first answer. For any thread.
        """
        return figures(self._model.experts, self._scheduler.meters)

    def drafts_now(self) -> DraftFigures | None:
        """What drafting has done for the answer that is written alone, or did for the last one.

        None where nobody drafts. For any thread.
        """
        return None if self._drafting is None else self._drafting.controller.figures

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Logits (T, V) f32 after each of `ids`; touches no session. Waits for its turn."""
        future: Future[Tensor] = Future()
        self._inbox.put(Scoring(self._checked(ids, room=0), future))
        return future.result()

    def close(self) -> None:
        """Cancel everything and wait for the thread; the engine cannot be used afterwards."""
        self._inbox.close()
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

    def _drop(self, stream: Stream) -> None:
        """A cancelled request that is still waiting ends at once, not when its turn comes."""
        request = self._inbox.drop(stream)
        if request is not None:
            stream.put(Done("cancelled", self._stats(request)))

    def _stats(self, request: Request) -> Stats:
        now = time.monotonic()
        first, session = request.first_token or now, request.session
        return Stats(
            prompt_tokens=len(request.ids),
            cached_tokens=request.cached,
            completion_tokens=request.tokens,
            prefill_s=first - request.started if request.started else 0.0,
            decode_s=now - first if request.started else 0.0,
            context_used=0 if session is None else len(session.ids),
            context_limit=self.context_limit,
            cache_bytes=0 if session is None else sum(session.cache.nbytes.values()),
            experts=figures(self._model.experts, request.meters),
            draft=None if request.decoding is None else request.decoding.figures,
            kernel=self.kernel,
        )

    def _scheduling(self, session_bytes: int, session_files: SessionFiles | None) -> Scheduler:
        from mimo_local.scheduler import Scheduler
        from mimo_local.session_pool import SessionPool

        return Scheduler(
            self._model,
            self._inbox,
            SessionPool(self._new_cache, budget=session_bytes, files=session_files),
            stop_ids=self.stop_ids,
            context_limit=self.context_limit,
            stats=self._stats,
            drafting=self._drafting,
            recorder=self._recorder,
        )
