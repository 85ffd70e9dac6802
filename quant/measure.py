"""How much a stored weight lost: relative errors of matrices, measured on rows that stand for them.

Pure arithmetic on rows and sums; knows formats, no files and no model. Called by `convert` while
the exact rows are still in memory, by `mimo_local.fidelity` for packs made elsewhere, and by tests.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from quant.formats import Format, Parts
from quant.fp8 import Fp8Rows
from quant.inventory import Role, role_of

RUN, RUNS = 8, 4
"""Rows side by side, and how many such places: 32 rows of the real model are 131 072 weights, which
give its relative error to a percent; a whole expert would cost a third of quantising it again."""

_EXPERT_NUMBER = re.compile(r"(\.mlp\.experts)\.\d+\.")


def relative_rms(exact: torch.Tensor, stored: torch.Tensor) -> float:
    """Root mean square of the difference over that of `exact`; 0 when both are all zero.

    Same shapes, any float dtype. NF4 on Gaussian weights gives about 0.085, int8 rows about 0.008.
    """
    return Sums.of(exact, stored).rms


def sampled(rows: int) -> Iterator[tuple[slice, float]]:
    """Rows that stand for a matrix of so many, each run with how many times its own it stands for.

    All rows up to RUN * RUNS, else RUNS runs spread from the first row to the last.
    """
    if rows <= RUN * RUNS:
        yield slice(0, rows), 1.0
        return
    for i in range(RUNS):
        start = (rows - RUN) * i // (RUNS - 1)
        yield slice(start, start + RUN), rows / (RUN * RUNS)


@dataclass(slots=True)
class Sums:
    """Squares of a matrix and of what it lost, added up over its pieces."""

    size: float = 0.0
    error: float = 0.0

    @classmethod
    def of(cls, exact: torch.Tensor, stored: torch.Tensor) -> Sums:
        """Those of some rows."""
        wide = exact.double()
        return cls(wide.square().sum().item(), (stored.double() - wide).square_().sum().item())

    def add(self, other: Sums, times: float = 1.0) -> None:
        """Count `other` so many times."""
        self.size += other.size * times
        self.error += other.error * times

    @property
    def rms(self) -> float:
        """Root of error over size; of nothing lost 0, of something where there was nothing 1."""
        return (self.error / self.size) ** 0.5 if self.size else float(self.error > 0)


@dataclass(frozen=True, slots=True)
class Loss:
    """What one matrix lost, or the matrices of one kind of a layer's experts together."""

    name: str
    """The hub's name, `*` for the number of an expert."""
    role: Role
    format: str
    matrices: int
    rms: float
    """Relative to the weights themselves."""
    worst: float
    """The largest of a single matrix."""
    worst_name: str


class Tally:
    """Collects the losses of matrices, piece by piece."""

    def __init__(self) -> None:
        self._sums: dict[str, Sums] = {}
        self._formats: dict[str, str] = {}

    def add(self, name: str, fmt: Format, exact: torch.Tensor | Fp8Rows, stored: Parts) -> None:
        """Rows of a matrix and the parts they became; vectors are kept exact and not looked at."""
        if len(exact.shape) != 2:
            return
        for part, times in sampled(exact.shape[0]):
            kept = fmt.unpack({key: value[part] for key, value in stored.items()})
            self.put(name, fmt.name, Sums.of(_values(exact, part), kept), times)

    def same(self, name: str, fmt: Format) -> None:
        """A matrix that was stored as it was."""
        self.put(name, fmt.name, Sums(1.0, 0.0))

    def put(self, name: str, fmt: str, sums: Sums, times: float = 1.0) -> None:
        """Sums of rows of a matrix that stand for `times` as many."""
        self._formats[name] = fmt
        self._sums.setdefault(name, Sums()).add(sums, times)

    def sums(self) -> dict[str, list[float]]:
        """Size and error of every matrix so far, as plain data for a later `put`; and forget it."""
        found = {name: [sums.size, sums.error] for name, sums in self._sums.items()}
        self._sums.clear()
        return found

    def take(self) -> list[Loss]:
        """What was collected since the last time, by name; experts of a layer together."""
        groups: dict[str, list[str]] = {}
        for name in self._sums:
            groups.setdefault(_EXPERT_NUMBER.sub(r"\1.*.", name), []).append(name)
        losses = [self._loss(group, names) for group, names in sorted(groups.items())]
        self._sums.clear()
        return losses

    def _loss(self, group: str, names: list[str]) -> Loss:
        total = Sums()
        for name in names:
            total.add(self._sums[name])
        worst = max(names, key=lambda name: self._sums[name].rms)
        fmt, role = self._formats[worst], role_of(worst, (1, 1))
        most = self._sums[worst].rms
        # Six digits: what the order of a sum changes is far below.
        return Loss(group, role, fmt, len(names), _digits(total.rms), _digits(most), worst)


def _digits(value: float) -> float:
    return float(f"{value:.6g}")


def _values(exact: torch.Tensor | Fp8Rows, part: slice) -> torch.Tensor:
    """Rows of a source as float32."""
    if isinstance(exact, Fp8Rows):
        return Fp8Rows(exact.codes[part], exact.grid, exact.row_of[part], exact.block).values()
    return exact[part]
