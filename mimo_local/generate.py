"""Continuing a sequence: read the prompt, then draw an id, draft some, forward them, and again.

`Decoding` is one sequence between passes of the model: which ids the next pass forwards, and what
is drawn from its logits. Who runs the passes decides how many sequences share one: `scheduler` for
the engine, `generate` for a single one. A draft is right if it is the id that would be drawn in its
place anyway, the random number being keyed by the position: the ids are the same with and without
drafting. Ids only: knows no text, no threads and no sessions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch

from mimo_local.cache import KVCache
from mimo_local.draft_cache import DraftCache
from mimo_local.draft_control import DraftController
from mimo_local.errors import CancelledError, ContextOverflowError, UsageError
from mimo_local.events import DraftFigures, FinishReason, Progress
from mimo_local.model import Model, Segment
from mimo_local.mtp import Drafter
from mimo_local.ops import threads_for
from mimo_local.sampler import Constraint, Sampler, SamplingParams, logprobs_of


@dataclass(frozen=True, slots=True)
class Drafting:
    """Who drafts, and who says how deep."""

    drafter: Drafter
    controller: DraftController


@dataclass(frozen=True, slots=True)
class Drawn:
    """One new id. The other two as in `events.Token`."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Decoding:
    """One sequence being continued.

    Whatever ends it (a stop id, an error, a cancel), `ids` is what the cache holds after `close`:
    the last id is never forwarded, or taken back. The repetition penalty sees the answer's ids
    only: over the prompt too, as transformers' does, it drives a summary away from its document's
    words.
    """

    def __init__(
        self,
        cache: KVCache,
        ids: list[int],
        params: SamplingParams,
        *,
        stop_ids: Collection[int] = (),
        limit: int,
        constraint: Constraint | None = None,
        logprobs: int | None = None,
    ) -> None:
        """`ids`: the prompt, which the cache has to hold before `take`; new ones are appended."""
        self.cache, self.ids = cache, ids
        self.reason: FinishReason | None = None
        """Why it ended; None while it goes on."""
        self.figures: DraftFigures | None = None
        """What drafting did, for a sequence that had it."""
        self._sampler, self._stop_ids = Sampler(params), stop_ids
        self._constraint, self._logprobs = constraint, logprobs
        self._start = len(ids)
        self._most = self._start + params.max_tokens
        self._end = min(self._most, limit)
        self._held: int | None = None
        """Rows that are certain, while ids are being drawn."""
        self._drafting: Drafting | None = None
        self._drafts: list[int] = []

    @property
    def room(self) -> int:
        """Positions it may still need, prompt included."""
        return self._end

    def draft_with(self, drafting: Drafting | None, condition: Hashable = None) -> None:
        """From now on verify drafts, or don't. A controller serves one sequence at a time.

        `condition`: see `DraftController.begin_sequence`.
        """
        if drafting is self._drafting:
            return
        self._leave_drafting()
        if drafting is not None:
            drafting.controller.begin_sequence(condition)
            self._drafting = drafting

    def next_ids(self) -> list[int]:
        """What the next pass forwards: the last id, and the drafts that are worth verifying."""
        self._drafts = []
        if self._drafting is not None:
            control = self._drafting.controller
            # The pass draws one id itself; the last id of all is drawn and not forwarded.
            control.begin(self._end - len(self.ids) - 1)
            guesses = self._drafting.drafter.drafts(self.cache, self.ids)
            while control.more() and (guess := next(guesses, None)) is not None:
                if not control.keep(guess[1]):
                    break
                self._drafts.append(guess[0])
            control.verify()
        return [self.ids[-1], *self._drafts]

    def take(self, rows: torch.Tensor) -> Iterator[Drawn]:
        """Draw from the logits (n, V) f32 of a pass: one id, and one more for each right draft.

        A caller who stops iterating ends the sequence with what came so far, by `close`.
        """
        control = None if self._drafting is None else self._drafting.controller
        if control is not None:
            control.verified()
        for i, logits in enumerate(rows):
            self._held = len(self.ids)
            drawn = self._draw(logits, self._held)
            right = i < len(self._drafts) and drawn.id == self._drafts[i]
            if control is not None:
                control.judge(right=right)
            if drawn.id in self._stop_ids:
                self.reason = "stop"
                return
            self.ids.append(drawn.id)
            if self._constraint is not None and self._constraint.advance(drawn.id):
                self.reason = "stop"
            elif len(self.ids) == self._end:
                self.reason = "length" if self._end == self._most else "context"
            yield drawn
            if self.reason is not None:
                return
            if not right:
                break
        # Rows of wrong drafts go.
        assert self._held is not None
        _cut(self.cache, self._held)
        self._held = None

    def close(self) -> None:
        """End it: the cache is as without drafting, and `ids` what it holds."""
        if self._held is not None:
            _cut(self.cache, self._held)
        self._leave_drafting()
        del self.ids[self.cache.length :]

    def _draw(self, logits: torch.Tensor, position: int) -> Drawn:
        with threads_for(1):
            allowed = logits if self._constraint is None else self._constraint.mask(logits)
            token = self._sampler.draw(allowed, position, self.ids[self._start :])
            if self._logprobs is None:
                return Drawn(token)
            return Drawn(token, *logprobs_of(logits, token, self._logprobs))

    def _leave_drafting(self) -> None:
        if self._drafting is not None:
            self._drafting.controller.end_sequence()
            self.figures = self._drafting.controller.report()
            self._drafting = None


def generate(
    model: Model,
    cache: KVCache,
    ids: list[int],
    params: SamplingParams,
    *,
    stop_ids: Collection[int] = (),
    context_limit: int | None = None,
    cancel: Callable[[], bool] | None = None,
    on_prefill: Callable[[int, int], None] | None = None,
    drafting: Drafting | None = None,
) -> Generator[int, None, FinishReason]:
    """Yield new ids of one sequence; return why it ended. A stop id ends it and is not yielded.

    `ids` holds prompt and answer, the first `cache.length` of them already in the cache.
    `on_prefill(done, total)` counts cached ids as done. `cancel` is asked before every layer of the
    prompt and for every id of the answer. `drafting` needs a cache with `draft`.
    """
    limit = model.config.max_context if context_limit is None else context_limit
    cancel = cancel or (lambda: False)
    answer = Decoding(cache, ids, params, stop_ids=stop_ids, limit=limit)
    try:
        answer.draft_with(drafting, condition(model))
        hidden = read_prompt(model, cache, ids, limit=limit, cancel=cancel, on_prefill=on_prefill)
        while True:
            with threads_for(1):
                rows = model.logits(hidden)
            for drawn in answer.take(rows):
                yield drawn.id
                if cancel():
                    return answer.reason or "cancelled"
            if answer.reason is not None:
                return answer.reason
            (hidden,) = forward(model, [(cache, answer.next_ids())])
    except CancelledError:
        return "cancelled"
    finally:
        answer.close()


def condition(model: Model) -> Hashable:
    """What makes a pass take another time than before: sizes of the tiers, reading ahead."""
    held = model.experts.nbytes
    return model.experts.wants_guesses, *(nbytes.bit_length() for nbytes in held.values())


def forward(model: Model, news: Sequence[tuple[KVCache, list[int]]]) -> list[torch.Tensor]:
    """One pass for the next ids of one or several sequences -> hidden (T, D) of each."""
    hidden = model.forward([Segment(torch.tensor(new), cache) for cache, new in news])
    parts = list(torch.split(hidden, [len(new) for _, new in news]))
    for (cache, _), part in zip(news, parts, strict=True):
        if isinstance(cache.draft, DraftCache):
            cache.draft.add(part, cache.length)
    return parts


def read_prompt(
    model: Model,
    cache: KVCache,
    ids: list[int],
    *,
    limit: int,
    cancel: Callable[[], bool],
    on_prefill: Callable[[int, int], None] | None = None,
    end: int | None = None,
) -> torch.Tensor:
    """Forward what the cache lacks of `ids` -> hidden (1, D) of the last one.

    The last one goes alone, as it does when all others are in the cache already: so the same
    prompt and seed give the same answer again. `end`: only so many ids now. CancelledError,
    UsageError, ContextOverflowError.
    """
    _check(ids, cache, limit)
    cached, total = cache.length, len(ids)
    first, last = (ids[cached:-1], ids[-1:]) if end is None else (ids[cached:end], list[int]())
    report = on_prefill or (lambda done, total: None)
    report(cached, total)

    def on_progress(progress: Progress) -> None:
        done = cached + progress.done
        if done < total - 1:
            report(done, total)

    if cancel():
        raise CancelledError("stopped before reading the prompt", hint="ask again")
    hidden = torch.empty(0)
    if first:
        new, draft = Segment(torch.tensor(first), cache), cache.draft
        if not isinstance(draft, DraftCache):
            hidden = model.prefill(new, on_progress=on_progress, cancel=cancel)
        else:  # as many rows as drafting wants
            hidden = model.prefill(new, tail=draft.keep, on_progress=on_progress, cancel=cancel)
            draft.add(hidden, cache.length)
    if last:
        if cancel():
            raise CancelledError("stopped before the last token", hint="ask again")
        (hidden,) = forward(model, [(cache, last)])
        report(total, total)
    return hidden[-1:]


def _cut(cache: KVCache, n: int) -> None:
    if n < cache.length:
        cache.truncate(n)


def _check(ids: list[int], cache: KVCache, limit: int) -> None:
    if not ids:
        raise UsageError("the prompt is empty", hint="give at least one token")
    if cache.length >= len(ids):
        raise ValueError(f"the cache holds {cache.length} rows, the prompt has {len(ids)} ids")
    if len(ids) >= limit:
        raise ContextOverflowError(
            f"the prompt has {len(ids)} tokens, the context has room for {limit} in all",
            hint="shorten the prompt or raise --context; `mimo summarize` reads long documents",
        )
