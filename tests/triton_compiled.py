"""Our Triton kernels compiled for an RTX 4090 (sm_89), no card needed: one JSON line.

Every specialisation that a matrix of the real model needs: registers, spills, shared memory, and
how often each instruction stands in the machine code. Called by tests/test_triton.py.
"""

from __future__ import annotations

import collections
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"  # said, because its default is about to change
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import triton
from bnb_cuda import matrices, real_config
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mimo_local.kernels import triton_experts, triton_w8
from mimo_local.kernels.triton_experts_kernel import down, gate_up
from mimo_local.kernels.triton_w8_kernel import w8a16

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {
    "x": "*bf16", "codes": "*i8", "scales": "*fp32", "hidden": "*bf16", "pairs": "*i32",
    "shares": "*fp32", "slots": "*u8", "table": "*fp32",
}  # fmt: skip
GENERAL = ("m", "half")
"""Whole numbers about which Triton is told nothing."""


def compiled(kernel: Any, y: str, constants: dict[str, Any], **options: int) -> Any:
    """As Triton does it at the first call: what divides by 16 is told."""
    types = {**POINTERS, "y": y, **dict.fromkeys(constants, "constexpr")}
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(signature)
        if name not in constants and name not in GENERAL
    }
    return triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=divisible),
        target=GPUTarget("cuda", 89, 32),
        options=options,
    )


def look(kernel: Any, folder: Path) -> dict[str, Any]:
    """Resources and instructions."""
    cubin = folder / "k.cubin"
    cubin.write_bytes(kernel.asm["cubin"])

    def run(*command: str | Path) -> str:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout + done.stderr

    usage = run(TOOLS / "cuobjdump", "-res-usage", cubin)
    code = run(TOOLS / "nvdisasm", "-c", cubin)
    found = re.findall(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", code)
    resources = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    return {
        "registers": int(resources["REG"]), "stack": int(resources["STACK"]),
        "local": int(resources["LOCAL"]), "shared": kernel.metadata.shared,
        "code": collections.Counter(found),
    }  # fmt: skip


def products(folder: Path) -> list[dict[str, Any]]:
    """Of `triton_w8`, for every matrix."""
    wanted: dict[tuple[triton_w8.Tile, bool], list[tuple[int, int]]] = {}
    for rows, cols in sorted(matrices()):
        assert rows % 16 == cols % 16 == 0
        tile = triton_w8.tile(rows)
        wanted.setdefault((tile, cols % tile.cols == 0), []).append((rows, cols))
    found = []
    for (tile, even), shapes in wanted.items():
        constants = {"BM": triton_w8.ROWS, "BN": tile.rows, "BK": tile.cols, "EVEN": even}
        kernel = compiled(w8a16, "*bf16", constants, num_warps=tile.warps, num_stages=tile.stages)
        found.append({"tile": tile, "even": even, "shapes": shapes, **look(kernel, folder)})
    return found


def experts(folder: Path) -> list[dict[str, Any]]:
    """Of `triton_experts`, for the real model's."""
    config = real_config()
    wide, narrow = config.hidden_size, config.moe_intermediate_size
    assert triton_experts.fits(narrow, wide)
    constants = {
        "K": config.experts_per_token, "WIDE": wide, "NARROW": narrow,
        "BN": triton_experts.ROWS, "NB": triton_experts.GROUPS,
    }  # fmt: skip
    return [
        look(compiled(kernel, "*fp32", constants, num_warps=triton_experts.WARPS), folder)
        for kernel in (gate_up, down)
    ]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = {"products": products(Path(folder)), "experts": experts(Path(folder))}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
