"""Trace files: what is appended comes back, and nothing else does."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from mimo_local.errors import DiskSpaceError, TraceError, UsageError
from mimo_local.routing_trace import Facts, RoutingTrace, Text, TraceWriter


def facts(**more: Any) -> Facts:
    return Facts(
        **{"model": "m", "layers": (1, 2, 4), "n_experts": 16, "k": 2, "expert_nbytes": 100} | more
    )


def some(n: int, of: Facts, seed: int = 0) -> tuple[np.ndarray, np.ndarray | None]:
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, of.n_experts, (n, len(of.layers), of.k))
    if not of.n_guesses:
        return ids, None
    return ids, rng.integers(0, of.n_experts, (n, len(of.layers) - 1, of.n_guesses))


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    n_experts=st.sampled_from([4, 256, 257, 4000]),
    n_guesses=st.integers(0, 3),
    chunks=st.lists(st.tuples(st.booleans(), st.integers(0, 5), st.booleans()), min_size=1),
)
def test_what_was_appended_comes_back(
    tmp_path: Path, n_experts: int, n_guesses: int, chunks: list[tuple[bool, int, bool]]
) -> None:
    of, path = facts(n_experts=n_experts, n_guesses=n_guesses), tmp_path / "t"
    path.unlink(missing_ok=True)
    kept, answers = [], []
    with TraceWriter(path, of) as out:
        out.begin("text 0")
        for i, (new, n, answer) in enumerate(chunks):
            if new:
                out.begin(f"text {i}")
            # Within a sequence answers follow the prompt.
            answer = answer or bool(not new and answers and out._texts[-1].answer)
            rows = some(n, of, i)
            out.append(*rows, answer=answer)
            kept.append(rows)
            answers += [answer] * n
    assert out.tokens == len(answers)
    if not answers:
        assert list(tmp_path.iterdir()) == []
        return
    found = RoutingTrace.read(path)
    assert found.facts == of and found.tokens == len(answers)
    assert found.ids.dtype == (np.uint8 if n_experts <= 256 else np.int16)
    np.testing.assert_array_equal(found.ids, np.concatenate([ids for ids, _ in kept]))
    if n_guesses:
        assert found.guesses is not None
        np.testing.assert_array_equal(found.guesses, np.concatenate([g for _, g in kept]))
    else:
        assert found.guesses is None
    assert found.is_answer.tolist() == answers
    assert all(text.tokens for text in found.texts)


def test_a_trace_writes_itself_and_gives_its_answers(tmp_path: Path) -> None:
    of = facts(n_guesses=1, config="c")
    ids, guesses = some(9, of)
    dtype = of.dtype
    texts = (Text("a", 3, 2), Text("b", 1), Text("c", 0, 3))
    assert guesses is not None
    trace = RoutingTrace(of, texts, ids.astype(dtype), guesses.astype(dtype))
    trace.write(tmp_path / "t")
    again = RoutingTrace.read(tmp_path / "t")
    assert (again.facts, again.texts) == (of, texts)
    np.testing.assert_array_equal(again.ids, ids)
    mine = again.only_answers()
    assert mine.texts == (Text("a", 0, 2), Text("c", 0, 3)) and mine.guesses is not None
    np.testing.assert_array_equal(mine.ids, ids[[3, 4, 6, 7, 8]])
    np.testing.assert_array_equal(mine.guesses, guesses[[3, 4, 6, 7, 8]])
    with pytest.raises(UsageError, match="no answers"):
        RoutingTrace(of, (Text("b", 9),), ids, guesses).only_answers()


def test_an_error_leaves_no_file_and_an_old_one_alone(tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_text("old")
    with pytest.raises(KeyError), TraceWriter(path, facts()) as out:
        out.begin("x")
        out.append(*some(4, facts()), answer=False)
        raise KeyError
    assert [p.name for p in tmp_path.iterdir()] == ["t"]
    assert path.read_text() == "old"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_at_the_end_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(fd: int) -> None:
        raise OSError(number, "no")

    monkeypatch.setattr("os.fsync", fail)
    wanted = DiskSpaceError if number == errno.ENOSPC else UsageError
    with pytest.raises(wanted), TraceWriter(tmp_path / "t", facts()) as out:
        out.begin("x")
        out.append(*some(4, facts()), answer=False)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_refused_before_anything_is_traced(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no/t"):
        TraceWriter(tmp_path / "no" / "t", facts())


@pytest.mark.parametrize(
    ("ids", "guesses"),
    [
        (np.zeros((2, 3, 3), int), None),
        (np.zeros((2, 2, 2), int), None),
        (np.full((2, 3, 2), 16), None),
        (np.full((2, 3, 2), -1), None),
        (np.zeros((2, 3, 2), int), np.zeros((2, 2, 1), int)),
    ],
)
def test_what_does_not_fit_is_not_appended(
    tmp_path: Path, ids: np.ndarray, guesses: np.ndarray | None
) -> None:
    with TraceWriter(tmp_path / "t", facts()) as out:
        out.begin("x")
        with pytest.raises(ValueError, match=r"expected|outside"):
            out.append(ids, guesses, answer=False)
    assert not (tmp_path / "t").exists()


def written(path: Path) -> bytes:
    ids, _ = some(20, facts())
    RoutingTrace(facts(), (Text("a", 20),), ids, None).write(path)
    return path.read_bytes()


def test_no_damage_goes_unnoticed(tmp_path: Path) -> None:
    path = tmp_path / "t"
    whole = written(path)
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(TraceError):
            RoutingTrace.read(path)
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            found = RoutingTrace.read(path)
        except TraceError:
            continue
        # Blanks after the header may become something the format's reader does not mind.
        np.testing.assert_array_equal(found.ids, some(20, facts())[0])
        assert found.facts == facts()


def test_a_foreign_file_is_named_as_such(tmp_path: Path) -> None:
    path = tmp_path / "t"
    with pytest.raises(TraceError, match="cannot be read"):
        RoutingTrace.read(path)
    path.write_text("# notes")
    with pytest.raises(TraceError, match="cannot be read"):
        RoutingTrace.read(path)
    meta = {"format": "mimo-routing-1", "facts": {}, "texts": []}
    for mimo in ("[]", "{", "{}", json.dumps(meta), json.dumps(meta | {"format": "other"})):
        save_file({"ids": np.zeros(3)}, path, {"mimo": mimo})
        with pytest.raises(TraceError, match="not a routing trace"):
            RoutingTrace.read(path)
    save_file({"ids": np.zeros(3)}, path)
    with pytest.raises(TraceError, match="not a routing trace"):
        RoutingTrace.read(path)


def test_a_right_checksum_does_not_excuse_wrong_shapes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, module = tmp_path / "t", "mimo_local.routing_trace"
    written(path)
    monkeypatch.setattr(f"{module}._digest", lambda *_: "same")
    described = json.dumps(
        {
            "format": "mimo-routing-1",
            "facts": {**{f: getattr(facts(), f) for f in Facts.__slots__}},
            "texts": [{"source": "a", "prompt": 2, "answer": 0}],
        }
    )
    good = np.ones((2, 3, 2), np.uint8)
    for tensors in (
        {},
        {"ids": good[:1]},
        {"ids": good.astype(np.int16)},
        {"ids": good * 16},
        {"ids": good, "guesses": good},
    ):
        save_file(dict(tensors), path, {"mimo": described, "checksum": "same"})
        with pytest.raises(TraceError, match="description"):
            RoutingTrace.read(path)
    save_file({"ids": good}, path, {"mimo": described, "checksum": "same"})
    assert RoutingTrace.read(path).tokens == 2
