"""Plain chat: what each command does, what a failure keeps, what is saved; then real keys."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import stat
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeEngine
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput

from mimo_local.chat import Attachment, Chat, Message
from mimo_local.cli import prompt
from mimo_local.cli.answer import Look
from mimo_local.cli.keep import Keeper, find
from mimo_local.cli.plain import PlainChat
from mimo_local.cli.prompt import KEPT, LONGEST, LineReader, PromptReader, is_open, unquoted
from mimo_local.commands import COMMANDS
from mimo_local.errors import HistoryError, RemoteError, UsageError
from mimo_local.history import History
from mimo_local.settings import Paths, Settings

ROOT = Path(__file__).parent.parent


class Script:
    """A reader that plays lines and remembers what it was offered."""

    def __init__(self, *lines: str, edits: bool = True) -> None:
        self.lines, self.edits = list(lines), edits
        self.offered: list[str] = []
        self.labels: list[str] = []

    def read(self, label: str = "> ", offered: str = "") -> str | None:
        self.offered.append(offered)
        self.labels.append(label)
        return self.lines.pop(0) if self.lines else None

    def quiet(self) -> AbstractContextManager[None]:
        return nullcontext()


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


def talk(
    engine: FakeEngine,
    *lines: str,
    edits: bool = True,
    keeper: Keeper | None = None,
    **options: Any,
) -> PlainChat:
    """A chat in which these lines were typed."""
    settings = Settings.resolve(env={}, **options)
    chat = PlainChat(
        engine,  # type: ignore[arg-type]
        settings,
        Look(),
        Script(*lines, edits=edits),
        keeper or Keeper(),
        Chat(system=settings.system or "", preset=settings.preset, thinking=settings.think),
    )
    chat.run()
    return chat


def said(chat: PlainChat) -> list[str]:
    return [message.content for message in chat.chat.messages]


def offered(chat: PlainChat) -> list[str]:
    return chat.reader.offered  # type: ignore[attr-defined]


# -- asking ----------------------------------------------------------------------------------------


def test_a_talk_goes_on_and_remembers(
    engine: FakeEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.queue("one")
    engine.queue("two")
    chat = talk(engine, "first", "", "  ", "second", "/exit", "never")
    assert said(chat) == ["first", "one", "second", "two"]
    assert capsys.readouterr().out == "one\ntwo\n"
    assert "one" in engine.requests[1].prompt


def test_a_failure_keeps_the_prompt_and_the_files(
    engine: FakeEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.md").write_text("alpha")
    engine.queue("half", error=RemoteError("it broke", hint="ask again"))
    engine.queue("fine")
    chat = talk(engine, f"/file {tmp_path}/a.md", "long question", "long question")
    assert offered(chat)[2] == "long question"
    assert said(chat) == ["long question", "fine"]
    assert engine.requests[1].prompt.count("alpha") == 1
    assert "error: it broke\nhint: ask again" in capsys.readouterr().err


def test_after_a_failure_regen_asks_the_same_again(engine: FakeEngine) -> None:
    engine.queue(error=RemoteError("it broke", hint="ask again"))
    engine.queue("fine")
    chat = talk(engine, "question", "/regen", edits=False)
    assert said(chat) == ["question", "fine"]
    assert offered(chat)[1] == "", "nothing is offered where nothing can be edited"


def test_an_answer_stopped_before_it_began_keeps_the_prompt(engine: FakeEngine) -> None:
    engine.queue(reason="cancelled")
    chat = talk(engine, "question")
    assert said(chat) == [] and offered(chat)[1] == "question"


def test_a_stopped_answer_is_kept(engine: FakeEngine) -> None:
    engine.queue("half an", reason="cancelled")
    assert said(talk(engine, "question")) == ["question", "half an"]


def test_a_prompt_that_begins_with_a_slash_survives_its_failure(engine: FakeEngine) -> None:
    engine.queue(error=RemoteError("it broke", hint="ask again"))
    chat = talk(engine, "//help me", "/etc/fstab says what?")
    assert offered(chat)[1] == "//help me"
    assert said(chat)[0] == "/etc/fstab says what?"


def test_half_a_character_from_the_terminal_is_no_end(engine: FakeEngine) -> None:
    assert said(talk(engine, "caf\udce9"))[0] == "caf?"


# -- commands --------------------------------------------------------------------------------------


def test_every_command_of_the_table_is_there(engine: FakeEngine) -> None:
    for spec in COMMANDS:
        assert callable(getattr(PlainChat, f"_{spec.name}"))
        talk(engine, f"/{spec.name}")  # alone, in an empty chat: none of them fails


def test_help_lists_all_commands_and_keys(
    engine: FakeEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    talk(engine, "/help")
    err = capsys.readouterr().err
    assert all(spec.label in err for spec in COMMANDS) and "Ctrl-R" in err
    talk(engine, "/help", edits=False)
    assert "Ctrl-R" not in capsys.readouterr().err


def test_a_mistyped_command_is_offered_again(
    engine: FakeEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = talk(engine, "/regne", "/preset haiku")
    assert offered(chat) == ["", "/regne", "/preset haiku"]
    assert "did you mean `/regen`?" in capsys.readouterr().err
    assert not engine.requests


def test_regen_takes_another_seed_and_replaces_the_answer(engine: FakeEngine) -> None:
    engine.queue("one")
    engine.queue("two")
    engine.queue("three")
    chat = talk(engine, "question", "/regen", "/regen", seed=5)
    assert said(chat) == ["question", "three"]
    assert [request.params.seed for request in engine.requests] == [5, 6, 7]


def test_a_regen_that_fails_leaves_the_answer_that_was_there(engine: FakeEngine) -> None:
    engine.queue("one")
    engine.queue(error=RemoteError("it broke", hint="ask again"))
    assert said(talk(engine, "question", "/regen")) == ["question", "one"]


def test_edit_offers_the_last_prompt_and_replaces_it(engine: FakeEngine, tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("alpha")
    engine.queue("one")
    engine.queue("two")
    chat = talk(engine, f"/file {tmp_path}/a.md", "question", "/edit", "better question")
    assert offered(chat)[3] == "question"
    assert chat.reader.labels[3] == "edit> "  # type: ignore[attr-defined]
    assert said(chat) == ["better question", "two"]
    assert "alpha" in engine.requests[1].prompt, "its document goes along"


def test_edit_with_a_text_does_it_at_once_and_an_empty_one_gives_up(engine: FakeEngine) -> None:
    assert said(talk(engine, "question", "/edit other"))[0] == "other"
    chat = talk(engine, "question", "/edit", "", "more")
    assert [text for text in said(chat) if text != "fake answer"] == ["question", "more"]


def test_an_edit_that_fails_leaves_the_chat_and_goes_on_editing(engine: FakeEngine) -> None:
    engine.queue("one")
    engine.queue(error=RemoteError("it broke", hint="ask again"))
    engine.queue("three")
    chat = talk(engine, "question", "/edit", "worse", "third")
    assert offered(chat)[3] == "worse"
    assert said(chat) == ["third", "three"]


def test_branches_are_listed_and_gone_on_with(
    engine: FakeEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    for text in ("one", "two", "three", "four"):
        engine.queue(text)
    keeper = Keeper.open(Settings())
    lines = ["first", "/branch", "/regen", "/branch", "/branch 1", "and?", "/branch 7", "/branch x"]
    chat = talk(engine, *lines, keeper=keeper)
    assert said(chat) == ["first", "one", "and?", "three"]
    assert "one" in engine.requests[2].prompt and "two" not in engine.requests[2].prompt
    err = capsys.readouterr().err
    assert "  1  one\n* 2  two\n" in err and "one version only" in err
    assert "going on after: one" in err and err.count("N from") == 0, "and? has one version"
    with saved() as history:
        assert [s.message.content for s in history.messages(1)][-1] == "three"
    talk(engine, "hi", "/branch")
    assert "only a saved chat" in capsys.readouterr().err
    keeper.close()


def test_branches_of_a_prompt_that_was_edited(
    engine: FakeEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    keeper = Keeper.open(Settings())
    chat = talk(engine, "first", "/edit second", "/branch", "/branch 1", "/branch 9", keeper=keeper)
    assert said(chat) == ["first", "fake answer"]
    err = capsys.readouterr().err
    assert "  1  first\n* 2  second\n" in err and "N from 1 to 2" in err
    keeper.close()


def test_undo_takes_back_prompt_and_answer(engine: FakeEngine) -> None:
    chat = talk(engine, "first", "second", "/undo")
    assert said(chat) == ["first", "fake answer"]
    assert said(talk(engine, "first", "/undo", "/undo")) == []


def test_clear_starts_anew_with_the_same_switches(engine: FakeEngine) -> None:
    chat = talk(
        engine, "/think on", "/preset math", "/system Be brief.", "first", "/clear", "second"
    )
    assert said(chat) == ["second", "fake answer"]
    assert (chat.chat.thinking, chat.chat.preset, chat.chat.system) == (True, "math", "Be brief.")
    assert "first" not in engine.requests[-1].prompt
    assert engine.requests[-1].params.temperature == 0.4, "math's"


def test_system_and_think_change_what_is_asked(engine: FakeEngine) -> None:
    talk(engine, "/system Be brief.", "a", "/system -", "b")
    assert "Be brief." in engine.requests[0].prompt
    assert "Be brief." not in engine.requests[1].prompt
    chat = talk(engine, "/think", "/think off")
    assert chat.chat.thinking is False


def test_files_are_counted_listed_and_dropped(
    engine: FakeEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a b.md").write_text("x" * 1024)
    chat = talk(engine, f"/file '{tmp_path}/a b.md'", "/file -", "/file", "hi")
    err = capsys.readouterr().err
    assert "a b.md: 1,024 tokens, 25% of the context" in err
    assert "no file goes with the next prompt" in err
    assert chat.chat.messages[0].attachments == ()
    assert chat.reader.labels[1] == "[1 file] > "  # type: ignore[attr-defined]


def test_a_file_that_is_none_is_said_and_offered(engine: FakeEngine, tmp_path: Path) -> None:
    chat = talk(engine, f"/file {tmp_path}/none.md")
    assert offered(chat)[1] == f"/file {tmp_path}/none.md"
    assert chat.files == []


def test_stats_tells_model_and_figures(
    engine: FakeEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    talk(engine, "/stats", "hi", "/stats")
    err = capsys.readouterr().err
    assert err.count(engine.description) == 2
    assert "no answer yet" in err and "answer 2 tokens" in err


@pytest.mark.parametrize("kept", [False, True])
def test_save_writes_markdown_and_json_and_never_over_a_file(
    kept: bool, engine: FakeEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.queue("<think>", "hm", "</think>", "Hello.")
    md, js = tmp_path / "a.md", tmp_path / "a.json"
    (tmp_path / "mine.md").write_text("mine")
    keeper = Keeper.open(Settings()) if kept else Keeper()
    lines = ["hi", f"/save {md}", f"/save {js}", f"/save {tmp_path}/mine.md", "/save x.txt"]
    chat = talk(engine, "/save early.md", *lines, f"/save {tmp_path}/no/a.md", keeper=keeper)
    text = md.read_text()
    assert "hi" in text and "Hello." in text and "hm" in text
    data = json.loads(js.read_text())
    assert [m["content"] for m in data["messages"]] == ["hi", "Hello."]
    assert (tmp_path / "mine.md").read_text() == "mine"
    err = capsys.readouterr().err
    assert "there already" in err and "ends in .md or .json" in err and "nothing to save" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.md", "mine.md"]
    assert offered(chat)[-1].endswith("/no/a.md")


def test_a_disk_that_fills_up_leaves_no_half_file(tmp_path: Path) -> None:
    from mimo_local.cli.plain import write_new

    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with pytest.raises(UsageError, match="cannot be written"):
        write_new(tmp_path / "no" / "a.md", "x")
    with pytest.raises(UsageError, match="already"):
        write_new(Path("/dev/full"), "x")


# -- what is kept ----------------------------------------------------------------------------------


def saved() -> History:
    return History.open(Paths.default().history_file)


def test_a_chat_is_saved_with_its_branches_and_gone_on_with(engine: FakeEngine) -> None:
    engine.queue("one")
    engine.queue("two")
    keeper = Keeper.open(Settings())
    talk(engine, "question", "/regen", keeper=keeper, preset="code")
    number = keeper.number
    keeper.close()
    assert number is not None
    with saved() as history:
        info = history.chat(number)
        assert (info.n_messages, info.n_branches, info.preset) == (3, 2, "code")
        assert [s.message.content for s in history.messages(number)] == ["question", "two"]
        assert history.messages(number)[1].model == "fake"
        assert history.messages(number)[1].stats["completion_tokens"] == 1
    again = Keeper.open(Settings(), last=True)
    assert again.chat is not None and again.number == number
    assert [m.content for m in again.chat.messages] == ["question", "two"]
    assert again.chat.preset == "code"
    again.close()
    assert find(None) == find(number) == number


def test_what_was_typed_wins_over_what_was_saved() -> None:
    keeper = Keeper.open(Settings())
    keeper.prompt(Chat([Message("user", "a")], system="S", preset="math", thinking=True))
    keeper.close()
    typed = Settings.resolve(env={"MIMO_SYSTEM": "from the environment"}, preset="code")
    again = Keeper.open(typed, last=True)
    assert again.chat is not None
    assert (again.chat.preset, again.chat.system, again.chat.thinking) == ("code", "S", True)
    again.close()


def test_a_prompt_without_an_answer_is_left_out_when_going_on(engine: FakeEngine) -> None:
    engine.queue("one")
    engine.queue(error=RemoteError("it broke", hint="ask again"))
    keeper = Keeper.open(Settings())
    talk(engine, "first", "lost", keeper=keeper)
    keeper.close()
    again = Keeper.open(Settings(), last=True)
    assert again.chat is not None
    assert [m.content for m in again.chat.messages] == ["first", "one"]
    again.close()


def test_clear_begins_another_saved_chat_and_a_switch_is_saved(engine: FakeEngine) -> None:
    keeper = Keeper.open(Settings())
    talk(engine, "first", "/think on", "second", "/clear", "third", keeper=keeper)
    keeper.close()
    with saved() as history:
        new, old = history.chats()
        assert (new.title, old.title) == ("third", "first")
        assert old.thinking and old.n_messages == 4


def test_no_history_keeps_nothing_but_may_go_on(engine: FakeEngine, user_home: Path) -> None:
    off = Settings.resolve(env={}, history=False)
    talk(engine, "secret", keeper=Keeper.open(off))
    assert not Paths.default().data_dir.exists()
    keeper = Keeper.open(Settings())
    talk(engine, "known", keeper=keeper)
    keeper.close()
    again = Keeper.open(off, last=True)
    assert again.chat is not None and again.prompts is None
    chat = PlainChat(engine, off, Look(), Script("more"), again, again.chat)  # type: ignore[arg-type]
    chat.run()
    with saved() as history:
        assert [s.message.content for s in history.messages(1)] == ["known", "fake answer"]


def test_a_history_that_is_damaged_is_said_once_and_the_answer_comes(
    engine: FakeEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    file = Paths.default().history_file
    file.parent.mkdir(parents=True)
    file.write_bytes(b"no database at all" * 1000)
    chat = talk(engine, "hi", "more", keeper=Keeper.open(Settings()))
    assert said(chat)[1] == "fake answer"
    assert capsys.readouterr().err.count("not saved") == 1
    with pytest.raises(HistoryError):
        Keeper.open(Settings(), last=True)


def test_a_history_that_breaks_in_between_is_said_once(
    engine: FakeEngine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> int:
        raise HistoryError("the disk is full", hint="make room")

    keeper = Keeper.open(Settings())
    monkeypatch.setattr(History, "add", full)
    chat = talk(engine, "hi", "more", keeper=keeper)
    assert len(said(chat)) == 4
    assert capsys.readouterr().err.count("not saved") == 1


def test_nothing_to_go_on_with() -> None:
    with pytest.raises(UsageError, match="no chat to go on with"):
        Keeper.open(Settings(), last=True)
    with pytest.raises(HistoryError, match="no chat 7"):
        Keeper.open(Settings(), number=7)
    with pytest.raises(HistoryError, match="no chat 7"):
        find(7)


def test_documents_are_saved_with_their_message() -> None:
    keeper = Keeper.open(Settings())
    keeper.prompt(Chat([Message("user", "see", attachments=(Attachment("a", "alpha"),))]))
    keeper.close()
    with saved() as history:
        assert history.messages(1)[0].message.attachments == (Attachment("a", "alpha"),)


# -- reading ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "unfinished", "meant"),
    [
        ("hi", False, "hi"),
        ('"""', True, ""),
        ('"""a', True, "a"),
        ('"""a\nb', True, "a\nb"),
        ('"""a\nb"""', False, "a\nb"),
        ('"""\n  a\n"""', False, "  a"),
        ('""""""', False, ""),
        ('say """a"""', False, 'say """a"""'),
    ],
)
def test_triple_quotes(text: str, unfinished: bool, meant: str) -> None:
    assert is_open(text) is unfinished
    assert unquoted(text) == meant


def test_lines_from_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO('one\r\n"""two\nthree"""\n\n"""open'))
    reader = LineReader()
    assert [reader.read() for _ in range(5)] == ["one", "two\nthree", "", "open", None]


@pytest.fixture
def keys() -> Iterator[PipeInput]:
    with create_pipe_input() as pipe:
        yield pipe


def editor(keys: PipeInput, remember: Path | None = None) -> PromptReader:
    return PromptReader(remember=remember, input=keys, output=DummyOutput())


ENTER, CTRL_C, CTRL_D, CTRL_J, CTRL_R, UP, TAB = "\r", "\x03", "\x04", "\n", "\x12", "\x1b[A", "\t"


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("hi" + ENTER, "hi"),
        ("two" + CTRL_J + "lines" + ENTER, "two\nlines"),
        ("two\x1b\rlines" + ENTER, "two\nlines"),
        ('"""two' + ENTER + 'lines"""' + ENTER, "two\nlines"),
        ("\x1b[200~pasted\r\nlines\r\n\x1b[201~" + ENTER, "pasted\nlines"),
        ("你好" + ENTER, "你好"),
        ("hallo\x7f\x7f\x7f\x7fi" + ENTER, "hi"),
    ],
)
def test_keys(typed: str, expected: str, keys: PipeInput) -> None:
    keys.send_text(typed)
    assert editor(keys).read() == expected


def test_offered_text_is_there_to_be_changed(keys: PipeInput) -> None:
    keys.send_text(" now" + ENTER)
    assert editor(keys).read("edit> ", "do it") == "do it now"


def test_ctrl_d_ends_and_ctrl_c_hints_or_keeps_what_was_typed(
    keys: PipeInput, capsys: pytest.CaptureFixture[str]
) -> None:
    reader = editor(keys)
    keys.send_text(CTRL_C)
    assert reader.read() == "" and "Ctrl-D" in capsys.readouterr().err
    keys.send_text("almost lost" + CTRL_C)
    assert reader.read() == "" and "Ctrl-D" not in capsys.readouterr().err
    keys.send_text(UP + ENTER)
    assert reader.read() == "almost lost"
    keys.send_text(CTRL_D)
    assert reader.read() is None


def test_prompts_are_remembered_for_the_next_run_and_searched(
    keys: PipeInput, tmp_path: Path
) -> None:
    file = tmp_path / "data" / "prompts"
    reader = editor(keys, file)
    for text in ("find the whale", "two" + CTRL_J + "lines", "x" * 20):
        keys.send_text(text + ENTER)
        reader.read()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with create_pipe_input() as later:
        reader = editor(later, file)
        later.send_text(UP + UP + ENTER)
        assert reader.read() == "two\nlines"
        later.send_text(CTRL_R + "whale" + ENTER + ENTER)
        assert reader.read() == "find the whale"


def test_a_file_others_could_read_is_closed_to_them(tmp_path: Path) -> None:
    file = tmp_path / "prompts"
    file.write_text("\n# then\n+hello\n")
    file.chmod(0o644)
    assert list(prompt.history(file).load_history_strings()) == ["hello"]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_the_file_is_bounded_and_a_book_is_not_kept(tmp_path: Path) -> None:
    file = tmp_path / "prompts"
    file.write_text("".join(f"\n# then\n+prompt {n}\n+more\n" for n in range(2 * KEPT)))
    found = list(prompt.history(file).load_history_strings())
    assert len(found) == KEPT and found[0] == f"prompt {2 * KEPT - 1}\nmore"
    prompt.history(file).append_string("x" * (LONGEST + 1))
    assert len(file.read_text()) < LONGEST * 10
    assert list(tmp_path.iterdir()) == [file]


def test_prompts_that_cannot_be_kept_are_said_once_and_still_work(
    keys: PipeInput, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    reader = editor(keys, tmp_path / "file" / "prompts")
    for text in ("one", "two"):
        keys.send_text(text + ENTER)
        reader.read()
    keys.send_text(UP + UP + ENTER)
    assert reader.read() == "one"
    assert capsys.readouterr().err.count("not kept") == 1


def completions(text: str) -> list[str]:
    from prompt_toolkit.completion import CompleteEvent
    from prompt_toolkit.document import Document

    found = prompt.completer().get_completions(Document(text), CompleteEvent())
    return [completion.text for completion in found]


def test_commands_words_and_paths_are_completed(tmp_path: Path) -> None:
    (tmp_path / "letter.md").write_text("")
    assert completions("/re") == ["/regen"]
    assert completions("/preset m") == ["/preset math"]
    assert completions(f"/file {tmp_path}/le") == ["tter.md"]
    assert completions("re") == completions("/a\n/re") == completions("/etc/f") == []


# -- a real terminal -------------------------------------------------------------------------------

CHILD = """
import sys, time
sys.path.insert(0, {tests!r})
from fakes import FakeEngine
from mimo_local.cli import main, models
words = " ".join(f"word{{n}}" for n in range(400))
reply = lambda prompt: "short answer" if "two" in prompt.rsplit("<user>", 1)[-1] else words
engine = FakeEngine(reply=reply, delay_s=0.02)
models.open_engine = lambda settings: engine
sys.exit(main(["chat", "--plain", *{args!r}]))
"""


READY = r"\x1b\[\?2004h"
"""The line editor asks for pasted text to be marked: it has begun."""


class Terminal:
    """`mimo chat --plain` on a pseudo-terminal, with a fake model; type keys, wait for text."""

    def __init__(self, home: Path, *args: str) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:  # pragma: no cover  (the child)
            os.environ.update(MIMO_HOME=str(home), TERM="xterm", PROMPT_TOOLKIT_NO_CPR="1")
            os.environ.update(COLUMNS="80", LINES="24")
            code = CHILD.format(tests=str(ROOT / "tests"), args=args)
            os.chdir(ROOT)
            os.execv(sys.executable, [sys.executable, "-c", code])
        self.text = ""

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def wait(self, pattern: str, seconds: float = 30) -> str:
        """Read until the pattern has come; what came until then."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.text, re.DOTALL)):
            ready, _, _ = select.select([self.fd], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise AssertionError(f"{pattern!r} did not come: {self.text[-800:]!r}")
            self._read()
        before, self.text = self.text[: found.end()], self.text[found.end() :]
        return before

    def end(self, seconds: float = 20) -> int:
        """Wait until it has ended; what it wrote until then is in `text`."""
        end = time.monotonic() + seconds
        while True:
            ready, _, _ = select.select([self.fd], [], [], 0.05)
            if ready:
                self._read()
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                os.close(self.fd)
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                os.close(self.fd)
                raise AssertionError(f"it did not end: {self.text[-800:]!r}")

    def _read(self) -> bool:
        try:
            data = os.read(self.fd, 65536)
        except OSError:  # its end was closed
            return False
        self.text += data.decode("utf-8", "replace")
        return bool(data)


def test_a_real_terminal_from_the_first_key_to_the_last(user_home: Path) -> None:
    terminal = Terminal(user_home)
    terminal.wait(READY)
    assert not termios.tcgetattr(terminal.fd)[3] & termios.ICANON, "the line editor has the keys"
    terminal.type("a long one\r")
    terminal.wait("word5 ")
    terminal.type("\x03")
    shown = terminal.wait(READY)
    assert "^C" not in shown and "word399" not in shown
    terminal.type("another\r")
    terminal.wait("word5 ")
    terminal.type("typed ahead, two\r\x03")
    assert "ahead" not in terminal.wait(READY)
    assert "typed ahead, two" in terminal.wait("short answer")
    terminal.wait(READY)
    terminal.type("/stats\r")
    assert "answer" in terminal.wait(r"answer \d+ tokens")
    terminal.wait(READY)
    terminal.type("two\nlines\r")
    terminal.wait("short answer")
    terminal.wait(READY)
    terminal.type("\x03")
    terminal.wait("Ctrl-D or /exit ends the chat")
    terminal.wait(READY)
    terminal.type("a long goodbye\r")
    terminal.wait("word5 ")
    terminal.type("\x04\x03")  # ends it as soon as there is a prompt again
    assert terminal.end() == 0
    with saved() as history:
        contents = [stored.message.content for stored in history.messages(1)]
    assert contents[0] == "a long one" and contents[1].startswith("word0 word1")
    assert 5 < len(contents[1].split()) < 399, "the part until Ctrl-C is kept"
    assert contents[4:6] == ["typed ahead, two", "short answer"]
    assert contents[6:9] == ["two\nlines", "short answer", "a long goodbye"]
    prompts = Paths.default().data_dir / "prompts"
    assert "+two\n+lines\n" in prompts.read_text()


def test_nothing_to_go_on_with_is_said_before_the_model_is_loaded(user_home: Path) -> None:
    terminal = Terminal(user_home, "--no-history", "-c")
    assert "no chat to go on with" in terminal.wait("hint:") + terminal.text
    assert terminal.end() == 2


def test_plain_has_no_colours(user_home: Path) -> None:
    terminal = Terminal(user_home)
    terminal.wait(READY)
    terminal.type("/he")
    shown = terminal.wait("keys and commands")
    assert not re.search(r"\x1b\[[0-9;]*(3[0-7]|4[0-7]|38|48|9[0-7])[;m]", shown)
    terminal.type("\x03")
    terminal.wait(READY)
    terminal.type("\x04")
    assert terminal.end() == 0


def test_piped_text_is_a_prompt_not_a_chat(user_home: Path) -> None:
    code = CHILD.format(tests=str(ROOT / "tests"), args=())
    done = subprocess.run(
        [sys.executable, "-c", code],
        input="hello two\nmore\n",
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        env=os.environ | {"MIMO_HOME": str(user_home)},
    )
    assert (done.returncode, done.stdout) == (0, "short answer\n"), done.stderr
    with saved() as history:
        assert history.messages(1)[0].message.content == "hello two\nmore"
