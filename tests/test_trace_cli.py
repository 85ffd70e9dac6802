"""`mimo trace` and `mimo replay`: texts in, a file out; a file in, tables out."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from fakes import FakeTokenizer

from mimo_local import cli
from mimo_local.cli import models
from mimo_local.cli import trace as module
from mimo_local.errors import ExitCode
from mimo_local.experts.store import ExpertStore
from mimo_local.loading import Loaded
from mimo_local.model import Model
from mimo_local.routing_trace import Facts, RoutingTrace, Text
from mimo_local.settings import Settings
from mimo_local.weights import open_weights

Golden = Callable[[str, str], None]


class SmallTokenizer(FakeTokenizer):
    stop_ids = ()

    def encode(self, text: str) -> list[int]:
        return [ord(c) % 64 for c in text]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = tiny.write(tmp_path_factory.mktemp("cli") / "m", tiny.config("fsf", "dmm"))
    weights = open_weights(folder)
    model = Model(weights, ExpertStore(weights))
    return Loaded(
        model, "tiny", "a tiny model", 200, SmallTokenizer(), model.new_cache, "none",  # type: ignore[arg-type]
        None, None, None, 1 << 20,
    )  # fmt: skip


@pytest.fixture
def traced(loaded: Loaded, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(module, "load", lambda settings: (loaded, 4096))
    return tmp_path / "t"


def test_texts_and_files_are_traced_one_after_the_other(
    traced: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("some notes")
    args = ["trace", "hello there", str(tmp_path / "notes.txt"), "--guesses", "-o", str(traced)]
    assert cli.main(args) == 0
    out, err = capsys.readouterr()
    assert out == f"{traced}\n" and "tokens traced" in err
    found = RoutingTrace.read(traced)
    assert [text.source for text in found.texts] == ["argument", str(tmp_path / "notes.txt")]
    assert found.texts[0] == Text("argument", 11)
    assert found.guesses is not None
    assert (found.facts.model, found.facts.expert_nbytes) == ("tiny", 4096)


def test_an_answer_is_traced_too(traced: Path) -> None:
    args = ["trace", "hello", "--generate", "5", "--seed", "3", "-o", str(traced)]
    assert cli.main(args) == 0
    found = RoutingTrace.read(traced)
    assert found.texts[0].answer == 4, "the fifth was never forwarded"
    assert found.texts[0].prompt > 5, "as the template has it"


def test_ctrl_c_keeps_what_was_traced(
    traced: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mimo_local.tracing import Tracer

    plain, calls = Tracer._forward, []

    def slow(self: Tracer, *args: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return plain(self, *args, **more)

    monkeypatch.setattr(Tracer, "_forward", slow)
    args = ["trace", "hello", "again", "--generate", "50", "--seed", "3", "-o", str(traced)]
    assert cli.main(args) == ExitCode.INTERRUPTED
    assert "traced" in capsys.readouterr().err
    (only,) = RoutingTrace.read(traced).texts
    assert only.answer == 2


def test_a_stop_before_the_first_token_writes_nothing(
    traced: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_record", lambda *_: signal.raise_signal(signal.SIGINT))
    assert cli.main(["trace", "hello", "-o", str(traced)]) == ExitCode.INTERRUPTED
    assert not traced.exists()


def test_what_looks_like_a_file_must_be_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "load", lambda settings: pytest.fail("loaded a model"))
    for name in ("notes.md", "texts/a"):
        assert cli.main(["trace", name, "-o", "t"]) == ExitCode.USAGE
        assert f"no file `{name}`" in capsys.readouterr().err


def test_a_model_without_a_tokenizer_cannot_read_texts(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from dataclasses import replace

    from mimo_local import loading
    from mimo_local.errors import UsageError

    folder = tiny.write(tmp_path / "m", tiny.config("fsf", "dmm"))
    settings = Settings.resolve(model=folder)
    monkeypatch.setattr(models, "choose", lambda settings: settings)
    monkeypatch.setattr(loading, "load", lambda *_: loaded)
    assert module.load(settings)[1] > 0, "priced from the folder"
    monkeypatch.setattr(loading, "load", lambda *_: replace(loaded, tokenizer=None))
    with pytest.raises(UsageError, match="no tokenizer"):
        module.load(settings)


# -- replay ----------------------------------------------------------------------------------------


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Drawn by Python's own generator: numpy may change its streams, and the golden with them."""
    rng, ids = random.Random(0), []
    for _ in range(120):
        ids.append([sorted(range(32), key=lambda e: e * rng.random())[:4] for _ in range(3)])
    facts = Facts("drawn", (1, 2, 4), n_experts=32, k=4, expert_nbytes=10_000_000, n_guesses=4)
    chosen = np.array(ids, np.uint8)
    guesses = np.where(chosen[:, 1:] % 3, chosen[:, 1:], 31).astype(np.uint8)
    monkeypatch.chdir(tmp_path)
    texts = (Text("a", 20, 60), Text("b", 0, 40))
    RoutingTrace(facts, texts, chosen, guesses).write(Path("some.trace"))
    return Path("some.trace")


def test_replay_prints_tables(
    recorded: Path, golden: Golden, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["replay", str(recorded), "--prefetch", "2", "--rows", "1,4"]
    assert cli.main([*args, "--policies", "lru,layer-lfru-8,belady"]) == 0
    out, err = capsys.readouterr()
    golden("replay.txt", out)
    assert err == ""


def test_replay_prints_json(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["replay", str(recorded), "--shares", "10,50", "--policies", "lru", "--answers"]
    assert cli.main([*args, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["tokens"] == found["answer_tokens"] == 100 and found["rows"] == 1
    assert [r["share"] for r in found["results"]] == [0.1, 0.5]
    assert all(0 <= r["steady_rate"] <= 1 for r in found["results"])


def test_many_shares_become_several_tables(
    recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shares = ",".join(str(n) for n in range(10, 100, 10))
    assert cli.main(["replay", str(recorded), "--policies", "lru", "--shares", shares]) == 0
    out = capsys.readouterr().out
    assert "90%" in out and "…" not in out


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["none.trace"], 1, "none.trace"),
        (["some.trace", "--policies", "fifo"], 2, "policies: lru"),
        (["some.trace", "--rows", "0"], 2, "--rows"),
        (["some.trace", "--shares", "200"], 2, "share"),
        (["some.trace", "--shares", "few"], 2, "few"),
    ],
)
def test_what_cannot_be_replayed_says_why(
    recorded: Path, args: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["replay", *args]) == code
    out, err = capsys.readouterr()
    assert said in err and "hint: " in err
    assert out == ""
