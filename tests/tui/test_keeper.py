from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from textual.message import Message as TextualMessage

from mimo_local.chat import Message
from mimo_local.errors import HistoryError
from mimo_local.events import Stats
from mimo_local.history import History
from tui.conversation import Conversation
from tui.keeper import Keeper, Opened
from tui.messages import Found, KeepFailed, Kept, Titled


class Desk:
    """A keeper whose messages land in a list."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.messages: list[TextualMessage] = []
        self.keeper = Keeper(self.messages.append, lambda: History.open(path))
        self.keeper.start()

    def wait_for(self, kind: type, n: int = 1) -> TextualMessage:
        end = time.monotonic() + 5
        while time.monotonic() < end:
            found = [m for m in self.messages if isinstance(m, kind)]
            if len(found) >= n:
                return found[n - 1]
            time.sleep(0.005)
        raise AssertionError(f"no {kind.__name__} among {self.messages}")

    def settle(self) -> None:
        """Wait until everything asked for is done."""
        before = sum(isinstance(m, Found) for m in self.messages)
        self.keeper.find()
        self.wait_for(Found, before + 1)

    def failures(self) -> list[KeepFailed]:
        return [m for m in self.messages if isinstance(m, KeepFailed)]

    def saved(self, chat: Conversation) -> list[tuple[str, str]]:
        assert chat.saved is not None
        with History.open(self.path) as history:
            return [(m.message.role, m.message.content) for m in history.messages(chat.saved)]


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path / "history.db")
    yield made
    made.keeper.close()


def held(desk: Desk, question: str = "q", answer: str = "a") -> Conversation:
    chat = Conversation()
    asked = chat.say(question)
    desk.keeper.save(chat, asked)
    reply = chat.answer(asked)
    reply.message = Message("assistant", answer)
    reply.stats = Stats(completion_tokens=5)
    desk.keeper.save(chat, reply, "model-x")
    desk.settle()
    return chat


def test_a_chat_is_saved_message_by_message_and_opened_again(desk: Desk) -> None:
    chat = held(desk, "Why do tides lag?", "Friction.")
    assert desk.saved(chat) == [("user", "Why do tides lag?"), ("assistant", "Friction.")]
    assert desk.wait_for(Titled).title == chat.title == "Why do tides lag?"
    assert chat.saved is not None
    desk.keeper.open(chat.saved)
    opened = desk.wait_for(Opened)
    assert [s.message.content for s in opened.messages] == ["Why do tides lag?", "Friction."]
    assert opened.messages[1].stats["completion_tokens"] == 5
    assert opened.messages[1].model == "model-x"
    assert opened.branch == tuple(s.id for s in opened.messages)
    desk.keeper.find("tid")
    (row,) = desk.wait_for(Found, 2).rows
    assert row.chat == chat.saved
    assert row.message is not None, "not its title as well"
    assert "\x02tid" in row.snippet


def test_a_growing_answer_overwrites_itself(desk: Desk) -> None:
    chat = Conversation()
    reply = chat.answer(chat.say("q"))
    for text in ("Once", "Once upon", "Once upon a time"):
        reply.message = Message("assistant", text)
        desk.keeper.save(chat, reply)
        desk.settle()
        assert desk.saved(chat) == [("user", "q"), ("assistant", text)]


def test_saves_of_one_message_do_not_pile_up_behind_a_slow_disk(tmp_path: Path) -> None:
    gate, updates = threading.Event(), []

    class Slow(History):
        def update(self, *args, **kwargs) -> None:
            updates.append(args)
            super().update(*args, **kwargs)

    def slow() -> History:
        gate.wait(5)
        return Slow.open(tmp_path / "h.db")

    messages: list[TextualMessage] = []
    keeper = Keeper(messages.append, slow)
    keeper.start()
    chat = Conversation()
    reply = chat.answer(chat.say("q"))
    for n in range(200):
        reply.message = Message("assistant", "word " * n)
        keeper.save(chat, reply)
    gate.set()
    keeper.close()
    assert len(updates) <= 1
    with History.open(tmp_path / "h.db") as history:
        last = history.last()
        assert last is not None
        assert history.messages(last.id)[-1].message.content == "word " * 199


def test_branches_and_options_are_kept(desk: Desk) -> None:
    chat = held(desk)
    asked, first = chat.path
    second = chat.answer(asked)
    second.message = Message("assistant", "another")
    desk.keeper.save(chat, second)
    desk.settle()
    assert desk.saved(chat)[-1] == ("assistant", "another")
    desk.keeper.choose(first)
    chat.preset, chat.thinking, chat.system = "math", True, "Be brief."
    desk.keeper.set_options(chat)
    desk.settle()
    assert desk.saved(chat)[-1] == ("assistant", "a")
    with History.open(desk.path) as history:
        assert chat.saved is not None
        info = history.chat(chat.saved)
    assert (info.preset, info.thinking, info.system, info.n_branches) == (
        *("math", True, "Be brief."),
        2,
    )


def test_a_question_taken_back_and_asked_again_is_one_message(desk: Desk) -> None:
    chat = Conversation()
    old = chat.say("with a tipo")
    desk.keeper.save(chat, old)
    chat.drop(old)
    new = chat.say("with a typo")
    desk.keeper.replaces(new, old)
    desk.keeper.save(chat, new)
    desk.settle()
    with History.open(desk.path) as history:
        assert chat.saved is not None
        everything = history.all_messages(chat.saved)
    assert [m.message.content for m in everything] == ["with a typo"]


def test_a_failing_disk_is_said_once_and_what_was_missed_is_saved_later(desk: Desk) -> None:
    chat = held(desk)
    other = sqlite3.connect(desk.path)
    # As a full disk or a lost file system would: every write fails.
    other.execute(
        "CREATE TRIGGER no_more BEFORE INSERT ON messages BEGIN SELECT raise(ABORT, 'full'); END"
    )
    asked = chat.say("unsaved question")
    desk.keeper.save(chat, asked)
    reply = chat.answer(asked)
    for n in range(3):
        reply.message = Message("assistant", f"answer {n}")
        desk.keeper.save(chat, reply)
        desk.settle()
    assert len(desk.failures()) == 1
    assert desk.failures()[0].saving
    assert desk.failures()[0].problem.hint
    other.execute("DROP TRIGGER no_more")
    other.close()
    reply.message = Message("assistant", "answer, whole")
    desk.keeper.save(chat, reply)
    desk.settle()
    assert desk.saved(chat)[2:] == [
        ("user", "unsaved question"),
        ("assistant", "answer, whole"),
    ]


def test_a_history_that_cannot_be_opened_is_said_once(tmp_path: Path) -> None:
    messages: list[TextualMessage] = []

    def broken() -> History:
        raise HistoryError("the file is damaged", hint="move it away")

    keeper = Keeper(messages.append, broken)
    keeper.start()
    chat = Conversation()
    for n in range(5):
        keeper.save(chat, chat.say(f"q{n}"))
    keeper.close()
    assert [type(m) for m in messages] == [KeepFailed]
    assert messages[0].problem.message == "the file is damaged"


def test_rename_and_remove(desk: Desk) -> None:
    chat = held(desk)
    assert chat.saved is not None
    desk.keeper.rename(chat.saved, "Tides")
    assert desk.wait_for(Titled, 2).title == "Tides"
    desk.keeper.remove(chat.saved)
    assert desk.wait_for(Kept, 2).chat == chat.saved
    desk.keeper.open(chat.saved)
    assert not desk.wait_for(KeepFailed).saving


def test_export_never_replaces_a_file_unasked_and_comes_back(desk: Desk, tmp_path: Path) -> None:
    chat = held(desk, "Why?", "Because.")
    assert chat.saved is not None
    md, js = tmp_path / "chat.md", tmp_path / "chat.JSON"
    md.write_text("precious")
    desk.keeper.export(chat.saved, md)
    assert "exists" in desk.wait_for(KeepFailed).problem.message
    assert md.read_text() == "precious"
    desk.keeper.export(chat.saved, md, replace=True)
    desk.keeper.export(chat.saved, js)
    desk.wait_for(Kept, 2)
    assert "Because." in md.read_text()
    assert json.loads(js.read_text())
    desk.keeper.import_file(js)
    assert desk.wait_for(Kept, 3).what == "Imported 1 chat"
    with History.open(desk.path) as history:
        assert len(history.chats()) == 2


@pytest.mark.parametrize("content", [b"no json", b'{"nothing": 1}', b"\xff\xfe", None])
def test_a_bad_import_says_what_would_do(desk: Desk, tmp_path: Path, content) -> None:
    path = tmp_path / "in.json"
    if content is not None:
        path.write_bytes(content)
    desk.keeper.import_file(path)
    failed = desk.wait_for(KeepFailed)
    assert failed.problem.hint
    assert "bug" not in failed.problem.hint


def test_export_to_a_place_that_is_not_there(desk: Desk, tmp_path: Path) -> None:
    chat = held(desk)
    assert chat.saved is not None
    desk.keeper.export(chat.saved, tmp_path / "no" / "x.md")
    assert "cannot be written" in desk.wait_for(KeepFailed).problem.message


def test_saved_chats_can_be_read_without_saving_this_one(tmp_path: Path) -> None:
    path = tmp_path / "h.db"
    with History.open(path) as history:
        kept = history.new_chat(title="old")
    messages: list[TextualMessage] = []
    keeper = Keeper(messages.append, lambda: History.open(path), saves=False)
    keeper.start()
    chat = Conversation()
    keeper.save(chat, chat.say("secret"))
    keeper.open(kept)
    keeper.close()
    assert [type(m) for m in messages] == [Opened]
    with History.open(path) as history:
        assert [c.title for c in history.chats()] == ["old"]


def test_without_a_history_nothing_happens(tmp_path: Path) -> None:
    messages: list[TextualMessage] = []
    keeper = Keeper(messages.append, None)
    keeper.start()
    chat = Conversation()
    keeper.save(chat, chat.say("q"))
    keeper.find("x")
    keeper.close()
    assert not keeper.on
    assert messages == []
    assert chat.saved is None
