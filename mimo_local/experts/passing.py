"""PassingStore: experts read when a sweep wants them and dropped behind it; none is ever held.

For measuring a model whose experts fit no memory, one layer at a time: speed comes second, a few
experts' bytes are all it takes. Called by `mimo_local.fidelity`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from functools import partial

import torch

from mimo_local import kernels
from mimo_local.errors import CancelledError
from mimo_local.experts.meters import Meters
from mimo_local.experts.store import RamTier, Store, apply
from mimo_local.weights import Expert, Weights
from quant.pipeline import ahead
from quant.tensorfile import Scratch

AHEAD = 2
"""Experts read while one is at work; as float32, one of the real model is 100 MB."""


class PassingStore(Store):
    """Every expert straight from the weights."""

    def __init__(self, weights: Weights, *, exact: bool) -> None:
        """`exact`: float32 products by torch, else the kernels' where there are any."""
        self.weights, self.exact, self.meters = weights, exact, Meters()
        self.on_expert: Callable[[float], None] = lambda share: None
        """Called with the part of a sweep that is done."""

    @property
    def nbytes(self) -> dict[str, int]:
        """Nothing."""
        return {"ram": 0}

    def resident(self, layer: int) -> bool:
        """Never."""
        return False

    def mlps(self, layer: int) -> tuple[ctypes.Array[kernels.Mlp], object]:
        """Not to be asked: no layer is resident."""
        raise LookupError(f"layer {layer} is not resident")

    def run(
        self,
        layer: int,
        x: torch.Tensor,
        ids: torch.Tensor,
        w: torch.Tensor,
        *,
        meanwhile: Callable[[], None] | None = None,
        guess: tuple[int, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """As `sweep`."""
        return self.sweep(layer, x, ids, w)

    def sweep(
        self,
        layer: int,
        x: torch.Tensor,
        ids: torch.Tensor,
        w: torch.Tensor,
        *,
        cancel: Callable[[], bool] | None = None,
    ) -> torch.Tensor:
        """The chosen experts in ascending order, each read once."""
        x, ids, w = x.contiguous(), ids.to(torch.int32).contiguous(), w.contiguous()
        out = torch.zeros_like(x)
        chosen = sorted({e for e in ids.flatten().tolist() if e >= 0})
        tasks = (partial(self._load, layer, e) for e in chosen)
        with closing(ahead(tasks, AHEAD)) as loaded:
            for i, (e, expert) in enumerate(zip(chosen, loaded, strict=True)):
                if cancel is not None and cancel():
                    raise CancelledError("stopped between experts", hint="ask again to start over")
                self._add(out, expert, e, x, ids, w)
                self.on_expert((i + 1) / len(chosen))
        return out

    def stream(
        self, layer: int, wanted: Mapping[int, int], *, held: int = 1, slots: int = 1
    ) -> Generator[tuple[int, Expert], None, None]:
        """Each in memory of its own."""
        tasks = (partial(self._load, layer, e) for e in sorted(wanted))
        with closing(ahead(tasks, AHEAD)) as loaded:
            yield from zip(sorted(wanted), loaded, strict=True)

    def _load(self, layer: int, e: int, _: Scratch) -> Expert:
        return self.weights.expert(layer, e)

    def _add(
        self,
        out: torch.Tensor,
        expert: Expert,
        e: int,
        x: torch.Tensor,
        ids: torch.Tensor,
        w: torch.Tensor,
    ) -> None:
        native = None if self.exact else kernels.get()
        if native is None:
            rows, places = (ids == e).nonzero(as_tuple=True)
            out.index_add_(0, rows, apply(expert, x[rows]).mul_(w[rows, places, None]))
            return
        tier, (n, d) = RamTier(), x.shape
        tier.put(0, [expert])
        mine = torch.where(ids == e, 0, -1).to(torch.int32)
        native.call(
            "moe", tier.mlps(0), 1, x.data_ptr(), d, n,
            mine.data_ptr(), w.data_ptr(), ids.shape[1], out.data_ptr(), d, 1,
        )  # fmt: skip
