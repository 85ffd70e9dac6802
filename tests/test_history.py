"""Saved chats: the tree, the search, several programs at once, damaged files, imports."""

from __future__ import annotations

import copy
import json
import os
import re
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mimo_local.chat import Attachment, Message, ToolCall
from mimo_local.errors import HistoryError
from mimo_local.events import Stats
from mimo_local.history import History, Hit, schema, words

ROOT = Path(__file__).parent.parent
V1 = Path(__file__).parent / "golden" / "history" / "v1.sql"


def user(text: str, **more: Any) -> Message:
    return Message("user", text, **more)


def answer(text: str, **more: Any) -> Message:
    return Message("assistant", text, **more)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "history.db"


@pytest.fixture
def history(path: Path) -> Iterator[History]:
    with History.open(path) as opened:
        yield opened
        consistent(opened)


def consistent(history: History) -> None:
    """The index says exactly what the tables hold, and every reference leads somewhere."""
    db = history._db
    db.execute("INSERT INTO search(search, rank) VALUES ('integrity-check', 1)")
    assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert db.execute("PRAGMA foreign_key_check").fetchall() == []


def texts(history: History, chat: int) -> list[str]:
    return [stored.message.content for stored in history.messages(chat)]


def found(hits: list[Hit]) -> list[int | None]:
    return [hit.message_id for hit in hits]


# -- messages and branches -------------------------------------------------------------------------


def test_a_chat_comes_back_as_it_was(history: History, path: Path) -> None:
    question = user(
        "What is\x00 this? ", attachments=(Attachment("a.pdf", "text\n"), *[Attachment("b", "")])
    )
    call = ToolCall("c1", "look", '{"at": "sky"}')
    reply = answer("A cat 🐈", reasoning="hm", tool_calls=(call,))
    tool = Message("tool", "blue", tool_call_id="c1")
    chat = history.new_chat(system="be brief", preset="math", thinking=True, model="m")
    a = history.add(chat, question, parent=None)
    stats = Stats(prompt_tokens=7, completion_tokens=3, decode_s=0.5, prefill_s=0.25)
    b = history.add(chat, reply, parent=a, stats=stats, model="demo")
    history.add(chat, tool, parent=b)
    for opened in (history, History.open(path)):
        got = opened.messages(chat)
        assert [stored.message for stored in got] == [question, reply, tool]
        assert [stored.parent for stored in got] == [None, a, b]
        assert got[1].stats["completion_tokens"] == 3 and got[1].stats["decode_s"] == 0.5
        assert (got[0].stats, got[1].model) == ({}, "demo")
        assert abs(got[2].created - time.time()) < 60
        info = opened.chat(chat)
        assert (info.system, info.preset, info.thinking, info.model) == (
            "be brief",
            "math",
            True,
            "demo",
        )
        assert (info.n_messages, info.n_branches, info.title) == (3, 1, "What is this?")
    opened.close()


def test_regenerate_and_edit_are_siblings_and_a_branch_is_remembered(history: History) -> None:
    chat = history.new_chat()
    a = history.add(chat, user("a"), parent=None)
    b1 = history.add(chat, answer("b1"), parent=a)
    c1 = history.add(chat, user("c1"), parent=b1)
    d1 = history.add(chat, answer("d1"), parent=c1)
    d2 = history.add(chat, answer("d2"), parent=c1)  # regenerated
    c2 = history.add(chat, user("c2"), parent=b1)  # edited
    assert texts(history, chat) == ["a", "b1", "c2"]
    assert history.siblings(d2) == history.siblings(d1) == [d1, d2]
    assert history.siblings(c2) == [c1, c2]
    history.choose(c1)
    assert texts(history, chat) == ["a", "b1", "c1", "d2"], "the last one used below it"
    history.choose(d1)
    history.choose(c2)
    assert texts(history, chat) == ["a", "b1", "c2"]
    history.choose(c1)
    assert texts(history, chat) == ["a", "b1", "c1", "d1"], "chosen counts as used"
    assert history.chat(chat).n_branches == 3
    assert history.chat(chat).n_messages == 6


def test_an_edit_of_the_first_message_is_another_root(history: History) -> None:
    chat, other = history.new_chat(), history.new_chat()
    a = history.add(chat, user("a"), parent=None)
    history.add(other, user("not mine"), parent=None)
    b = history.add(chat, user("b"), parent=None)
    assert history.siblings(a) == [a, b]
    assert texts(history, chat) == ["b"]
    history.choose(a)
    assert texts(history, chat) == ["a"]
    assert history.chat(chat).n_branches == 2


def test_an_answer_is_saved_while_it_streams(history: History) -> None:
    chat = history.new_chat()
    a = history.add(chat, user("q"), parent=None)
    b = history.add(chat, answer(""), parent=a, model="m")
    for text in ("half", "half an", "half an answer"):
        history.update(b, answer(text, reasoning="think"))
        assert texts(history, chat) == ["q", text]
    history.update(b, answer("half an answer"), Stats(completion_tokens=3))
    history.update(b, answer("whole answer"))
    (_, stored) = history.messages(chat)
    assert (stored.stats["completion_tokens"], stored.model) == (3, "m")
    assert found(history.search("whole")) == [b] and history.search("half") == []


def test_newest_activity_comes_first_and_pages_follow(
    history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(1000, 2000))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    ids = [history.new_chat(title=f"t{i}") for i in range(5)]
    assert history.last() is not None
    a = history.add(ids[1], user("x"), parent=None)
    assert [info.id for info in history.chats()] == [ids[1], *reversed(ids[2:]), ids[0]]
    history.add(ids[3], user("y"), parent=None)
    history.update(a, user("z"))
    assert [info.id for info in history.chats(2)] == [ids[1], ids[3]]
    assert [info.id for info in history.chats(2, 2)] == [ids[4], ids[2]]
    last = history.last()
    assert last is not None and last.id == ids[1]


def test_an_empty_history_has_no_last_chat(history: History) -> None:
    assert history.last() is None and history.chats() == [] and history.search("x") == []


@pytest.mark.parametrize(
    ("text", "title"),
    [
        ("hello", "hello"),
        ("\n\n  # Heading\x1b[2J of  it\nmore", "Heading [2J of it"),
        ("word " * 30, "word " * 11 + "word…"),
        ("x" * 200, "x" * 59 + "…"),
        ("合" * 70, "合" * 59 + "…"),
        ("", "plan.pdf"),
        ("\u202eevil\u2028next", "evil"),
    ],
)
def test_the_first_question_is_the_title(history: History, text: str, title: str) -> None:
    chat = history.new_chat()
    files = () if text else (Attachment("plan.pdf", "..."),)
    a = history.add(chat, answer("not this"), parent=None)
    history.add(chat, user(text, attachments=files), parent=a)
    assert history.chat(chat).title == title.strip()
    history.add(chat, user("nor this"), parent=a)
    assert history.chat(chat).title == title.strip()


def test_a_name_given_by_hand_stays(history: History) -> None:
    chat = history.new_chat(title="mine")
    history.add(chat, user("question"), parent=None)
    assert history.chat(chat).title == "mine"
    history.rename(chat, " new\x1b name\n")
    assert history.chat(chat).title == "new name"
    assert found(history.search("mine")) == [] and found(history.search("name")) == [None]
    with pytest.raises(HistoryError, match="empty"):
        history.rename(chat, " \n")


def test_options_change_one_by_one(history: History) -> None:
    chat = history.new_chat(system="s")
    history.set_options(chat, preset="code")
    history.set_options(chat, thinking=True)
    info = history.chat(chat)
    assert (info.system, info.preset, info.thinking) == ("s", "code", True)
    history.set_options(chat, system="", thinking=False)
    info = history.chat(chat)
    assert (info.system, info.preset, info.thinking) == ("", "code", False)


def test_what_is_not_there_is_said(history: History) -> None:
    chat, other = history.new_chat(), history.new_chat()
    a = history.add(chat, user("a"), parent=None)
    calls = [
        lambda: history.add(99, user("x"), parent=None),
        lambda: history.add(other, user("x"), parent=a),
        lambda: history.add(chat, user("x"), parent=99),
        lambda: history.update(99, user("x")),
        lambda: history.choose(99),
        lambda: history.siblings(99),
        lambda: history.rename(99, "x"),
        lambda: history.set_options(99, preset="code"),
        lambda: history.remove(99),
        lambda: history.chat(99),
        lambda: history.messages(99),
        lambda: history.export_markdown(99),
        lambda: history.export_json(99),
        lambda: history.chat(1 << 80),
    ]
    for call in calls:
        with pytest.raises(HistoryError) as caught:
            call()
        assert caught.value.hint
    assert texts(history, chat) == ["a"] and texts(history, other) == []


def test_a_removed_chat_is_gone_from_the_file(history: History, path: Path) -> None:
    keep, gone = history.new_chat(), history.new_chat(title="xylophone")
    history.add(keep, user("zebra"), parent=None)
    parent = None
    for i in range(1500):  # deeper than sqlite cascades
        parent = history.add(gone, user(f"quetzal {i}"), parent=parent)
    history.remove(gone)
    assert [info.id for info in history.chats()] == [keep]
    assert history.search("quetzal") == [] and history.search("xylophone") == []
    raw = b"".join(file.read_bytes() for file in path.parent.iterdir())
    assert b"zebra" in raw and b"quetzal" not in raw and b"xylophone" not in raw
    assert history.new_chat() > gone, "a number is not given twice"


# -- search ----------------------------------------------------------------------------------------


@pytest.fixture
def library(history: History) -> History:
    lines = {
        "Contract review": [
            "Please check clause 4.2 (payment terms).",
            "请审查这份合同的付款条款。",
        ],
        "Zürich café": ["The naïve approach fails in C++ and f(x) -> y", "concatenate two cats"],
        "payment": ["unrelated words", "ภาษาไทย 日本語のテスト 한국어시험"],
    }
    for title, contents in lines.items():
        chat, parent = history.new_chat(title=title), None
        for content in contents:
            parent = history.add(chat, user(content), parent=parent)
    return history


@pytest.mark.parametrize(
    ("query", "snippet"),
    [
        ("合同", "请审查这份\x02合同\x03的付款条款。"),
        ("同", "请审查这份合\x02同\x03的付款条款。"),
        ("合同 付款", "请审查这份\x02合同\x03的\x02付款\x03条款。"),
        ("clause PAY", "Please check \x02clause\x03 4.2 (\x02payment\x03 terms)."),
        ("cat", "concatenate two \x02cats\x03"),
        ("naive", "The \x02naïve\x03 approach fails in C++ and f(x) -> y"),
        ("->", "The naïve approach fails in C++ and f(x) \x02->\x03 y"),
        ("f(x)", "The naïve approach fails in C++ and \x02f(x\x03) -> y"),
        ("C++ ->", "The naïve approach fails in \x02C\x03++ and f(x) -> y"),
        ("concatenate ", "\x02concatenate\x03 two cats"),
        ("nai\u0308ve", "The \x02naïve\x03 approach fails in C++ and f(x) -> y"),
        ("zurich", "\x02Zürich\x03 café"),
        ("CAFE", "Zürich \x02café\x03"),
        ("日本語", "ภาษาไทย \x02日本語\x03のテスト 한국어시험"),
        ("ไทย", "ภาษา\x02ไทย\x03 日本語のテスト 한국어시험"),
        ("국어", "ภาษาไทย 日本語のテスト 한\x02국어\x03시험"),
    ],
)
def test_words_are_found_and_marked(library: History, query: str, snippet: str) -> None:
    assert [hit.snippet for hit in library.search(query)] == [snippet]


@pytest.mark.parametrize(
    "query", ["", "  ", "同合", "clau payment", "dog", "cats dog", "x(f", "conc ", "\x00", "\ud800"]
)
def test_what_is_not_there_is_not_found(library: History, query: str) -> None:
    assert library.search(query) == []


def test_a_title_counts_more_than_a_message(library: History) -> None:
    hits = library.search("payment")
    assert [(hit.chat.title, hit.message_id is None) for hit in hits] == [
        ("payment", True),
        ("Contract review", False),
    ]
    assert len(library.search("payment", limit=1)) == 1


@pytest.mark.parametrize(
    "query",
    [
        *(
            '"',
            'a"b OR c',
            "NEAR(a b)",
            "title:payment",
            "-payment",
            "pay*",
            "(",
            "AND",
            "^a",
            "{a",
        ),
        *("'; DROP TABLE chats; --", "%_", "*" * 100, "a " * 500, "\u0301", "付" * 500),
    ],
)
def test_nothing_a_person_types_is_syntax(library: History, query: str) -> None:
    library.search(query)
    assert len(library.search("payment")) == 2


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.text(max_size=40), st.text(max_size=60))
def test_any_text_is_stored_and_any_part_of_it_searched(
    history: History, query: str, text: str
) -> None:
    chat = history.new_chat()
    message = history.add(chat, user(text), parent=None)
    assert texts(history, chat) == [text.encode("utf-8", "replace").decode()]
    history.search(query)
    chunks = words.chunks(text)
    if chunks and text.isascii():
        assert message in found(history.search(chunks[-1], limit=10**6))


def test_text_with_its_accents_apart_is_found_and_marked(history: History) -> None:
    chat = history.new_chat(title="x")
    history.add(chat, user("two cafe\u0301s हिन्दी भाषा"), parent=None)
    assert [hit.snippet for hit in history.search("cafes")] == ["two \x02cafés\x03 हिन्दी भाषा"]
    assert [hit.snippet for hit in history.search("caf\u00e9")] == ["two \x02cafés\x03 हिन्दी भाषा"]
    assert len(history.search("हिन्दी")) == 1 and not history.search("भिन्दी")


def test_names_of_documents_are_found_and_their_text_is_not(history: History) -> None:
    chat = history.new_chat()
    files = (Attachment("offer_2026.pdf", "ocelot"),)
    message = history.add(chat, user("compare", attachments=files), parent=None)
    assert found(history.search("offer")) == [message]
    assert history.search("ocelot") == []


def test_a_snippet_is_one_safe_line_around_the_match() -> None:
    text = "start " + "é " * 5000 + "\x1b[31m needle\x02 \x07here\nand\t there " + "z " * 500
    shown = words.snippet(text, words.pattern("needle there"))
    assert "\x02needle\x03 here and \x02there\x03" in shown
    assert shown.startswith("…") and shown.endswith("…") and len(shown) <= words.SNIPPET + 6
    assert not set(shown.replace("\x02", "").replace("\x03", "")) & {chr(c) for c in range(32)}


# -- the file --------------------------------------------------------------------------------------


def test_only_the_owner_may_read_it(history: History, path: Path) -> None:
    history.add(history.new_chat(), user("private"), parent=None)
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert {
        file.name: file.stat().st_mode & 0o777 for file in path.parent.iterdir()
    } == dict.fromkeys(("history.db", "history.db-wal", "history.db-shm"), 0o600)


def test_a_file_of_version_1_is_still_read(path: Path) -> None:
    """v1.sql was written by the first release; it must never be changed."""
    path.parent.mkdir()
    db = sqlite3.connect(path)
    db.create_function("spaced", 1, words.spaced, deterministic=True)
    db.executescript(V1.read_text(encoding="utf-8"))
    db.close()
    with History.open(path) as history:
        consistent(history)
        (info,) = history.chats()
        assert (info.title, info.n_messages, info.n_branches) == ("请审查合同", 3, 2)
        assert texts(history, info.id) == ["请审查合同", "Gladly: §4"]
        assert len(history.search("合同")) == 2
        assert history._db.execute("PRAGMA user_version").fetchone() == (len(schema.MIGRATIONS),)


def test_an_older_file_is_brought_up_to_date_once(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with History.open(path) as history:
        history.add(history.new_chat(), user("kept"), parent=None)
    step = (
        "ALTER TABLE chats ADD COLUMN colour TEXT NOT NULL DEFAULT 'red';\n"
        "UPDATE chats SET colour = 'blue';"
    )
    monkeypatch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, step))
    for _ in range(2):
        with History.open(path) as history:
            assert texts(history, 1) == ["kept"]
            assert history._db.execute("SELECT colour FROM chats").fetchall() == [("blue",)]
            assert history._db.execute("PRAGMA user_version").fetchone() == (2,)


def test_a_migration_that_fails_changes_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with History.open(path) as history:
        history.add(history.new_chat(), user("kept"), parent=None)
    with monkeypatch.context() as patched:
        bad = "CREATE TABLE half (x);\nINSERT INTO nowhere VALUES (1);"
        patched.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, bad))
        with pytest.raises(HistoryError, match="nowhere"):
            History.open(path)
    with History.open(path) as history:
        assert texts(history, 1) == ["kept"]
        names = [name for (name,) in history._db.execute("SELECT name FROM sqlite_master")]
        assert "half" not in names


def test_a_newer_file_is_refused_and_not_touched(path: Path) -> None:
    History.open(path).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    before = path.read_bytes()
    with pytest.raises(HistoryError, match=r"newer release.*99") as caught:
        History.open(path)
    assert "update mimo-local" in caught.value.hint
    assert path.read_bytes() == before


def test_a_database_of_something_else_is_left_alone(path: Path) -> None:
    path.parent.mkdir()
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE recipes (name)")
    db.close()
    with pytest.raises(HistoryError, match="something else") as caught:
        History.open(path)
    assert f"mv {path}" in caught.value.hint
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT count(*) FROM sqlite_master").fetchone() == (1,)
    db.close()


@pytest.mark.parametrize("damage", ["text", "head", "middle", "folder", "short"])
def test_a_damaged_file_is_a_clear_error(path: Path, damage: str) -> None:
    with History.open(path) as history:
        chat = history.new_chat()
        for i in range(300):
            history.add(chat, user(f"message {i} " * 20), parent=None)
    data = bytearray(path.read_bytes())
    match damage:
        case "text":
            data = bytearray(b"this is no database, " * 1000)
        case "head":
            data[16:100] = b"\xff" * 84
        case "middle":
            data[4096:] = os.urandom(len(data) - 4096)
        case "short":
            del data[5000:]
        case "folder":
            path.unlink()
            path.mkdir()
    if damage != "folder":
        path.write_bytes(data)
    with pytest.raises(HistoryError) as caught:
        history = History.open(path)
        try:
            history.search("message")
            history.add(history.new_chat(), user("x"), parent=None)
            history.messages(chat)
        finally:
            history.close()
    assert str(path) in caught.value.message and caught.value.hint
    if damage != "folder":
        assert "damaged" in caught.value.message and f"mv {path}" in caught.value.hint


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HistoryError) as caught:
        History.open(tmp_path / "file" / "history.db")
    assert "MIMO_HOME" in caught.value.hint


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_a_clear_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(HistoryError) as caught:
            History.open(tmp_path / "history.db")
        assert "permissions" in caught.value.hint
    finally:
        tmp_path.chmod(0o700)


def test_a_folder_that_may_not_be_written_is_a_clear_error(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(schema.os, "open", refuse)
    with pytest.raises(HistoryError, match="Permission denied") as caught:
        History.open(path)
    assert "permissions" in caught.value.hint


def test_an_sqlite_too_old_is_a_clear_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 31, 1))
    with pytest.raises(HistoryError, match=r"need 3\.35"):
        History.open(path)
    assert not path.exists()


def test_a_read_only_database_is_a_clear_error(history: History) -> None:
    chat = history.new_chat()
    history._db.execute("PRAGMA query_only = ON")
    with pytest.raises(HistoryError) as caught:
        history.add(chat, user("x"), parent=None)
    assert "permissions" in caught.value.hint
    history._db.execute("PRAGMA query_only = OFF")
    assert texts(history, chat) == []


def test_a_full_disk_loses_only_what_was_not_written(history: History) -> None:
    chat = history.new_chat()
    a = history.add(chat, user("kept"), parent=None)
    (pages,) = history._db.execute("PRAGMA page_count").fetchone()
    history._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(HistoryError, match="disk is full") as caught:
        history.add(chat, answer("x" * 100_000), parent=a)
    assert "free some space" in caught.value.hint
    assert texts(history, chat) == ["kept"]
    history._db.execute("PRAGMA max_page_count = 1000000")
    history.add(chat, answer("now"), parent=a)
    assert texts(history, chat) == ["kept", "now"]


def test_another_program_that_holds_the_file_is_named_after_a_while(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "BUSY_S", 0.05)
    with History.open(path) as history:
        chat = history.new_chat()
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(HistoryError, match="in use") as caught:
            history.add(chat, user("x"), parent=None)
        assert "try again" in caught.value.hint
        assert texts(history, chat) == [], "reading goes on meanwhile"
        other.execute("ROLLBACK")
        other.close()
        history.add(chat, user("x"), parent=None)


def test_a_closed_history_says_so(path: Path) -> None:
    history = History.open(path)
    history.close()
    history.close()
    with pytest.raises(HistoryError, match="closed"):
        history.chats()


def test_an_interrupt_in_the_middle_leaves_nothing_half_done(history: History) -> None:
    chat = history.new_chat()
    with pytest.raises(KeyboardInterrupt), history._write() as db:
        db.execute("UPDATE chats SET title = 'half'")
        raise KeyboardInterrupt
    assert history.chat(chat).title == ""


# -- several at once -------------------------------------------------------------------------------

WRITER = """
import sys
from pathlib import Path
from mimo_local.chat import Message
from mimo_local.history import History
with History.open(Path(sys.argv[1])) as history:
    chat, parent = history.new_chat(title=sys.argv[2]), None
    for i in range(40):
        parent = history.add(chat, Message("user", f"{sys.argv[2]} {i}"), parent=parent)
        history.update(parent, Message("user", f"{sys.argv[2]} {i} done"))
"""


def test_several_programs_begin_and_write_one_file(path: Path) -> None:
    names = [f"writer{i}" for i in range(4)]
    running = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path), name], cwd=ROOT)
        for name in names
    ]
    assert [process.wait(60) for process in running] == [0] * 4
    with History.open(path) as history:
        chats = {info.title: info for info in history.chats()}
        assert set(chats) == set(names)
        for name, info in chats.items():
            assert texts(history, info.id) == [f"{name} {i} done" for i in range(40)]
        assert len(history.search("done", limit=1000)) == 160
        consistent(history)


def test_threads_share_one_history(history: History) -> None:
    chat = history.new_chat()
    errors: list[BaseException] = []

    def work(name: str) -> None:
        try:
            for i in range(30):
                history.add(chat, user(f"{name} {i}"), parent=None)
                history.search(name)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(f"t{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and history.chat(chat).n_messages == 120


def test_a_killed_program_loses_nothing_it_had_saved(path: Path) -> None:
    code = WRITER + "\n    import os; os.kill(os.getpid(), 9)"
    done = subprocess.run([sys.executable, "-c", code, str(path), "w"], cwd=ROOT, timeout=60)
    assert done.returncode == -9
    with History.open(path) as history:
        assert len(texts(history, 1)) == 40
        consistent(history)


# -- export and import -----------------------------------------------------------------------------


@pytest.fixture
def branched(history: History) -> int:
    """A chat with everything in it."""
    chat = history.new_chat(system="sys", preset="code", thinking=True, model="m")
    a = history.add(chat, user("look", attachments=(Attachment("a.txt", "```\nhi"),)), parent=None)
    call = ToolCall("1", "f", '{"x": "```"}')
    b = history.add(chat, answer("", tool_calls=(call,)), parent=a)
    c = history.add(chat, Message("tool", "42", tool_call_id="1"), parent=b)
    history.add(
        chat,
        answer("first\x1b[2J", reasoning="why\r\n"),
        parent=c,
        stats=Stats(completion_tokens=5),
    )
    d = history.add(chat, answer("second"), parent=c)
    history.add(chat, user("更多"), parent=d)
    history.choose(history.siblings(d)[0])
    return chat


def test_json_brings_back_everything(history: History, branched: int, tmp_path: Path) -> None:
    data = json.loads(json.dumps(history.export_json(branched)))
    (same,) = history.import_chats(data)
    again = history.export_json(same)
    assert texts(history, same) == texts(history, branched)
    first = min(entry["id"] for entry in again["messages"]) - min(e["id"] for e in data["messages"])
    for entry in again["messages"]:
        entry["id"] -= first
        entry["parent"] = entry["parent"] and entry["parent"] - first
    again["leaf"] -= first
    assert again == data
    with History.open(tmp_path / "other.db") as other:
        assert len(other.import_chats([data, data])) == 2
        assert len(other.import_chats({"chats": [data]})) == 1


def test_markdown_is_for_people(history: History, branched: int) -> None:
    text = history.export_markdown(branched)
    assert "\x1b" not in text and "\r" not in text
    head, _, body = text.partition("## You")
    assert head.startswith("# look\n") and "## System\n\nsys" in head and "preset code" in head
    assert "*Document a.txt, 6 characters*\n\nlook" in body
    assert 'Calls `f`:\n\n````json\n{"x": "```"}\n````' in body
    assert "## Tool\n\n42\n" in body
    assert "<details><summary>Thinking</summary>\n\nwhy\n\n</details>\n\nfirst[2J" in body
    assert "second" not in text, "the active branch only"


def test_openai_messages_are_a_chat(history: History) -> None:
    data = [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "image_url"}]},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "r",
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
            ],
        },
        {"role": "tool", "content": "x", "tool_call_id": "1"},
    ]
    for shape in (data, {"messages": data, "model": "gpt"}):
        (chat,) = history.import_chats(shape)
        assert history.chat(chat).system == "be kind"
        assert [stored.message for stored in history.messages(chat)] == [
            user("hi\n\n[image_url]"),
            answer("", reasoning="r", tool_calls=(ToolCall("1", "f", "{}"),)),
            Message("tool", "x", tool_call_id="1"),
        ]


def chatgpt() -> dict[str, Any]:
    def node(parent: str | None, role: str, text: str, **content: Any) -> dict[str, Any]:
        message = {
            "author": {"role": role},
            "content": {"content_type": "text", "parts": [text], **content},
            "create_time": 1700000000.5,
            "metadata": {"model_slug": "gpt-x"} if role == "assistant" else {},
        }
        return {"parent": parent, "message": message}

    return {
        "title": "Old chat",
        "create_time": 1700000000.0,
        "update_time": 1700000100.0,
        "current_node": "a2",
        "mapping": {
            "a2": node("t", "assistant", "second"),
            "root": {"parent": None, "message": None},
            "s": node("root", "system", ""),
            "q": node("s", "user", "question"),
            "t": node("q", "assistant", "", content_type="thoughts", thoughts=[{"content": "hm"}]),
            "x": node("t", "tool", "secret output"),
            "a1": node("x", "assistant", "first"),
            "p": node(
                "a2",
                "user",
                "",
                content_type="multimodal_text",
                parts=[{"content_type": "image"}, "see"],
            ),
        },
    }


def test_a_chatgpt_export_keeps_its_branches(history: History) -> None:
    (chat,) = history.import_chats([chatgpt()])
    info = history.chat(chat)
    assert (info.title, info.created, info.updated) == ("Old chat", 1700000000.0, 1700000100.0)
    assert (info.n_messages, info.n_branches) == (4, 2)
    branch = history.messages(chat)
    assert [(s.message.role, s.message.content, s.message.reasoning) for s in branch] == [
        ("user", "question", ""),
        ("assistant", "second", "hm"),
    ]
    assert branch[1].model == "gpt-x" and branch[1].created == 1700000000.5
    other = next(s for s in history.all_messages(chat) if s.message.content == "first")
    assert other.message.reasoning == "hm", "what was thought before both"
    assert [hit.snippet for hit in history.search("see")] == ["[image] \x02see\x03"]
    assert history.search("secret") == []


def test_a_very_deep_chatgpt_export(history: History) -> None:
    data = chatgpt()
    mapping = data["mapping"]
    for i in range(5000):
        mapping[f"n{i}"] = copy.deepcopy(mapping["q"]) | {"parent": f"n{i - 1}" if i else "a2"}
    data["mapping"] = dict(reversed(mapping.items()))
    data["current_node"] = "n4999"
    (chat,) = history.import_chats(data)
    assert len(texts(history, chat)) == 5002
    history.remove(chat)


OURS = {
    "format": "mimo-chat",
    "version": 1,
    "messages": [{"id": 1, "role": "user", "content": "x"}],
}


def changed(data: Any, *path: Any, to: Any) -> Any:
    data = copy.deepcopy(data)
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = to
    return data


@pytest.mark.parametrize(
    "data",
    [
        *(None, 7, "text", [], {}, [1], [[]], {"messages": 5}, {"messages": []}, {"mapping": []}),
        *([{"role": "poet", "content": "x"}], [{"role": ["user"], "content": "x"}]),
        *([{"role": "user", "content": 5}], [{"role": "user", "content": [5]}]),
        [{"role": "system", "content": "only"}],
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1"}}]}],
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}],
        [{"role": "assistant", "tool_calls": "f"}],
        changed(OURS, "version", to=2),
        changed(OURS, "messages", 0, "parent", to=1),
        changed(OURS, "messages", 0, "id", to="1"),
        changed(OURS, "messages", 0, "created", to="yesterday"),
        changed(OURS, "messages", 0, "created", to=1e300),
        changed(OURS, "messages", 0, "created", to=float("nan")),
        changed(OURS, "messages", 0, "created", to=True),
        changed(OURS, "messages", 0, "stats", to=[1]),
        changed(OURS, "messages", 0, "attachments", to=[1]),
        changed(OURS, "leaf", to=5),
        changed(OURS, "title", to=5),
        changed(OURS, "messages", to=OURS["messages"] * 2),
        [OURS, 5],
        [OURS, {"nothing": 1}],
        changed(chatgpt(), "mapping", "root", "parent", to="a2"),
        changed(chatgpt(), "mapping", "q", to=5),
        changed(chatgpt(), "create_time", to="x"),
    ],
)
def test_what_is_no_chat_is_refused_whole(history: History, data: Any) -> None:
    with pytest.raises(HistoryError) as caught:
        history.import_chats(data)
    assert caught.value.hint and history.chats() == []


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_one_wrong_value_anywhere_is_an_import_or_a_refusal(history: History, data: Any) -> None:
    start = data.draw(
        st.sampled_from([OURS, chatgpt(), {"messages": [{"role": "user", "content": "x"}]}])
    )
    places = list(paths_of(start))
    broken = changed(start, *data.draw(st.sampled_from(places)), to=data.draw(junk))
    try:
        ids = history.import_chats(broken)
    except HistoryError as error:
        assert error.hint
    else:
        for chat in ids:
            history.export_markdown(chat)
            json.dumps(history.export_json(chat))


def paths_of(data: Any, *path: Any) -> Iterator[tuple[Any, ...]]:
    items = (
        data.items()
        if isinstance(data, dict)
        else enumerate(data)
        if isinstance(data, list)
        else ()
    )
    for key, value in items:
        yield (*path, key)
        yield from paths_of(value, *path, key)


def test_listing_and_branches_read_indexes_not_tables(history: History) -> None:
    """20,000 messages are listed in a millisecond only this way (bench/saved_chats.py)."""
    seen: list[str] = []
    history._db.set_trace_callback(seen.append)
    chat = history.new_chat()
    history.choose(history.add(chat, user("a"), parent=None))
    history.chats(), history.messages(chat), history.siblings(1), history.search("a")
    history._db.set_trace_callback(None)
    for sql in seen:
        if not sql.lstrip().startswith(("SELECT", "WITH")) or "search MATCH" in sql:
            continue
        for *_, step in history._db.execute(f"EXPLAIN QUERY PLAN {sql}"):
            scan = re.match(r"SCAN (m|messages|chats)\b(?! .*USING)", step)
            assert not scan, (step, sql)
