"""The VRAM tier on a stand-in accelerator: lazy copies, protected memory, real numbers.

Each case runs in a process of its own, because a device is registered for good.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sim_device
import tiny

from quant.convert import Recipe, convert

ROOT = Path(__file__).parent.parent
CONFIG: dict[str, Any] = tiny.config(
    "fsf", "dmm", experts=8, top_k=2, hidden=64, moe_intermediate=64
)
pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler"
)


@pytest.fixture(scope="module", params=["nf4", "int8"])
def pack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(f"sim-{request.param}")
    sim_device.build()
    convert(
        tiny.write(folder / "m", CONFIG), folder / "pack", Recipe.for_format(str(request.param))
    )
    return folder / "pack"


def run(pack: Path, case: str) -> subprocess.CompletedProcess[str]:
    script = ROOT / "tests" / "sim" / "vram_on_sim.py"
    return subprocess.run(
        [sys.executable, str(script), str(pack), case],
        capture_output=True, text=True, cwd=ROOT, timeout=120, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_right_numbers_with_few_waits_and_no_byte_too_many(pack: Path) -> None:
    done = run(pack, "right")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["worst"] < 4e-2  # bfloat16 there, activations in 8 bits here
    assert found["vram_hits"] > 10
    assert found["uploads"] >= 3  # the slots that were empty, and whoever is wanted more later
    if "int8" in str(pack.parent):  # bitsandbytes' reference for NF4 copies its table every time
        # The choice, results on their way up, and a staging buffer.
        assert found["most_syncs"] <= 1 + 1 + 1
    assert found["unpinned"] == 0
    # The slots, and what a step had on the device when it was looked at.
    assert found["planned"] <= found["bytes"] <= found["planned"] + 64 * 1024


# Waits are the same for every format; NF4 by bitsandbytes' reference takes five times as long.
@pytest.mark.parametrize("pack", ["int8"], indirect=True)
@pytest.mark.parametrize(
    "case",
    [
        "no wait for arrival", "staging refilled too early", "choice read too early",
        "results overwritten too early",
    ],
)  # fmt: skip
def test_a_missing_wait_is_seen(pack: Path, case: str) -> None:
    done = run(pack, case)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1])["worst"] > 0.2


def test_a_tensor_on_the_wrong_side_is_seen(pack: Path) -> None:
    done = run(pack, "CPU and device mixed")
    assert done.returncode != 0
    assert "same device" in done.stderr or "sim:" in done.stderr
