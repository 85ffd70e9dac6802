"""Our Triton kernels on the CPU, by Triton's interpreter, against their twin: one JSON line.

In a process of its own: the interpreter is chosen before Triton is imported. Called by
tests/test_triton.py.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from mimo_local.experts import vram
from mimo_local.kernels import triton_experts, triton_w8
from mimo_local.random_weights import RandomWeights, shape_config
from quant import on_device

SHAPES = [
    (1, 64, 256), (2, 96, 512), (3, 40, 100), (16, 33, 257), (5, 1, 16), (7, 31, 1),
]  # fmt: skip

Builder = interpreter.InterpreterBuilder
_dot, _cast, _trunc = Builder.create_dot, Builder.create_si_to_fp, Builder.create_fp_trunc


def _widened(t: Any) -> Any:
    """The interpreter holds bfloat16 as its bits, and multiplies those as whole numbers."""
    if t.dtype != tl.bfloat16:
        return t
    return interpreter.TensorHandle((t.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
    return _dot(self, _widened(a), _widened(b), d, precision, imprecise)


def cast(self: Any, source: Any, dtype: Any) -> Any:
    """Whole numbers become bits of bfloat16 by way of float32, not by their own bits."""
    if dtype.scalar != tl.bfloat16:
        return _cast(self, source, dtype)
    return trunc(self, _cast(self, source, tl.float32), dtype)


def trunc(self: Any, source: Any, dtype: Any) -> Any:
    """To the nearest bfloat16, as the hardware does; the interpreter cuts off."""
    if dtype.scalar != tl.bfloat16:
        return _trunc(self, source, dtype)
    bits = torch.from_numpy(source.data).bfloat16().view(torch.uint16).numpy()
    return interpreter.TensorHandle(bits, tl.bfloat16)


def experts() -> list[dict[str, Any]]:
    """The VRAM tier's experts one by one, and all of a step together."""
    config = dataclasses.replace(
        shape_config(2, 512, shape="tiny"),
        hidden_size=1024,
        moe_intermediate_size=1024,
        n_experts=6,
    )
    weights = RandomWeights(config)
    layout = weights.expert_layout
    assert layout is not None
    cpu = torch.device("cpu")
    tier = vram.VramTier({1: layout}, 4 * vram.VramTier({1: layout}, 0, cpu).slot_bytes, cpu)
    for e in range(4):
        tier.touch((1, e))
        assert tier.consider((1, e), weights.expert(1, e))
        tier.end_of_step()
    triton_experts.available = lambda device: True
    found = []
    g = torch.Generator().manual_seed(3)
    for numbers in ([[0, 5, 3]], [[3, 2, 1], [4, 5, -1], [2, 3, 0]]):
        x = torch.randn(len(numbers), 1024, generator=g)
        w = torch.rand(len(numbers), 3, generator=g)
        wanted = torch.zeros_like(x)
        for t, row in enumerate(numbers):
            for k, e in enumerate(row):
                if (1, e) in tier:
                    wanted[t] += w[t, k] * tier.run((1, e), x[t : t + 1])[0]
        y = tier.together(1, x, numbers, w)
        alone = tier.together(1, x[-1:], numbers[-1:], w[-1:])
        found.append({
            "error": float((y - wanted).norm() / wanted.norm()), "dtype": str(y.dtype),
            "alone": torch.equal(alone[0], y[-1]), "nothing": bool((y[1:2] == 0).all()),
        })  # fmt: skip
    return found


def main() -> None:
    Builder.create_dot, Builder.create_si_to_fp, Builder.create_fp_trunc = dot, cast, trunc
    g = torch.Generator().manual_seed(0)
    found = []
    for m, n, k in SHAPES:
        x = torch.randn(m, k, generator=g).bfloat16()
        codes = torch.randint(-127, 128, (n, k), generator=g, dtype=torch.int8)
        scales = torch.rand(n, generator=g) + 0.1
        y = triton_w8.product(x, codes, scales)
        exact = (x.double() @ codes.double().T) * scales.double()
        twin = on_device.product(x, "int8", {"codes": codes, "scales": scales}, n, k)
        norm = exact.norm()
        found.append({
            "shape": (m, n, k), "dtype": str(y.dtype), "y": list(y.shape),
            "error": float((y.double() - exact).norm() / norm),
            "twin": float((twin.double() - exact).norm() / norm),
            "alone": all(
                torch.equal(triton_w8.product(x[i : i + 1], codes, scales)[0], y[i])
                for i in {0, m - 1}
            ),
        })  # fmt: skip
    trials = [triton_w8._trial(torch.device("cpu"))]
    # Fewer programs than on a card, where each makes four rows: the interpreter runs them in turn.
    triton_experts.ROWS = 256
    trials.append(triton_experts._trial(torch.device("cpu")))
    triton_w8.product, right = (lambda *args: right(*args) + 1), triton_w8.product
    trials.append(triton_w8._trial(torch.device("cpu")))
    print(json.dumps({"products": found, "trials": trials, "experts": experts()}))


if __name__ == "__main__":
    main()
