"""Predicted against measured: how far a plan was off in a run, and which assumption to blame.

Pure arithmetic on recorded runs. Called by `mimo plan --check` and `mimo doctor`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from mimo_local.runs import Cost, Predicted, Run
from mimo_local.sizes import GB, gb

OFF: Final = 1.5
"""A prediction that many times too fast or too slow is called wrong."""
FEW_TOKENS: Final = {"decode": 8, "prefill": 64}
"""Fewer say nothing: waking up, page faults and sampling count for too much."""
FEW_SECONDS: Final = 0.05
HIT_MARGIN: Final = 0.05
WAITING: Final = 0.25
"""Share of the time from which waiting for the disk may be to blame."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One comparison of tokens per second; `low` and `high`: predicted."""

    what: Literal["decode", "prefill"]
    measured: float
    low: float
    high: float
    ratio: float
    """Measured over what was predicted; 1 between the bounds, below 1: slower."""
    blame: str
    """Which assumption was wrong; empty if none was."""

    @property
    def off(self) -> bool:
        """Whether the prediction was wrong by more than OFF."""
        return not 1 / OFF <= self.ratio <= OFF

    def sentence(self) -> str:
        """`decode was 2.1 times slower than predicted: ...`, or that it was right."""
        if not self.off:
            return f"{self.what} was as predicted"
        times = self.ratio if self.ratio > 1 else 1 / self.ratio
        how = "faster" if self.ratio > 1 else "slower"
        return f"{self.what} was {times:.1f} times {how} than predicted: {self.blame}"


def judge(run: Run) -> tuple[Finding, ...]:
    """Decode and prefill of a run, as far as there were tokens enough."""
    found = []
    if run.decode.tokens >= FEW_TOKENS["decode"] and run.decode.seconds > FEW_SECONDS:
        speeds = [way.tokens_per_s for way in run.predicted]
        found.append(_finding(run, "decode", run.decode, min(speeds), max(speeds)))
    enough = run.prefill.tokens >= FEW_TOKENS["prefill"] and run.prefill.seconds > FEW_SECONDS
    if enough and run.predicted_prefill_s > 0:
        speed = run.prefill.tokens / run.predicted_prefill_s
        found.append(_finding(run, "prefill", run.prefill, speed, speed))
    return tuple(found)


def _finding(
    run: Run, what: Literal["decode", "prefill"], cost: Cost, low: float, high: float
) -> Finding:
    measured = cost.tokens_per_s
    ratio = measured / min(max(measured, low), high)
    blame = ""
    if not 1 / OFF <= ratio <= OFF:
        slow = ratio < 1
        blame = _blame_decode(run, slow) if what == "decode" else _blame_prefill(run, slow)
        if not run.calibrated:
            blame += "; the rates were assumed, `mimo plan --calibrate` measures them"
    return Finding(what, measured, low, high, ratio, blame)


def _blame_decode(run: Run, slow: bool) -> str:
    cost, (worst, best) = run.decode, (run.predicted[0], run.predicted[-1])
    hit = cost.hit
    if hit is not None and slow and hit < worst.hit - HIT_MARGIN:
        return (
            f"{hit:.0%} of the experts were in memory, {_range(worst, best)} expected "
            "(the first answers fill it)"
        )
    if hit is not None and not slow and hit > best.hit + HIT_MARGIN:
        return f"{hit:.0%} of the experts were in memory, {_range(worst, best)} expected"
    near = worst if slow else best
    waited, computed = cost.wait_s / cost.tokens, (cost.seconds - cost.wait_s) / cost.tokens
    thought = near.resident_s + near.expert_s
    # The part that is further from its prediction, in seconds, is the one to name.
    if abs(waited - near.wait_s) > abs(computed - thought):
        return f"waiting for the disk took {_ms(waited)} ms a token, {_ms(near.wait_s)} expected"
    why = "other programs, fewer threads, or slower memory than assumed" if slow else "the memory"
    return f"computing took {_ms(computed)} ms a token, {_ms(thought)} expected: {why}"


def _blame_prefill(run: Run, slow: bool) -> str:
    cost = run.prefill
    if cost.wait_s > WAITING * cost.seconds:
        rate = cost.disk_bytes / cost.seconds / GB
        return f"the disk gave {gb(cost.disk_bytes)} at {rate:.2f} GB/s"
    how = "slower" if slow else "faster"
    if run.bound == "disk" and not slow:
        return "less had to come from disk than expected"
    return f"the products were {how} than assumed"


def _range(worst: Predicted, best: Predicted) -> str:
    low, high = f"{worst.hit:.0%}", f"{best.hit:.0%}"
    return low if low == high else f"{low[:-1]}-{high}"


def _ms(seconds: float) -> str:
    """Milliseconds, with a decimal or two where they are few."""
    return f"{1e3 * seconds:.0f}" if seconds >= 0.01 else f"{1e3 * seconds:.2g}"
