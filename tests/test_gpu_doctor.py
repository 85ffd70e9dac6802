"""What doctor says about NVIDIA cards, on machines written down here: no card is needed.

The driver's tool is a shell script that prints what real ones print.
"""

from __future__ import annotations

import dataclasses
import os
import stat
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from mimo_local import doctor, gpu_facts, gpu_probe, gpu_report, hardware
from mimo_local.cli import tables
from mimo_local.gpu_facts import Answer, Around, Card, Probe, Said, User

GB = 1_000_000_000
FULL = "0, NVIDIA GeForce RTX 4090, 580.95.05, 24564, 812, 23272, 8.9, 1, 4, 16, 16"
CARD = Card(
    0, "NVIDIA GeForce RTX 4090", "580.95.05", 24564 << 20, 812 << 20, 23272 << 20, (8, 9), 1, 4,
    16, 16,
)  # fmt: skip
PLAIN = Around(on_bus=1, nouveau=False, wsl=False, container=False, locked=())
NOTHING = Around(on_bus=0, nouveau=False, wsl=False, container=False, locked=())
GOOD = Probe(
    torch="2.13.0+cu130", cuda="13.0", available=True,
    archs=("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"),
    name=CARD.name, capability=(8, 9), total=CARD.total, free=CARD.free,
    checks={
        "tensors": "", "pinned memory": "", "4-bit products": "", "8-bit products": "",
        "Triton": "",
    },
    rates={"to the card": 25.1e9, "from the card": 26.3e9},
)  # fmt: skip

Smi = Callable[[str], Path]


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Smi:
    """`smi(script)` puts a tool of that name before all others."""

    def put(script: str) -> Path:
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        return tool

    return put


# ---- facts ---------------------------------------------------------------------------------------


def test_without_the_tool_there_is_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(gpu_facts, "WSL_TOOL", str(tmp_path / "none"))
    assert gpu_facts.ask_driver() == Answer("missing")
    assert gpu_facts.users() == ()


def test_a_card_is_described(smi: Smi) -> None:
    smi(f'echo "{FULL}"')
    assert gpu_facts.ask_driver() == Answer("cards", (CARD,))


def test_an_old_driver_that_knows_fewer_fields_is_asked_again(smi: Smi) -> None:
    smi(
        'case "$1" in *compute_cap*) echo \'Field "compute_cap" is not a valid field to query.\';'
        " exit 2;; esac\n"
        'echo "0, NVIDIA GeForce RTX 3090, 470.256.02, 24576, 100, 24476"'
    )
    (card,) = gpu_facts.ask_driver().cards
    assert (card.name, card.driver, card.capability) == (
        "NVIDIA GeForce RTX 3090", "470.256.02", None,
    )  # fmt: skip
    assert card.lanes_now == 0


def test_what_a_card_does_not_tell_is_left_open() -> None:
    text = (
        "0, NVIDIA GB10, 580.95.05, [N/A], [N/A], [N/A], 12.1, [N/A], [N/A], [N/A], [N/A]\n"
        "1, Tesla\x1b[31m T4, 580.95.05, 15360, 5, 15355, 7.5, 3, 3, 8, 16\n"
        "\nwarning: infoROM is corrupted at gpu 0000:01:00.0\n"
    )
    first, second = gpu_facts.parse_cards(text)
    assert (first.total, first.capability, first.lanes_max) == (0, (12, 1), 0)
    assert second.name == "Tesla[31m T4"
    assert (second.lanes_now, second.lanes_max) == (8, 16)


@pytest.mark.parametrize(
    ("script", "kind", "said"),
    [
        ("echo 'No devices were found'; exit 6", "none", "No devices"),
        ("echo ''", "none", ""),
        (
            "echo 'Failed to initialize NVML: Driver/library version mismatch'\n"
            "echo 'NVML library version: 580.95'; exit 18",
            "failed", "version mismatch",
        ),
        ("echo 'Failed to initialize NVML: Insufficient Permissions'; exit 4", "failed", "Permis"),
        (
            'echo "NVIDIA-SMI has failed because it couldn\'t communicate with the NVIDIA driver. '
            'Make sure that the latest NVIDIA driver is installed and running."; exit 9',
            "failed", "communicate",
        ),
        (
            "echo 'Unable to determine the device handle for GPU0000:01:00.0: GPU is lost.'\n"
            "exit 15",
            "failed", "lost",
        ),
        ("exit 3", "failed", "code 3"),
        ("kill -SEGV $$", "failed", "code -11"),
    ],
)  # fmt: skip
def test_a_driver_in_trouble_is_quoted(smi: Smi, script: str, kind: str, said: str) -> None:
    smi(script)
    answer = gpu_facts.ask_driver()
    assert answer.kind == kind
    assert said in answer.text
    assert answer.cards == ()


def test_a_driver_that_hangs_is_left_after_a_while(
    smi: Smi, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi("exec sleep 60")
    monkeypatch.setattr(gpu_facts, "PATIENCE", 0.2)
    start = time.monotonic()
    assert gpu_facts.ask_driver() == Answer("hangs")
    assert time.monotonic() - start < 20


def test_a_tool_that_cannot_be_started_is_said(smi: Smi) -> None:
    smi("").write_bytes(b"\x00\x01 no program")
    assert "cannot be started" in gpu_facts.ask_driver().text


def test_who_uses_a_card_is_named_without_the_way_to_it(smi: Smi) -> None:
    smi(
        "cat <<'END'\n"
        "4711, /somewhere/of a user/bin/python3.11, 2048\n"
        "12, C:\\Games\\fast, really.exe, [N/A]\n"
        "99, blender, 4096\nEND"
    )
    assert gpu_facts.users() == (
        User(99, "blender", 4096 << 20), User(4711, "python3.11", 2048 << 20),
        User(12, "fast, really.exe", 0),
    )  # fmt: skip


def test_what_lies_around_is_seen(tmp_path: Path) -> None:
    for name, vendor, kind in (
        ("0000:01:00.0", "0x10de", "0x030000"), ("0000:01:00.1", "0x10de", "0x040300"),
        ("0000:00:02.0", "0x8086", "0x030000"),
    ):  # fmt: skip
        folder = tmp_path / "sys/bus/pci/devices" / name
        folder.mkdir(parents=True)
        (folder / "vendor").write_text(vendor + "\n")
        (folder / "class").write_text(kind + "\n")
    (tmp_path / "proc/sys/kernel").mkdir(parents=True)
    (tmp_path / "proc/modules").write_text("snd 1 0 - Live 0x0\nnouveau 2 1 - Live 0x0\n")
    (tmp_path / "proc/sys/kernel/osrelease").write_text("6.6.87.2-microsoft-standard-WSL2\n")
    (tmp_path / ".dockerenv").write_text("")
    found = gpu_facts.around(tmp_path)
    assert found == Around(on_bus=1, nouveau=True, wsl=True, container=True, locked=())
    assert gpu_facts.around(tmp_path / "nowhere") == NOTHING


def said(code: int | None, text: str) -> gpu_facts.Run:
    def run(command: Sequence[str], seconds: float) -> Said:
        assert command[0] == sys.executable
        assert seconds == gpu_facts.PROBE_PATIENCE
        return Said(code, text)

    return run


def test_a_trial_that_breaks_off_says_where() -> None:
    assert "within 180 s" in gpu_facts.probe(run=said(None, "")).failed
    assert "broke off: Segmentation" in gpu_facts.probe(run=said(-11, "a\nSegmentation\n")).failed
    assert "code -9" in gpu_facts.probe(run=said(-9, "")).failed
    assert "broke off" in gpu_facts.probe(run=said(0, '{"torch": 1}')).failed


def test_the_trial_runs_here_in_a_process_of_its_own() -> None:
    found = gpu_facts.probe()
    assert found.failed == ""
    assert found.torch
    assert (found.cuda, found.available) == ("", False)  # the build the tests run with


def test_each_trial_is_right_on_a_device_that_works() -> None:
    import torch

    checks, rates = gpu_probe.trials(torch.device("cpu"), 1 << 16)
    assert {name for name, why in checks.items() if not why} == {
        "tensors", "pinned memory", "4-bit products", "8-bit products",
    }  # fmt: skip
    assert "CUDA" in checks["Triton"]
    assert set(rates) == {"to the card", "from the card"}
    assert all(rate > 0 for rate in rates.values())


def test_each_trial_notices_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from quant import on_device

    right = on_device.product
    monkeypatch.setattr(on_device, "product", lambda *args: right(*args) * 1.1)
    checks, _ = gpu_probe.trials(torch.device("cpu"), 1 << 16)
    assert checks["4-bit products"].startswith("results are off by ")

    def fail(*args: object) -> None:
        raise RuntimeError("CUDA error: no kernel image is available\nmore about it")

    monkeypatch.setattr(on_device, "product", fail)
    checks, _ = gpu_probe.trials(torch.device("cpu"), 1 << 16)
    assert checks["8-bit products"] == "CUDA error: no kernel image is available"
    assert checks["tensors"] == ""


# ---- judgements ----------------------------------------------------------------------------------


def card(**changes: object) -> Answer:
    return Answer("cards", (dataclasses.replace(CARD, **changes),))  # type: ignore[arg-type]


def judged(
    answer: Answer = Answer("cards", (CARD,)),  # noqa: B008
    around: Around = PLAIN,
    build: str = "CUDA 13.0",
    probe: Probe | None = GOOD,
    users: Sequence[User] = (),
) -> gpu_report.Found:
    return gpu_report.examine(answer, around, build, probe, users)


def test_a_machine_in_order_has_no_trouble() -> None:
    found = judged()
    assert found.troubles == ()
    lines = dict(found.lines)
    assert lines["card"] == "NVIDIA GeForce RTX 4090, compute capability 8.9"
    assert lines["VRAM"] == "25.8 GB, 24.4 GB free"
    assert lines["bus"] == "16 of 16 lanes, PCIe 4 (now 1, as idle cards do)"  # no trouble
    assert lines["copies"] == "25.1 GB/s to the card, 26.3 GB/s from the card"


FAILED = "failed"


@pytest.mark.parametrize(
    ("answer", "around", "level", "message", "fix"),
    [
        (Answer("missing"), PLAIN, "warning", "driver is not installed", "580"),
        (
            Answer("missing"), dataclasses.replace(PLAIN, nouveau=True), "warning", "nouveau",
            "restart",
        ),
        (
            Answer("missing"), dataclasses.replace(PLAIN, container=True), "warning",
            "this container", "--gpus all",
        ),
        (Answer("hangs"), PLAIN, "broken", "does not answer", "dmesg"),
        (Answer("none", text="No devices were found"), PLAIN, "warning", "sees no card", "power"),
        (
            Answer(FAILED, text="Failed to initialize NVML: Driver/library version mismatch"),
            PLAIN, "broken", "was updated", "restart",
        ),
        (
            Answer(FAILED, text="Failed to initialize NVML: Insufficient Permissions"),
            dataclasses.replace(PLAIN, locked=("nvidia0", "nvidiactl")), "broken",
            "/dev/nvidia0, /dev/nvidiactl", "usermod",
        ),
        (Answer(FAILED, text="GPU is lost."), PLAIN, "broken", "fell off", "riser"),
        (
            Answer(FAILED, text="couldn't communicate with the NVIDIA driver"),
            dataclasses.replace(NOTHING, wsl=True), "broken", "communicate", "in Windows",
        ),
        (
            Answer(FAILED, text="couldn't communicate with the NVIDIA driver"), PLAIN, "broken",
            "communicate", "Secure Boot",
        ),
    ],
)  # fmt: skip
def test_a_driver_in_trouble_comes_with_its_fix(
    answer: Answer, around: Around, level: str, message: str, fix: str
) -> None:
    assert gpu_report.present(answer, around)
    (trouble,) = judged(answer, around, probe=None).troubles
    assert (trouble.level, message in trouble.message, fix in trouble.fix) == (level, True, True), (
        trouble
    )


@pytest.mark.parametrize(
    ("build", "driver", "level", "fix"),
    [
        ("CPU only", "580.95.05", "warning", "cu130"),
        ("CPU only", "550.163.01", "warning", "cu126"),
        ("CPU only", "", "warning", "cu130"),
        ("ROCm 7.1", "580.95.05", "warning", "cu130"),
        ("CUDA 13.0", "550.163.01", "broken", "cu126"),
        ("CUDA 13.0", "470.256.02", "broken", "update the driver"),
        ("CUDA 12.6", "470.256.02", "broken", "update the driver"),
    ],
)
def test_torch_has_to_be_built_for_the_driver(
    build: str, driver: str, level: str, fix: str
) -> None:
    (trouble,) = judged(card(driver=driver), build=build, probe=None).troubles
    assert trouble.level == level
    assert fix in trouble.fix


@pytest.mark.parametrize("driver", ["580.65.06", "590.1", "[N/A]"])
def test_a_driver_new_enough_or_without_a_number_is_no_trouble(driver: str) -> None:
    assert judged(card(driver=driver)).troubles == ()


@pytest.mark.parametrize(
    ("changes", "message", "fix"),
    [
        ({"lanes_now": 4}, "4 of its 16 PCIe lanes: 7 GB/s instead of 27", "slot next to"),
        ({"lanes_now": 8, "gen_max": 0}, "8 of its 16 PCIe lanes", "slot"),
        ({"capability": (7, 5)}, "no bfloat16", "selftest"),
        ({"used": 9 * GB, "free": 16 * GB}, "9.0 GB of NVIDIA", "close programs"),
    ],
)
def test_a_card_held_back_is_a_warning(changes: dict[str, object], message: str, fix: str) -> None:
    (trouble,) = judged(card(**changes), probe=None).troubles
    assert trouble.level == "warning"
    assert message in trouble.message
    assert fix in trouble.fix


def test_who_takes_the_memory_is_named() -> None:
    users = (User(1, "blender", 6 * GB), User(2, "python3", 2 * GB), User(3, "x", 0))
    found = judged(card(used=9 * GB), users=users)
    assert dict(found.lines)["in use by"] == "blender 6.0 GB, python3 2.0 GB"
    assert "by blender, python3 among others" in found.troubles[0].message


def probe(**changes: object) -> Probe:
    return dataclasses.replace(GOOD, **changes)  # type: ignore[arg-type]


def check(name: str, why: str) -> Probe:
    return probe(checks={**GOOD.checks, name: why})


@pytest.mark.parametrize(
    ("probe", "level", "message", "fix"),
    [
        (Probe(failed="torch did not answer"), "broken", "did not answer", "gpu_probe 0"),
        (
            probe(available=False, why="CUDA unknown error"), "broken", "CUDA unknown error",
            "CUDA_VISIBLE_DEVICES",
        ),
        (probe(capability=(12, 1), archs=("sm_90",)), "broken", "no code for compute", "cu130"),
        (probe(capability=(6, 1)), "broken", "no code for compute capability 6.1", "cu126"),
        (check("Triton", "Triton fails: Failed to find C compiler."), "warning", "slow way", "gcc"),
        (check("Triton", "Triton is not installed"), "warning", "slow way", "pip install triton"),
        (check("4-bit products", "no lib"), "broken", "4-bit products do not", "bitsandbytes"),
        (check("pinned memory", "CUDA error"), "broken", "pinned", "ulimit"),
        (check("tensors", "CUDA error"), "broken", "tensors do not", "restart"),
        (probe(rates={"to the card": 6.2e9}), "warning", "6.2 GB/s, its bus should carry 27", ""),
    ],
)  # fmt: skip
def test_what_torch_cannot_do_comes_with_its_fix(
    probe: Probe, level: str, message: str, fix: str
) -> None:
    (trouble,) = judged(probe=probe).troubles
    assert trouble.level == level
    assert message in trouble.message
    assert fix in trouble.fix


def test_code_for_a_later_card_runs_where_it_may() -> None:
    assert judged(probe=probe(archs=("sm_80",))).troubles == ()  # 8.9 runs what was made for 8.0
    assert judged(probe=probe(archs=("compute_75",))).troubles == ()  # compiled at the first use
    assert judged(probe=probe(archs=("sm_90a", "nonsense"))).troubles != ()


def test_wsl_is_told_what_only_windows_can_set() -> None:
    found = judged(around=dataclasses.replace(PLAIN, wsl=True))
    assert {"WSL memory", "WSL packs", "WSL VRAM"} <= set(dict(found.lines))


# ---- the whole screen ----------------------------------------------------------------------------


def test_nothing_is_tried_without_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_facts, "ask_driver", lambda: Answer("missing"))
    monkeypatch.setattr(gpu_facts, "around", lambda: NOTHING)
    monkeypatch.setattr(gpu_facts, "probe", lambda index: pytest.fail("tried"))
    report = doctor.examine(seconds=0)
    assert "GPU" not in dict(report.sections)
    assert dict(dict(report.sections)["machine"])["GPU"] == "none found"


def test_the_screen_shows_the_largest_card_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    small = dataclasses.replace(CARD, index=1, name="NVIDIA RTX A400", total=4 << 30, used=0)
    tried: list[int] = []
    monkeypatch.setattr(gpu_facts, "ask_driver", lambda: Answer("cards", (small, CARD)))
    monkeypatch.setattr(gpu_facts, "around", lambda: PLAIN)
    monkeypatch.setattr(gpu_facts, "users", lambda: ())
    monkeypatch.setattr(doctor, "torch_build", lambda: "CUDA 13.0")

    def trial(index: int) -> Probe:
        tried.append(index)
        return check("Triton", "Triton fails: Failed to find C compiler.")

    monkeypatch.setattr(gpu_facts, "probe", trial)
    there = hardware.Gpu(CARD.name, CARD.total, CARD.free, CARD.driver)
    monkeypatch.setattr(hardware, "gpus", lambda: (there,))
    report = doctor.examine(seconds=0)
    assert tried == [0]
    held = dict(dict(report.sections)["GPU"])["it would hold"]
    assert "48 of 48 layers, head, drafter" in held
    assert int(held.split(" of 12032 experts")[0].rsplit(" ", 1)[1]) > 500
    assert report.ok, "slower is not broken"
    text = tables.doctor(report)
    assert "card 0" in text
    assert "card 1" in text
    assert "fix: install gcc" in text
    assert "GPU" in report.to_dict()["sections"]


def test_torch_for_the_cpu_is_not_tried_on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_facts, "ask_driver", lambda: Answer("cards", (CARD,)))
    monkeypatch.setattr(gpu_facts, "around", lambda: PLAIN)
    monkeypatch.setattr(gpu_facts, "users", lambda: ())
    monkeypatch.setattr(gpu_facts, "probe", lambda index: pytest.fail("tried"))
    report = doctor.examine(seconds=0)
    assert report.ok
    assert any("torch is built for CPU only" in problem.message for problem in report.problems)
