"""Experts on a stand-in accelerator: lazy copies, protected memory, real numbers.

Steps through the VRAM tier (sim/vram_on_sim.py), prompts through slots (sim/sweep_on_sim.py).

Each case runs in a process of its own, because a device is registered for good.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sim_device
import tiny
from built import needs_compiler

from quant.convert import Recipe, convert

ROOT = Path(__file__).parent.parent
CONFIG: dict[str, Any] = tiny.config(
    "fsf", "dmm", experts=8, top_k=2, hidden=64, moe_intermediate=64
)
pytestmark = needs_compiler


@pytest.fixture(scope="module", params=["nf4", "int8"])
def pack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(f"sim-{request.param}")
    sim_device.build()
    convert(
        tiny.write(folder / "m", CONFIG), folder / "pack", Recipe.for_format(str(request.param))
    )
    return folder / "pack"


def run(pack: Path, what: str, case: str) -> subprocess.CompletedProcess[str]:
    script = ROOT / "tests" / "sim" / f"{what}_on_sim.py"
    return subprocess.run(
        [sys.executable, str(script), str(pack), case],
        capture_output=True, text=True, cwd=ROOT, timeout=120, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def right(pack: Path, what: str) -> dict[str, Any]:
    done = run(pack, what, "right")
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found["worst"] < 4e-2  # bfloat16 there, activations in 8 bits here
    assert found["unpinned"] == 0
    return found


def test_steps_give_right_numbers_with_few_waits_and_no_byte_too_many(pack: Path) -> None:
    found = right(pack, "vram")
    assert found["vram_hits"] > 10
    assert found["uploads"] >= 3  # the slots that were empty, and whoever is wanted more later
    if "int8" in str(pack.parent):  # bitsandbytes' reference for NF4 copies its table every time
        # The choice, results on their way up, and a staging buffer.
        assert found["most_syncs"] <= 1 + 1 + 1
    # The slots, and what a step had on the device when it was looked at.
    assert found["planned"] <= found["bytes"] <= found["planned"] + 64 * 1024


def test_prompts_give_right_numbers_with_few_waits_and_no_byte_too_many(pack: Path) -> None:
    found = right(pack, "sweep")
    if "int8" in str(pack.parent):
        for waits, uploads in zip(found["waits"], found["uploads"], strict=True):
            # The counts, the CPU's rows and results, and a buffer's last copy for each upload.
            assert waits <= 3 + uploads
        # Slots, activations of one product, x, the result, and the pairs.
        assert found["over"] <= 0


# Waits are the same for every format; NF4 by bitsandbytes' reference takes five times as long.
@pytest.mark.parametrize("pack", ["int8"], indirect=True)
@pytest.mark.parametrize(
    ("what", "case"),
    [
        ("vram", "no wait for arrival"),
        ("vram", "staging refilled too early"),
        ("vram", "choice read too early"),
        ("vram", "results overwritten too early"),
        ("sweep", "no wait for arrival"),
        ("sweep", "counts read too early"),
        ("sweep", "rows read too early"),
    ],
)
def test_a_missing_wait_is_seen(pack: Path, what: str, case: str) -> None:
    done = run(pack, what, case)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1])["worst"] > 0.2


@pytest.mark.parametrize("pack", ["int8"], indirect=True)
@pytest.mark.parametrize("what", ["vram", "sweep"])
def test_a_tensor_on_the_wrong_side_is_seen(pack: Path, what: str) -> None:
    done = run(pack, what, "CPU and device mixed")
    assert done.returncode != 0
    assert "same device" in done.stderr or "sim:" in done.stderr
