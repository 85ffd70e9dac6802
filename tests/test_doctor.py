"""doctor: every fact has a line, every fault a fix, and only what is broken fails."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mimo_local import doctor, hardware, kernels
from mimo_local.errors import NativeError

NATIVE = SimpleNamespace(isa="avx2", isas=("scalar", "avx2"), threads=2, notes=())


@pytest.fixture(autouse=True)
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "get", lambda: NATIVE)
    monkeypatch.setattr(kernels, "why_unavailable", lambda: "")
    monkeypatch.setattr(kernels, "describe", lambda: "avx2")


def line(report: doctor.Report, section: str, label: str) -> str:
    return dict(dict(report.sections)[section])[label]


def messages(report: doctor.Report, level: str) -> list[str]:
    return [p.message for p in report.problems if p.level == level]


def test_a_healthy_machine_is_described_and_passes(user_home: Path) -> None:
    report = doctor.examine(seconds=0)
    assert report.ok, report.problems
    assert [name for name, _ in report.sections] == [
        "machine", "kernels", "storage", "software", "models", "terminal",
    ]  # fmt: skip
    assert line(report, "kernels", "in use") == "avx2, 2 threads"
    assert line(report, "storage", "data").startswith(str(user_home))
    assert line(report, "software", "torch").startswith(importlib.metadata.version("torch"))
    assert "none in" in line(report, "models", "packs")
    assert "mimo demo" in line(report, "models", "demo model")
    assert json.loads(json.dumps(report.to_dict()))["ok"] is True


def test_every_problem_comes_with_a_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "get", lambda: None)
    monkeypatch.setattr(kernels, "why_unavailable", lambda: "It is not installed. Install gcc.")
    report = doctor.examine(seconds=0)
    assert line(report, "kernels", "in use") == "reference (slow)"
    assert line(report, "kernels", "because") == "It is not installed. Install gcc."
    assert report.ok, "slow is not broken"
    assert messages(report, "warning")
    assert all(problem.fix for problem in report.problems)


def test_a_kernel_library_that_refuses_to_start_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise NativeError("999 threads asked of the kernels", hint="Choose 1 to 256")

    monkeypatch.setattr(kernels, "get", refuse)
    report = doctor.examine(seconds=0)
    assert not report.ok
    assert "999 threads" in messages(report, "broken")[0]


def test_lowered_kernels_and_ignored_wishes_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    lowered = SimpleNamespace(isa="scalar", isas=("scalar", "avx2"), threads=1, notes=("no amx",))
    monkeypatch.setattr(kernels, "get", lambda: lowered)
    report = doctor.examine(seconds=0)
    assert "no amx" in messages(report, "warning")
    assert any("this CPU has avx2" in text for text in messages(report, "warning"))


def test_a_missing_package_is_broken_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "REQUIRED", ("no-such-package-here",))
    report = doctor.examine(seconds=0)
    assert not report.ok
    assert report.problems[0].fix == "`pip install no-such-package-here`"


def test_a_folder_that_cannot_be_written_is_broken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    monkeypatch.setenv("MIMO_HOME", str(blocker))
    report = doctor.examine(seconds=0)
    assert any("cannot be written" in text for text in messages(report, "broken"))


def test_a_chosen_model_that_is_gone_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIMO_MODEL", "/nowhere/at/all")
    report = doctor.examine(seconds=0)
    assert any("/nowhere/at/all" in text for text in messages(report, "broken"))
    assert "MIMO_MODEL" in line(report, "models", "chosen")


def test_a_broken_settings_file_is_found(user_home: Path) -> None:
    (user_home / "config").mkdir()
    (user_home / "config" / "config.toml").write_text("top_p = 7\n")
    report = doctor.examine(seconds=0)
    assert any("top_p" in text for text in messages(report, "broken"))


def test_packs_and_the_demo_are_found(user_home: Path) -> None:
    for folder in ("data/packs/mine", "cache/demo/small"):
        (user_home / folder).mkdir(parents=True)
        (user_home / folder / "pack.json").write_text("{}")
    report = doctor.examine(seconds=0)
    assert line(report, "models", "packs") == "mine"
    assert line(report, "models", "demo model").endswith("small")


def test_little_ram_and_a_network_disk_are_warnings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    facts = hardware.detect(tmp_path)
    poor = dataclasses.replace(
        facts,
        ram_available=1 << 30,
        disk=dataclasses.replace(facts.disk, filesystem="nfs4"),
        gpus=(hardware.Gpu("Card", 24 << 30, 20 << 30, "575"),),
    )
    monkeypatch.setattr(hardware, "detect", lambda path: poor)
    report = doctor.examine(seconds=0)
    assert report.ok
    assert len([t for t in messages(report, "warning") if "RAM" in t or "network" in t]) == 2
    assert "Card" in line(report, "machine", "GPU")


def test_speeds_are_measured_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "measure_disk", lambda p, s: hardware.Speed(0.1e9, "buffered"))
    monkeypatch.setattr(hardware, "measure_ram", lambda s: hardware.Speed(50e9, "2 threads"))
    report = doctor.examine(seconds=0.1)
    assert line(report, "machine", "RAM speed") == "50.0 GB/s read, 2 threads"
    assert line(report, "storage", "disk speed") == "0.10 GB/s read (buffered)"
    assert any("NVMe" in problem.fix for problem in report.problems)


@pytest.mark.parametrize(
    ("text", "build"),
    [
        ("cuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n", "CUDA 13.0"),
        ("cuda = None\nhip = '7.1'\n", "ROCm 7.1"),
        ("cuda: Optional[str] = None\n", "CPU only"),
    ],
)
def test_torchs_build_is_read_from_its_version_file(
    text: str, build: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "version.py").write_text(text)
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: spec)
    assert doctor.torch_build() == build


def test_looking_loads_no_torch() -> None:
    code = (
        "import sys\nfrom mimo_local import doctor\ndoctor.examine(seconds=0)\n"
        "print(sorted({'torch', 'textual', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
