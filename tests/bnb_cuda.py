"""bitsandbytes' CUDA half run without a card, in a process of its own: its library is a recorder.

`python tests/bnb_cuda.py` imports the module that registers the CUDA kernels, as `import
bitsandbytes` does where a card is, makes every product of the real model with 1 to 16 rows as on an
RTX 4090, and prints one JSON object: what was registered, and which function of the native library
each product ended in. Called by tests/test_bitsandbytes_cuda.py.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from mimo_local.config import ModelConfig
from mimo_local.weights import shapes
from quant import on_device

RTX_4090 = (128, 8, 9)  # multiprocessors, compute capability
ROWS = (1, 2, 3, 4, 5, 8, 16)


class Function:
    """One function of the native library."""

    def __init__(self, name: str, calls: list[tuple[str, tuple[Any, ...]]]) -> None:
        self.name, self.calls = name, calls
        self.argtypes: list[Any] = []
        self.restype = None

    def __call__(self, *args: Any) -> int:
        # ctypes would refuse these as late as on the user's machine.
        for kind, value in zip(self.argtypes, args, strict=True):
            kind.from_param(value)
        self.calls.append((self.name, args))
        return 0


class Library:
    """In place of libbitsandbytes_cuda*.so."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self._functions: dict[str, Function] = {}

    def __getattr__(self, name: str) -> Function:
        return self._functions.setdefault(name, Function(name, self.calls))


def cuda_half(library: Library) -> dict[str, Callable[..., Any]]:
    """Operator -> what is registered for it on CUDA."""
    import bitsandbytes  # noqa: F401
    from bitsandbytes import _ops, cextension

    found: dict[str, Callable[..., Any]] = {}

    def register(name: str, kind: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def note(function: Callable[..., Any]) -> Callable[..., Any]:
            assert kind == "cuda", kind
            found[name.removeprefix("bitsandbytes::")] = function
            return function

        return note

    cextension.lib = library
    _ops.register_kernel = register
    torch._C._cuda_getCurrentRawStream = lambda index: 0
    from bitsandbytes.backends.cuda import ops

    ops._gpu_dispatch_props = lambda index: RTX_4090
    ops._cuda_device_of = lambda tensor: contextlib.nullcontext()
    return found


def real_config() -> ModelConfig:
    """That of the real model."""
    path = Path(__file__).resolve().parent.parent / "mimo_local" / "real_config.json"
    return ModelConfig.from_dict(json.loads(path.read_text(encoding="utf-8")))


def matrices() -> set[tuple[int, int]]:
    """(rows, cols) of every matrix of the real model, alone and stacked as the layers hold them."""
    config = real_config()
    hidden = config.hidden_size
    found = {shape for _, shape in shapes(config, experts=False) if len(shape) == 2}
    found |= {(config.moe_intermediate_size, hidden), (hidden, config.moe_intermediate_size)}
    found |= {(2 * config.moe_intermediate_size, hidden), (hidden, 2 * hidden)}  # eh_proj last
    for spec in {*config.layers, config.mtp_layer} - {None}:
        width = spec.heads * spec.head_dim + spec.kv_heads * (spec.head_dim + spec.v_head_dim)
        found |= {(width, hidden), (2 * spec.intermediate, hidden), (hidden, spec.intermediate)}
    return found


def main() -> None:
    library = Library()
    registered = cuda_half(library)
    # Tensors of the host take the place of a device's: their addresses are handed on, no byte of
    # them is read.
    torch.ops.bitsandbytes.gemm_4bit = registered["gemm_4bit"]
    picked = []
    for rows, cols in sorted(matrices()):
        there = on_device.parts_there("nf4", rows, cols, torch.device("cuda"))
        parts = {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in there.items()}
        for t in ROWS:
            x = torch.empty((t, cols), dtype=torch.bfloat16)
            if rows * cols > 1 << 23 and t > 8:
                continue  # unpacked and multiplied by torch, which here would be real work
            del library.calls[:]
            y = on_device.product(x, "nf4", parts, rows, cols)
            names = [name for name, _ in library.calls]
            sizes = list(library.calls[0][1][8:13]) if names == ["cgemm_4bit_bf16"] else None
            picked.append(
                {"rows": rows, "cols": cols, "t": t, "calls": names, "sizes": sizes,
                 "y": list(y.shape), "dtype": str(y.dtype)}
            )  # fmt: skip
    print(json.dumps({"registered": sorted(registered), "picked": picked}))


if __name__ == "__main__":
    main()
