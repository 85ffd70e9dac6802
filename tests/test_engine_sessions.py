"""The engine and its pool together: what a restart costs, and what it leaves on disk."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
import tiny

from mimo_local import scheduler
from mimo_local.engine import Engine
from mimo_local.events import Done, Stats, Token
from mimo_local.sampler import SamplingParams
from mimo_local.session_store import FOLDER, SessionStore
from mimo_local.settings import Settings


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    facts = tiny.config("fsfs", "dmdd", vocab=64, context=8192)
    return tiny.write(tmp_path_factory.mktemp("model"), facts, mtp_layers=3)


@pytest.fixture
def store(user_home: Path) -> SessionStore:
    return SessionStore(user_home / "cache" / FOLDER)


def ask(engine: Engine, ids: list[int], n: int = 8) -> tuple[list[int], Stats]:
    events = list(engine.submit(None, ids, SamplingParams(temperature=0.0, max_tokens=n)))
    done = events[-1]
    assert isinstance(done, Done), done
    return [e.id for e in events if isinstance(e, Token)], done.stats


@pytest.mark.parametrize("draft", ["off", "on"])
def test_a_chat_goes_on_after_a_restart(checkpoint: Path, draft: str, store: SessionStore) -> None:
    settings = Settings(model=checkpoint, draft=draft, context=8000)  # type: ignore[arg-type]
    ids = random.Random(1).choices(range(64), k=3000)
    with Engine.load(settings) as engine:
        answer, stats = ask(engine, ids)
        assert stats.cached_tokens == 0
        more = [*ids, *answer, 1, 2, 3]
        wanted, stats = ask(engine, more)
        assert stats.cached_tokens == len(more) - 4
    assert [len(saved.ids) for saved in store.sessions()] == [len(more) + 7]
    for prompt, new in (([*more, *wanted, 5], 2), (more, 1), ([*ids, *answer, 9, 9], 2)):
        with Engine.load(settings) as engine:
            found, stats = ask(engine, prompt)
            assert stats.cached_tokens == len(prompt) - new
            if prompt == more:
                assert found == wanted


def test_nothing_is_saved_where_nothing_is_wanted(checkpoint: Path, store: SessionStore) -> None:
    with Engine.load(Settings(model=checkpoint, context=8000, sessions_size=0)) as engine:
        ask(engine, [3] * 600)
    assert not store.folder.exists()


def test_a_chat_is_saved_while_the_engine_rests(
    checkpoint: Path, store: SessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "IDLE_S", 0.01)
    with Engine.load(Settings(model=checkpoint, context=8000)) as engine:
        ask(engine, [3] * 600)
        end = time.monotonic() + 30
        while not store.sessions():
            assert time.monotonic() < end, "it never rested"
            time.sleep(0.005)
        _, stats = ask(engine, [3] * 600)
        assert stats.cached_tokens == 599
