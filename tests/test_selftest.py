"""`mimo bench --gpu-selftest`: right devices pass, broken ones are found, the report names nobody.

On the CPU as the device, and on the stand-in device in processes of their own.
"""

from __future__ import annotations

import getpass
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sim_device
import torch
from built import needs_compiler

from mimo_local.cli import main
from mimo_local.errors import ExitCode, UsageError
from mimo_local.selftest import document, rates, run
from mimo_local.selftest.run import SelfTest
from mimo_local.selftest.types import REAL, SMALL, Result, off

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
on_sim = needs_compiler


def test_the_cpu_as_the_device_passes_and_leaves_a_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "r.md"
    code = main(["bench", "--gpu-selftest", "--device", "cpu", "--report", str(report)])
    shown = capsys.readouterr()
    assert code == ExitCode.OK, shown.out
    data = json.loads(shown.out.splitlines()[-1])
    assert data["ok"]
    areas = {result["area"] for result in data["results"]}
    assert areas == {"copies", "products", "attention", "experts", "model"}
    names = " ".join(result["name"] for result in data["results"])
    for what in ("nf4", "mxfp4", "int8", "bf16", "sliding with sink", "drafts", "a prompt"):
        assert what in names
    assert sum(result["ok"] is True for result in data["results"]) > 30
    text = report.read_text()
    assert text.startswith("# GPU self-test: ")
    assert json.loads(text.split("```json\n")[1].split("\n```")[0]) == data
    assert str(report) in shown.err
    assert "passed" in shown.out
    for private in (str(Path.home()), str(tmp_path), str(ROOT)):
        assert private not in text


def sim(case: str) -> dict[str, Any]:
    sim_device.build()
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "sim" / "selftest_on_sim.py"), case],
        capture_output=True, text=True, cwd=ROOT, timeout=400, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    found["results"] = [Result(*one) for one in found["results"]]
    return found


@on_sim
def test_a_device_with_lazy_copies_and_bfloat16_passes() -> None:
    found = sim("right")
    assert found["ok"], found["results"]
    # Some of it is not exact: what passes there was rounded as on a card.
    assert any("0.2" in one.found for one in found["results"] if one.area == "attention")


@on_sim
@pytest.mark.parametrize(
    ("case", "area", "named"),
    [
        ("experts used before they are there", "experts", "int8"),
        ("scales left out", "products", "int8, head"),
        ("no sink", "attention", "sliding with sink, one row"),
    ],
)
def test_a_device_that_computes_wrongly_is_found(case: str, area: str, named: str) -> None:
    found = sim(case)
    assert not found["ok"]
    failed = [one for one in found["results"] if one.ok is False]
    assert {one.area for one in failed} == {area}
    assert any(named in one.name for one in failed)
    if case == "no sink":
        assert all("sliding" in one.name for one in failed)


@on_sim
def test_a_device_that_fails_in_one_thing_is_tested_in_the_others() -> None:
    found = sim("a device that fails")
    assert not found["ok"]
    (failed,) = [one for one in found["results"] if one.ok is False]
    assert (failed.area, failed.found) == ("experts", "RuntimeError: sim: the device is lost")
    assert {"copies", "attention"} < {one.area for one in found["results"]}


# ---- the run -------------------------------------------------------------------------------------


def stopped() -> Iterator[Result]:
    yield Result("copies", "one", None, "1 GB/s")
    raise KeyboardInterrupt


def test_ctrl_c_keeps_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rates, "copies", lambda device, sizes: stopped())
    report = tmp_path / "r.md"
    code = main(["bench", "--gpu-selftest", "--device", "cpu", "--report", str(report)])
    assert code == ExitCode.INTERRUPTED
    assert "stopped early" in report.read_text()
    data = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [result["name"] for result in data["results"]] == ["one"]
    assert not data["ok"]


def test_a_failed_check_fails_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = Result("copies", "bytes come back", False, "no", "yes")
    monkeypatch.setattr(SelfTest, "_stages", lambda self: {"copies": lambda: iter([wrong])})
    report = tmp_path / "r.md"
    code = main(["bench", "--gpu-selftest", "--device", "cpu", "--report", str(report)])
    assert code == ExitCode.FAILED
    assert "FAILED  bytes come back  no (yes)" in capsys.readouterr().out
    assert "1 of 1 checks failed" in report.read_text()


def test_progress_is_told_stage_by_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    stages = {name: (lambda: iter(())) for name in ("a", "b")}
    monkeypatch.setattr(SelfTest, "_stages", lambda self: stages)
    SelfTest(CPU, SMALL, on_progress=lambda progress: told.append(progress.stage)).run()
    assert told == ["testing a", "testing b"]


def test_an_error_with_a_nan_passes_nothing() -> None:
    wanted = torch.ones(3)
    assert off(torch.tensor([1.0, float("nan"), 1.0]), wanted) == float("inf")
    assert off(wanted.clone(), wanted) == 0


def test_an_accelerator_is_tested_in_the_real_shapes() -> None:
    assert run.sizes_for(torch.device("cuda")) is REAL
    assert run.sizes_for(CPU) is SMALL
    config = run._config("real", REAL)
    assert (config.hidden_size, config.n_experts, config.n_layers) == (4096, 16, 3)
    assert {spec.attention for spec in config.layers} == {"full", "sliding"}
    assert {spec.mlp for spec in config.layers} == {"dense", "moe"}


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cuda", "nonsense", "cuda:99"])
def test_a_device_torch_cannot_use_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=name) as caught:
        run.device_of(name)
    assert "mimo doctor" in caught.value.hint


def test_without_a_card_the_command_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--gpu-selftest"]) == ExitCode.USAGE
    assert "mimo doctor" in capsys.readouterr().err


@pytest.mark.parametrize("more", [["--model", "x"], ["--shape", "real"], ["--draft"]])
def test_it_measures_no_model(more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--gpu-selftest", *more]) == ExitCode.USAGE
    assert "measures no model" in capsys.readouterr().err


def test_a_report_without_a_place_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = str(tmp_path / "none" / "r.md")
    assert main(["bench", "--gpu-selftest", "--device", "cpu", "--report", where]) == (
        ExitCode.USAGE
    )
    assert "cannot be written" in capsys.readouterr().err


def test_a_disk_that_is_full_at_the_end_loses_no_figures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = Result("copies", "one", True, "1 GB/s")
    monkeypatch.setattr(SelfTest, "_stages", lambda self: {"copies": lambda: iter([found])})

    def full(self: Path, *args: object, **more: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    code = main(["bench", "--gpu-selftest", "--device", "cpu", "--report", str(tmp_path / "r")])
    shown = capsys.readouterr()
    assert code == ExitCode.OK
    assert "No space left" in shown.err
    assert json.loads(shown.out.splitlines()[-1])["results"][0]["name"] == "one"


# ---- privacy -------------------------------------------------------------------------------------


def test_paths_and_names_are_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(getpass, "getuser", lambda: "anna")
    monkeypatch.setattr(Path, "home", classmethod(lambda cls: Path("/users/anna")))
    text = document.scrubbed(
        "OSError: /users/anna/my models/x.so: cannot open '/opt/secret/lib/libcuda.so.1', "
        "C:\\Users\\anna\\a.dll of anna \x1b[31m 25.1 GB/s"
    )
    assert "anna" not in text
    assert "secret" not in text
    assert "libcuda.so.1" in text
    assert "25.1 GB/s" in text
    assert "\x1b" not in text


def test_a_user_nobody_knows_stops_no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> str:
        raise KeyError("uid not found")

    monkeypatch.setattr(getpass, "getuser", unknown)
    assert document.scrubbed("1 row 85 us (700 GB/s)") == "1 row 85 us (700 GB/s)"


def test_cells_do_not_break_the_table() -> None:
    data = {
        "verdict": "v", "ok": True, "when": "2026-01-01", "machine": {"device": "a | b"},
        "results": [Result("x", "y", None, "c | d")._asdict()],
    }  # fmt: skip
    text = document.markdown(data)
    assert "a \\| b" in text
    assert "c \\| d" in text


# ---- CUDA's rules --------------------------------------------------------------------------------


@on_sim
def test_what_it_asks_of_a_device_keeps_the_rules_of_cuda() -> None:
    """Numbers are none, so that checks fail; nothing breaks off, is mixed or comes too early."""
    import dataclasses

    from fake_cuda import fake_cuda

    sizes = dataclasses.replace(SMALL, formats=("nf4", "int8", "bf16"))
    with fake_cuda() as cuda:
        test = SelfTest(torch.device("cuda"), sizes, only=("copies", "attention", "experts"))
        test.run()
        assert cuda.count.unpinned == 0
    broken = [one for one in test.results if one.name == "broke off"]
    assert not broken
    assert {one.area for one in test.results} == {"copies", "attention", "experts"}
