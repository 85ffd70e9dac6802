"""How often a chosen expert is at hand: hit rate against the share of experts that is kept.

Two stated curves bound what is not known before the model has run, a recorded trace gives a third.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass

from mimo_local.errors import UsageError


@dataclass(frozen=True, slots=True)
class HitCurve:
    """Straight lines between (share of experts kept, share of choices found), both from 0 to 1."""

    name: str
    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        flat = [value for point in self.points for value in point]
        rising = all(a[0] < b[0] and a[1] <= b[1] for a, b in zip(self.points, self.points[1:]))  # noqa: B905
        ends = bool(self.points) and self.points[0][0] == 0 and self.points[-1] == (1.0, 1.0)
        if not rising or not ends or not all(0 <= value <= 1 for value in flat):
            raise UsageError(
                f"the hit rates `{self.name}` do not rise from share 0 to (1, 1)",
                hint="give (share kept, hit rate) pairs in ascending order",
            )

    @classmethod
    def through(cls, name: str, rates: Mapping[float, float]) -> HitCurve:
        """A curve through replayed (share kept -> hit rate); where rates fall, the best before."""
        points, best = [(0.0, 0.0)], 0.0
        for share in sorted(share for share in rates if 0 < share < 1):
            best = max(best, rates[share])
            points.append((share, best))
        return cls(name, (*points, (1.0, 1.0)))

    def __call__(self, share: float) -> float:
        """The hit rate with `share` of the experts kept."""
        share = min(max(share, 0.0), 1.0)
        i = bisect_right(self.points, share, key=lambda point: point[0]) - 1
        if i == len(self.points) - 1:
            return 1.0
        (x0, y0), (x1, y1) = self.points[i], self.points[i + 1]
        return y0 + (y1 - y0) * (share - x0) / (x1 - x0)


UNIFORM = HitCurve("uniform", ((0.0, 0.0), (1.0, 1.0)))
"""Every expert equally likely, whatever came before: no cache can do worse for long."""

SKEWED = HitCurve(
    "skewed",
    (
        *((0.0, 0.0), (0.05, 0.20), (0.10, 0.34), (0.19, 0.50)),
        *((0.38, 0.70), (0.55, 0.81), (0.75, 0.92), (1.0, 1.0)),
    ),
)
"""Least-recently-used caches in public traces of similar models (GLM-5.2, DeepSeek-V4-Flash,
Qwen3.8-Flash-Next: 19 % kept 45-55 % found, 38 % 62-80 %, 55 % 75-85 %, 75 % 90-94 %): the middle.
MiMo-V2-Flash's own routing has not been recorded."""

BOUNDS = (UNIFORM, SKEWED)
