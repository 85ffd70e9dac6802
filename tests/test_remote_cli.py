"""`--remote` from the command line: what is asked, said, saved and returned."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from endpoint import SHAPES, Endpoint, Reply, chunk, sse, usage
from fakes import FakeEngine

from mimo_local import cli
from mimo_local.cli import models
from mimo_local.errors import ExitCode, UsageError
from mimo_local.history import History
from mimo_local.remote import connection
from mimo_local.settings import Paths, Settings

ROOT = Path(__file__).parent.parent


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setattr(connection, "PAUSES_S", ())
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr(models, "open_engine", lambda _: pytest.fail("loaded a model"))
    with Endpoint() as endpoint:
        yield endpoint


def test_one_question(server: Endpoint, capsys: pytest.CaptureFixture[str]) -> None:
    server.chat(Reply([SHAPES["vllm"]]))
    assert cli.main(["chat", "--remote", server.url, "--think", "--stats", "What is it?"]) == 0
    out, err = capsys.readouterr()
    assert out == "Forty-two 答.\n"
    assert f"what you write and attach is sent to {server.url}" in err
    assert "Let me see 思." in err
    assert f"| remote {server.url}" in err, "the figures say where they come from"
    with History.open(Paths.default().history_file) as history:
        question, answer = history.messages(1)
        assert question.message.content == "What is it?"
        assert (answer.message.reasoning, answer.model) == ("Let me see 思.", "mimo-v2-flash")


def test_as_json_and_from_the_environment(
    server: Endpoint, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.chat(Reply([SHAPES["sglang"]]))
    monkeypatch.setenv("MIMO_REMOTE", server.url + "/v1/")
    monkeypatch.setenv("MIMO_REMOTE_KEY", "sk-secret")
    assert cli.main(["chat", "--json", "hi"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert (found["answer"], found["thinking"]) == ("Forty-two 答.", "Let me see 思.")
    assert found["stats"]["cached_tokens"] == 16
    assert server.asked()[0].headers["authorization"] == "Bearer sk-secret"
    assert "sk-secret" not in out + err


def test_an_answer_that_breaks_off_keeps_what_came_and_fails(
    server: Endpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    server.chat(Reply([sse(chunk({"content": "the beginning"}), done=False)], drop=True))
    assert cli.main(["chat", "--remote", server.url, "hi"]) == ExitCode.FAILED
    out, err = capsys.readouterr()
    assert out == "the beginning\n"
    assert "broke off the answer" in err and "hint: " in err


def test_notes_are_said(server: Endpoint, capsys: pytest.CaptureFixture[str]) -> None:
    server.chat(Reply([sse(chunk({"content": "a"}, "content_filter"))]))
    assert cli.main(["chat", "--remote", server.url, "hi"]) == 0
    assert "content filter" in capsys.readouterr().err


def test_a_hostile_answer_does_nothing_to_a_terminal(
    server: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    server.chat(Reply([sse(chunk({"content": "a\x1b]0;title\x07b\tc\nd\u3000e"}, "stop"))]))
    assert cli.main(["chat", "--remote", server.url, "hi"]) == 0
    assert screen.getvalue() == "a]0;titleb\tc\nd\u3000e\n"


def test_a_summary(server: Endpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "a.md"
    text.write_text("# One\n\nThe whale swims north.\n\n# Two\n\nThe ship sails south.\n")
    server.answer("/tokenize", Reply.json({"count": 20, "tokens": list(range(20))}))
    said = "The whale swims north and the ship sails south [sec. 1]."
    server.chat(Reply([sse(chunk({"content": said}, "stop"), chunk(usage=usage(90, 14)))]))
    assert cli.main(["summarize", "--remote", server.url, str(text)]) == 0
    out, err = capsys.readouterr()
    assert "whale swims north" in out
    assert f"is sent to {server.url}" in err and "mimo-v2-flash, one pass, 100%" in err
    body = server.asked()[0].body
    assert "whale swims north" in body["messages"][-1]["content"]
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert len(server.asked("/tokenize")) > 1


def test_a_long_document_is_summarized_in_parts_that_fit(
    server: Endpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "a.txt"
    text.write_text("\n\n".join(f"Paragraph {n}: the whale swims on. " * 20 for n in range(60)))
    server.chat(Reply([sse(chunk({"content": "The whale swims on."}, "stop"))]))
    assert cli.main(["summarize", "--remote", server.url, str(text)]) == 0
    sizes = [len(r.body["messages"][-1]["content"]) // 3.5 for r in server.asked()]
    assert len(sizes) > 3 and max(sizes) < 8192
    assert "estimated" in capsys.readouterr().err


# -- which one -------------------------------------------------------------------------------------


def test_a_model_that_is_typed_wins_over_a_setting(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = FakeEngine()
    monkeypatch.setattr(models, "open_engine", lambda settings: engine)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setenv("MIMO_REMOTE", "http://cluster.invalid")
    for args in (["-m", str(tmp_path)], ["--remote", "off"]):
        assert cli.main(["chat", *args, "hi"]) == 0
    assert len(engine.requests) == 2
    assert "sent to" not in capsys.readouterr().err


def test_both_typed_is_a_mistake() -> None:
    settings = Settings.resolve(env={}, model="x", remote="http://a")
    with pytest.raises(UsageError, match="--model is a model here"):
        models.is_remote(settings)


def test_a_plan_says_that_it_is_for_this_machine(
    server: Endpoint, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["plan", "--ram", "400GB"])
    assert "setting `remote`" not in capsys.readouterr().err
    monkeypatch.setenv("MIMO_REMOTE", server.url)
    cli.main(["plan", "--ram", "400GB"])
    assert f"ask {server.url} (setting `remote`)" in capsys.readouterr().err
    assert not server.requests


# -- Ctrl-C ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["", "the beginning"])
def test_ctrl_c_leaves_at_once_and_keeps_what_came(part: str, user_home: Path) -> None:
    with Endpoint() as server:
        sent = [sse(chunk({"content": part}), done=False)] if part else []
        server.chat(Reply(sent, stall="after"))
        command = [sys.executable, "-m", "mimo_local", "chat", "--remote", server.url, "hi"]
        environment: dict[str, Any] = os.environ | {"MIMO_HOME": str(user_home)}
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, cwd=ROOT, env=environment,
        )  # fmt: skip
        assert server.stalled.wait(30)
        if part:
            assert process.stdout is not None
            assert process.stdout.read(len(part)) == part
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
        assert server.gone.wait(1)
        assert time.monotonic() - started < 3
        assert (out.strip(), process.returncode) == ("", 130), err
        with History.open(Paths.default().history_file) as history:
            saved = [stored.message.content for stored in history.messages(1)]
        assert saved == (["hi", part] if part else ["hi"])


def test_ctrl_c_while_a_server_is_being_looked_at(user_home: Path) -> None:
    with Endpoint() as server:
        server.answer("/v1/models", Reply(stall="before"))
        command = [sys.executable, "-m", "mimo_local", "chat", "--remote", server.url, "hi"]
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, cwd=ROOT, env=os.environ | {"MIMO_HOME": str(user_home)},
        )  # fmt: skip
        assert server.stalled.wait(30)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=10)
    assert (out, process.returncode) == ("", 130)
    assert "Task" not in err and "Traceback" not in err, err
