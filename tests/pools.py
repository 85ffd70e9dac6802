"""What an engine does with a pool of sessions, one request after the other, and counts of it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
import torch
from fakes import FakeCache, FakeModel

from mimo_local.cache import KVCache
from mimo_local.experts.store import ExpertStore
from mimo_local.generate import Drafting, generate
from mimo_local.model import Model
from mimo_local.mtp import Drafter
from mimo_local.sampler import SamplingParams
from mimo_local.session import Session
from mimo_local.session_pool import SessionPool
from mimo_local.weights import open_weights

WINDOW = 9
MOST = 1 << 40


class Chats:
    """What an engine does with a pool, one request after the other; counts what is processed."""

    def __init__(self, model: Any, pool: SessionPool, drafting: Drafting | None = None) -> None:
        self.model, self.pool, self.drafting = model, pool, drafting
        self.read = 0
        """Prompt ids of the last request that went through the model."""

    def begin(self, ids: list[int], n: int) -> tuple[Session, Any]:
        session = self.pool.take(ids, tokens=len(ids) + n)
        assert session.ids == ids[: len(session.ids)] and len(session.ids) < len(ids)
        assert session.cache.length == len(session.ids)
        self.read = len(ids) - session.cache.length
        session.ids[:] = ids
        params = SamplingParams(temperature=0.0, max_tokens=n)
        steps = generate(self.model, session.cache, session.ids, params, drafting=self.drafting)
        return session, steps

    def ask(self, ids: list[int], n: int = 6, *, stop_after: int = MOST) -> list[int]:
        session, steps = self.begin(ids, n)
        made: list[int] = []
        for token in steps:
            if not made:
                session.remember()
            made.append(token)
            if len(made) == stop_after:
                steps.close()
        session.remember()
        self.pool.give_back(session)
        return made


def from_scratch(model: Any, ids: list[int], n: int = 6) -> list[int]:
    params = SamplingParams(temperature=0.0, max_tokens=n)
    return list(generate(model, model.new_cache(), list(ids), params))


def fake(budget: int = MOST, **kwargs: Any) -> Chats:
    return Chats(FakeModel(), SessionPool(FakeCache, budget=budget, **kwargs))  # type: ignore[arg-type]


def text(n: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(64), k=n)


def small_model(folder: Path, **kwargs: Any) -> tuple[Model, Drafter]:
    """Sliding and full layers, experts, three MTP layers; random weights of a seed."""
    facts = tiny.config("fsfs", "dmdd", window=WINDOW, vocab=64, context=1 << 16)
    weights = open_weights(tiny.write(folder, facts, mtp_layers=3, **kwargs))
    model = Model(weights, ExpertStore(weights))
    return model, Drafter(weights, model)


def new_cache(
    small: tuple[Model, Drafter], drafts: bool, dtype: torch.dtype = torch.bfloat16
) -> Callable[[], KVCache]:
    model, drafter = small

    def make() -> KVCache:
        cache = model.new_cache(dtype=dtype)
        if drafts:
            cache.draft = drafter.new_cache(dtype, cache.slack)
        return cache

    return make
