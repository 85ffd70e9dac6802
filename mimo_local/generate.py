"""The loop: read the prompt, then draw an id, draft some, forward them all, and again. Ids only.

A draft is right if it is the id that would be drawn in its place anyway, the random number being
keyed by the position: the ids are the same with and without drafting. Rows of wrong drafts are
taken back. Knows no text, no threads and no sessions; `engine` drives it and owns what it is given.
Whatever ends it (a stop id, an error, a cancel, a generator that is closed), `ids` is what the
cache holds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Hashable
from dataclasses import dataclass

import torch

from mimo_local.cache import KVCache
from mimo_local.draft_cache import DraftCache
from mimo_local.draft_control import DraftController
from mimo_local.errors import CancelledError, ContextOverflowError, UsageError
from mimo_local.events import FinishReason, Progress
from mimo_local.model import Model, Segment
from mimo_local.mtp import Drafter
from mimo_local.ops import threads_for
from mimo_local.sampler import Sampler, SamplingParams


@dataclass(frozen=True, slots=True)
class Drafting:
    """Who drafts, and who says how deep."""

    drafter: Drafter
    controller: DraftController


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
    """Yield new ids; return why it ended. A stop id ends it and is not yielded.

    `ids` holds prompt and answer, the first `cache.length` of them already in the cache; each new
    id is appended before it is yielded, and at the end `ids` is cut to what the cache holds (the
    last one is never forwarded, or taken back). The repetition penalty sees the answer's ids only:
    over the prompt too, as transformers' does, it drives a summary away from its document's words.
    `on_prefill(done, total)` counts cached ids as done. `cancel` is asked before every layer of the
    prompt and for every id of the answer. `drafting` needs a cache with `draft`.
    """
    limit = model.config.max_context if context_limit is None else context_limit
    sampler = Sampler(params)
    cancel = cancel or (lambda: False)
    control = DraftController(0) if drafting is None else drafting.controller
    held = limit
    try:
        _check(ids, cache, limit)
        hidden = _prefill(model, cache, ids, cancel, on_prefill)[-1:]
        start, drafts = len(ids), list[int]()
        end = min(start + params.max_tokens, limit)
        control.begin_sequence(_tiers(model))
        while True:
            with threads_for(1):
                rows = model.logits(hidden)
            control.verified()
            for i, logits in enumerate(rows):
                held = len(ids)
                with threads_for(1):
                    token = sampler.draw(logits, held, ids[start:])
                right = i < len(drafts) and token == drafts[i]
                control.judge(right=right)
                if token in stop_ids:
                    return "stop"
                ids.append(token)
                yield token
                if len(ids) == end or cancel():
                    return _reason(len(ids), end, start + params.max_tokens)
                if not right:
                    break
            _cut(cache, held)
            drafts = [] if drafting is None else _draft(drafting, cache, ids, end)
            hidden = _forward(model, cache, [token, *drafts])
    except CancelledError:
        return "cancelled"
    finally:
        # Of a pass that was not used to its end the rest goes: the cache is as without drafting.
        _cut(cache, held)
        control.end_sequence()
        del ids[cache.length :]


def _tiers(model: Model) -> Hashable:
    """What makes a pass take another time than before: sizes of the tiers, reading ahead."""
    held = model.experts.nbytes
    return model.experts.wants_guesses, *(nbytes.bit_length() for nbytes in held.values())


def _reason(n: int, end: int, most: int) -> FinishReason:
    if n < end:
        return "cancelled"
    return "length" if n == most else "context"


def _cut(cache: KVCache, n: int) -> None:
    if n < cache.length:
        cache.truncate(n)


def _draft(drafting: Drafting, cache: KVCache, ids: list[int], end: int) -> list[int]:
    """What is worth verifying after `ids`, which end before position `end`."""
    control, drafts = drafting.controller, list[int]()
    # The pass draws one id itself; the last id of all is drawn and not forwarded.
    control.begin(end - len(ids) - 1)
    guesses = drafting.drafter.drafts(cache, ids)
    while control.more() and (guess := next(guesses, None)) is not None:
        if not control.keep(guess[1]):
            break
        drafts.append(guess[0])
    control.verify()
    return drafts


def _forward(model: Model, cache: KVCache, new: list[int]) -> torch.Tensor:
    """Forward the ids after those in the cache -> hidden (T, D)."""
    hidden = model.forward([Segment(torch.tensor(new), cache)])
    if isinstance(cache.draft, DraftCache):
        cache.draft.add(hidden, cache.length)
    return hidden


def _prefill(
    model: Model,
    cache: KVCache,
    ids: list[int],
    cancel: Callable[[], bool],
    on_prefill: Callable[[int, int], None] | None,
) -> torch.Tensor:
    """Forward what the cache lacks -> hidden of the last ids (T, D): as many as drafting wants."""
    cached, total = cache.length, len(ids)
    report = on_prefill or (lambda done, total: None)
    report(cached, total)

    def on_progress(progress: Progress) -> None:
        report(cached + progress.done, total)

    if cancel():
        raise CancelledError("stopped before reading the prompt", hint="ask again")
    new, draft = Segment(torch.tensor(ids[cached:]), cache), cache.draft
    if not isinstance(draft, DraftCache):
        return model.prefill(new, on_progress=on_progress, cancel=cancel)
    hidden = model.prefill(new, tail=draft.keep, on_progress=on_progress, cancel=cancel)
    draft.add(hidden, cache.length)
    return hidden


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
