"""How much a stored weight lost: pure arithmetic, called by tests of formats and conversions."""

from __future__ import annotations

import torch


def relative_rms(exact: torch.Tensor, stored: torch.Tensor) -> float:
    """Root mean square of the difference over that of `exact`; 0 when both are all zero.

    Same shapes, any float dtype. NF4 on Gaussian weights gives about 0.085, int8 rows about 0.008.
    """
    size = exact.double().norm().item()
    error = (stored.double() - exact.double()).norm().item()
    return error / size if size else float(error > 0)
