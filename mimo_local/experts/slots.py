"""How one expert lies in a device's memory: where each part of its three matrices begins.

A slot is one run of bytes, so that an expert goes up in one copy. Knows formats and offsets, no
device work and no policy. Called by `vram` and `device_sweep`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F

from mimo_local.kernels.triton_experts import Places
from mimo_local.weights import Expert, QuantLinear
from quant import on_device
from quant.formats import Parts
from quant.layout import ExpertLayout

MATRICES: Final = ("gate", "up", "down")
_ALIGN: Final = 256
"""Bytes: what CUDA's allocator gives, and more than any load wants."""


@dataclass(frozen=True, slots=True)
class SlotLayout:
    """Where the parts of an expert stored as `format` lie; gate and up are (narrow, wide)."""

    format: str
    narrow: int
    wide: int
    parts: Mapping[tuple[str, str], tuple[torch.dtype, tuple[int, ...], int]]
    """(matrix, part) -> dtype, shape, first byte."""
    nbytes: int

    @classmethod
    def of(cls, layout: ExpertLayout, device: torch.device) -> SlotLayout:
        """That of a pack's layer, for a device."""
        wide = layout.parts["down_proj.codes" if _coded(layout) else "down_proj.weight"][1][0]
        narrow = layout.parts["gate_proj.codes" if _coded(layout) else "gate_proj.weight"][1][0]
        found, at = {}, 0
        for matrix in MATRICES:
            rows, cols = _size(matrix, narrow, wide)
            for name, (dtype, shape) in on_device.parts_there(
                layout.format, rows, cols, device
            ).items():
                found[matrix, name] = (dtype, shape, at)
                at += -(-dtype.itemsize * math.prod(shape) // _ALIGN) * _ALIGN
        return cls(layout.format, narrow, wide, found, at)

    def size(self, matrix: str) -> tuple[int, int]:
        """(rows, cols) of "gate", "up" or "down"."""
        return _size(matrix, self.narrow, self.wide)

    @property
    def places(self) -> Places:
        """First bytes of codes and scales, for a format that has them."""
        order = [(matrix, part) for matrix in MATRICES for part in ("codes", "scales")]
        return Places(*(self.parts[key][2] for key in order))

    def views(self, slot: torch.Tensor) -> dict[str, Parts]:
        """Matrix -> its parts in `slot`, uint8 (at least `nbytes`,)."""
        found: dict[str, Parts] = {matrix: {} for matrix in MATRICES}
        for (matrix, name), (dtype, shape, at) in self.parts.items():
            run = slot[at : at + dtype.itemsize * math.prod(shape)]
            found[matrix][name] = run.view(dtype).view(shape)
        return found

    def fill(self, slot: torch.Tensor, expert: Expert) -> None:
        """Write an expert of the host into `slot`, of the host too, as the device wants it."""
        views = self.views(slot)
        for matrix, linear in _matrices(expert):
            for name, part in views[matrix].items():
                part.copy_(linear.parts[name].view(part.shape))

    def run(self, views: Mapping[str, Parts], x: torch.Tensor) -> torch.Tensor:
        """x (T, wide) -> down(silu(gate x) * up x) (T, wide), in the dtype of activations."""
        gate = F.silu(self._product(views, "gate", x))
        return self._product(views, "down", gate.mul_(self._product(views, "up", x)))

    def _product(self, views: Mapping[str, Parts], matrix: str, x: torch.Tensor) -> torch.Tensor:
        return on_device.product(x, self.format, views[matrix], *self.size(matrix))


def _coded(layout: ExpertLayout) -> bool:
    return "down_proj.codes" in layout.parts


def _size(matrix: str, narrow: int, wide: int) -> tuple[int, int]:
    return (wide, narrow) if matrix == "down" else (narrow, wide)


def _matrices(expert: Expert) -> Iterator[tuple[str, QuantLinear]]:
    yield "gate", expert.gate
    yield "up", expert.up
    yield "down", expert.down
