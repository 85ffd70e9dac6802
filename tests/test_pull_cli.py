"""`mimo pull` and `mimo plan REPO` as a person types them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from hub_server import REPO, Fault, HubServer
from test_pull import hashes, hub, shard_fault, source, wanted  # noqa: F401  (fixtures)

from mimo_local import cli
from mimo_local.errors import ExitCode


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    monkeypatch.setattr("mimo_local.pull.run.PROBE_S", 0.05)


def test_one_command_makes_a_pack_that_chat_finds(
    hub: HubServer,  # noqa: F811
    wanted: dict[str, str],  # noqa: F811
    user_home: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["pull", "--yes"]) == 0
    pack = user_home / "data" / "packs" / "MiMo-V2-Flash-nf4"
    out, err = capsys.readouterr()
    assert out == f"{pack}\n" and hashes(pack) == wanted
    assert f"{REPO} at {hub.commit[:12]}" in err and "(estimated)" in err
    assert "experts" in err and "mimo chat -m MiMo-V2-Flash-nf4" in err
    hub.asked.clear()
    assert cli.main(["pull"]) == 0, "nothing left to do, nothing to ask"
    assert "already there" in capsys.readouterr().err and not hub.asked
    assert cli.main(["pull", "--format", "int8", "--to", "MiMo-V2-Flash-nf4"]) == ExitCode.USAGE
    assert "other formats" in capsys.readouterr().err


def test_a_dry_run_says_all_and_leaves_nothing(
    hub: HubServer,  # noqa: F811
    user_home: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["pull", REPO, "--dry-run", "--format", "int8"]) == 0
    out = capsys.readouterr().out
    assert "fetch" in out and "convert" in out and "disk" in out and "MB free" in out + "MB free"
    assert not list(user_home.rglob("*.source")), "a dry run writes nothing"
    assert "weights" in out and "VRAM" in out


def test_nobody_there_to_ask_is_no_yes(
    hub: HubServer,  # noqa: F811
    user_home: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["pull"]) == ExitCode.USAGE
    assert "--yes" in capsys.readouterr().err
    assert not list(user_home.rglob("*.source")), "planning leaves nothing behind"


@pytest.mark.parametrize(("answer", "code"), [("n\n", 130), ("y\n", 0)])
def test_it_asks_first(
    answer: str,
    code: int,
    hub: HubServer,  # noqa: F811
    user_home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import io

    class Typed(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Typed(answer))
    assert cli.main(["pull"]) == code
    assert (user_home / "data" / "packs" / "MiMo-V2-Flash-nf4" / "pack.json").exists() == (not code)


def test_json_is_a_line_per_event(
    hub: HubServer,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["pull", "--json", "--yes", "--rate-limit", "500MB/s", "--to", "small"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    kinds = [line["event"] for line in lines]
    assert kinds[-1] == "done" and "plan" in kinds and "progress" in kinds
    plan = lines[kinds.index("plan")]
    sizes = [p.stat().st_size for p in hub.folder.glob("*.safetensors")]
    assert plan["source_bytes"] == sum(sizes) and plan["files"] == len(sizes)
    assert plan["disk_needed"] > plan["pack_bytes"] and plan["fits"] is True
    pack = Path(lines[-1]["pack"])
    written = sum(p.stat().st_size for p in pack.glob("*.safetensors"))
    assert plan["pack_bytes"] == written and pack.name == "small"
    moves = [line["done"] for line in lines if line["event"] == "progress"][-5:]
    assert moves == sorted(moves)


def test_json_tells_of_errors_too(
    hub: HubServer,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    hub.fault = shard_fault(Fault(status=503), times=10**6, name="model_1_linear")
    assert cli.main(["pull", "--json", "--yes"]) == ExitCode.FAILED
    out, err = capsys.readouterr()
    last = json.loads(out.splitlines()[-1])
    assert last["event"] == "error" and "503" in last["message"] and last["hint"]
    assert err.startswith("error: ") or "error: " in err


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["pull", "not-a-repository"], "owner/name"),
        (["pull", "--rate-limit", "fast"], "not a rate"),
        (["pull", "--format", "gguf"], "gguf"),
        (["plan", "a/b", "-m", "here"], "only one can be planned"),
    ],
)
def test_wrong_usage(
    args: list[str],
    text: str,
    hub: HubServer,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(args) == ExitCode.USAGE
    assert text in capsys.readouterr().err


def test_planning_a_repository_reads_exact_sizes_and_fetches_nothing(
    hub: HubServer,  # noqa: F811
    wanted: dict[str, str],  # noqa: F811
    user_home: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["plan", REPO, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == f"{REPO} at {hub.commit[:12]} as nf4 pack"
    assert sum(name.endswith(".safetensors") for name in hub.files("resolve")) == 10
    assert not list(user_home.rglob("*.safetensors"))
    assert cli.main(["pull", "--yes", "--to", "p"]) == 0
    capsys.readouterr()
    assert cli.main(["plan", "-m", str(user_home / "data" / "packs" / "p"), "--json"]) == 0
    pack = json.loads(capsys.readouterr().out)
    assert found["sizes"] == pack["sizes"], "what the headers promise is what is made"
