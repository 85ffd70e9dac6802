"""Which of a long prompt's experts a device multiplies and which the CPU: by what each costs them.

An expert with few rows is cheaper where it lies than on the bus; one with many rows belongs where
arithmetic is cheap. Both sides work at the same time, so what counts is when the later one is done.
Knows numbers of rows and seconds, no tensors. Called by `device_sweep`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Final

from mimo_local.plan.rates import CORE_FLOPS, GPU_FLOPS, PCIE_EFF, RAM_EFF, SLOW_FLOPS
from mimo_local.plan.types import Budget

MOST_PAIRS: Final = 8192
"""(row, expert) pairs the CPU gets of a layer at most: their activations take 24 KiB each of pinned
memory, 200 MB in all. A prompt that has more is long enough for the device."""
FUSED: Final = 8
"""Rows up to which a device multiplies an expert's codes as they are (bitsandbytes, 4 bits)."""
ENOUGH_S: Final = 5e-3
"""Seconds a side's share has to take for its time to be believed: less is all beginnings."""
WEIGHT: Final = 0.25
"""Of the latest layer in the running average of a side's rate."""
CLEARLY: Final = 1.5
"""Times slower or faster than expected, twice in a row: the rates were another machine's."""
STEP: Final = 1.2
"""Corrections are powers of it: the same prompt is mostly split the same way again."""
FORGET: Final = 0.98
"""What is left of a correction after a layer that did not use the side: it is tried again."""


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds; rows are those that chose the expert."""

    upload: float
    """An expert's bytes to the device."""
    device_expert: float
    """A dozen launches."""
    device_unpack: float
    """An expert's weights to the activations' dtype, for more than FUSED rows."""
    device_row: float
    host_expert: float
    """An expert's bytes from memory to the cores."""
    host_row: float
    start: float = 1.5e-3
    """Until the device has its first expert: a buffer is filled and copied."""

    @classmethod
    def guess(cls, nbytes: int, weights: int, *, isa: str | None, cores: int) -> Costs:
        """Of an expert of `weights` weights in `nbytes` bytes, at the rates the planner assumes.

        `isa`: of the kernels; None: there are none.
        """
        flops, budget = 2.0 * weights, Budget(0, 0)
        core = SLOW_FLOPS if isa is None else CORE_FLOPS.get(isa, CORE_FLOPS["avx512"])
        return cls(
            upload=nbytes / (budget.pcie_rate * PCIE_EFF),
            device_expert=1e-4,
            # Written and read again as bfloat16, at half the rate of VRAM.
            device_unpack=8.0 * weights / budget.vram_rate,
            device_row=flops / GPU_FLOPS,
            host_expert=nbytes / (budget.ram_rate * RAM_EFF),
            host_row=flops / (core * max(1, cores)),
        )

    def device(self, rows: int, *, there: bool) -> float:
        """An expert on the device; copies and products of different experts overlap."""
        work = self.device_expert + rows * self.device_row
        work += self.device_unpack if rows > FUSED else 0.0
        return work if there else max(self.upload, work)

    def host(self, rows: int) -> float:
        """An expert on the CPU."""
        return self.host_expert + rows * self.host_row

    def scaled(self, device: float, host: float) -> Costs:
        """With both sides slower by these factors."""
        return Costs(
            self.upload * device, self.device_expert * device, self.device_unpack * device,
            self.device_row * device, self.host_expert * host, self.host_row * host,
            self.start * device,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Split:
    """Who does what; both in ascending order of the experts."""

    device: list[int]
    host: list[int]
    device_s: float
    host_s: float
    """Seconds by the costs."""

    @property
    def seconds(self) -> float:
        """When both are done."""
        return max(self.device_s, self.host_s)


def split(
    counts: Mapping[int, int],
    costs: Costs,
    there: Collection[int] = (),
    *,
    most_pairs: int = MOST_PAIRS,
    both: bool = True,
) -> Split:
    """`counts`: expert -> rows, of those that have any; `there`: experts that lie on the device.

    The CPU gets the experts at which it is worst by least, as many as end soonest: never later than
    one side would have done it all (the CPU's side: while that is `most_pairs` or less). Of equal
    ends the one with least for the CPU. `both`: else one side gets everything.
    """
    wanted = sorted(e for e, n in counts.items() if n > 0)
    device = {e: costs.device(counts[e], there=e in there) for e in wanted}
    host = {e: costs.host(counts[e]) for e in wanted}
    order = sorted(wanted, key=lambda e: (host[e] / max(device[e], 1e-12), e))
    # The seconds that are left to the device, added from the end: all of them gone is exactly 0.
    left = [0.0]
    for e in reversed(order):
        left.append(left[-1] + device[e])
    left.reverse()
    taken, host_s, pairs = 0, 0.0, 0
    best_s, best_host_s = left[0] + costs.start, 0.0
    for n, e in enumerate(order, 1):
        host_s, pairs = host_s + host[e], pairs + counts[e]
        if pairs > most_pairs:
            break
        last = n == len(order)
        end = host_s if last else max(host_s, left[n] + costs.start)
        if end < best_s and (both or last):
            taken, best_s, best_host_s = n, end, host_s
    mine = set(order[:taken])
    rest = [e for e in wanted if e not in mine]
    device_s = left[taken] + costs.start if rest else 0.0
    return Split(rest, sorted(mine), device_s, best_host_s)


@dataclass(slots=True)
class Rates:
    """The costs as they turn out: a guess, and by how much each side was slower than it."""

    guess: Costs
    device: float = 1.0
    host: float = 1.0
    _seen: set[str] = field(default_factory=set)
    _last: dict[str, float] = field(default_factory=dict)
    """How far off each side's last layer was."""

    @property
    def costs(self) -> Costs:
        """What to expect of the next layer; in steps, so that a trifle changes nobody's share."""
        return self.guess.scaled(_stepped(self.device), _stepped(self.host))

    def observe(self, found: Split, device_s: float | None, host_s: float | None) -> None:
        """A layer that was split as `found` took so many seconds; None: not to be believed.

        Each side's first layer is left out: libraries load, memory is taken.
        """
        self.device = self._next("device", self.device, found.device_s, device_s)
        self.host = self._next("host", self.host, found.host_s, host_s)

    def _next(self, side: str, factor: float, expected: float, took: float | None) -> float:
        if expected <= 0.0:
            return 1.0 + (factor - 1.0) * FORGET
        if took is None or max(expected, took) < ENOUGH_S:
            return factor
        if side not in self._seen:
            self._seen.add(side)
            return factor
        # What two layers agree on is believed whole; one alone may have met a pause of the system.
        times, before = max(took, 1e-6) / expected, self._last.get(side, 1.0)
        agreed = min(times, before) if times > 1.0 else max(times, before)
        if (agreed - 1.0) * (times - 1.0) > 0 and abs(math.log(agreed)) > math.log(CLEARLY):
            self._last[side] = 1.0
            return factor * agreed
        self._last[side] = times
        return factor * (1.0 + WEIGHT * (min(4.0, max(0.25, times)) - 1.0))


def _stepped(factor: float) -> float:
    return float(STEP ** round(math.log(factor, STEP)))
