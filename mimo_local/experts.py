"""ExpertStore: runs the chosen experts of one layer, each expert's bytes read once per step.

Knows which expert lies where (for now: all of them in RAM) and in which order to run them; knows no
routing and no attention. Built by `engine` and `api`, called by `model` once per mixture layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import psutil
import torch
import torch.nn.functional as F

from mimo_local import hardware
from mimo_local.errors import NotEnoughMemoryError
from mimo_local.events import Progress
from mimo_local.weights import Expert, OnProgress, QuantLinear, Weights, stack


class _Held(NamedTuple):
    """An expert ready to run: gate and up are one product of 2 I rows."""

    gate_up: QuantLinear
    down: QuantLinear

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x (T, D) -> down(silu(gate x) * up x) (T, D)."""
        joint = self.gate_up(x)
        width = self.down.cols
        return self.down(F.silu(joint[:, :width]).mul_(joint[:, width:]))


class RamTier:
    """Experts held in memory, by layer.

    Gate and up are copied into one matrix: with the demo model's small experts the calls cost as
    much as the bytes, and a token takes 8 experts in each of 29 layers.
    """

    def __init__(self) -> None:
        self._held: dict[int, list[_Held]] = {}
        self.nbytes = 0

    def put(self, layer: int, experts: Iterable[Expert]) -> None:
        """Hold all experts of one layer."""
        held = self._held[layer] = []
        for expert in experts:
            # A copy of `down` too: a view would keep the whole buffer the expert was read into.
            ready = _Held(stack([expert.gate, expert.up]), stack([expert.down]))
            held.append(ready)
            self.nbytes += ready.gate_up.nbytes + ready.down.nbytes

    def get(self, layer: int) -> list[_Held]:
        """The experts of one layer, by index."""
        return self._held[layer]


class ExpertStore:
    """What the mixture layers see."""

    def __init__(self, weights: Weights, *, on_progress: OnProgress | None = None) -> None:
        """Load every expert into RAM by layers; NotEnoughMemoryError before the first byte."""
        config = weights.config
        check_memory(weights.nbytes)
        self.ram = RamTier()
        layers = [spec.index for spec in config.layers if spec.mlp == "moe"]
        total = weights.expert_nbytes if layers else 0
        for layer in layers:
            self.ram.put(layer, (weights.expert(layer, e) for e in range(config.n_experts)))
            if on_progress is not None:
                on_progress(Progress("loading experts", self.ram.nbytes, total))

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes held, by tier."""
        return {"ram": self.ram.nbytes}

    def run(self, layer: int, x: torch.Tensor, ids: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """x (T, D) f32, ids (T, K) int64, w (T, K) f32 -> (T, D) f32: sum over K of w * expert(x).

        A row sums its experts in ascending order, whatever the other rows chose, so its bits do not
        depend on its company as long as each expert's products do not (T <= 16).
        """
        experts = self.ram.get(layer)
        out = torch.zeros_like(x)
        n_chosen = ids.shape[1]
        if x.shape[0] == 1:
            for e, k in sorted(zip(ids[0].tolist(), range(n_chosen), strict=True)):
                out.add_(experts[e](x).mul_(w[:, k : k + 1]))
            return out
        chosen, order = ids.flatten().sort(stable=True)
        rows = order // n_chosen
        xs, ws = x[rows], w.flatten()[order, None]
        start = 0
        for e, n in Counter(chosen.tolist()).items():
            mine = slice(start, start + n)
            out.index_add_(0, rows[mine], experts[e](xs[mine]).mul_(ws[mine]))
            start += n
        return out


def available_memory() -> int:
    """Bytes this process may still take: the machine's, or its cgroup's if that is less."""
    return min(int(psutil.virtual_memory().available), hardware.cgroup_memory()[1])


def check_memory(nbytes: int) -> None:
    """Refuse to load `nbytes` that do not fit; raises NotEnoughMemoryError."""
    free = available_memory()
    if nbytes > free:
        raise NotEnoughMemoryError(
            f"the model takes {nbytes / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free: "
            f"{(nbytes - free) / 1e9:.1f} GB are missing",
            hint="close other programs, choose a smaller format (`mimo quantize --format nf4`), "
            "or see `mimo plan`",
        )
