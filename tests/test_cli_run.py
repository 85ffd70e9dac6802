"""`mimo run`: from a recipe and files to an answer, on stdout or in a file, whole or stopped."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from endpoint import VLLM, Endpoint, Reply
from fakes import FakeEngine
from rich.cells import cell_len

from mimo_local import cli
from mimo_local.cli import models
from mimo_local.errors import ExitCode, NativeError
from mimo_local.settings import Paths, Settings


class Stdin(io.TextIOWrapper):
    def __init__(self, data: bytes = b"", *, tty: bool = False) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._tty = tty

    def isatty(self) -> bool:
        return self._tty


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin(tty=True))
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    fake = FakeEngine(["An", " answer."], context_limit=50_000)

    def open_engine(settings: Settings) -> FakeEngine:
        return fake

    monkeypatch.setattr(models, "open_engine", open_engine)
    return fake


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A program longer than a section of a text, with indents where sections are cut."""
    lines = [f"    if x == {i}:\n        y = [{i}]\n\n\n" for i in range(300)]
    path = tmp_path / "a.py"
    path.write_text("def f(x):\n" + "".join(lines) + "    return {{y}}\n", encoding="utf-8")
    return path


def own(name: str, text: str) -> None:
    folder = Paths.default().recipes_dir
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.toml").write_text(text, encoding="utf-8")


def test_a_recipe_and_a_file_become_one_answer(
    engine: FakeEngine, program: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", "code-review", str(program), "--set", "focus=names"]) == 0
    out, err = capsys.readouterr()
    assert (out, err) == ("An answer.\n", "")
    (request,) = engine.requests
    text = program.read_text().strip("\n")
    assert f"<document>\n{text}\n</document>" in request.prompt, "every line with its indent"
    assert "Look most closely at: names" in request.prompt
    assert "It is meant" not in request.prompt
    assert (request.params.max_tokens, request.params.temperature) == (4096, 0.6)
    assert engine.closed


def test_a_pipe_and_another_language(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin("会议记录".encode()))
    monkeypatch.setenv("LANG", "zh_CN.UTF-8")
    assert cli.main(["run", "minutes", "--json"]) == 0
    out, _ = capsys.readouterr()
    found = json.loads(out)
    assert (found["recipe"], found["language"], found["answer"]) == ("minutes", "zh", "An answer.")
    assert "<document>\n会议记录\n</document>" in engine.requests[0].prompt
    assert "行动项" in engine.requests[0].prompt


def test_an_empty_pipe_is_no_document(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin(b" \n"))
    assert cli.main(["run", "minutes"]) == ExitCode.USAGE
    assert "needs a document" in capsys.readouterr().err
    assert engine.requests == []


@pytest.mark.parametrize(
    ("args", "config", "expected"),
    [
        ([], "", ("summarize", 0.3, 1.0, 16384, False)),
        ([], 'max_tokens = 7\ntemperature = 0.9\ntop_p = 0.5\npreset = "code"\nthink = true',
         ("summarize", 0.3, 1.0, 16384, False)),
        (["--max-tokens", "7", "--temperature", "0", "--think"], "",
         ("summarize", 0, 1.0, 7, True)),
        (["--preset", "math"], "", ("math", 0.3, 1.0, 16384, False)),
    ],
)  # fmt: skip
def test_what_is_typed_wins_then_the_recipe_then_the_settings(
    args: list[str], config: str, expected: tuple[Any, ...], engine: FakeEngine, user_home: Path
) -> None:
    file = Paths.default().config_file
    file.parent.mkdir(exist_ok=True)
    file.write_text(config)
    assert cli.main(["run", "translate", "--set", "text=Hallo", *args]) == 0
    (request,) = engine.requests
    name, temperature, penalty, max_tokens, thinking = expected
    params = request.params
    assert (params.temperature, params.repetition_penalty) == (temperature, penalty)
    assert params.max_tokens == max_tokens
    top_p = {"summarize": 0.85, "math": 0.8}[name]
    assert params.top_p == (0.5 if "top_p" in config else top_p)
    assert request.prompt.endswith("<assistant>") == thinking


def test_values_come_from_files_too(engine: FakeEngine, tmp_path: Path) -> None:
    terms = tmp_path / "terms.txt"
    terms.write_text("Vertrag = contract\r\n  Partei = party\n", encoding="utf-8-sig")
    args = ["--set", f"glossary=@{terms}", "--set", "keep=@@home", "--set", "text=a=b"]
    assert cli.main(["run", "translate", *args]) == 0
    prompt = engine.requests[0].prompt
    assert "Glossary (binding): Vertrag = contract\n  Partei = party\n" in prompt
    assert "Leave untranslated: @home\n" in prompt and "\n\na=b\n" in prompt


def test_a_file_of_a_recipe_runs_from_anywhere(engine: FakeEngine, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('prompt = "Say {{x}}"\n[variables.x]\n')
    assert cli.main(["run", str(path), "--set", "x=hi"]) == 0
    assert "Say hi" in engine.requests[0].prompt


# -- into a file -----------------------------------------------------------------------------------


def test_an_answer_into_a_file(
    engine: FakeEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.md"
    assert cli.main(["run", "study", "--set", "topic=x", "-o", str(out)]) == 0
    assert capsys.readouterr() == ("", f"written to {out}\n")
    assert out.read_text() == "An answer.\n"
    engine.queue("More")
    assert cli.main(["run", "study", "--set", "topic=x", "-o", str(out), "--json"]) == 0
    assert json.loads(out.read_text())["answer"] == "More"


def test_a_file_that_cannot_be_written_is_said_first(
    engine: FakeEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "no" / "out.md"
    assert cli.main(["run", "study", "--set", "topic=x", "-o", str(out)]) == ExitCode.USAGE
    assert "cannot be written" in capsys.readouterr().err and engine.requests == []


def test_an_error_in_the_middle_keeps_what_was_made(
    engine: FakeEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine._answers.clear()
    engine.queue("Half", " an", error=NativeError("it broke", hint="try again"))
    out = tmp_path / "out.md"
    assert cli.main(["run", "study", "--set", "topic=x", "-o", str(out)]) == ExitCode.NATIVE
    assert "what was made until then is in" in (err := capsys.readouterr().err)
    assert "error: it broke" in err and out.read_text() == "Half an\n"
    assert engine.closed


@pytest.mark.parametrize("into", [False, True])
def test_ctrl_c_keeps_what_was_made(
    into: bool,
    engine: FakeEngine,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine._answers.clear()
    engine.queue("Half", " an answer", hold=True)
    from mimo_local.cli import answer

    show = answer._Screen.show

    def interrupt(screen: Any, piece: Any) -> None:
        show(screen, piece)
        if "answer" in piece.text:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(answer._Screen, "show", interrupt)
    file = tmp_path / "out.md"
    args = ["-o", str(file)] if into else []
    assert cli.main(["run", "study", "--set", "topic=x", *args]) == ExitCode.INTERRUPTED
    out, err = capsys.readouterr()
    kept = file.read_text() if into else out
    assert kept == "Half an answer\n"
    assert not into or f"stopped; what was made is in {file}" in err


def test_with_a_terminal_the_answer_is_seen_while_it_is_written(
    engine: FakeEngine,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1")
    assert cli.main(["run", "study", "--set", "topic=x", "-o", str(tmp_path / "a")]) == 0
    out, err = capsys.readouterr()
    assert not out and "An answer.\n" in err


# -- no room ---------------------------------------------------------------------------------------


def test_a_document_too_long_is_refused_with_numbers(
    engine: FakeEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "long.txt"
    file.write_text("word " * 20_000)
    assert cli.main(["run", "minutes", str(file)]) == ExitCode.USAGE
    err = capsys.readouterr().err
    numbers = re.search(r"are ([0-9,]+) tokens, the context holds 50,000", err)
    assert numbers and 100_000 < int(numbers[1].replace(",", "")) < 102_000
    assert f"`mimo summarize {file}`" in err and "--pages" in err
    assert engine.requests == [] and engine.closed


def test_more_context_is_advised_only_where_there_is_more(
    engine: FakeEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "long.txt"
    file.write_text("word " * 20_000)
    cli.main(["run", "minutes", str(file)])
    assert "--context" not in capsys.readouterr().err
    engine.config.max_context = 200_000
    cli.main(["run", "minutes", str(file)])
    advised = re.search(r"--context ([0-9]+) makes it fit", capsys.readouterr().err)
    assert advised
    engine.context_limit = int(advised[1])
    assert cli.main(["run", "minutes", str(file)]) == 0
    assert capsys.readouterr().err == "", "room for the whole answer"


def test_little_room_is_a_note(
    engine: FakeEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "long.txt"
    file.write_text("word " * 9500)
    assert cli.main(["run", "minutes", str(file)]) == 0
    assert "there is room for" in capsys.readouterr().err


# -- looking ---------------------------------------------------------------------------------------


def test_the_list_fits_and_names_what_is_broken(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own("haiku", 'description = "Three\\u001b[2J lines"\nprompt = "x"')
    own("broken", 'prompt = "x"\npromt = "y"')
    for locale in ("C", "zh_CN.UTF-8"):
        monkeypatch.setenv("LC_ALL", locale)
        assert cli.main(["run", "--list"]) == 0
        out, err = capsys.readouterr()
        assert max(map(cell_len, out.splitlines())) <= 80
        assert "haiku        -      yours: Three[2J lines\n" in out
        assert "broken" not in out and "broken.toml, line 2: there is no `promt`" in err
        assert ("论文" in out) == (locale != "C")
        assert str(Paths.default().recipes_dir) in err
    assert cli.main(["run", "--list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {recipe["name"]: recipe["own"] for recipe in listed}["haiku"] is True


def test_show_prints_variables_and_texts(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "translate", "--show", "--lang", "zh"]) == 0
    out, _ = capsys.readouterr()
    assert "  to        译入语言 (else: 简体中文)\n" in out
    assert "documents: optional, or --set text=...\n" in out and "{{glossary}}" in out
    assert cli.main(["run", "translate", "--show", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["texts"]["zh"]["prompt"]


@pytest.mark.parametrize(
    "args",
    [
        *(
            "",
            "nothing",
            "paper",
            "paper --lang fr",
            "paper no/such/file.pdf",
            "translate --set to",
        ),
        *("translate --set too=x", "debug --set error=@no/such/file", "study --preset poet"),
        *("paper README.md --pages x", "./missing.toml"),
    ],
)
def test_wrong_usage_has_a_hint_and_loads_no_model(
    args: str, engine: FakeEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    code = cli.main(["run", *args.split()])
    out, err = capsys.readouterr()
    assert code in (ExitCode.USAGE, ExitCode.FAILED) and not out
    assert err.startswith("error: ") and "\n\nhint: " in err
    assert not engine.requests and not engine.closed


@pytest.mark.demo
def test_the_demo_model_answers_a_recipe(
    demo_pack_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("Anna: we ship on Friday.\nBen: agreed, I will write the notes.\n")
    out = tmp_path / "minutes.md"
    args = ["minutes", str(notes), "-o", str(out), "-m", str(demo_pack_dir), "--seed", "1"]
    assert cli.main(["run", *args, "--max-tokens", "40"]) == 0
    assert capsys.readouterr().out == ""
    text = out.read_text()
    assert text.strip() and text.endswith("\n")
    from mimo_local.tokenizer import Tokenizer

    assert len(Tokenizer.from_dir(demo_pack_dir).encode(text)) <= 44


def test_a_server_answers_a_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.py"
    file.write_text("def f():\n    pass\n")
    with Endpoint() as server:
        server.chat(Reply([VLLM]))
        assert cli.main(["run", "code-review", str(file), "--remote", server.url]) == 0
        (asked,) = server.asked()
    out, err = capsys.readouterr()
    assert out == "Forty-two 答.\n" and server.url in err
    system, user = asked.body["messages"]
    assert system["role"] == "system" and "It is data" in system["content"]
    assert "<document>\ndef f():\n    pass\n</document>" in user["content"]
    assert asked.body["max_tokens"] == 4096


def test_a_program_given_to_chat_keeps_its_lines_too(engine: FakeEngine, program: Path) -> None:
    assert cli.main(["chat", "what is this?", "-f", str(program)]) == 0
    assert program.read_text().strip("\n") in engine.requests[0].prompt
