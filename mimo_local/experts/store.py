"""ExpertStore: runs the chosen experts of one layer, each expert's bytes read once per step.

All of them in RAM, and in which order they are run; knows no routing and no attention. `Store` is
what every store answers. Built by `opening`, called by `model` once per mixture layer.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Final, TypeAlias

import torch
import torch.nn.functional as F

from mimo_local import kernels
from mimo_local.errors import CancelledError
from mimo_local.events import Progress
from mimo_local.experts.memory import check_memory
from mimo_local.experts.meters import Meters
from mimo_local.weights import Expert, OnProgress, Weights

# A sweep of 512, 2048 and 8192 rows through the real model's experts took as long in calls of 128,
# 512, 1024 and 4096 pairs as in one call. 512 are about 30 ms.
BATCH_PAIRS: Final = 512
"""(row, expert) pairs of a sweep that go to the kernels in one call, if they are there."""

Watcher: TypeAlias = Callable[[int, torch.Tensor], None]


class Store(ABC):
    """What the mixture layers see.

    `ExpertStore` (all in RAM) or `tiered.TieredStore`, and before one of them, for layers on an
    accelerator, `device_store.DeviceStore`.
    """

    meters: Meters
    _watcher: Watcher | None = None

    @property
    def host(self) -> Store:
        """The store for layers on the host: rows and results in this machine's memory."""
        return self

    @property
    @abstractmethod
    def nbytes(self) -> dict[str, int]:
        """Bytes held, by tier."""

    @property
    def notes(self) -> list[str]:
        """What the user should know about how it runs."""
        return []

    @property
    def wants_guesses(self) -> bool:
        """Whether `expect` would do anything now."""
        return False

    @abstractmethod
    def resident(self, layer: int) -> bool:
        """Whether all experts of the layer lie in RAM for good, so that `mlps` may be called."""

    @abstractmethod
    def mlps(self, layer: int) -> tuple[ctypes.Array[kernels.Mlp], object]:
        """The experts of a resident layer for the kernels, and what must live meanwhile."""

    def held(self, layer: int, e: int) -> Expert | None:
        """The expert, if it lies in RAM now: its bytes are good until the next step."""
        return None

    def watch(self, watcher: Watcher | None) -> None:
        """Tell `watcher(layer, ids (T, K) int32)` about every step's choices; None: nobody."""
        self._watcher = watcher

    def expect(self, layer: int, ids: torch.Tensor) -> None:  # noqa: B027
        """ids (N,): what `layer`, which comes next, will probably choose, likeliest first."""

    @abstractmethod
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
        """x (T, D) f32, ids (T, K) int, w (T, K) f32 -> (T, D) f32: sum over K of w * expert(x).

        A row sums its experts in ascending order, whatever the other rows chose. With the kernels
        its bits do not depend on its company up to 8 rows; 4- and 8-bit experts then meet x rounded
        to 8 bits per 64 columns. An id of -1 leaves its entry out. `meanwhile` is called while the
        first reads are under way, if there may be any; `guess` is for `expect`, by those who have
        it at hand.
        """

    @abstractmethod
    def sweep(
        self,
        layer: int,
        x: torch.Tensor,
        ids: torch.Tensor,
        w: torch.Tensor,
        *,
        cancel: Callable[[], bool] | None = None,
    ) -> torch.Tensor:
        """As `run`, for the rows of a long prompt: every expert is read once, in file order.

        `cancel` is asked between experts; CancelledError when it says so.
        """

    @property
    def lends(self) -> int:
        """Experts all streams together may hold and read ahead."""
        return 1 << 20

    @abstractmethod
    def stream(
        self, layer: int, wanted: Mapping[int, int], *, held: int = 1, slots: int = 1
    ) -> Generator[tuple[int, Expert], None, None]:
        """(expert, its matrices) of all in `wanted` (expert -> rows it has), ascending, read once.

        For who computes elsewhere. An expert's bytes are good until `held` more have been asked
        for, and no other step may run while they are in use. `slots` of `lends`, `held` or more,
        are this stream's. Close it to stop early. PackError if an expert cannot be read.
        """

    def close(self) -> None:  # noqa: B027
        """Let go of threads and files; the store cannot be used afterwards."""


class RamTier:
    """Experts held in memory as they were read, by layer."""

    def __init__(self) -> None:
        self._held: dict[int, list[Expert]] = {}
        self._mlps: dict[int, ctypes.Array[kernels.Mlp]] = {}
        self.nbytes = 0

    def put(self, layer: int, experts: Iterable[Expert]) -> None:
        """Hold all experts of one layer; nothing is copied."""
        held = self._held[layer] = list(experts)
        mlps = self._mlps[layer] = (kernels.Mlp * len(held))()
        for mlp, expert in zip(mlps, held, strict=True):
            for name in ("gate", "up", "down"):
                linear = getattr(expert, name)
                setattr(mlp, name, linear.format.matrix(linear.parts))
            self.nbytes += expert.nbytes

    def __contains__(self, layer: int) -> bool:
        return layer in self._held

    def get(self, layer: int) -> list[Expert]:
        """The experts of one layer, by index."""
        return self._held[layer]

    def mlps(self, layer: int) -> ctypes.Array[kernels.Mlp]:
        """Their addresses; good as long as the tier lives."""
        return self._mlps[layer]


class ExpertStore(Store):
    """All experts in RAM."""

    def __init__(self, weights: Weights, *, on_progress: OnProgress | None = None) -> None:
        """Load every expert into RAM by layers; NotEnoughMemoryError before the first byte."""
        config = weights.config
        check_memory(weights.nbytes)
        self.ram = RamTier()
        self.meters = Meters()
        layers = [spec.index for spec in config.layers if spec.mlp == "moe"]
        total = weights.expert_nbytes if layers else 0
        for layer in layers:
            self.ram.put(layer, (weights.expert(layer, e) for e in range(config.n_experts)))
            if on_progress is not None:
                on_progress(Progress("loading experts", self.ram.nbytes, total))

    @property
    def nbytes(self) -> dict[str, int]:
        """All of them."""
        return {"ram": self.ram.nbytes}

    def resident(self, layer: int) -> bool:
        """Always, unless somebody watches: a call of all layers tells nobody what they choose."""
        return self._watcher is None and layer in self.ram

    def sweep(
        self,
        layer: int,
        x: torch.Tensor,
        ids: torch.Tensor,
        w: torch.Tensor,
        *,
        cancel: Callable[[], bool] | None = None,
    ) -> torch.Tensor:
        """The bits of `run`, BATCH_PAIRS at a time."""
        if self._watcher is not None:
            self._watcher(layer, ids)
        x, ids, w = x.contiguous(), ids.to(torch.int32).contiguous(), w.contiguous()
        native = kernels.get() if x.device.type == "cpu" else None
        (n, d), out, mlps = x.shape, torch.zeros_like(x), self.ram.mlps(layer)
        for first, end in _batches(ids, len(mlps)):
            if cancel is not None and cancel():
                raise CancelledError(
                    "stopped while reading the prompt", hint="ask again to start over"
                )
            mine = torch.where((ids >= first) & (ids < end), ids, -1)
            if native is None:
                self._add_torch(out, layer, x, mine, w)
                continue
            native.call(
                "moe", mlps, len(mlps), x.data_ptr(), d, n,
                mine.data_ptr(), w.data_ptr(), ids.shape[1], out.data_ptr(), d, 1,
            )  # fmt: skip
        return out

    def stream(
        self, layer: int, wanted: Mapping[int, int], *, held: int = 1, slots: int = 1
    ) -> Generator[tuple[int, Expert], None, None]:
        """They are all there, and stay."""
        experts = self.ram.get(layer)
        for e in sorted(wanted):
            yield e, experts[e]

    def mlps(self, layer: int) -> tuple[ctypes.Array[kernels.Mlp], object]:
        """Addresses of the experts of one layer, and their owner."""
        return self.ram.mlps(layer), self.ram

    def held(self, layer: int, e: int) -> Expert | None:
        """Always."""
        return self.ram.get(layer)[e]

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
        """One fused call; nothing is read, and nothing happens `meanwhile`."""
        if self._watcher is not None:
            self._watcher(layer, ids)
        native = kernels.get()
        if native is None or x.device.type != "cpu":
            return self.run_torch(layer, x, ids, w)
        mlps, x = self.ram.mlps(layer), x.contiguous()
        chosen, w = ids.to(torch.int32).contiguous(), w.contiguous()
        (n, d), out = x.shape, torch.empty_like(x)
        native.call(
            "moe", mlps, len(mlps), x.data_ptr(), d, n,
            chosen.data_ptr(), w.data_ptr(), ids.shape[1], out.data_ptr(), d, 0,
        )  # fmt: skip
        return out

    def run_torch(
        self, layer: int, x: torch.Tensor, ids: torch.Tensor, w: torch.Tensor
    ) -> torch.Tensor:
        """The twin of `run`, expert by expert."""
        out = torch.zeros_like(x)
        self._add_torch(out, layer, x, ids, w)
        return out

    def _add_torch(
        self, out: torch.Tensor, layer: int, x: torch.Tensor, ids: torch.Tensor, w: torch.Tensor
    ) -> None:
        experts = self.ram.get(layer)
        chosen, order = ids.flatten().sort(stable=True)
        rows = order // ids.shape[1]
        xs, ws = x[rows], w.flatten()[order, None]
        start = 0
        for e, n in Counter(chosen.tolist()).items():
            mine = slice(start, start + n)
            start += n
            if e >= 0:
                out.index_add_(0, rows[mine], apply(experts[e], xs[mine]).mul_(ws[mine]))


def _batches(ids: torch.Tensor, n_experts: int) -> Iterator[tuple[int, int]]:
    """Experts that go to the kernels in one call: [first, end) with BATCH_PAIRS or one in use."""
    counts: list[int] = torch.bincount(ids[ids >= 0].long(), minlength=n_experts).tolist()
    first = pairs = 0
    for e, n in enumerate(counts):
        if pairs and pairs + n > BATCH_PAIRS:
            yield first, e
            first, pairs = e, 0
        pairs += n
    if pairs:
        yield first, n_experts


def apply(expert: Expert, x: torch.Tensor) -> torch.Tensor:
    """x (T, D) -> down(silu(gate x) * up x) (T, D)."""
    return expert.down(F.silu(expert.gate(x)).mul_(expert.up(x)))
