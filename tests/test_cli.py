"""The mimo command: what goes to stdout, what to stderr, which status, and what a start costs."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from fakes import FakeEngine

import mimo_local
from mimo_local import cli
from mimo_local.chat import Chat, Message
from mimo_local.cli import answer, machine, models, packs, plan_text, reference, status
from mimo_local.cli import plan as plan_command
from mimo_local.cli.keep import Keeper
from mimo_local.errors import (
    CancelledError,
    DiskSpaceError,
    DocumentError,
    ExitCode,
    NotEnoughMemoryError,
    PackError,
    UsageError,
)
from mimo_local.events import Prefill, Progress
from mimo_local.plan import Budget, here, plan
from mimo_local.plan.rates import CORE_FLOPS
from mimo_local.settings import Paths, Settings
from mimo_local.sizes import GB

ROOT = Path(__file__).parent.parent
Golden = Callable[[str, str], None]


class Stdin(io.TextIOWrapper):
    """Piped input, or an empty terminal."""

    def __init__(self, data: bytes = b"", *, tty: bool = False) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._tty = tty

    def isatty(self) -> bool:
        return self._tty


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin(tty=True))


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    """What every command gets instead of a model; `engine.settings` is what it was opened with."""
    fake = FakeEngine()

    def open_engine(settings: Settings) -> FakeEngine:
        fake.settings = settings  # type: ignore[attr-defined]
        return fake

    monkeypatch.setattr(models, "open_engine", open_engine)
    return fake


# -- start and help --------------------------------------------------------------------------------


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    code = (
        "import sys, time\nfrom mimo_local.cli import main\n"
        "assert main(['--help']) == 0\nseconds = time.process_time()\n"
        "heavy = {'torch', 'numpy', 'textual', 'rich', 'starlette', 'psutil', 'asyncio', 'httpx2', "
        "'prompt_toolkit'} & set(sys.modules)\n"
        "print('RESULT', seconds, sorted(heavy))"
    )
    runs = []
    for _ in range(3):  # seconds of this process alone, from its start: other work does not count
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT
        )
        assert done.returncode == 0, done.stderr
        _, seconds, heavy = done.stdout.splitlines()[-1].split(" ", 2)
        assert heavy == "[]"
        runs.append(float(seconds))
        if runs[-1] < 0.4:
            break
    assert min(runs) < 0.4, runs


def test_help_texts(golden: Golden) -> None:
    for command, text in reference.helps():
        golden(f"help/{command.replace(' ', '-')}.txt", text + "\n")


def test_the_reference_page_is_what_help_says(request: pytest.FixtureRequest) -> None:
    page = ROOT / "docs" / "cli.md"
    if request.config.getoption("--update-golden"):
        page.write_text(reference.markdown(), encoding="utf-8")
    assert page.read_text(encoding="utf-8") == reference.markdown(), (
        "run `python -m mimo_local.cli.reference > docs/cli.md`"
    )


def test_every_promised_command_is_there() -> None:
    commands = {name.split()[1] for name, _ in reference.helps() if " " in name}
    promised = "chat summarize quantize verify demo plan doctor bench config"
    assert commands >= {*promised.split()}


@pytest.mark.parametrize("args", [["--help"], ["-h"], []])
def test_help_is_not_an_error(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(args) == 0
    assert "Usage: mimo" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"mimo {mimo_local.__version__}\n"


def test_python_dash_m() -> None:
    command = [sys.executable, "-m", "mimo_local", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, f"mimo {mimo_local.__version__}\n")


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("wrong", hint="right"), 2),
        (PackError("wrong", hint="right"), 3),
        (NotEnoughMemoryError("wrong", hint="right"), 4),
        (DiskSpaceError("wrong.", hint="right"), 1),
        (CancelledError("wrong", hint="right"), 130),
        (KeyboardInterrupt(), 130),
        (MemoryError(), 4),
    ],
)
def test_errors_are_one_line_and_a_hint(
    error: BaseException,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(settings: Settings) -> FakeEngine:
        raise error

    monkeypatch.setattr(models, "open_engine", fail)
    assert cli.main(["chat", "hi"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    if isinstance(error, KeyboardInterrupt):
        assert err == "\nstopped\n"
    elif not isinstance(error, MemoryError):
        assert err == "error: wrong\n\nhint: right\n"


@pytest.mark.parametrize(
    "args",
    [
        ["chit"],
        ["chat", "--no-such-option"],
        ["chat", "--top-k", "many", "hi"],
        ["chat", "--top-p", "7", "hi"],
        ["chat", "--preset", "poet", "hi"],
        ["chat", ""],
        ["chat", "-f"],
        ["summarize"],
        ["plan", "--ram", "lots"],
        ["plan", "--context", "999999999"],
        ["plan", "--format", "q4"],
        ["plan", "--pages", "0"],
        ["plan", "--cores", "0"],
        ["plan", "--ram-rate", "fast"],
        ["plan", "--disk-rate", "0"],
        ["bench", "-p", "a,b"],
        ["config"],
    ],
)
def test_wrong_usage_is_two_and_says_what_next(
    args: list[str], engine: FakeEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(args) == ExitCode.USAGE
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and "\n\nhint: " in err, err
    assert not out
    assert engine.requests == []


def test_an_unforeseen_error_is_one_line_and_a_log(
    user_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(settings: Settings) -> FakeEngine:
        raise KeyError("surprise")

    monkeypatch.setattr(models, "open_engine", fail)
    assert cli.main(["chat", "hi"]) == 1
    err = capsys.readouterr().err
    logs = list((user_home / "cache" / "logs").iterdir())
    assert "unexpected KeyError: 'surprise'" in err.splitlines()[0]
    assert str(logs[0]) in err and "Traceback" not in err
    assert "Traceback" in logs[0].read_text()
    assert cli.main(["--debug", "chat", "hi"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_log_that_cannot_be_written_does_not_hide_the_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MIMO_HOME", str(tmp_path / "file"))
    assert cli.unexpected(ValueError("deep"), debug=False) == 1
    assert "unexpected ValueError: deep" in capsys.readouterr().err


# -- chat ------------------------------------------------------------------------------------------


def test_an_answer_goes_to_stdout_and_nothing_else_does(
    engine: FakeEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.queue("Hel", "lo", " there")
    assert cli.main(["chat", "Say hello"]) == 0
    out, err = capsys.readouterr()
    assert out == "Hello there\n"
    assert "Hello" not in err
    assert "Say hello" in engine.requests[0].prompt
    assert engine.closed


def test_thinking_goes_to_stderr(engine: FakeEngine, capsys: pytest.CaptureFixture[str]) -> None:
    engine.queue("<think>", "let me see", "</think>", "\n42")
    assert cli.main(["chat", "--think", "What is it?"]) == 0
    out, err = capsys.readouterr()
    assert out == "42\n"
    assert "let me see\n" in err
    assert "\x1b" not in err, "no escape codes where no terminal is"


def test_files_piped_text_and_the_prompt_are_one_message_in_that_order(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "a.md").write_text("# Alpha\n\nfirst file\n")
    (tmp_path / "b.txt").write_text("second file\n")
    monkeypatch.setattr(sys, "stdin", Stdin("piped text é\n".encode()))
    files = ["-f", str(tmp_path / "a.md"), "-f", str(tmp_path / "b.txt")]
    assert cli.main(["chat", *files, "the prompt"]) == 0
    prompt = engine.requests[0].prompt
    places = [prompt.index(t) for t in ("first file", "second file", "piped text é", "the prompt")]
    assert places == sorted(places)
    assert "a.md" in prompt and "b.txt" in prompt, "the model is told what is what"


def test_a_dash_reads_stdin_once(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin(b"some notes"))
    assert cli.main(["chat", "-f", "-", "shorten"]) == 0
    assert engine.requests[0].prompt.count("some notes") == 1


def test_piped_binary_that_is_no_document_is_refused(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin(b"\x89PNG\r\n\x1a\n\0\0"))
    assert cli.main(["chat", "what is this"]) == DocumentError.exit_code
    assert "hint: " in capsys.readouterr().err


def test_a_missing_file_stops_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(models, "open_engine", lambda settings: pytest.fail("loaded a model"))
    assert cli.main(["chat", "-f", "/no/such/file.txt", "hi"]) == 1
    assert "/no/such/file.txt" in capsys.readouterr().err


def test_no_prompt_and_no_terminal_is_a_usage_error(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin(b""))
    assert cli.main(["chat"]) == ExitCode.USAGE
    assert "there is no prompt" in capsys.readouterr().err


def test_flags_reach_the_sampler_over_the_preset(engine: FakeEngine) -> None:
    args = ["--preset", "math", "--temperature", "0", "--seed", "7", "--max-tokens", "9"]
    args += ["--stop", "END", "--stop", "FIN"]
    assert cli.main(["chat", *args, "--top-k", "5", "--min-p", "0.1", "hi"]) == 0
    request = engine.requests[0]
    params = request.params
    assert (params.temperature, params.seed, params.max_tokens) == (0, 7, 9)
    assert (params.top_k, params.min_p) == (5, 0.1)
    assert (params.top_p, params.repetition_penalty) == (0.8, 1.05), "math's own"
    assert request.stop == ("END", "FIN")


def test_every_sampling_parameter_has_a_flag() -> None:
    import dataclasses
    import inspect

    from mimo_local.cli.chat import chat
    from mimo_local.sampler import SamplingParams

    flags = set(inspect.signature(chat).parameters)
    assert {field.name for field in dataclasses.fields(SamplingParams)} <= flags


def test_the_environment_counts_and_a_flag_wins(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIMO_TOP_P", "0.5")
    monkeypatch.setenv("MIMO_TEMPERATURE", "0.1")
    assert cli.main(["chat", "--temperature", "0.9", "hi"]) == 0
    assert (engine.requests[0].params.top_p, engine.requests[0].params.temperature) == (0.5, 0.9)


def test_a_system_prompt_and_thinking_reach_the_template(engine: FakeEngine) -> None:
    assert cli.main(["chat", "-s", "Be brief.", "--think", "hi"]) == 0
    prompt = engine.requests[0].prompt
    assert "Be brief." in prompt
    assert not prompt.endswith("</think>")


def test_json_is_one_document(engine: FakeEngine, capsys: pytest.CaptureFixture[str]) -> None:
    engine.queue("<think>", "hm", "</think>", "ja", "wohl ü", reason="length")
    assert cli.main(["chat", "--json", "--stats", "hi"]) == 0
    out, err = capsys.readouterr()
    data = json.loads(out)
    assert (data["answer"], data["thinking"]) == ("jawohl ü", "hm")
    assert data["finish_reason"] == "length"
    assert data["stats"]["prompt_tokens"] == len(engine.requests[0].ids)
    assert data["stats"]["decode_tokens_per_s"] > 0
    assert "--max-tokens" in err and "t/s" in err


def test_a_failed_answer_keeps_what_came_and_fails(
    engine: FakeEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.queue("half an", error=NotEnoughMemoryError("out of room", hint="less context"))
    assert cli.main(["chat", "hi"]) == ExitCode.MEMORY
    out, err = capsys.readouterr()
    assert out == "half an\n"
    assert err.endswith("error: out of room\n\nhint: less context\n")
    assert engine.closed


def test_a_model_without_a_tokenizer_cannot_chat(
    engine: FakeEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.tokenizer = None  # type: ignore[assignment]
    assert cli.main(["chat", "hi"]) == ExitCode.USAGE
    assert "tokenizer" in capsys.readouterr().err


def interrupt_when(said: Callable[[], bool]) -> threading.Thread:
    """Ctrl-C in this process as soon as `said()`."""

    def wait() -> None:
        end = time.monotonic() + 10
        while not said() and time.monotonic() < end:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_ctrl_c_stops_the_answer_and_keeps_it(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGINT)
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    engine.queue("so", " far", hold=True)
    # A held stream is waited for in short steps here: the fake's own wait ignores signals.
    thread = interrupt_when(lambda: "far" in out.getvalue())
    assert cli.main(["chat", "hi"]) == ExitCode.INTERRUPTED
    thread.join()
    assert out.getvalue() == "so far\n"
    assert signal.getsignal(signal.SIGINT) is before
    assert engine.closed


def test_a_second_ctrl_c_interrupts() -> None:
    calls = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs of a shell ignore it
    with pytest.raises(KeyboardInterrupt), answer.on_interrupt(lambda: calls.append(1)):
        signal.raise_signal(signal.SIGINT)
        assert calls == [1]
        signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)
    assert calls == [1]


class Screen(io.StringIO):
    """A terminal that remembers."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("no_color", "dim"), [("", True), ("1", False)])
def test_thinking_is_dimmed_on_a_terminal_unless_no_color(
    no_color: str, dim: bool, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    err = Screen()
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", "xterm")
    engine.queue("<think>", "hm", "</think>", "yes")
    assert cli.main(["chat", "hi"]) == 0
    assert ("\x1b[2m" in err.getvalue()) is dim


def test_without_prompt_on_a_terminal_the_window_opens_with_the_flags(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[Any] = []
    app, bridge = ModuleType("tui.app"), ModuleType("tui.bridge")
    app.run = lambda settings, defaults: seen.append((settings, defaults)) or 3  # type: ignore[attr-defined]
    bridge.ChatDefaults = SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tui.app", app)
    monkeypatch.setitem(sys.modules, "tui.bridge", bridge)
    monkeypatch.setattr(sys, "stdout", Screen())
    monkeypatch.setattr(sys, "stderr", Screen())
    args = ["-m", str(tmp_path), "--preset", "agent", "--think", "--seed", "1", "--stop", "X"]
    assert cli.main(["chat", *args]) == 3
    settings, defaults = seen[0]
    assert settings.model == tmp_path
    assert (defaults.preset, defaults.thinking, defaults.stop) == ("agent", True, ("X",))
    assert defaults.overrides == {"seed": 1}
    keeper = Keeper.open(Settings())
    keeper.prompt(Chat([Message("user", "hello")]))
    keeper.close()
    monkeypatch.setenv("MIMO_REMOTE", "http://a")
    assert cli.main(["chat", "-c", "--no-history"]) == 3
    settings, defaults = seen[1]
    assert (settings.remote, settings.history, defaults.chat_id) == ("http://a", False, 1)
    assert cli.main(["chat", *args, "--id", "1"]) == 3
    assert seen[2][0].remote is None, "a model that is typed wins"
    assert cli.main(["chat", "--id", "7"]) == ExitCode.FAILED, "said before a window opens"
    assert len(seen) == 3


def test_chat_defaults_fit_the_windows_own_type(tmp_path: Path) -> None:
    pytest.importorskip("tui.bridge")
    from mimo_local.cli.chat import defaults

    made = defaults(Settings.resolve(model=tmp_path, temperature=0.2, system="S"), ())
    assert made.overrides == {"temperature": 0.2}
    assert made.system == "S"


def test_plain_chat_is_line_by_line_and_remembers(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Screen()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stdin", Stdin(b"first\n\nsecond\n/bye\nnever\n", tty=True))
    engine.queue("one")
    engine.queue("two")
    assert cli.main(["chat"]) == 0, "stderr is no terminal here, so there is no window to draw"
    assert out.getvalue() == "one\ntwo\n"
    assert len(engine.requests) == 2
    for text in ("first", "one", "second"):
        assert text in engine.requests[1].prompt


def test_a_question_is_saved_and_another_one_goes_on_with_it(engine: FakeEngine) -> None:
    assert cli.main(["chat", "my name is Ada"]) == 0
    assert cli.main(["chat", "something else"]) == 0
    assert cli.main(["chat", "-c", "--think", "and then?"]) == 0
    assert cli.main(["chat", "--id", "1", "what is my name?"]) == 0
    assert cli.main(["chat", "--no-history", "not for later"]) == 0
    third, fourth, fifth = (request.prompt for request in engine.requests[2:])
    assert "something else" in third and "Ada" not in third
    assert "my name is Ada" in fourth and "fake answer" in fourth and "and then" not in fourth
    assert "Ada" not in fifth
    from mimo_local.history import History

    with History.open(Paths.default().history_file) as history:
        assert [info.n_messages for info in history.chats()] == [4, 4]
        assert not history.search("later")


@pytest.mark.parametrize("args", [["-c"], ["--id", "7"], ["-c", "--id", "7"]])
def test_a_chat_that_is_not_there_stops_before_the_model_is_loaded(
    args: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(models, "open_engine", lambda settings: pytest.fail("loaded a model"))
    assert cli.main(["chat", *args, "hi"]) in (ExitCode.USAGE, ExitCode.FAILED)
    assert "hint: " in capsys.readouterr().err


def test_a_history_that_cannot_be_written_does_not_cost_the_answer(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = Paths.default().history_file
    file.parent.mkdir(parents=True)
    file.mkdir()
    assert cli.main(["chat", "hi"]) == 0
    out, err = capsys.readouterr()
    assert out == "fake answer\n" and err.count("not saved") == 1


def test_plain_chat_writes_answers_where_stdout_goes(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin(b"one\n/exit\n", tty=True))
    assert cli.main(["chat", "--plain"]) == 0
    assert capsys.readouterr().out == "fake answer\n"


# -- which model -----------------------------------------------------------------------------------


def test_the_model_typed_wins_then_a_pack_then_the_demo(
    user_home: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(models, "demo_pack", lambda: tmp_path / "demo")
    assert models.choose(Settings.resolve()).model == tmp_path / "demo"
    assert "not MiMo" in capsys.readouterr().err
    pack = user_home / "data" / "packs" / "mine"
    pack.mkdir(parents=True)
    (pack / "pack.json").write_text("{}")
    assert models.choose(Settings.resolve()).model == pack
    assert "mine" in capsys.readouterr().err
    typed = models.choose(Settings.resolve(model=tmp_path))
    assert typed.model == tmp_path
    assert capsys.readouterr().err == ""


def test_a_model_that_does_not_exist_is_named_with_its_origin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MIMO_MODEL", "/gone/away")
    with pytest.raises(UsageError, match=r"/gone/away.*MIMO_MODEL"):
        models.choose(Settings.resolve())


# -- summarize -------------------------------------------------------------------------------------


def test_a_summary_goes_to_stdout_and_its_notes_to_stderr(
    engine: FakeEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("The harbour froze in January. Trade stopped.\n")
    engine.queue("The harbour froze [sec. 1].")
    assert cli.main(["summarize", str(tmp_path / "notes.txt"), "--focus", "ice"]) == 0
    out, err = capsys.readouterr()
    assert "The harbour froze" in out
    assert "% of" in err and "% of" not in out
    assert "ice" in engine.requests[0].prompt
    assert engine.closed


def test_a_summary_to_a_file_and_as_json(
    engine: FakeEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("The harbour froze in January.\n")
    source, target = str(tmp_path / "notes.txt"), tmp_path / "out.md"
    engine.queue("It froze.")
    assert cli.main(["summarize", source, "-o", str(target)]) == 0
    assert capsys.readouterr().out == ""
    assert "It froze." in target.read_text()
    engine.queue("It froze.")
    assert cli.main(["summarize", source, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mode"] == "one pass"
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".part"] == []


def test_an_impossible_output_is_refused_before_the_work(
    engine: FakeEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("text\n")
    for target in (tmp_path, tmp_path / "no" / "folder.md"):
        args = ["summarize", str(tmp_path / "notes.txt"), "-o", str(target)]
        assert cli.main(args) == ExitCode.USAGE
        assert str(target) in capsys.readouterr().err
    assert engine.requests == []


# -- packs -----------------------------------------------------------------------------------------


def test_a_bare_name_is_a_pack_in_the_packs_folder(user_home: Path, tmp_path: Path) -> None:
    assert packs.folder_for(Path("mine")) == user_home / "data" / "packs" / "mine"
    for path in (Path("a/b"), Path("./x/y"), tmp_path / "z", Path()):
        assert packs.folder_for(path) == path


def test_verify_names_a_folder_that_is_no_pack(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["verify", str(tmp_path)]) == ExitCode.MODEL_FILES
    assert "pack.json" in capsys.readouterr().err


def test_demo_prints_the_path_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[dict[str, Any]] = []

    def demo_pack(**options: Any) -> Path:
        seen.append(options)
        return Path("/somewhere/demo")

    monkeypatch.setattr(models, "demo_pack", demo_pack)
    assert cli.main(["demo", "--variant", "exact", "--format", "bf16", "--rebuild"]) == 0
    out, err = capsys.readouterr()
    assert out == "/somewhere/demo\n"
    assert "not MiMo" in err
    assert seen == [{"variant": "exact", "fmt": "bf16", "rebuild": True}]


def test_a_checkpoint_becomes_a_pack_that_is_verified_planned_and_measured(
    user_home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import tiny

    config = tiny.config(hidden=64, intermediate=128, moe_intermediate=64, v_head_dim=16)
    source = tiny.write(tmp_path / "source", config)
    assert cli.main(["quantize", str(source), "small", "--head", "bf16"]) == 0
    target = user_home / "data" / "packs" / "small"
    out, err = capsys.readouterr()
    assert out == f"{target}\n"
    assert "(estimated)" in err and "written" in err
    assert cli.main(["quantize", str(source), "small", "--head", "bf16"]) == 0, "nothing left to do"
    capsys.readouterr()

    assert cli.main(["verify", "small", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True

    assert cli.main(["plan", "-m", str(target), "--context", "64", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    data = sum(p.stat().st_size for p in target.glob("*.safetensors"))
    assert 0.7 * data < planned["total"] <= data, "headers and padding are all that is missing"
    assert planned["fits"] and planned["staging_slots"] == 0

    assert cli.main(["bench", "-m", "small", "-p", "8", "-n", "2", "-r", "1"]) == 0
    measured = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [r["test"] for r in measured["results"]] == ["pp8", "tg2"]
    assert "small" in measured["model"]

    victim = next(target.glob("experts-*.safetensors"))
    damaged = bytearray(victim.read_bytes())
    damaged[-1] ^= 1
    victim.write_bytes(damaged)
    assert cli.main(["verify", str(target)]) == ExitCode.MODEL_FILES
    assert victim.name in capsys.readouterr().err


def test_an_unknown_format_stops_before_anything_is_written(
    user_home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import tiny

    source = tiny.write(tmp_path / "source")
    assert cli.main(["quantize", str(source), "small", "--attention", "q4_k"]) == ExitCode.USAGE
    assert "q4_k" in capsys.readouterr().err
    assert not (user_home / "data").exists()


def test_a_long_conversion_is_confirmed_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import tiny

    source = tiny.write(tmp_path / "source")
    monkeypatch.setattr(packs, "quantize_rate", lambda recipe, config: 1.0)
    monkeypatch.setattr(sys, "stdin", Stdin(b"n\n", tty=True))
    assert cli.main(["quantize", str(source), str(tmp_path / "pack")]) == ExitCode.INTERRUPTED
    assert not (tmp_path / "pack").exists()
    assert " h (estimated)" in capsys.readouterr().err
    assert cli.main(["quantize", str(source), str(tmp_path / "pack"), "--yes"]) == 0


# -- machine ---------------------------------------------------------------------------------------

GPU_24 = Budget(
    ram=0, disk=1000 * GB, vram=24 * GB, cores=16, ram_rate=80e9, core_flops=CORE_FLOPS["avx512"]
)
MACHINES = {
    "laptop-16gb": Budget(ram=16 * GB, disk=500 * GB, cores=8, ram_rate=50e9, disk_rate=3.5e9),
    "laptop-8gb": Budget(ram=8 * GB, disk=150 * GB, cores=4, ram_rate=50e9, disk_rate=3.5e9),
    **{f"rtx4090-{ram}gb": replace(GPU_24, ram=ram * GB) for ram in (32, 64, 96, 128, 192)},
    "rtx4060-32gb": here.with_gpu(replace(GPU_24, ram=32 * GB, cores=8), 8 * GB),
    "rtx3060-64gb": here.with_gpu(replace(GPU_24, ram=64 * GB, cores=8), 12 * GB),
    "cpu-256gb": Budget(
        ram=256 * GB, disk=2000 * GB, cores=32, ram_rate=200e9, core_flops=CORE_FLOPS["avx512"]
    ),
}


@pytest.mark.parametrize("name", MACHINES)
def test_the_plan_of_a_machine(name: str, golden: Golden) -> None:
    config, pack, title = plan_command.subject(None, "nf4")
    found = plan(config, pack, MACHINES[name])
    cpu = plan(config, pack, replace(MACHINES[name], vram=0)) if found.device.layers else None
    text = plan_text.plan(found, title, cpu) + "\n"
    text += "".join(f"error: {p.message}\nhint: {p.hint}\n" for p in found.problems)
    golden(f"plan/{name}.txt", text)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("24GB", 24 * GB),
        ("24 gb", 24 * GB),
        ("24G", 24 * GB),
        ("1.5TB", 1500 * GB),
        ("23.5GiB", int(23.5 * 2**30)),
        ("0", 0),
        ("512mib", 512 << 20),
        ("1000", 1000),
    ],
)
def test_sizes(text: str, nbytes: int) -> None:
    assert plan_command.size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1ib", "1.GB", "24 GB RAM", "1e9", "٣GB"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size"):
        plan_command.size(text)


def test_plan_takes_what_is_typed_and_the_machine_for_the_rest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = ["plan", "--vram", "24GB", "--ram", "64GB", "--disk", "1TB", "--cores", "16"]
    assert cli.main([*args, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    budget = data["budget"]
    assert (budget["vram"], budget["ram"], budget["disk"]) == (24 * GB, 64 * GB, 1000 * GB)
    assert budget["cores"] == 16
    assert data["fits"] is True and data["staging_slots"] == 16
    slower = data["without_gpu"]["decode"][0]["tokens_per_s"]
    assert 0 < slower < data["prediction"]["decode"][0]["tokens_per_s"]
    cli.main(["plan", "--disk", "1TB", "--json"])
    from mimo_local import hardware

    assert json.loads(capsys.readouterr().out)["budget"]["ram"] == hardware.detect().ram_total


def test_less_vram_than_there_is_is_the_same_card_more_is_another(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mimo_local import hardware

    found = (hardware.Gpu("NVIDIA GeForce RTX 3090", 24 * GB, 20 * GB),)
    monkeypatch.setattr(hardware, "gpus", lambda: found)
    lines = {}
    for vram in ("0", "16GB", "24GB", "32GB"):
        assert cli.main(["plan", "--vram", vram, "--ram", "64GB", "--disk", "1TB"]) == 0
        lines[vram] = capsys.readouterr().out
    assert "VRAM 936 GB/s (RTX 3090)" in lines["16GB"] and "16.0 GB VRAM" in lines["16GB"]
    assert "VRAM 936 GB/s (RTX 3090)" in lines["24GB"]
    assert "VRAM 1792 GB/s (like an RTX 5090)" in lines["32GB"]
    assert "no GPU" in lines["0"] and "GB/s (RTX" not in lines["0"]
    assert "without the GPU: decode" in lines["24GB"] and "without the GPU" not in lines["0"]
    args = ["plan", "--vram", "24GB", "--ram", "64GB", "--disk", "1TB", "--vram-rate", "500GB/s"]
    assert cli.main(args) == 0
    assert "VRAM 500 GB/s (given)" in capsys.readouterr().out


def test_a_plan_that_cannot_work_is_shown_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--ram", "4GB", "--vram", "0", "--disk", "1TB"]) == ExitCode.MEMORY
    out, err = capsys.readouterr()
    assert "attention" in out
    assert "missing" in err and "hint: " in err


def test_plan_loads_neither_torch_nor_a_model() -> None:
    code = (
        "import sys\nfrom mimo_local.cli import main\n"
        "main('plan --vram 24GB --ram 64GB --disk 1TB'.split())\n"
        "print('HEAVY', sorted({'torch', 'numpy', 'textual'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "HEAVY []", done.stderr


def test_bench_prints_a_table_and_last_one_line_of_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from test_benchmark import FakeRunner

    runner = FakeRunner(step_s=0.001)
    monkeypatch.setattr(machine, "load_runner", lambda settings: (runner, "a model", 1.5))
    assert cli.main(["bench", "-p", "16", "-n", "4", "-d", "0,8", "-t", "1,2", "-r", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    data = json.loads(lines[-1])
    names = ["pp16", "tg4", "pp16 @ d8", "tg4 @ d8"] * 2
    assert [result["test"] for result in data["results"]] == names
    assert (data["model"], data["load_s"]) == ("a model", 1.5)
    assert "t/s" in lines[0] and "±" in lines[2]


def test_doctor_fails_only_when_something_is_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import mimo_local.doctor as module
    from mimo_local.doctor import Problem, Report

    for level, code in (("warning", 0), ("broken", 1)):
        problem = Problem(level, "it leaks", "call a plumber")  # type: ignore[arg-type]
        report = Report((("machine", (("CPU", "one"),)),), (problem,))
        monkeypatch.setattr(module, "examine", lambda r=report: r)
        assert cli.main(["doctor"]) == code
        out = capsys.readouterr().out
        assert f"{level}: it leaks\n  fix: call a plumber" in out
        cli.main(["doctor", "--json"])
        assert json.loads(capsys.readouterr().out)["ok"] is (code == 0)


def test_config_show_says_where_values_come_from(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], user_home: Path
) -> None:
    monkeypatch.setenv("MIMO_TOP_P", "0.5")
    (user_home / "config").mkdir()
    (user_home / "config" / "config.toml").write_text('preset = "code"\n')
    assert cli.main(["config", "show"]) == 0
    out = capsys.readouterr().out
    assert any(line.split() == ["top_p", "0.5", "MIMO_TOP_P"] for line in out.splitlines())
    assert cli.main(["config", "show", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["preset"]["value"] == "code"
    assert data["preset"]["from"].endswith("config.toml")
    assert data["seed"] == {"value": None, "from": "default"}


# -- progress --------------------------------------------------------------------------------------


def test_progress_on_a_terminal_is_one_line_that_is_taken_away() -> None:
    screen, now = Screen(), [0.0]
    show = status.Status(screen, clock=lambda: now[0])
    for done in range(0, 101, 10):
        show(Progress("converting", done * GB, 100 * GB))
        now[0] += 5
    assert "\n" not in screen.getvalue()
    assert "left" in screen.getvalue() and "100%" in screen.getvalue()
    show.clear()
    assert screen.getvalue().endswith(" \r")


def test_the_rate_is_that_of_the_whole_work_not_of_its_last_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    screen, now = Screen(), [0.0]
    show = status.Status(screen, clock=lambda: now[0])
    for i in range(31):
        show(Progress(f"verifying experts-{i:03d}.safetensors", i * GB, 60 * GB))
        now[0] += 2
    assert screen.getvalue().rstrip().endswith("60 s left"), "30 files of 60 took 60 s"


def test_work_of_a_few_seconds_leaves_no_line_in_a_log() -> None:
    log, now = io.StringIO(), [0.0]
    show = status.Status(log, clock=lambda: now[0])
    for done in range(9):
        show(Progress("loading", done, 9, "layers"))
        now[0] += 1
    assert log.getvalue() == ""


def test_progress_in_a_log_is_rare() -> None:
    log, now = io.StringIO(), [0.0]
    show = status.Status(log, clock=lambda: now[0])
    for stage in ("one", "two"):
        for done in range(100):
            show(Progress(stage, done, 100, "files"))
            now[0] += 0.5
    lines = log.getvalue().splitlines()
    assert [text.split()[0] for text in lines] == ["one"] * 4 + ["two"] * 5
    assert "\r" not in log.getvalue()


def test_progress_of_a_prompt_and_without_a_total() -> None:
    screen = Screen()
    show = status.Status(screen)
    show(Prefill(512, 2048, 100.0))
    assert "reading the prompt  [##......]  25%  512/2,048 tokens" in screen.getvalue()
    assert status.line(Progress("counting", 7, 0, "files")) == "counting  7 files"


def test_the_time_left_is_what_the_rest_takes_at_the_speed_so_far() -> None:
    screen, now = Screen(), [100.0]
    show = status.Status(screen, clock=lambda: now[0])
    show(Progress("copying", 0, 100, "files"))
    now[0] += 60
    show(Progress("copying", 25, 100, "files"))
    assert "3 min left" in screen.getvalue(), "75 files at 25 a minute"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (99, "99 s"), (120, "2 min"), (9000, "2.5 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert status.duration(seconds) == text


# -- plan: rates given, calibrated, checked --------------------------------------------------------


def test_given_rates_and_pages_reach_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["plan", "--vram", "0", "--ram", "64GB", "--disk", "1TB", "--ram-rate", "60GB/s"]
    args += ["--disk-rate", "3.5GB", "--pages", "40", "--context", "32768"]
    assert cli.main([*args, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["budget"]["ram_rate"] == 60e9 and data["budget"]["disk_rate"] == 3.5e9
    assert data["prediction"]["prefill"]["tokens"] == 40 * 550
    assert data["hidden_budget_bytes"] > 0 and data["context"] == 32768
    assert cli.main(args) == 0
    out = capsys.readouterr().out
    assert "RAM 60 GB/s (given)" in out and "disk 3.5 GB/s (given)" in out
    assert "40 pages (22000 tokens) read in" in out and "uniform-skewed" in out


def test_calibrating_answering_and_checking_a_pack(
    user_home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import tiny

    from mimo_local import runs
    from mimo_local.runs import Cost, Predicted, Run

    assert cli.main(["plan", "--check"]) == 0
    assert "no answer" in capsys.readouterr().out
    source = tiny.write(tmp_path / "source", tiny.config(hidden=64, moe_intermediate=64))
    assert cli.main(["quantize", str(source), "small"]) == 0
    assert cli.main(["plan", "--calibrate", "-m", str(source)]) == ExitCode.USAGE
    target = user_home / "data" / "packs" / "small"
    capsys.readouterr()
    assert cli.main(["plan", "--calibrate", "-m", str(target)]) == 0
    out, err = capsys.readouterr()
    assert "calibrated with a prompt of 512 tokens and 24 more" in err
    assert out.count("(calibrated ") == 2 and "disk 7 GB/s (assumed)" in out
    assert cli.main(["plan", "-m", str(target)]) == 0
    assert "(calibrated " in capsys.readouterr().out, "kept for the next time"
    assert cli.main(["plan", "-m", str(target), "--cores", "3"]) == 0
    assert "(calibrated " not in capsys.readouterr().out, "that is another machine"

    from mimo_local import hardware
    from mimo_local.plan import here

    way = Predicted(2.0, 0.4, 2e9, 0.1, 0.1, 0.3)
    run = Run(
        at="2026-11-28T12:00:00+00:00", machine=here.machine_key(hardware.detect()),
        model="small", pack="p", kernel="avx2", calibrated=True, prefill=Cost(1000, 10.0),
        decode=Cost(100, 200.0, wait_s=170.0, disk_bytes=200 * GB), predicted=(way, way),
        predicted_prefill_s=9.0, bound="disk", peak_rss=GB, planned_ram=2 * GB,
    )  # fmt: skip
    runs.append(user_home / "data" / runs.FILE, run)
    runs.append(user_home / "data" / runs.FILE, replace(run, machine="another"))
    assert cli.main(["plan", "--check"]) == 0
    out = capsys.readouterr().out
    assert out.count("| 2026-11-28 12:00 |") == 1, "only this machine's"
    assert "decode was 4.0 times slower than predicted: waiting for the disk took 1700 ms" in out
    assert "prefill was as predicted" in out and "planned 2.0 GB" in out
    assert cli.main(["plan", "--check", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["runs"]
    assert found["findings"][0]["off"] and found["decode"]["tokens"] == 100
    assert cli.main(["doctor", "--json"]) in (0, 1)
    report = json.loads(capsys.readouterr().out)
    assert report["sections"]["predictions"]["decode"].startswith("0.5 tokens/s measured")
    assert any("4.0 times slower" in problem["message"] for problem in report["problems"])
