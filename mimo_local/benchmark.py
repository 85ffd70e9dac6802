"""Prefill and decode speed of a loaded model, in llama-bench's terms: pp512 and tg32, mean ± sd.

Drives the model itself with random ids: no text, no sampling, no stop ids, so that a figure counts
one thing. Knows no terminal; the CLI prints. Real numbers only: what was not run is not reported.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

from mimo_local.errors import CancelledError, UsageError
from mimo_local.events import Progress
from mimo_local.experts.meters import Meters
from mimo_local.hardware import peak_rss

if TYPE_CHECKING:
    from mimo_local.cache import KVCache
    from mimo_local.hardware import Hardware
    from mimo_local.model import Model

SEED = 20251217  # the same ids in every run: routing, and so the bytes read, do not change


class Runner(Protocol):
    """A model with one growing sequence, as the benchmark needs it."""

    vocab_size: int
    max_context: int

    def reset(self) -> None:
        """Forget the sequence."""

    def prefill(self, ids: Sequence[int]) -> None:
        """Process `ids` at once, up to the logits of the last one."""

    def step(self, token: int) -> None:
        """Process one id, up to its logits."""

    def set_threads(self, n: int) -> None:
        """Use `n` CPU threads from now on."""

    def threads(self) -> int:
        """CPU threads in use."""

    def meters(self) -> Meters | None:
        """What the experts' tiers have counted so far; None where all experts lie in RAM."""


class ModelRunner:
    """A `Model` and a cache of its own, kept as `new_cache` makes it (the engine's way)."""

    def __init__(
        self, model: Model, new_cache: Callable[[], KVCache] | None = None, *, whole: bool = False
    ) -> None:
        """`whole`: a prompt's last layer runs for all rows, as where few layers stand for many."""
        self.model, self.whole = model, whole
        self._new_cache = new_cache or model.new_cache
        self.vocab_size = model.config.vocab_size
        self.max_context = model.config.max_context
        self.reset()

    def reset(self) -> None:
        """Start a new cache."""
        self.cache = self._new_cache()

    def prefill(self, ids: Sequence[int]) -> None:
        """Whole prompt; only the last row's logits are computed, as in an answer."""
        import torch

        from mimo_local.model import Segment
        from mimo_local.prefill import How

        segment = Segment(torch.tensor(ids, dtype=torch.int64), self.cache)
        how = How(whole=self.whole)
        self.model.logits(self.model.prefill(segment, how=how))

    def step(self, token: int) -> None:
        """One decode step."""
        import torch

        from mimo_local.model import Segment

        segment = Segment(torch.tensor([token], dtype=torch.int64), self.cache)
        self.model.logits(self.model.forward([segment]))

    def set_threads(self, n: int) -> None:
        """Kernel threads and torch's."""
        import torch

        from mimo_local import kernels

        torch.set_num_threads(n)
        native = kernels.get()
        if native is not None:
            native.set_threads(n)

    def meters(self) -> Meters | None:
        """What the experts' tiers have counted so far; None where all experts lie in RAM."""
        store = self.model.experts
        return store.meters.copy() if "disk" in store.nbytes else None

    def threads(self) -> int:
        """Threads of the kernels, or torch's without them."""
        import torch

        from mimo_local import kernels

        native = kernels.get()
        return torch.get_num_threads() if native is None else native.threads


@dataclass(frozen=True, slots=True)
class Test:
    """`pp`: process `tokens` ids at once; `tg`: generate `tokens` one by one; after `depth` ids."""

    __test__ = False  # pytest: this is no test class

    kind: str
    tokens: int
    depth: int = 0

    @property
    def name(self) -> str:
        """As llama-bench writes it: `pp512`, `tg32 @ d2048`."""
        return f"{self.kind}{self.tokens}" + (f" @ d{self.depth}" if self.depth else "")


@dataclass(frozen=True, slots=True)
class Result:
    """Tokens per second of every repetition of one test."""

    test: Test
    threads: int
    samples: tuple[float, ...]
    experts: Meters | None = None
    """What the tiers did in the counted runs; None where all experts lie in RAM."""

    @property
    def mean(self) -> float:
        """Mean tokens/s."""
        return statistics.fmean(self.samples)

    @property
    def sd(self) -> float:
        """Sample standard deviation, 0 for one repetition."""
        return statistics.stdev(self.samples) if len(self.samples) > 1 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the JSON line."""
        return {
            "test": self.test.name,
            "kind": self.test.kind,
            "tokens": self.test.tokens,
            "depth": self.test.depth,
            "threads": self.threads,
            "tokens_per_s": self.mean,
            "sd": self.sd,
            "samples": list(self.samples),
            "experts": None if self.experts is None else asdict(self.experts),
        }

    @property
    def disk_bytes_per_token(self) -> float:
        """Bytes of experts read from disk per token of the counted runs."""
        if self.experts is None:
            return 0.0
        return self.experts.disk_bytes / (self.test.tokens * len(self.samples))


def plan_tests(
    prompts: Iterable[int], generate: Iterable[int], depths: Iterable[int] = (0,)
) -> tuple[Test, ...]:
    """All pp and tg tests at all depths; zeros mean "none of this kind", as in llama-bench."""
    prompts, generate = tuple(prompts), tuple(generate)
    tests = [
        Test(kind, n, depth)
        for depth in depths
        for kind, counts in (("pp", prompts), ("tg", generate))
        for n in counts
        if n
    ]
    if not tests:
        raise UsageError("there is nothing to measure", hint="give `-p 512` or `-n 32`")
    return tuple(tests)


def run(
    runner: Runner,
    tests: Sequence[Test],
    *,
    threads: Sequence[int] = (),
    reps: int = 3,
    on_progress: Callable[[Progress], None] | None = None,
    cancel: Callable[[], bool] | None = None,
) -> list[Result]:
    """Every test, with every thread count, `reps` times after one run that is not counted.

    No thread counts: as the model was loaded, which is what an answer runs with.
    """
    for test in tests:
        if test.tokens + test.depth > runner.max_context:
            raise UsageError(
                f"`{test.name}` needs {test.tokens + test.depth} tokens of context, "
                f"the model has {runner.max_context}",
                hint="use smaller -p, -n or -d",
            )
    if reps < 1:
        raise UsageError(f"{reps} repetitions measure nothing", hint="use `--reps 1` or more")
    results, done, total = [], 0, len(tests) * max(1, len(threads)) * (reps + 1)
    for count in threads or (None,):
        if count is not None:
            runner.set_threads(count)
        for test in tests:
            samples, before = [], None
            for rep in range(reps + 1):
                if cancel is not None and cancel():
                    raise CancelledError("the benchmark was stopped", hint="use fewer --reps")
                rate = measure(runner, test)
                done += 1
                if rep:
                    samples.append(rate)
                else:
                    before = runner.meters()
                if on_progress is not None:
                    on_progress(Progress(f"measuring {test.name}", done, total, "runs"))
            after = runner.meters()
            used = None if before is None or after is None else after.since(before)
            results.append(Result(test, runner.threads(), tuple(samples), used))
    return results


def measure(runner: Runner, test: Test) -> float:
    """Tokens per second of one run of `test`, the ids at `depth` not timed."""
    source = random.Random(SEED)
    ids = [source.randrange(runner.vocab_size) for _ in range(test.depth + test.tokens)]
    runner.reset()
    if test.depth:
        runner.prefill(ids[: test.depth])
    start = time.perf_counter()
    if test.kind == "pp":
        runner.prefill(ids[test.depth :])
    else:
        for token in ids[test.depth :]:
            runner.step(token)
    return test.tokens / (time.perf_counter() - start)


def machine(hardware: Hardware) -> dict[str, Any]:
    """The machine as plain data, without what changes from run to run."""
    facts = asdict(hardware)
    # Free space changes and the path is somebody's home: neither is the machine.
    facts["disk"] = {"filesystem": hardware.disk.filesystem}
    return facts


def document(
    results: Sequence[Result], *, hardware: Hardware, model: str, load_s: float
) -> dict[str, Any]:
    """Everything a comparison needs, as one JSON document."""
    from mimo_local import __version__

    return {
        "tool": "mimo bench",
        "version": __version__,
        "model": model,
        "machine": machine(hardware),
        "load_s": round(load_s, 3),
        "peak_rss_bytes": peak_rss(),
        "results": [result.to_dict() for result in results],
    }
