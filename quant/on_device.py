"""A stored matrix on an accelerator: the bytes it has there, and the product made from them.

Codes lie there as in the pack; NF4 scales are widened to float32, as bitsandbytes wants them. 4-bit
products go through bitsandbytes, which multiplies few rows straight from the codes, as our Triton
kernel does with 8-bit ones; MXFP4, which neither knows, and 8 bits for many rows or without Triton
are unpacked to the activations' dtype first. Runs on any torch
device, the CPU included: what the tests do. Called by `mimo_local.device_linear` and the experts'
VRAM tier; the CPU's own products are in `formats`.
"""

from __future__ import annotations

import math
from typing import Final

import torch
import torch.nn.functional as F

from mimo_local.kernels import triton_w8
from quant.formats import BLOCK, MX_BLOCK, Format, Parts, PartShapes, get_format

PLAIN: Final = ("bf16", "f32")
FORMATS: Final = ("nf4", "mxfp4", "int8", *PLAIN)
"""Those a device multiplies: all there are."""
_UNPACKED: Final = 1 << 25
"""Weights unpacked at once: 64 MB in bfloat16. The real model's head would be 1.2 GB."""


def activations(device: torch.device) -> torch.dtype:
    """The dtype products are made in there: bfloat16 on accelerators, else float32."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def parts_there(name: str, rows: int, cols: int, device: torch.device) -> PartShapes:
    """Name -> (dtype, shape) of what `upload` gives for a (rows, cols) matrix."""
    if name == "nf4":
        return {
            "codes": (torch.uint8, (rows * cols // 2,)),
            "scales": (torch.float32, (rows * cols // BLOCK,)),
        }
    if name == "mxfp4":
        return {
            "codes": (torch.uint8, (rows * cols // 2,)),
            "scales": (torch.uint8, (rows * cols // MX_BLOCK,)),
        }
    if name == "int8":
        return {"codes": (torch.int8, (rows, cols)), "scales": (torch.float32, (rows,))}
    get_format(name)  # PackError for a name nobody knows
    return {"weight": (activations(device), (rows, cols))}


def nbytes_there(name: str, rows: int, cols: int, device: torch.device) -> int:
    """Bytes of `parts_there`."""
    parts = parts_there(name, rows, cols, device).values()
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in parts)


def upload(fmt: Format, parts: Parts, device: torch.device) -> Parts:
    """A host's parts of a matrix -> its parts on the device. Blocking: for what stays there."""
    found = {}
    rows, cols = _shape(fmt, parts)
    for name, (dtype, shape) in parts_there(fmt.name, rows, cols, device).items():
        found[name] = torch.empty(shape, dtype=dtype, device=device)
        found[name].copy_(parts[name].reshape(shape).to(dtype))
    return found


def below(name: str, parts: Parts, first: int, cols: int) -> Parts:
    """The parts of the rows from `first` on; the bytes are shared."""
    if name == "nf4":
        per = {"codes": cols // 2, "scales": cols // BLOCK}
    elif name == "mxfp4":
        per = {"codes": cols // 2, "scales": cols // MX_BLOCK}
    else:
        per = dict.fromkeys(parts, 1)
    return {part: tensor[first * per[part] :] for part, tensor in parts.items()}


def product(x: torch.Tensor, name: str, parts: Parts, rows: int, cols: int) -> torch.Tensor:
    """x (T, cols) -> x W^T (T, rows), both in `activations`; W as `upload` gave it."""
    if name == "nf4":
        import bitsandbytes  # noqa: F401  (1 s: registers its operators with torch)

        y: torch.Tensor = torch.ops.bitsandbytes.gemm_4bit(
            x, parts["codes"].view(-1, 1), [rows, cols], parts["scales"], BLOCK, "nf4"
        )
        return y
    if name in PLAIN:
        return F.linear(x, parts["weight"].to(x.dtype))
    if name == "int8" and x.shape[0] <= triton_w8.ROWS and triton_w8.available(x.device):
        return triton_w8.product(x, parts["codes"], parts["scales"])
    step = max(1, _UNPACKED // cols)
    if rows <= step:
        return _unpacked_product(x, name, parts, rows, cols)
    out = x.new_empty((x.shape[0], rows))
    for a in range(0, rows, step):
        n = min(step, rows - a)
        out[:, a : a + n] = _unpacked_product(x, name, _some(name, parts, a, n, cols), n, cols)
    return out


def _some(name: str, parts: Parts, first: int, n: int, cols: int) -> Parts:
    """The parts of n rows."""
    rest = below(name, parts, first, cols)
    if name == "int8":
        return {part: tensor[:n] for part, tensor in rest.items()}
    return {
        "codes": rest["codes"][: n * cols // 2],
        "scales": rest["scales"][: n * cols // MX_BLOCK],
    }


def _unpacked_product(
    x: torch.Tensor, name: str, parts: Parts, rows: int, cols: int
) -> torch.Tensor:
    if name == "int8":
        y = F.linear(x, parts["codes"].view(rows, cols).to(x.dtype))
        return y.mul_(parts["scales"].to(x.dtype))
    return F.linear(x, mxfp4_values(parts["codes"], parts["scales"], x.dtype).view(rows, cols))


def mxfp4_values(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """codes (N / 2,), scales (N / 32,) uint8 -> (N / 32, 32), exact in bfloat16.

    An E2M1 code's two exponent bits and its mantissa bit are put where bfloat16 has its own: that
    is the value times 2^-126, subnormals included, and no table has to be read.
    """
    wide = codes.view(-1, 1).to(torch.int16)
    both = torch.cat((wide >> 4, wide & 15), 1)
    bits = ((both & 8) << 12) | ((both & 7) << 6)
    values = bits.view(torch.bfloat16).view(-1, MX_BLOCK) * 2.0**126
    # 2^(scale - 127): the byte is a float32's exponent.
    power = (scales.to(torch.int32) << 23).view(torch.float32)
    return values.to(dtype) * power.to(dtype)[:, None]


def _shape(fmt: Format, parts: Parts) -> tuple[int, int]:
    if "weight" in parts:
        rows, cols = parts["weight"].shape
        return rows, cols
    rows, cols = parts["codes"].shape
    return rows, cols * (2 if fmt.name in ("nf4", "mxfp4") else 1)
