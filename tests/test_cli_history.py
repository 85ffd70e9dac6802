"""`mimo history`: what is printed for people and for scripts, and what is never printed."""

from __future__ import annotations

import io
import json
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

from mimo_local import cli
from mimo_local.chat import Attachment, Message, ToolCall
from mimo_local.cli import history as commands
from mimo_local.errors import ExitCode
from mimo_local.events import Stats
from mimo_local.history import History
from mimo_local.settings import Paths

NASTY = "\x1b[2J\x07\x9b31m\u202e\x00"


class Terminal(io.TextIOWrapper):
    """Standard input with these bytes; a terminal if asked for."""

    def __init__(self, data: bytes = b"", *, tty: bool = False) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._tty = tty

    def isatty(self) -> bool:
        return self._tty


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")


@pytest.fixture
def chats(user_home: Path) -> list[int]:
    """Three saved chats; the first has two branches, the last is hostile."""
    with History.open(Paths.default().history_file) as history:
        a = history.new_chat(system="be exact", preset="code", thinking=True, model="demo")
        file = Attachment("合同.pdf", "x" * 1234)
        q = history.add(a, Message("user", "请审查合同" * 12, attachments=(file,)), parent=None)
        stats = Stats(completion_tokens=321)
        thought = "first\nsecond"
        r = history.add(a, Message("assistant", "Fine.", thought), parent=q, stats=stats)
        history.add(a, Message("assistant", "Not fine."), parent=q)
        history.choose(r)
        b = history.new_chat(title="Planning the garden")
        history.add(b, Message("user", "where do " + "tomatoes " * 30 + "grow"), parent=None)
        c = history.new_chat(system=NASTY, model=NASTY)
        call = ToolCall("1", f"f{NASTY}", '{"x": "\x9b"}')
        n = history.add(
            c,
            Message("user", f"nasty {NASTY}", attachments=(Attachment(NASTY, NASTY),)),
            parent=None,
        )
        history.add(c, Message("assistant", NASTY, NASTY, tool_calls=(call,)), parent=n)
    return [a, b, c]


def run(*args: str, code: int = 0) -> None:
    assert cli.main(["history", *args]) == code


def data(capsys: pytest.CaptureFixture[str]) -> Any:
    out, err = capsys.readouterr()
    assert err == "" and out.count("\n") == 1
    return json.loads(out)


def test_list_is_a_table_that_fits(chats: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    run("list")
    out, err = capsys.readouterr()
    assert not err
    head, *rows = out.splitlines()
    assert head == "id  last used         messages  title"
    assert [re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d", "DAY", row) for row in rows] == [
        " 3  DAY         2  nasty [2J 31m",
        " 2  DAY         1  Planning the garden",
        " 1  DAY         3  请审查合同请审查合同请审查合同请审查合同请审查…",
    ]
    assert max(map(cell_len, out.splitlines())) <= 80


def test_without_a_command_it_lists(chats: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    run("list")
    listed = capsys.readouterr()
    run()
    assert capsys.readouterr() == listed


def test_list_says_when_there_is_more_or_nothing(
    capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    run("list")
    assert capsys.readouterr() == ("", "no chats are saved yet: `mimo chat` begins one\n")
    request.getfixturevalue("chats")
    run("list", "-n", "2")
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 3 and "`-n` shows them" in err
    run("list", "-n", "2", "--json")
    assert [chat["id"] for chat in data(capsys)["chats"]] == [3, 2]


def test_search_groups_by_chat(chats: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    run("search", "合同")
    out, _ = capsys.readouterr()
    chat, line = out.splitlines()
    assert chat.startswith("1  20") and line.startswith("   请审查合同")
    assert max(map(cell_len, out.splitlines())) <= 80 and "\x02" not in out
    run("search", "tomat")
    assert "…" in capsys.readouterr().out
    run("search", "nothing", "like", "this")
    assert capsys.readouterr() == ("", "nothing found\n")
    run("search", "--json", "garden")
    (hit,) = data(capsys)["hits"]
    assert (hit["snippet"], hit["matches"], hit["message_id"]) == (
        "Planning the garden", [[13, 19]], None,
    )  # fmt: skip


def test_matches_are_bold_on_a_terminal(
    chats: list[int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "colours", lambda stream: True)
    run("search", "garden")
    assert "Planning the \x1b[1mgarden\x1b[0m\n" in capsys.readouterr().out
    run("search", "tomatoes")
    line = capsys.readouterr().out.splitlines()[1]
    assert line.count("\x1b[1m") == line.count("\x1b[0m") >= 5
    assert cell_len(line.replace("\x1b[1m", "").replace("\x1b[0m", "")) <= 80


def test_show_prints_the_active_branch(
    chats: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    run("show", "1")
    out, err = capsys.readouterr()
    assert "3 messages, preset code, thinking, demo\n\nSystem\nbe exact\n\nYou" in out
    assert "\n[合同.pdf, 1,234 characters]\n请审查合同" in out
    assert re.search(
        r"\nAssistant  [-0-9]+ [:0-9]+  321 tokens\n\(thinking\) first\nsecond\n\nFine.\n", out
    )
    assert "Not fine." not in out and "one of 2 branches" in err
    run("show", "1", "--json")
    assert {entry["content"] for entry in data(capsys)["messages"]} >= {"Fine.", "Not fine."}
    run("show")
    assert capsys.readouterr().out.startswith("nasty")


@pytest.mark.parametrize(
    "args",
    [
        *("list", "list --json", "search nasty", "search --json nasty", "show 3", "show 3 --json"),
        *("export 3", "export 3 --json", "export --all", "rename 3 x\x1by\x9bz", "rm 3"),
    ],
)
def test_control_characters_never_reach_the_terminal(
    args: str, chats: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["history", *args.split(" ")])
    text = "".join(capsys.readouterr())
    assert text and not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", text), repr(text)


def test_export_and_import_bring_everything_back(
    chats: list[int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backup = tmp_path / "backup.json"
    run("export", "--all", "--json", "-o", str(backup))
    assert capsys.readouterr() == ("", f"3 chats written to {backup}\n")
    monkeypatch.setenv("MIMO_HOME", str(tmp_path / "elsewhere"))
    run("import", str(backup))
    out, err = capsys.readouterr()
    assert "2  Planning the garden\n" in out and err == f"3 chats imported from {backup}\n"
    again = tmp_path / "again.json"
    run("export", "--all", "--json", "-o", str(again))
    before, after = (json.loads(file.read_text()) for file in (backup, again))
    assert [c["title"] for c in after["chats"]] == [c["title"] for c in before["chats"]]
    assert [len(c["messages"]) for c in after["chats"]] == [2, 1, 3]
    run("export", "2", "-o", str(tmp_path / "a.md"))
    assert (tmp_path / "a.md").read_text().startswith("# ")


def test_import_reads_stdin_and_a_zip(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = [{"role": "user", "content": "hello"}]
    monkeypatch.setattr(sys, "stdin", Terminal(json.dumps(messages).encode()))
    run("import", "-")
    assert capsys.readouterr() == ("1  hello\n", "1 chat imported from -\n")
    archive = tmp_path / "export.zip"
    with zipfile.ZipFile(archive, "w") as made:
        made.writestr("conversations.json", json.dumps([{"messages": messages, "title": "zipped"}]))
    run("import", str(archive), "--json")
    assert data(capsys) == {"imported": [2]}


@pytest.mark.parametrize("kind", ["missing", "folder", "text", "deep", "binary", "zip", "half"])
def test_import_refuses_what_is_no_chat(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    match kind:
        case "folder":
            file.mkdir()
        case "text":
            file.write_text("Dear diary")
        case "deep":
            file.write_text("[" * 200_000)
        case "binary":
            file.write_bytes(bytes(range(256)))
        case "zip":
            with zipfile.ZipFile(file, "w") as made:
                made.writestr("other.txt", "")
        case "half":
            with zipfile.ZipFile(file, "w") as made:
                made.writestr("conversations.json", "[" + "1," * 9999)
            file.write_bytes(file.read_bytes()[:-30])
    run("import", str(file), code=ExitCode.USAGE)
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and "\n\nhint: " in err and str(file) in err
    run("list", "--json")
    assert data(capsys) == {"chats": []}


def test_rm_asks(
    chats: list[int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run("rm", "2", code=ExitCode.USAGE)
    assert "Planning the garden (1 message)" in (err := capsys.readouterr().err) and "--yes" in err
    monkeypatch.setattr(sys, "stdin", Terminal(b"n\n", tty=True))
    run("rm", "2", code=ExitCode.FAILED)
    assert "nothing was removed" in capsys.readouterr().err
    run("rm", "--yes", "2", "99", code=ExitCode.FAILED)
    assert "there is no chat 99" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", Terminal(b"y\n", tty=True))
    run("rm", "2", "2")
    out, err = capsys.readouterr()
    assert not out and err.endswith("1 chat removed\n")
    run("rm", "-y", "1", "3", "--json")
    assert data(capsys) == {"removed": [1, 3]}


def test_rename_and_path(
    chats: list[int], user_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("rename", "2", "The", "new garden")
    assert capsys.readouterr() == ("", "chat 2 is now: The new garden\n")
    run("rename", "2", "x", "--json")
    assert data(capsys) == {"id": 2, "title": "x"}
    run("path")
    file = user_home / "data" / "history.db"
    assert capsys.readouterr().out == f"{file}\n"
    run("path", "--json")
    assert data(capsys) == {"path": str(file), "exists": True, "bytes": file.stat().st_size}


@pytest.mark.parametrize(
    "args",
    [
        *("show 99", "show x", "rm", "rename 99 x", "rename 1", "export", "export 1 --all"),
        *("search", "list -n 0", "export 1 -o no/such/folder", f"show {10**30}"),
    ],
)
def test_wrong_usage_has_a_hint(args: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["history", *args.split()]) in (ExitCode.USAGE, ExitCode.FAILED)
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and "\n\nhint: " in err


def test_a_damaged_history_is_one_line_and_what_to_do(
    chats: list[int], user_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = user_home / "data" / "history.db"
    file.write_bytes(b"garbage" * 2000)
    run("list", code=ExitCode.FAILED)
    err = capsys.readouterr().err
    assert "is damaged" in err and f"mv {file} {file}.old" in err
