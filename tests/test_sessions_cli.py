"""mimo sessions: what is listed, what is removed, what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mimo_local import doctor
from mimo_local.cli import main
from mimo_local.session_manifest import Piece, Saved
from mimo_local.session_store import FOLDER, SessionStore


@pytest.fixture
def store(user_home: Path) -> SessionStore:
    return SessionStore(user_home / "cache" / FOLDER)


def put(store: SessionStore, ident: str, title: str = "", *, age_s: float = 0.0) -> Saved:
    """A session of 300 ids and two files of made-up rows."""
    store.prepare()
    names = []
    for suffix in (".rows", ".point"):
        with store.new_file(suffix) as (fd, name):
            os.write(fd, b"x" * 5000)
        names.append(name)
    rows, point = (Piece(name, 0, 300, 5000, (1,)) for name in names)
    saved = store.commit(Saved(ident, "mimo-pack", "f", [1] * 300, title, (rows,), (point,)))
    if age_s:
        when = time.time() - age_s
        os.utime(store.folder / f"{ident}.session", (when, when))
    return saved


def test_the_list_shows_the_newest_first(
    store: SessionStore, capsys: pytest.CaptureFixture[str]
) -> None:
    put(store, "aaaa1111", "Why is the sky blue?", age_s=7200)
    put(store, "bbbb2222", "把这份合同翻译成英文", age_s=30)
    assert main(["sessions"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["bbbb2222", "aaaa1111"]
    assert "300" in lines[1] and "mimo-pack" in lines[1] and "把这份合同翻译成英文" in lines[1]
    assert "2.0 h ago" not in lines[1] and "120 min ago" not in lines[1]
    assert "of at most" in lines[-1] and str(store.folder) in lines[-1]


def test_the_list_as_json(store: SessionStore, capsys: pytest.CaptureFixture[str]) -> None:
    put(store, "aaaa1111", "Why?")
    assert main(["sessions", "list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bytes"] == store.nbytes and found["limit"] == store.limit
    (one,) = found["sessions"]
    assert (one["id"], one["tokens"], one["bytes"], one["title"]) == (
        "aaaa1111",
        300,
        10_000,
        "Why?",
    )


def test_nothing_there_is_said(store: SessionStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sessions"]) == 0
    assert capsys.readouterr().out.startswith("no chat rests on disk")
    assert not store.folder.exists(), "looking makes nothing"
    assert main(["sessions", "rm", "--all"]) == 0


def test_one_and_all_are_removed(store: SessionStore, capsys: pytest.CaptureFixture[str]) -> None:
    for ident in ("aaaa1111", "bbbb2222", "cccc3333"):
        put(store, ident)
    assert main(["sessions", "rm", "bbbb2222"]) == 0
    assert {s.id for s in store.sessions()} == {"aaaa1111", "cccc3333"}
    assert len(list(store.folder.glob("*.rows"))) == 2
    (store.folder / "aaaa1111.session").write_text("of another version, or damaged")
    assert main(["sessions", "rm", "--all"]) == 0
    assert store.nbytes == 0 and "freed" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words", [["rm"], ["rm", "--all", "aaaa1111"], ["rm", "nobody"], ["rm", "../../etc"]]
)
def test_what_makes_no_sense_is_refused_and_removes_nothing(
    store: SessionStore, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    put(store, "aaaa1111")
    assert main(["sessions", *words]) == 2
    assert "hint:" in capsys.readouterr().err
    assert len(store.sessions()) == 1


def test_others_are_counted_and_not_read(
    store: SessionStore, capsys: pytest.CaptureFixture[str]
) -> None:
    put(store, "aaaa1111")
    (store.folder / "dddd4444.session").write_bytes(b"mimo-session 00000000\n{}")
    assert main(["sessions"]) == 0
    shown = capsys.readouterr()
    assert "1 more" in shown.err and "dddd4444" not in shown.out


def test_doctor_tells_how_much(store: SessionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    put(store, "aaaa1111")
    monkeypatch.setenv("MIMO_SESSIONS_SIZE", "20GB")
    lines = dict(dict(doctor.examine(seconds=0).sections)["storage"])
    assert lines["sessions"].startswith("1 saved") and lines["sessions"].endswith("20.0 GB")


def test_listing_loads_no_torch(store: SessionStore) -> None:
    put(store, "aaaa1111")
    code = (
        "import sys; from mimo_local.cli import main; main(['sessions'])\n"
        "print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout.splitlines()[-1] == "False False", done.stderr
