"""Our Triton kernels: their numbers by its interpreter, their machine code for sm_89.

Both run in processes of their own; no card is needed.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mimo_local.kernels import triton_experts, triton_w8

ROOT = Path(__file__).parent.parent
CUDA = torch.device("cuda", 0)
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


def run(script: str) -> Any:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / script)],
        capture_output=True, text=True, cwd=ROOT, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@needs_triton
def test_numbers_are_right_for_all_shapes_and_in_any_company() -> None:
    found = run("triton_interpreted.py")
    assert found["trials"] == ["", "", "its results are wrong on this card"]
    for one in found["experts"]:  # against bitsandbytes', one expert after the other
        assert one["error"] < 1e-5, one
        assert one["dtype"] == "torch.float32"
        assert one["alone"], one
        assert one["nothing"], one  # a row whose experts are elsewhere
    assert len(found["experts"]) == 2
    assert len(found["products"]) == 6
    for one in found["products"]:
        m, n, _ = one["shape"]
        assert one["y"] == [m, n]
        assert one["dtype"] == "torch.bfloat16"
        assert one["error"] < 2**-9, one  # rounded once, at the end
        assert one["error"] <= one["twin"] + 2**-12, one
        assert one["alone"], one  # the same bits without the other rows


def in_registers(one: dict[str, Any]) -> None:
    """No spills, room for four blocks of 128 threads, no more shared memory than a card has."""
    assert one["stack"] == one["local"] == 0
    assert not {name for name in one["code"] if name.startswith(("LDL", "STL"))}
    assert one["registers"] <= 128
    assert one["shared"] <= 99 << 10


@needs_triton
def test_machine_code_keeps_all_in_registers_and_reads_16_bytes_at_a_time() -> None:
    compiled = run("triton_compiled.py")
    for one in compiled["experts"]:
        in_registers(one)
        assert one["code"]["LDG.E.128"] >= 1  # codes; a thread's 32 of them want 32 numbers each
    found = compiled["products"]
    shapes = {tuple(shape) for one in found for shape in one["shapes"]}
    assert {(14848, 4096), (13568, 4096), (4096, 8192), (152576, 4096)} <= shapes
    assert len(found) == 2  # so many compilations on the user's machine
    for one in found:
        tile, code = triton_w8.Tile(*one["tile"]), one["code"]
        assert one["even"]  # no edge in a row: every load is whole
        in_registers(one)
        # Codes and x come by asynchronous copies of 16 bytes, and by nothing smaller.
        wide = [name for name in code if name.startswith("LDGSTS")]
        assert wide == ["LDGSTS.E.BYPASS.128"]
        loads = {name for name in code if name.startswith("LDG.")}
        assert loads == {"LDG.E.64"}  # scales, once
        assert code["HMMA.16816.F32.BF16"] * 16 * 8 * 16 * tile.warps == 16 * tile.rows * tile.cols
        # Bytes on their way while a tile is multiplied: see `triton_w8.tile`.
        ahead = (tile.stages - 1) * tile.rows * tile.cols
        assert ahead >= 12 << 10


@pytest.fixture
def asked() -> Iterator[None]:
    triton_w8._trouble.cache_clear()
    yield
    triton_w8._trouble.cache_clear()


def test_it_is_for_cuda_and_says_what_is_missing(
    asked: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not triton_w8.available(torch.device("cpu"))
    assert "CUDA" in triton_w8.why_unavailable(torch.device("cpu"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "not installed" in triton_w8.why_unavailable(CUDA)
    triton_w8._trouble.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "finds no CUDA device" in triton_w8.why_unavailable(CUDA)


@pytest.mark.parametrize(
    ("capability", "trial", "said"),
    [
        ((7, 5), "", "below 8.0"),
        ((8, 9), RuntimeError("Failed to find C compiler. Specify CC.\nmore"), "C compiler"),
        ((8, 9), OSError(), "OSError"),
        ((8, 9), "its results are wrong on this card", "wrong"),
        ((12, 0), "", ""),
    ],
)
def test_a_card_is_tried_before_it_is_trusted(
    asked: None, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], trial: Any, said: str
) -> None:
    tried = []

    def run(device: torch.device) -> str:
        tried.append(device)
        if isinstance(trial, Exception):
            raise trial
        return str(trial)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(triton_w8, "_trial", run)
    why = triton_w8.why_unavailable(CUDA)
    assert (said in why) if said else why == ""
    assert "\n" not in why
    assert triton_w8.available(CUDA) == (said == "")
    assert len(tried) == (capability[0] >= 8)  # once, whatever is asked afterwards


def test_more_rows_than_a_tile_are_somebody_elses() -> None:
    x = torch.zeros((triton_w8.ROWS + 1, 64), dtype=torch.bfloat16)
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    with pytest.raises(AssertionError):
        triton_w8.product(x, torch.zeros((32, 64), dtype=torch.int8), torch.ones(32))


def test_experts_together_need_what_one_product_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "CUDA" in triton_experts.why_unavailable(torch.device("cpu"))
    assert not triton_experts.available(torch.device("cpu"))
    monkeypatch.setattr(triton_w8, "why_unavailable", lambda device: "")
    for trial, said in (("", ""), ("its results are wrong", "wrong"), (OSError("no\nx"), "no")):
        triton_experts._trouble.cache_clear()

        def run(device: torch.device, trial: Any = trial) -> str:
            if isinstance(trial, Exception):
                raise trial
            return str(trial)

        monkeypatch.setattr(triton_experts, "_trial", run)
        why = triton_experts.why_unavailable(CUDA)
        assert (said in why) if said else why == ""
        assert "\n" not in why
    triton_experts._trouble.cache_clear()


def test_experts_of_odd_sizes_go_one_by_one() -> None:
    assert triton_experts.fits(2048, 4096)
    assert not triton_experts.fits(2048 + 512, 4096)
    assert not triton_experts.fits(64, 128)
