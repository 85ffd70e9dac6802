"""Stand-ins for each floor: a fake model for `generate`, a fake engine for everything above it.

`FakeModel` answers from a hash of every id its cache holds, so a cache that lost or kept a wrong
row changes the next token. `FakeEngine` plays queued chunks, in the same events as the real one,
without torch or weights: `FakeEngine(["Hel", "lo"])`, then `engine.queue(...)` for more answers.
Import with `from fakes import FakeEngine`.
"""

from __future__ import annotations

import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from mimo_local.errors import MimoError, UsageError
from mimo_local.events import (
    Done,
    DraftFigures,
    Event,
    ExpertFigures,
    Failed,
    FinishReason,
    Prefill,
    Stats,
    Token,
)
from mimo_local.experts.meters import Meters

if TYPE_CHECKING:
    import torch

    from mimo_local.sampler import Constraint, SamplingParams


# ---- for engine users (chat, summarize, cli, tui) ------------------------------------------------


class FakeTokenizer:
    """One id per character (its code point); the template is `<role>content` per line."""

    stop_ids: tuple[int, ...] = (0,)
    vocab_size = 0x110000

    control_ids = frozenset((0,))

    def token_id(self, text: str) -> int | None:
        return None

    def bytes_of(self, token: int) -> bytes:
        return chr(token).encode() if token else b""

    def template_says(self, text: str) -> bool:
        return text == "tools"

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(i) for i in ids if i)

    def stream(self) -> FakeDecoder:
        return FakeDecoder()

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> list[int]:
        text = "".join(f"<{m['role']}>{m['content']}\n" for m in messages)
        if add_generation_prompt:
            text += "<assistant>" if kwargs.get("enable_thinking") else "<assistant><think></think>"
        return self.encode(text)


class FakeDecoder:
    def push(self, token: int) -> str:
        return chr(token) if token else ""

    def flush(self) -> str:
        return ""


@dataclass
class Answer:
    """One queued answer: its chunks (one Token event each), then an end."""

    chunks: tuple[str, ...]
    reason: FinishReason = "stop"
    error: MimoError | None = None
    """Sent as Failed after the chunks instead of Done."""
    hold: bool = False
    """After the chunks, wait until somebody cancels: an answer that never ends by itself."""
    prefill_steps: int = 2


@dataclass
class Request:
    """What one `submit` was called with."""

    session: FakeSession
    ids: list[int]
    params: SamplingParams
    stop: tuple[str, ...]
    constraint: Constraint | None = None
    logprobs: int | None = None

    @property
    def prompt(self) -> str:
        return FakeTokenizer().decode(self.ids)


@dataclass
class FakeSession:
    ids: list[int] = field(default_factory=list)

    def common_prefix(self, ids: Sequence[int]) -> int:
        n = 0
        for mine, other in zip(self.ids, ids, strict=False):
            if mine != other:
                break
            n += 1
        return n

    def rewind(self, n: int) -> None:
        del self.ids[n:]


class FakeStream:
    """Events of one fake request; `cancel()` ends it before the next chunk."""

    def __init__(self, engine: FakeEngine, request: Request, answer: Answer) -> None:
        self._engine, self._request, self._answer = engine, request, answer
        self._cancelled = threading.Event()
        self._events = self._play()

    def cancel(self) -> None:
        self._cancelled.set()

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        return next(self._events)

    def _play(self) -> Iterator[Event]:
        request, answer = self._request, self._answer
        total, sent = len(request.ids), 0
        steps = max(1, answer.prefill_steps)
        for step in range(steps + 1):
            if self._cancelled.is_set():
                break
            yield Prefill(total * step // steps, total, 1000.0)
        request.session.ids[:] = request.ids
        for chunk in answer.chunks:
            if self._cancelled.wait(self._engine.delay_s):
                break
            sent += 1
            token, logprobs = ord(chunk[-1]) if chunk else 0, request.logprobs
            if logprobs is None:
                yield Token(token, chunk)
            else:
                top = tuple((token + n, -0.5 - n) for n in range(logprobs))
                yield Token(token, chunk, -0.5, top)
            request.session.ids.extend(ord(c) for c in chunk)
        if answer.hold:
            self._cancelled.wait()
        if self._cancelled.is_set():
            yield Done("cancelled", self._stats(total, sent))
        elif answer.error is not None:
            yield Failed(answer.error)
        else:
            yield Done(answer.reason, self._stats(total, sent))

    def _stats(self, prompt: int, completion: int) -> Stats:
        return Stats(
            prompt_tokens=prompt,
            completion_tokens=completion,
            prefill_s=0.5,
            decode_s=0.5,
            context_used=len(self._request.session.ids),
            context_limit=self._engine.context_limit,
            cache_bytes=1024,
            experts=self._engine.experts,
            kernel="fake",
        )


class FakeEngine:
    """An engine that plays answers from a queue; `requests` keeps what was asked.

    `reply`: called with the prompt's text when the queue is empty; its text is sent word by word.
    """

    name = "fake"
    description = "a fake engine that plays queued chunks"

    def __init__(
        self,
        *answers: Sequence[str],
        reply: Callable[[str], str] | None = None,
        delay_s: float = 0.0,
        context_limit: int = 4096,
    ) -> None:
        self.tokenizer = FakeTokenizer()
        self.config = SimpleNamespace(model_type="fake", max_context=context_limit, vocab_size=256)
        self.context_limit = context_limit
        self.delay_s = delay_s
        self.requests: list[Request] = []
        self.closed = False
        self.experts: ExpertFigures | None = None
        """What the tiers of a model that is partly on disk did, in each answer alike."""
        self.drafts: DraftFigures | None = None
        """What drafting did so far, while an answer is written."""
        self._reply = reply or (lambda prompt: "fake answer")
        self._answers: deque[Answer] = deque()
        for chunks in answers:
            self.queue(*chunks)

    def queue(
        self,
        *chunks: str,
        reason: FinishReason = "stop",
        error: MimoError | None = None,
        hold: bool = False,
        prefill_steps: int = 2,
    ) -> None:
        """Add one answer; see `Answer` for the fields."""
        self._answers.append(Answer(chunks, reason, error, hold, prefill_steps))

    def new_session(self) -> FakeSession:
        return FakeSession()

    def submit(
        self,
        session: FakeSession | None,
        ids: Sequence[int],
        params: SamplingParams,
        *,
        stop: Sequence[str] = (),
        constraint: Constraint | None = None,
        logprobs: int | None = None,
    ) -> FakeStream:
        if not ids:
            raise UsageError("the prompt is empty", hint="give at least one token")
        session = session or FakeSession()
        request = Request(session, list(ids), params, tuple(stop), constraint, logprobs)
        self.requests.append(request)
        if self._answers:
            answer = self._answers.popleft()
        else:
            words = self._reply(request.prompt).split(" ")
            answer = Answer(tuple(w if i == 0 else f" {w}" for i, w in enumerate(words)))
        return FakeStream(self, request, answer)

    def experts_now(self) -> ExpertFigures | None:
        return self.experts

    def drafts_now(self) -> DraftFigures | None:
        return self.drafts

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        raise UsageError("a fake engine has no logits", hint="load a model")

    def close(self) -> None:
        self.closed = True

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# ---- for generate and engine ---------------------------------------------------------------------


@dataclass(eq=False)
class FakeSnapshot:
    length: int
    held: list[int]
    oldest: int
    stale: bool = False
    nbytes: int = 0
    low: int = 0
    rings: object = field(default_factory=object)

    def reach(self, n: int) -> int:
        return 0 if self.stale or n < self.low else min(n, self.length)


class FakeCache:
    """Holds ids instead of keys; may be truncated by at most `slack` rows once past `window`."""

    def __init__(self, *, window: int = 8, slack: int = 4) -> None:
        self.window, self.slack = window, slack
        self.draft: Any = None
        self.held: list[int] = []
        self.oldest = 0
        """First position whose row is still there; truncating below oldest + window must fail."""
        self._snapshots: list[FakeSnapshot] = []

    @property
    def length(self) -> int:
        return len(self.held)

    @property
    def nbytes(self) -> dict[str, int]:
        return {"swa": 8 * min(self.length, self.window), "full": 8 * self.length}

    def extend(self, ids: Sequence[int]) -> None:
        self.held.extend(ids)
        self.oldest = max(self.oldest, self.length - self.window - self.slack)

    def can_truncate(self, n: int) -> bool:
        return 0 <= n <= self.length and self.oldest <= max(0, n - self.window)

    def truncate(self, n: int) -> None:
        if not self.can_truncate(n):
            raise UsageError(f"cannot cut {self.length} rows to {n}", hint="restore a snapshot")
        self._cut(n)

    def clear(self) -> None:
        self._cut(0)
        self.oldest = 0

    def snapshot(self) -> FakeSnapshot:
        snapshot = FakeSnapshot(self.length, list(self.held), self.oldest)
        snapshot.low = self.oldest + self.window if self.oldest else 0
        self._snapshots.append(snapshot)
        return snapshot

    @property
    def row_bytes(self) -> int:
        return 8

    @property
    def used_bytes(self) -> int:
        return sum(self.nbytes.values())

    def trim(self) -> None:
        pass

    def catch(self, points: Sequence[int]) -> None:
        pass

    def caught(self) -> list[FakeSnapshot]:
        return []

    def fork(
        self, into: FakeCache, at: FakeSnapshot | None, points: Sequence[FakeSnapshot]
    ) -> list[FakeSnapshot]:
        here = at or self.snapshot()
        into.held, into.oldest = list(here.held), here.oldest
        copies = [FakeSnapshot(p.length, list(p.held), p.oldest, low=p.low) for p in points]
        into._snapshots += copies
        return copies

    def restore(self, snapshot: FakeSnapshot) -> None:
        if snapshot.stale or snapshot not in self._snapshots:
            raise UsageError("the snapshot is stale", hint="use an earlier one")
        self._cut(snapshot.length)
        self.held, self.oldest = list(snapshot.held), snapshot.oldest

    def _cut(self, n: int) -> None:
        for snapshot in self._snapshots:
            snapshot.stale |= snapshot.length > n
        del self.held[n:]


class FakeExperts:
    """What the engine asks of a model's experts; `closed` says it was closed."""

    def __init__(self) -> None:
        self.meters, self.nbytes = Meters(), {"ram": 0}
        self.notes: list[str] = []
        self.wants_guesses = self.closed = False

    def close(self) -> None:
        self.closed = True


class FakeModel:
    """Hidden row t = hash of all ids up to t, so any slip in the cache changes what comes next.

    `script`: ids to prefer, by position (a strong logit), whatever the hash says.
    `fail_at`: raise RuntimeError when the cache reaches that length. `step_s`: sleep per row.
    """

    def __init__(
        self,
        vocab: int = 64,
        *,
        script: Mapping[int, int] | None = None,
        fail_at: int | None = None,
        step_s: float = 0.0,
        window: int = 8,
        slack: int = 4,
    ) -> None:
        self.vocab, self.script = vocab, dict(script or {})
        self.fail_at, self.step_s = fail_at, step_s
        self.window, self.slack = window, slack
        self.config = SimpleNamespace(
            model_type="fake", vocab_size=vocab, max_context=1 << 20, eos_ids=()
        )
        self.experts = FakeExperts()
        self.rows = 0
        """Rows forwarded so far: what prefix reuse saves."""

    def new_cache(self) -> FakeCache:
        return FakeCache(window=self.window, slack=self.slack)

    def forward(self, segments: Sequence[Any], *, trace: Any = None) -> torch.Tensor:
        import torch

        rows, longer = [], []
        for segment in segments:
            held = list(segment.cache.held)
            for token in segment.ids.tolist():
                if self.step_s:
                    time.sleep(self.step_s)
                if self.fail_at is not None and len(held) >= self.fail_at:
                    raise RuntimeError("the fake model fails here")
                held.append(token)
                self.rows += 1
                digest = zlib.crc32(repr(held).encode())
                rows.append([float(len(held)), float(digest % (1 << 20))])
            longer.append((segment.cache, held[segment.cache.length :]))
        for cache, new in longer:  # only a whole step is committed
            cache.extend(new)
        return torch.tensor(rows, dtype=torch.float32)

    def prefill(
        self,
        segment: Any,
        *,
        chunk: int = 8,
        on_progress: Callable[..., None] | None = None,
        cancel: Callable[[], bool] | None = None,
    ) -> torch.Tensor:
        from mimo_local.errors import CancelledError
        from mimo_local.events import Progress

        hidden, total = None, len(segment.ids)
        for start in range(0, total, chunk):
            if cancel is not None and cancel():
                raise CancelledError("stopped while reading the prompt", hint="ask again")
            part = SimpleNamespace(ids=segment.ids[start : start + chunk], cache=segment.cache)
            hidden = self.forward([part])[-1:]
            if on_progress is not None:
                on_progress(Progress("reading", min(start + chunk, total), total, "tokens"))
        assert hidden is not None
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        import torch

        rows = []
        for length, digest in hidden.tolist():
            generator = torch.Generator().manual_seed(int(digest))
            row = torch.randn(self.vocab, generator=generator)
            if int(length) in self.script:
                row[self.script[int(length)]] = 50.0
            rows.append(row)
        return torch.stack(rows)
