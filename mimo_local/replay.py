"""Replay of routing traces: what each policy would have hit, at which share of the experts held.

Plays the part of a tier (`experts.ram`): asks the policies the same questions in the same order,
moves no bytes. Knows traces and policies; no model, no torch. Called by `mimo replay` and
bench/routing_policies.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Final, TypeAlias

from mimo_local.errors import UsageError
from mimo_local.events import Progress
from mimo_local.experts.oracle import Belady
from mimo_local.experts.policy import AgedFrequency, ExpertPolicy, Key, Lru, PerLayer, PinnedLru
from mimo_local.routing_trace import RoutingTrace

SHARES: Final = (0.05, 0.10, 0.20, 0.30, 0.50, 0.75)

LayerStep: TypeAlias = tuple[Sequence[Key], Sequence[Key]]
"""(distinct experts wanted, guesses for the layer after it) of one layer in one step."""
Steps: TypeAlias = Callable[[], Iterator[list[LayerStep]]]
Make: TypeAlias = Callable[[int, "Replay"], ExpertPolicy]

_CHUNK = 256  # tokens turned into keys at a time


def _per_layer(
    capacity: int, replay: Replay, *, make: Callable[[int], ExpertPolicy]
) -> ExpertPolicy:
    return PerLayer(capacity, replay.trace.facts.layers, make)


def _pinned(capacity: int, replay: Replay, *, share: float) -> ExpertPolicy:
    return PinnedLru(capacity, replay.hottest()[: int(share * capacity)])


POLICIES: Final[dict[str, Make]] = {
    "lru": lambda capacity, _: Lru(capacity),
    "lfru-8": lambda capacity, _: AgedFrequency(capacity, half_life=8),
    "lfru-16": lambda capacity, _: AgedFrequency(capacity, half_life=16),
    "lfru-64": lambda capacity, _: AgedFrequency(capacity, half_life=64),
    "layer-lru": partial(_per_layer, make=Lru),
    "layer-lfru-8": partial(_per_layer, make=partial(AgedFrequency, half_life=8)),
    "layer-lfru-8-all": partial(_per_layer, make=partial(AgedFrequency, half_life=8, margin=0)),
    "lfru-slow": lambda capacity, _: AgedFrequency(
        capacity, half_life=32, margin=1.25, per_layer=1
    ),
    "pinned-half": partial(_pinned, share=0.5),
    "pinned-all": partial(_pinned, share=1.0),
    "belady": lambda capacity, replay: Belady(capacity, replay.future()),
}
"""What can be compared. `lfru-N`: half-life of N steps, taking in what was wanted more often than
its victim; `-all`: taking in whatever was wanted; `layer-`: quotas per layer; `lfru-slow`: one
upload per layer and step, for what beats its victim by a quarter; pins: the hottest of the trace's
first half."""


@dataclass(frozen=True, slots=True)
class Result:
    """One policy at one capacity. Counts are over all steps; `steady_*` over the second half."""

    policy: str
    share: float
    capacity: int
    rows: int
    tokens: int
    wanted: int
    hits: int
    steady_wanted: int
    steady_hits: int
    uploads: int
    """Experts taken in: what a slow tier costs."""
    steady_reads: int
    """Experts read in the second half: misses, and prefetched ones."""
    prefetched: int = 0
    prefetch_hits: int = 0
    """Wanted experts that were not held, but had been guessed and read. Not among `hits`."""
    prefetch_wasted: int = 0
    steady_prefetch_hits: int = 0

    @property
    def hit_rate(self) -> float:
        """Of the experts wanted, cold start included."""
        return self.hits / self.wanted if self.wanted else 0.0

    @property
    def steady_rate(self) -> float:
        """Of those wanted in the second half."""
        return self.steady_hits / self.steady_wanted if self.steady_wanted else 0.0

    @property
    def steady_covered(self) -> float:
        """As `steady_rate`, prefetched experts counted as hits."""
        found = self.steady_hits + self.steady_prefetch_hits
        return found / self.steady_wanted if self.steady_wanted else 0.0

    @property
    def waste(self) -> float:
        """Part of the prefetched experts that nobody wanted."""
        return self.prefetch_wasted / self.prefetched if self.prefetched else 0.0

    def bytes_per_token(self, expert_nbytes: int) -> float:
        """Read from the tier below, per token of the second half."""
        tokens = self.tokens - self.tokens // 2
        return self.steady_reads * expert_nbytes / tokens if tokens else 0.0

    def to_dict(self, expert_nbytes: int) -> dict[str, Any]:
        """Counts and rates for JSON."""
        return asdict(self) | {
            "hit_rate": self.hit_rate,
            "steady_rate": self.steady_rate,
            "steady_covered": self.steady_covered,
            "waste": self.waste,
            "steady_bytes_per_token": self.bytes_per_token(expert_nbytes),
        }


class Replay:
    """One trace, ready to be played to any number of policies."""

    def __init__(self, trace: RoutingTrace, *, rows: int = 1, prefetch: int = 0) -> None:
        """`rows`: tokens of a step, as in verifying drafts. `prefetch`: guesses read per row.

        UsageError: no tokens, no guesses to prefetch by.
        """
        if rows < 1 or trace.tokens < rows:
            raise UsageError(
                f"{trace.tokens} tokens give no step of {rows}", hint="trace a longer text"
            )
        if prefetch and trace.guesses is None:
            raise UsageError(
                "this trace holds no guesses to prefetch by", hint="trace it with `--guesses`"
            )
        self.trace: RoutingTrace = trace
        self.rows, self.prefetch = rows, prefetch
        facts = trace.facts
        self.steps = trace.tokens // rows
        self.all_experts = len(facts.layers) * facts.n_experts
        # One object per key: comparing them is then comparing addresses.
        self._keys = [[(layer, e) for e in range(facts.n_experts)] for layer in facts.layers]

    def layer_steps(self) -> Iterator[list[LayerStep]]:
        """Every step's layers in order; an incomplete last step is left out."""
        trace, rows = self.trace, self.rows
        n_layers = len(trace.facts.layers)
        size = max(1, _CHUNK // rows) * rows
        for start in range(0, self.steps * rows, size):
            part = slice(start, min(start + size, self.steps * rows))
            ids = self._by_step(trace.ids[part])
            guesses: list[list[list[int]]] = []
            if self.prefetch and trace.guesses is not None:
                guesses = self._by_step(trace.guesses[part, :, : self.prefetch])
            for s, step in enumerate(ids):
                out: list[LayerStep] = []
                for i, chosen in enumerate(step):
                    keys, ahead = self._keys[i], []
                    if guesses and i + 1 < n_layers:
                        following = self._keys[i + 1]
                        ahead = [following[e] for e in dict.fromkeys(guesses[s][i])]
                    out.append(([keys[e] for e in dict.fromkeys(chosen)], ahead))
                yield out

    def _by_step(self, array: Any) -> list[list[list[int]]]:
        """(T, L, K) -> [step][layer][ids of all its rows]."""
        n, layers, k = array.shape
        steps = array.reshape(n // self.rows, self.rows, layers, k).swapaxes(1, 2)
        found: list[list[list[int]]] = steps.reshape(n // self.rows, layers, -1).tolist()
        return found

    def future(self) -> Iterator[Key]:
        """All keys in the order they will be touched."""
        for step in self.layer_steps():
            for wanted, _ in step:
                yield from wanted

    def hottest(self) -> list[Key]:
        """All keys wanted in the first half, the most wanted first."""
        counts: Counter[Key] = Counter()
        for s, step in enumerate(self.layer_steps()):
            if s >= self.steps // 2:
                break
            for wanted, _ in step:
                counts.update(wanted)
        return [key for key, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]

    def distinct(self) -> float:
        """Mean number of distinct experts a layer wants in a step."""
        wanted = sum(len(keys) for step in self.layer_steps() for keys, _ in step)
        return wanted / (self.steps * len(self.trace.facts.layers))

    def recall(self) -> float:
        """Part of the experts wanted (first layer left out) that were among the guesses."""
        found = total = 0
        for step in self.layer_steps():
            for (_, guessed), (wanted, _) in pairwise(step):
                found += len(set(guessed).intersection(wanted))
                total += len(wanted)
        return found / total if total else 0.0

    def play(self, name: str, share: float) -> Result:
        """One policy holding `share` of all experts; UsageError for a name or share unknown."""
        if name not in POLICIES:
            raise UsageError(
                f"there is no policy `{name}`", hint=f"policies: {', '.join(POLICIES)}"
            )
        if not 0 <= share <= 1:
            raise UsageError(f"{share} is no share of the experts", hint="give some from 0 to 1")
        capacity = round(share * self.all_experts)
        policy = POLICIES[name](capacity, self)
        run = _Run(policy)
        half = self.steps // 2
        for s, step in enumerate(self.layer_steps()):
            if s == half:
                run.mark()
            (run.prefetching if self.prefetch else run.plain)(step)
            policy.end_of_step()
        return Result(name, share, capacity, self.rows, self.steps * self.rows, **run.counts())

    def table(
        self,
        policies: Iterable[str],
        shares: Sequence[float],
        on_progress: Callable[[Progress], None] | None = None,
    ) -> list[Result]:
        """Every policy at every share."""
        names, results = list(policies), []
        for name in names:
            for share in shares:
                results.append(self.play(name, share))
                if on_progress is not None:
                    total = len(names) * len(shares)
                    on_progress(Progress("replaying", len(results), total, "runs"))
        return results


class _Run:
    """A tier without bytes: counts what one policy hits."""

    def __init__(self, policy: ExpertPolicy) -> None:
        self.policy = policy
        self.wanted = self.hits = self.uploads = 0
        self.prefetched = self.staged_hits = self.wasted = 0
        self._half = (0, 0, 0, 0)

    def plain(self, step: list[LayerStep]) -> None:
        touch = self.policy.touch
        for wanted, _ in step:
            missing = [key for key in wanted if not touch(key)]
            self.wanted += len(wanted)
            if missing:
                self.hits += len(wanted) - len(missing)
                self._take(missing, wanted)
            else:
                self.hits += len(wanted)

    def prefetching(self, step: list[LayerStep]) -> None:
        """Guessed experts wait in a place of their own and are forgotten after their layer."""
        policy, staged = self.policy, set[Key]()
        for wanted, guessed in step:
            missing = [key for key in wanted if not policy.touch(key)]
            found = staged.intersection(missing)
            self.wanted += len(wanted)
            self.hits += len(wanted) - len(missing)
            self.staged_hits += len(found)
            self.wasted += len(staged) - len(found)
            self._take(missing, wanted)
            staged = {key for key in guessed if key not in policy}
            self.prefetched += len(staged)

    def _take(self, missing: list[Key], wanted: Sequence[Key]) -> None:
        policy = self.policy
        for key in missing:
            if policy.admits(key, wanted):
                try:
                    policy.insert(key, wanted)
                except ValueError:  # more wanted at once than the tier holds: used and forgotten
                    return
                self.uploads += 1

    def mark(self) -> None:
        """The second half begins."""
        self._half = (self.wanted, self.hits, self.staged_hits, self.prefetched)

    def counts(self) -> dict[str, int]:
        wanted, hits, staged, prefetched = self._half
        missed = (self.wanted - self.hits) - (wanted - hits)
        staged_hits = self.staged_hits - staged
        return {
            "wanted": self.wanted,
            "hits": self.hits,
            "steady_wanted": self.wanted - wanted,
            "steady_hits": self.hits - hits,
            "uploads": self.uploads,
            "steady_reads": missed - staged_hits + self.prefetched - prefetched,
            "prefetched": self.prefetched,
            "prefetch_hits": self.staged_hits,
            "prefetch_wasted": self.wasted,
            "steady_prefetch_hits": staged_hits,
        }
