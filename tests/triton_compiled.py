"""Our Triton kernels compiled for an RTX 4090 (sm_89), no card needed: one JSON line.

Every specialisation that a matrix of the real model needs: registers, spills, shared memory, and
how often each instruction stands in the machine code. Called by tests/test_triton_w8.py.
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
from bnb_cuda import matrices
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mimo_local.kernels import triton_w8
from mimo_local.kernels.triton_w8_kernel import w8a16

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {"x": "*bf16", "codes": "*i8", "scales": "*fp32", "y": "*bf16"}


def compiled(tile: triton_w8.Tile, even: bool) -> Any:
    """As Triton does it at the first call: what divides by 16 is told."""
    constants = {"BM": triton_w8.ROWS, "BN": tile.rows, "BK": tile.cols, "EVEN": even}
    signature = {**POINTERS, "m": "i32", "n": "i32", "k": "i32"}
    signature |= dict.fromkeys(constants, "constexpr")
    names = list(signature)
    divisible = {(names.index(n),): [["tt.divisibility", 16]] for n in (*POINTERS, "n", "k")}
    return triton.compile(
        ASTSource(fn=w8a16, signature=signature, constexprs=constants, attrs=divisible),
        target=GPUTarget("cuda", 89, 32),
        options={"num_warps": tile.warps, "num_stages": tile.stages},
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


def main() -> None:
    wanted: dict[tuple[triton_w8.Tile, bool], list[tuple[int, int]]] = {}
    for rows, cols in sorted(matrices()):
        assert rows % 16 == cols % 16 == 0
        tile = triton_w8.tile(rows)
        wanted.setdefault((tile, cols % tile.cols == 0), []).append((rows, cols))
    with tempfile.TemporaryDirectory() as folder:
        found = [
            {"tile": tile, "even": even, "shapes": shapes,
             **look(compiled(tile, even), Path(folder))}
            for (tile, even), shapes in wanted.items()
        ]  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main()
