"""The loop: read the prompt, then draw an id, forward it, and again. Ids only.

Knows no text, no threads and no sessions; `engine` drives it and owns what it is given. Whatever
ends it (a stop id, an error, a cancel, a generator that is closed), `ids` is what the cache holds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator

import torch

from mimo_local.cache import KVCache
from mimo_local.errors import CancelledError, ContextOverflowError, UsageError
from mimo_local.events import FinishReason, Progress
from mimo_local.model import Model, Segment
from mimo_local.ops import threads_for
from mimo_local.sampler import Sampler, SamplingParams


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
) -> Generator[int, None, FinishReason]:
    """Yield new ids; return why it ended. A stop id ends it and is not yielded.

    `ids` holds prompt and answer, the first `cache.length` of them already in the cache; each new
    id is appended before it is yielded, and at the end `ids` is cut to what the cache holds (the
    last id is drawn but never forwarded). The repetition penalty sees the answer's ids only: over
    the prompt too, as transformers' does, it drives a summary away from its document's words.
    `on_prefill(done, total)` counts cached ids as done. `cancel` is asked before every layer of the
    prompt and every step of the answer.
    """
    limit = model.config.max_context if context_limit is None else context_limit
    sampler = Sampler(params)
    cancel = cancel or (lambda: False)
    try:
        _check(ids, cache, limit)
        hidden = _prefill(model, cache, ids, cancel, on_prefill)
        start = len(ids)
        for count in range(1, params.max_tokens + 1):
            with threads_for(1):
                token = sampler.draw(model.logits(hidden)[0], len(ids), ids[start:])
            if token in stop_ids:
                return "stop"
            ids.append(token)
            yield token
            if count == params.max_tokens:
                return "length"
            if len(ids) >= limit:
                return "context"
            if cancel():
                return "cancelled"
            hidden = model.forward([Segment(torch.tensor([token]), cache)])
    except CancelledError:
        return "cancelled"
    finally:
        del ids[cache.length :]
    return "length"  # not reached: max_tokens is at least 1


def _prefill(
    model: Model,
    cache: KVCache,
    ids: list[int],
    cancel: Callable[[], bool],
    on_prefill: Callable[[int, int], None] | None,
) -> torch.Tensor:
    """Forward what the cache lacks -> hidden (1, D) of the last id."""
    cached, total = cache.length, len(ids)
    report = on_prefill or (lambda done, total: None)
    report(cached, total)

    def on_progress(progress: Progress) -> None:
        report(cached + progress.done, total)

    if cancel():
        raise CancelledError("stopped before reading the prompt", hint="ask again")
    new = Segment(torch.tensor(ids[cached:]), cache)
    return model.prefill(new, on_progress=on_progress, cancel=cancel)


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
