"""A weight matrix that lives and multiplies on an accelerator: a `QuantLinear` to its callers.

Knows a device and a stored matrix; the arithmetic is `quant.on_device`'s. Made by `layers`, `model`
and `mtp` from what `weights` read.
"""

from __future__ import annotations

import torch

from mimo_local import kernels
from mimo_local.weights import QuantLinear
from quant import on_device
from quant.formats import Format, Parts


class DeviceLinear(QuantLinear):
    """W (rows, cols) on a device: x (T, cols) -> x W^T (T, rows) in `on_device.activations`."""

    __slots__ = ()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """X (T, cols) of the device's dtype of activations -> (T, rows) of the same."""
        return on_device.product(x, self.format.name, self.parts, self.rows, self.cols)

    def matrix(self) -> kernels.Matrix:
        """Not for the kernels: they read the host's memory."""
        raise ValueError("a matrix on a device has no address on the host")

    def below(self, first: int) -> QuantLinear:
        """The matrix of the rows from `first` on; the bytes are shared."""
        parts = on_device.below(self.format.name, self.parts, first, self.cols)
        return DeviceLinear(self.format, parts, self.rows - first, self.cols)


def placed(linear: QuantLinear, device: torch.device | None) -> QuantLinear:
    """The matrix on `device`; as it is for None, the host."""
    if device is None:
        return linear
    fmt: Format = linear.format
    parts: Parts = on_device.upload(fmt, linear.parts, device)
    return DeviceLinear(fmt, parts, linear.rows, linear.cols)


def placed_tensor(tensor: torch.Tensor, device: torch.device | None) -> torch.Tensor:
    """A small tensor on `device`; as it is for None."""
    return tensor if device is None else tensor.to(device)
