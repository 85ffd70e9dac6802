"""Two engines measured in turn: the cases, the order, the ratios of neighbours.

Asks workers (bench/engine_worker.py) for times and does arithmetic; knows neither llama.cpp nor
this project's engine beyond their names. Called by bench/vs_llamacpp.py.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mimo_local.errors import UsageError

OURS, THEIRS = "mimo", "llama.cpp"
START = 16
"""Ids in the cache before decode at depth 0."""
VERIFY_REPEATS = 4
MOST_OTHERS = 0.06
"""Share of the machine other processes may take during a sample: beyond, it is taken again."""
RETAKES = 2
"""Times the rounds, at most."""


class Asked(Protocol):
    """What the measuring half needs of a `Worker`."""

    others: float

    def ask(self, op: str, n: int = 1, **more: object) -> Mapping[str, Any]:
        """One request."""

    def ms(self, op: str, n: int = 1, **more: object) -> list[float]:
        """The times of one request."""


@dataclass(frozen=True, slots=True)
class Case:
    """pp: a prompt of n ids; tg: n ids one by one; v: n ids at once with all logits."""

    kind: str
    n: int
    depth: int = 0

    @property
    def name(self) -> str:
        return f"{self.kind}{self.n}" + (f" @ d{self.depth}" if self.depth else "")

    @property
    def tokens(self) -> int:
        """Ids of one timed step."""
        return 1 if self.kind == "tg" else self.n


@dataclass(frozen=True, slots=True)
class Row:
    """One case with one thread count: a time per round for every engine."""

    case: Case
    threads: int
    samples: dict[str, list[float]]
    others: float = 0.0
    """The most that other processes took of the machine during a sample, 0..1."""

    def ms(self, name: str) -> float:
        """Median time of a step of `name`."""
        return statistics.median(self.samples[name])

    @property
    def ratios(self) -> list[float]:
        """llama.cpp's time / ours, round by round; empty when one of them did not run."""
        if set(self.samples) != {OURS, THEIRS}:
            return []
        pairs = zip(self.samples[THEIRS], self.samples[OURS], strict=True)
        return [theirs / ours for theirs, ours in pairs]

    def to_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {"test": self.case.name, "threads": self.threads, "engines": {}}
        found["others"] = self.others
        for name, samples in self.samples.items():
            found["engines"][name] = {
                "ms": round(self.ms(name), 3),
                "tok_s": round(1e3 * self.case.tokens / self.ms(name), 2),
                "samples_ms": [round(sample, 3) for sample in samples],
            }
        if ratios := self.ratios:
            found["ratio"] = {
                "median": round(statistics.median(ratios), 3),
                "min": round(min(ratios), 3),
                "max": round(max(ratios), 3),
            }
        return found


def plan_cases(
    prompts: Sequence[int], generate: Sequence[int], verify: Sequence[int], depths: Sequence[int]
) -> list[Case]:
    """Prompts at depth 0, decode and verify at every depth; UsageError when nothing is left."""
    cases = [Case("pp", n) for n in prompts if n]
    for depth in depths:
        cases += [Case("tg", n, depth) for n in generate if n]
        cases += [Case("v", n, depth) for n in verify if n]
    if not cases:
        raise UsageError("there is nothing to measure", hint="give `-p 512` or `-n 16`")
    return cases


def context_for(cases: Sequence[Case], rounds: int) -> int:
    """Ids the longest case reaches, rounded up to 256 as llama.cpp does."""
    longest = 0
    for case in cases:
        steps = case.n * VERIFY_REPEATS if case.kind == "v" else case.n
        grown = START + (1 + rounds * (1 + RETAKES)) * (steps + 1) if case.kind != "pp" else case.n
        longest = max(longest, case.depth + grown)
    return -(-longest // 256) * 256


def sample(worker: Asked, case: Case, outputs: str) -> tuple[float, float]:
    """Milliseconds of one prompt, one token (median of a burst) or one verified batch; others."""
    if case.kind == "pp":
        return worker.ms("prefill", case.n, outputs=outputs)[0], worker.others
    if case.kind == "tg":
        return statistics.median(worker.ms("decode", case.n + 1)[1:]), worker.others
    both = [(worker.ms("verify", case.n)[0], worker.others) for _ in range(VERIFY_REPEATS)]
    times, others = zip(*both, strict=True)
    return statistics.median(times), statistics.median(others)


def order(names: Sequence[str], round_: int) -> list[str]:
    """Who goes first changes every round, so that a slow drift helps nobody."""
    return list(names) if round_ % 2 == 0 else list(reversed(names))


def measure(
    workers: Mapping[str, Asked], case: Case, *, threads: int, rounds: int, outputs: str = "last"
) -> Row:
    """`rounds` samples of every engine in turn, after one that is not counted.

    A round during which other processes were at work is taken again, `RETAKES` times on average.
    """
    for worker in workers.values():
        worker.ask("threads", threads)
        if case.kind != "pp":
            worker.ask("fill", max(START, case.depth), chunk=512)
        sample(worker, case, outputs)
    every: list[dict[str, tuple[float, float]]] = []
    quiet: list[dict[str, tuple[float, float]]] = []
    while len(quiet) < rounds and len(every) < rounds * (1 + RETAKES):
        names = order(list(workers), len(every))
        every.append({name: sample(workers[name], case, outputs) for name in names})
        quiet = [one for one in every if _disturbed(one) <= MOST_OTHERS]
    kept = quiet if len(quiet) == rounds else sorted(every, key=_disturbed)[:rounds]
    samples = {name: [one[name][0] for one in kept] for name in workers}
    return Row(case, threads, samples, max(_disturbed(one) for one in kept))


def _disturbed(taken: Mapping[str, tuple[float, float]]) -> float:
    return max(others for _, others in taken.values())


def table_line(row: Row) -> str:
    """One line for people."""
    text = f"{row.case.name:>14}  {row.threads} thr"
    for name in row.samples:
        ms = row.ms(name)
        text += f"  {name} {ms:9.2f} ms {1e3 * row.case.tokens / ms:8.1f} tok/s"
    if ratios := row.ratios:
        middle = statistics.median(ratios)
        text += f"  ratio {middle:.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
    if row.others > MOST_OTHERS:
        text += f"  DISTURBED: others took {row.others:.0%} of the machine"
    return text


def layer_cost(fewer: Sequence[Row], more: Sequence[Row], layers: int) -> list[dict[str, Any]]:
    """Per test: what one of the `layers` more costs each engine, and the ratio; from medians."""
    found = []
    for a, b in zip(fewer, more, strict=True):
        cost = {name: (b.ms(name) - a.ms(name)) / layers for name in a.samples}
        entry: dict[str, Any] = {"test": a.case.name, "threads": a.threads}
        entry["ms"] = {name: round(ms, 3) for name, ms in cost.items()}
        if set(cost) == {OURS, THEIRS} and min(cost.values()) > 0:
            entry["ratio"] = round(cost[THEIRS] / cost[OURS], 3)
        found.append(entry)
    return found


def depth_cost(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What a token costs more far back than at the start: attention over the keys between.

    Per test and thread count; from medians. Empty without a decode at depth 0.
    """
    start = {(row.case.n, row.threads): row for row in rows if row.case.kind == "tg"
             and not row.case.depth}  # fmt: skip
    found = []
    for row in rows:
        near = start.get((row.case.n, row.threads))
        if row.case.kind == "tg" and row.case.depth and near is not None:
            found += layer_cost([near], [row], 1)
            found[-1]["test"] = row.case.name
    return found


_NAMES = ("layers", "demo", "experts", "format")


def best_of(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per slice, test and thread count llama.cpp's fastest format, beside ours of that run."""
    best: dict[tuple[Any, ...], dict[str, Any]] = {}
    for run in runs:
        for row in run["rows"]:
            if not row.ratios:
                continue
            key = (run.get("layers"), run.get("demo"), row.case.name, row.threads)
            ms = row.ms(THEIRS)
            if key not in best or ms < best[key]["ms"][THEIRS]:
                best[key] = {
                    **{name: run[name] for name in _NAMES if name in run},
                    "test": row.case.name,
                    "threads": row.threads,
                    "ms": {name: round(row.ms(name), 3) for name in (THEIRS, OURS)},
                    "ratio": round(statistics.median(row.ratios), 3),
                }
    return list(best.values())
