"""A server's life: loading behind an open port, failing to load, stopping in the middle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from fakes import FakeEngine
from servers import PATIENCE_S, events, serving, wait_until

from mimo_local import cli
from mimo_local.cli import models
from mimo_local.cli import serve as serve_command
from mimo_local.errors import CancelledError, PackError, UsageError
from mimo_local.events import Progress
from mimo_local.server import run as server_run
from mimo_local.server.options import Options
from mimo_local.server.replies import Health, NotReady
from mimo_local.settings import Settings

CHAT = "/v1/chat/completions"
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
Tell = Callable[[Progress], None]


def test_the_port_answers_while_the_model_loads() -> None:
    go_on, engine = threading.Event(), FakeEngine()

    def opener(tell: Tell) -> FakeEngine:
        tell(Progress("loading experts", 42, 100, "experts"))
        assert go_on.wait(PATIENCE_S)
        return engine

    with serving(engine, opener=opener) as server:
        wait_until(lambda: server.service.progress)
        status, headers, data = server.call("GET", "/health")
        found = NotReady.model_validate_json(data)
        assert (status, found.status, found.done, found.total) == (503, "loading", 42, 100)
        assert headers["retry-after"] == "5"
        status, body = server.json("POST", CHAT, ASK)
        assert status == 503 and "loading experts 42%" in body["error"]["message"]
        assert server.json("GET", "/v1/models")[0] == 503
        assert server.call("GET", "/metrics")[0] == 200
        assert server.call("GET", "/openapi.json")[0] == 200
        go_on.set()
        wait_until(lambda: server.service.engine)
        status, body = server.json("GET", "/health")
        assert status == 200 and Health.model_validate(body).model == "fake"
        assert server.json("POST", CHAT, ASK)[0] == 200
    assert engine.closed


@pytest.mark.parametrize("error", [PackError("it is corrupt", hint="verify"), ValueError("odd")])
def test_a_model_that_cannot_be_loaded_ends_the_server(error: Exception) -> None:
    def opener(tell: Tell) -> FakeEngine:
        raise error

    with pytest.raises(PackError if isinstance(error, PackError) else Exception, match=str(error)):
        server_run.serve(Options(port=0), opener, lambda url: None)


def test_stopping_while_loading_stops_the_loading() -> None:
    said: list[BaseException] = []

    def opener(tell: Tell) -> FakeEngine:
        try:
            for n in range(10**6):
                tell(Progress("loading", n, 10**6))
                time.sleep(0.001)
        except CancelledError as error:
            said.append(error)
            raise
        return FakeEngine()

    running = server_run.Running(Options(port=0, grace_s=0), opener)
    timer = threading.Timer(0.3, running.stop)
    timer.start()
    running.run()
    assert said, "it was not told"
    timer.join()


def test_an_engine_that_comes_too_late_is_closed_all_the_same() -> None:
    engine, running = FakeEngine(), None

    def opener(tell: Tell) -> FakeEngine:
        assert running is not None
        running.stop()
        wait_until(lambda: running.service.stopping)
        return engine

    running = server_run.Running(Options(port=0, grace_s=0), opener)
    running.run()
    assert engine.closed


def test_a_port_that_is_taken_is_said() -> None:
    with serving(FakeEngine()) as server:
        with pytest.raises(UsageError, match="cannot listen") as caught:
            server_run.bind(Options(port=server.port))
        assert "--port" in caught.value.hint
    with pytest.raises(UsageError, match="cannot listen"):
        server_run.bind(Options(host="no.such.host.invalid", keys=("k",)))


def test_what_runs_may_finish_and_what_waits_ends() -> None:
    engine = FakeEngine(delay_s=0.05)
    engine.queue(*"abcdefgh")
    with serving(engine, grace_s=10) as server:
        found: list[tuple[int, bytes]] = []

        def ask() -> None:
            status, _, data = server.call("POST", CHAT, {**ASK, "stream": True})
            found.append((status, data))

        thread = threading.Thread(target=ask)
        thread.start()
        wait_until(lambda: server.service.running)
        server.stop()
        thread.join(PATIENCE_S)
    ((status, data),) = found
    text = "".join(e["choices"][0]["delta"].get("content") or "" for e in events(data)[:-1])
    assert (status, text, events(data)[-1]) == (200, "abcdefgh", "[DONE]")


@pytest.mark.parametrize("stream", [True, False])
def test_after_the_grace_an_answer_is_told_that_it_ends(stream: bool) -> None:
    engine = FakeEngine()
    engine.queue("some", hold=True)
    with serving(engine, grace_s=0.3) as server:
        found: list[tuple[int, bytes]] = []

        def ask() -> None:
            status, _, data = server.call("POST", CHAT, {**ASK, "stream": stream})
            found.append((status, data))

        thread = threading.Thread(target=ask)
        thread.start()
        wait_until(lambda: server.service.running)
        server.stop()
        thread.join(PATIENCE_S)
    ((status, data),) = found
    if stream:
        assert "stopped" in events(data)[-1]["error"]["message"]
        assert status == 200
    else:
        assert status == 503
        assert json.loads(data)["error"]["code"] == "stopping"


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Settings, Options]]:
    """What `mimo serve` would have served."""
    calls: list[tuple[Settings, Options]] = []
    monkeypatch.delenv("MIMO_API_KEY", raising=False)

    def run(settings: Settings, options: Options) -> int:
        calls.append((settings, options))
        return 0

    monkeypatch.setattr(serve_command, "run", run)
    return calls


def test_flags_become_options(
    served: list[tuple[Settings, Options]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    file = tmp_path / "keys"
    file.write_text("# mine\nfrom-file\n\n  another \n")
    file.chmod(0o644)
    monkeypatch.setenv("MIMO_API_KEY", "from-env")
    args = "--host 0.0.0.0 --port 99 --api-key typed --cors http://a.example/ --alias gpt"
    args += " --max-requests 3 --max-body 2MB --grace 1 --think --max-tokens 50 --allow-host box"
    assert cli.main(["serve", *args.split(), "--api-key-file", str(file)]) == 0
    ((_, options),) = served
    assert options.keys == ("typed", "from-env", "from-file", "another")
    assert (options.host, options.port, options.cors) == ("0.0.0.0", 99, ("http://a.example",))
    assert (options.max_requests, options.max_body, options.grace_s) == (3, 2_000_000, 1)
    assert (options.thinking, options.max_tokens, options.aliases) == (True, 50, ("gpt",))
    assert options.allowed_hosts == ("box",)
    assert "chmod 600" in capsys.readouterr().err
    file.chmod(0o600)
    assert cli.main(["serve", "--api-key-file", str(file)]) == 0
    assert "chmod" not in capsys.readouterr().err


def test_defaults_are_the_models_own_recommendation(
    served: list[tuple[Settings, Options]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["serve"]) == 0
    options = served[-1][1]
    assert options.loopback and not options.keys
    assert (options.params.temperature, options.params.top_p) == (0.8, 0.95)
    assert options.max_tokens is None
    monkeypatch.setenv("MIMO_TEMPERATURE", "0")
    assert cli.main(["serve", "--preset", "code"]) == 0
    options = served[-1][1]
    assert (options.params.temperature, options.params.repetition_penalty) == (0, 1.2)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("--host 0.0.0.0", "everybody"),
        ("--api-key-file /nowhere", "cannot be read"),
        ("--max-body lots", "--max-body"),
        ("--port 70000", "65535"),
        ("--cors *", "every web page"),
        ("--preset haiku", "haiku"),
    ],
)
def test_what_the_command_refuses(
    served: list[tuple[Settings, Options]], capsys: pytest.CaptureFixture[str], args: str, said: str
) -> None:
    assert cli.main(["serve", *args.split()]) == 2
    assert said in capsys.readouterr().err
    assert not served


def test_an_empty_key_file_is_no_open_door(
    served: list[tuple[Settings, Options]], tmp_path: Path
) -> None:
    (tmp_path / "keys").write_text("\n# nothing\n")
    assert cli.main(["serve", "--api-key-file", str(tmp_path / "keys")]) == 2
    assert not served


def test_the_loader_tells_the_terminal_and_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    from mimo_local.engine import Engine

    def load(settings: Settings, on_event: Tell) -> Any:
        on_event(Progress("loading", 1, 2))
        return FakeEngine()

    monkeypatch.setattr(Engine, "load", load)
    told: list[Progress] = []
    settings = Settings(model=Path(__file__).parent)
    models.open_engine(settings, told.append)
    assert told == [Progress("loading", 1, 2)]
    models.open_engine(settings)


SCRIPT = """
import sys
sys.path[:0] = [{tests!r}]
from fakes import FakeEngine
from mimo_local import cli
from mimo_local.cli import models
engine = FakeEngine()
engine.queue("some", hold=True)
models.open_engine = lambda settings, tell=None: engine
code = cli.main(["serve", "--port", "0", "--grace", "0.2"])
print("CLOSED", engine.closed)
sys.exit(code)
"""


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_it_and_the_exit_is_clean(sig: signal.Signals, tmp_path: Path) -> None:
    tests = Path(__file__).parent.parent
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(tests=str(tests))],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tests.parent,
        env=os.environ | {"MIMO_HOME": str(tmp_path), "MIMO_API_KEY": ""},
    )  # fmt: skip
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert line.startswith("serving http://127.0.0.1:"), line
        url = line.split()[1]
        assert "ready: fake" in process.stderr.readline()
        with openai.OpenAI(base_url=url, api_key="x", max_retries=0) as client:
            stream = client.chat.completions.create(model="fake", stream=True, **ASK)
            next(iter(stream))
            process.send_signal(sig)
            with pytest.raises(openai.APIError, match="stopped"):
                for _ in stream:
                    pass
        out, err = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, out) == (0, "CLOSED True\n"), err
    assert err == "stopped\n"
