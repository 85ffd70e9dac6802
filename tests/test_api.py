"""`load` and what it gives: ids without a tokenizer, text and chat with one, errors with hints."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from fakes import FakeEngine
from test_tokenizer import DEFINITION, TEMPLATE, write

import mimo_local
from mimo_local.api import LocalModel
from mimo_local.chat import Message
from mimo_local.engine import Stream
from mimo_local.errors import ContextOverflowError, MimoError, UsageError
from mimo_local.events import Done
from mimo_local.sampler import SamplingParams

torch.set_num_threads(1)  # tiny products: a second thread only waits
IDS = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("api") / "ids-only", tiny.config())


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with tokenizer files: random weights, so its answers are noise."""
    vocab = 32 * (len(DEFINITION["model"]["vocab"]) // 32 + 2)
    folder = tiny.write(tmp_path_factory.mktemp("api") / "talks", tiny.config(vocab=vocab))
    return write(folder, chat_template=TEMPLATE)


@pytest.fixture
def model(checkpoint: Path) -> Iterator[LocalModel]:
    with mimo_local.load(checkpoint) as model:
        yield model


# ---- ids -----------------------------------------------------------------------------------------


def test_logits_equal_transformers(model: LocalModel) -> None:
    d = tiny.config()
    with torch.no_grad():
        want = tiny.oracle(d, tiny.state_dict(d))(torch.tensor([IDS * 4])).logits[0]
    got = model.logits(IDS * 4)
    assert (got.shape, got.dtype) == (want.shape, torch.float32)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert model.config.vocab_size == got.shape[1]


def test_ids_in_ids_out(model: LocalModel) -> None:
    out = list(model.generate(IDS, max_tokens=5, temperature=0))
    context = list(IDS)
    for token in out:
        assert token == int(model.logits(context)[-1].argmax())
        context.append(token)
    assert len(out) == 5
    assert out == list(model.generate(tuple(IDS), max_tokens=5, temperature=0))


def test_a_seed_repeats_an_answer(model: LocalModel) -> None:
    def once(**kwargs: Any) -> list[int]:
        return list(model.generate(IDS, max_tokens=30, **kwargs))

    assert once(seed=5) == once(seed=5)
    assert once() != once()


def test_leaving_or_dropping_a_stream_stops_the_model(
    model: LocalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams: list[Stream] = []
    submit = model.engine.submit

    def recorded(*args: Any, **kwargs: Any) -> Stream:
        streams.append(submit(*args, **kwargs))
        return streams[-1]

    monkeypatch.setattr(model.engine, "submit", recorded)
    for _ in model.generate(IDS, max_tokens=4000):
        break
    model.generate(IDS, max_tokens=4000)  # never even begun
    model.logits(IDS)  # waits for its turn
    for stream in streams:
        end = list(stream)[-1]
        assert isinstance(end, Done)
        assert end.reason == "cancelled"


def test_without_a_tokenizer_text_is_refused_at_once(model: LocalModel) -> None:
    assert model.tokenizer is None
    with pytest.raises(UsageError, match="tokenizer"):
        model.generate("hello")
    with pytest.raises(UsageError, match="tokenizer"):
        model.chat("hello")


def test_bad_calls_are_errors_of_the_call(model: LocalModel) -> None:
    with pytest.raises(UsageError, match="empty"):
        model.generate([])
    with pytest.raises(ContextOverflowError, match="5000"):
        model.generate([1] * 5000)
    with pytest.raises(UsageError, match="temprature"):
        model.generate(IDS, temprature=1)
    with pytest.raises(UsageError, match="top_p"):
        model.generate(IDS, top_p=2)
    with pytest.raises(UsageError, match="outside"):
        model.logits([10_000])


# ---- text ----------------------------------------------------------------------------------------


def test_text_in_text_out(talking: Path) -> None:
    with mimo_local.load(talking) as model:
        assert model.tokenizer is not None
        kwargs: dict[str, Any] = {"max_tokens": 40, "seed": 3, "temperature": 3.0}
        text = "".join(model.generate("The lamp", **kwargs))
        ids = list(model.generate(model.tokenizer.encode("The lamp"), **kwargs))
        assert text == model.tokenizer.decode(ids)
        assert text
        stop = text[len(text) // 2]
        cut = "".join(model.generate("The lamp", stop=[stop], **kwargs))
        assert cut == text[: text.index(stop)]


def test_chat_streams_and_reuses_the_conversation(talking: Path) -> None:
    with mimo_local.load(talking, kv_dtype="bf16", context=500) as model:
        assert model.engine.context_limit == 500
        first = "".join(model.chat("Hello", max_tokens=20, seed=1))
        turns: list[dict[str, str]] = [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": first},
            {"role": "user", "content": "Again"},
        ]
        second = "".join(model.chat(turns, max_tokens=20, seed=2))
        (session,) = model.engine._scheduler.sessions._idle
        assert session.common_prefix(model.tokenizer.render_chat(turns)) > 30  # type: ignore[union-attr]
        with mimo_local.load(talking, kv_dtype="bf16") as fresh:
            assert second == "".join(fresh.chat(turns, max_tokens=20, seed=2))


def test_chat_on_a_fake_engine() -> None:
    engine: Any = FakeEngine(["<think>hm</think>", "so ", "be it"], ["fine"], ["x"])
    model = LocalModel(engine)
    assert list(model.chat("why?", thinking=True, preset="math", seed=4)) == ["so ", "be it"]
    params = engine.requests[0].params
    assert params == SamplingParams(0.4, 0.8, 0, 0.0, 1.05, 4, 512)
    messages = [Message("system", "Be brief."), {"role": "user", "content": "a"}]
    assert list(model.chat(messages)) == ["fine"]
    assert engine.requests[1].prompt.startswith("<system>Be brief.\n<user>a\n")
    list(model.chat("a", system="Shout."))
    assert engine.requests[2].prompt.startswith("<system>Shout.\n")
    model.close()
    assert engine.closed


def test_errors_on_the_way_are_raised() -> None:
    engine: Any = FakeEngine()
    engine.queue("half", error=MimoError("broken", hint="mend it"))
    engine.queue("half", error=MimoError("broken", hint="mend it"))
    model = LocalModel(engine)
    for stream in (model.chat("a"), model.generate("a")):
        got = []
        with pytest.raises(MimoError, match="broken"):
            for text in stream:
                got.append(text)
        assert got == ["half"]


@pytest.mark.parametrize(
    "bad",
    [
        [],
        [{"role": "assistant", "content": "x"}],
        [{"role": "robot", "content": "x"}],
        [{"role": "user", "content": None}],
        [{"content": "x"}],
    ],
)
def test_bad_conversations_are_usage_errors(bad: Any) -> None:
    engine: Any = FakeEngine()
    with pytest.raises(UsageError):
        LocalModel(engine).chat(bad)


# ---- load ----------------------------------------------------------------------------------------


def test_load_finds_named_and_first_packs_or_says_there_is_none(
    user_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="no pack"):
        mimo_local.load()
    packs = user_home / "data" / "packs"
    for name in ("b", "a"):
        (packs / name).mkdir(parents=True)
        (packs / name / "pack.json").write_text(json.dumps({}))
    asked: list[Any] = []
    monkeypatch.setattr("mimo_local.engine.Engine.load", lambda s: asked.append(s) or FakeEngine())
    mimo_local.load(threads=1)
    mimo_local.load("b")
    assert [s.model for s in asked] == [packs / "a", packs / "b"]
    assert asked[0].threads == 1


def test_load_errors_have_hints(tmp_path: Path) -> None:
    for call in (lambda: mimo_local.load(tmp_path / "no"), lambda: mimo_local.load(tmp_path)):
        with pytest.raises(MimoError) as caught:
            call()
        assert caught.value.hint


def test_the_package_is_lazy_and_says_what_it_has() -> None:
    code = (
        "import sys, mimo_local; mimo_local.__version__; print('mimo_local.api' in sys.modules);"
        "mimo_local.load; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = mimo_local.nothing_here
