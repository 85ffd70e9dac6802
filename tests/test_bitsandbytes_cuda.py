"""Every operator of bitsandbytes that the device path calls has a kernel for the cards we name.

No card is needed: what its CUDA half registers is read by running it with a recorder for a library
(tests/bnb_cuda.py), and the machine code is looked up in the installed wheel.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_120")
"""Cards from the RTX 20 series to the 50 series."""


def folder() -> Path:
    spec = importlib.util.find_spec("bitsandbytes")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def libraries() -> list[Path]:
    """Those that a torch for CUDA 12.6 or later picks."""
    found = {int(p.stem[-3:]): p for p in folder().glob("libbitsandbytes_cuda*.so")}
    return [path for version, path in sorted(found.items()) if version >= 126]


def used() -> set[str]:
    """Operators named in our source."""
    return {
        name
        for package in ("mimo_local", "quant")
        for path in (ROOT / package).rglob("*.py")
        for name in re.findall(r"torch\.ops\.bitsandbytes\.(\w+)", path.read_text())
    }


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "bnb_cuda.py")],
        capture_output=True, text=True, cwd=ROOT, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_each_operator_has_a_kernel_on_cuda_and_a_shape_for_fake_tensors(
    found: dict[str, Any],
) -> None:
    import bitsandbytes  # noqa: F401

    names = used()
    assert "gemm_4bit" in names
    assert "gemv_4bit" not in names  # takes another layout on some CPUs, and is silently wrong
    for name in names:
        assert name in found["registered"]
        for key in ("Meta", "CPU"):
            full = f"bitsandbytes::{name}"
            assert torch._C._dispatch_has_kernel_for_dispatch_key(full, key) or (
                torch._C._dispatch_has_kernel_for_dispatch_key(full, "CompositeExplicitAutograd")
            ), (name, key)


def test_every_product_of_the_real_model_is_one_kernel_up_to_eight_rows(
    found: dict[str, Any],
) -> None:
    """Decode and the check of drafts never unpack a matrix; shapes and dtypes are accepted."""
    assert len({(p["rows"], p["cols"]) for p in found["picked"]}) >= 15
    for one in found["picked"]:
        assert one["y"] == [one["t"], one["rows"]]
        assert one["dtype"] == "torch.bfloat16"
        if one["t"] <= 8:
            assert one["calls"] == ["cgemm_4bit_bf16"], one
            # rows of x, rows and columns of the matrix, weights to a scale, 2: NF4
            assert one["sizes"] == [one["t"], one["rows"], one["cols"], 64, 2]
        else:
            # Few blocks to share among 128 multiprocessors: unpacked whole, then torch.
            assert one["calls"] in (["cgemm_4bit_bf16"], ["cdequantize_blockwise_bf16_nf4"])


def test_the_wheel_has_the_functions_the_products_end_in(found: dict[str, Any]) -> None:
    assert len(libraries()) >= 3
    names = {name for one in found["picked"] for name in one["calls"]}
    assert names == {"cgemm_4bit_bf16", "cdequantize_blockwise_bf16_nf4"}
    for library in libraries():
        strings = library.read_bytes()  # a symbol's name stands in the table between two zeros
        for name in names:
            assert b"\0" + name.encode() + b"\0" in strings, (library.name, name)


def tool(name: str) -> Path:
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        pytest.skip("triton, whose folder has NVIDIA's tools, is not installed")
    path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        pytest.skip(f"this triton brings no {name}")
    return path


def test_the_wheel_has_machine_code_for_the_cards_we_name() -> None:
    for library in libraries():
        out = subprocess.run(
            [tool("cuobjdump"), "-lelf", library], capture_output=True, text=True, check=True
        ).stdout
        missing = [arch for arch in ARCHITECTURES if f".{arch}.cubin" not in out]
        if missing == ["sm_120"] and library.stem.endswith("126"):
            continue  # CUDA 12.6 is older than these cards
        assert not missing, (library.name, missing)


@pytest.mark.parametrize("library", libraries(), ids=lambda path: path.stem)
def test_few_rows_have_a_kernel_of_their_own_that_spills_nothing(library: Path) -> None:
    out = subprocess.run(
        [tool("cuobjdump"), "-arch", "sm_89", "-res-usage", library],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    text = out.stdout + out.stderr
    found = dict(re.findall(r"gemm_4bit_simtI13__nv_bfloat16Li(\d)E.*\n\s*(REG:.*)", text))
    assert sorted(found) == [str(t) for t in range(1, 9)]  # 1 to 8 rows
    for usage in found.values():
        assert "STACK:0 " in usage
        assert "LOCAL:0 " in usage
        assert int(re.findall(r"REG:(\d+)", usage)[0]) <= 128
