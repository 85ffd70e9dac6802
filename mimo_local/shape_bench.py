"""Slices of the real model's shapes, and how near they run to this machine's limits.

`real_shape_model` makes a Model of random packed weights: the true shapes, formats and code paths,
no download. `ShapeBench` measures one beside what the machine can do, taken in the same moments.
Knows no terminal. Called by `mimo bench --shape` and by bench/vs_llamacpp.py.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

from mimo_local import benchmark, hardware, kernels, limits
from mimo_local.errors import NotEnoughMemoryError, UsageError
from mimo_local.events import Progress
from mimo_local.experts.memory import available_memory
from mimo_local.experts.store import ExpertStore
from mimo_local.model import Model
from mimo_local.random_weights import RandomWeights, shape_config
from mimo_local.shape_runs import AttentionCase, Slice
from mimo_local.sizes import gb
from mimo_local.weights import OnProgress

VERIFY_ROWS: Final = (1, 2, 3, 4)
_SPARE: Final = 1 << 30  # what measuring takes besides weights and probe: caches, activations


def real_shape_model(
    layers: int,
    vocab: int,
    experts: str = "nf4",
    rest: str = "int8",
    *,
    shape: str = "real",
    on_progress: OnProgress | None = None,
) -> Model:
    """The first `layers` layers of the real model with random weights, in seconds.

    `experts`: nf4, mxfp4 or int8; `rest` (attention, dense, head): int8, nf4 or bf16. `shape`:
    "real", or "tiny" for tests. Raises UsageError and NotEnoughMemoryError.
    """
    weights = RandomWeights(shape_config(layers, vocab, shape=shape), experts=experts, rest=rest)
    return build(weights, on_progress=on_progress)[0]


def build(
    weights: RandomWeights, *, spare: int = 0, on_progress: OnProgress | None = None
) -> tuple[Model, ExpertStore]:
    """(model, its experts), after a look at the memory: `spare` bytes must be left besides."""
    need, free = weights.nbytes + spare, available_memory()
    if need > free:
        raise NotEnoughMemoryError(
            f"{weights.config.n_layers} layers and the measurement take {gb(need)} of memory and "
            f"{gb(free)} are free",
            hint="measure fewer layers with `--layers`, or close other programs",
        )
    store = ExpertStore(weights, on_progress=on_progress)
    return Model(weights, store, on_progress=on_progress), store


@dataclass(frozen=True, slots=True)
class Options:
    """What to make and what to measure; `check` refuses what cannot be."""

    shape: str = "real"
    layers: int = 2
    vocab: int = 32_768
    experts: str = "nf4"
    rest: str = "int8"
    threads: tuple[int, ...] = ()
    """Empty: all this process may use, and one."""
    contexts: tuple[int, ...] = (1024, 8192, 32_768)
    prefill: tuple[int, ...] = (128, 512, 2048, 8192)
    quick: bool = False
    probe: int = limits.PROBE

    def check(self) -> None:
        """UsageError for a count out of range."""
        most = shape_config(self.layers, self.vocab, shape=self.shape).max_context
        wrong = [n for n in self.threads if not 1 <= n <= kernels.MAX_THREADS]
        if wrong:
            raise UsageError(
                f"{wrong[0]} threads cannot be used", hint=f"use 1 to {kernels.MAX_THREADS}"
            )
        for name, counts in (("context", self.contexts), ("prefill", self.prefill)):
            for n in counts:
                if not 1 <= n <= most:
                    raise UsageError(
                        f"--{name} {n} is not a number of tokens this model can hold",
                        hint=f"use 1 to {most}",
                    )


@dataclass
class Figures:
    """What was measured with one number of threads; None and [] where nothing was."""

    threads: int
    limits: dict[str, Any] = field(default_factory=dict)
    decode: dict[str, Any] | None = None
    verify: list[dict[str, Any]] = field(default_factory=list)
    attention: list[dict[str, Any]] = field(default_factory=list)
    prefill: list[dict[str, Any]] = field(default_factory=list)


class ShapeBench:
    """Makes the slice, measures it, keeps what was measured when it is interrupted."""

    def __init__(
        self, options: Options, folder: Path, *, on_progress: OnProgress | None = None
    ) -> None:
        """`folder`: whose disk is measured. Raises UsageError; makes nothing yet."""
        options.check()
        self.options, self.folder, self.on_progress = options, folder, on_progress
        config = shape_config(options.layers, options.vocab, shape=options.shape)
        self.weights = RandomWeights(config, experts=options.experts, rest=options.rest)
        self.figures: list[Figures] = []
        self.made_s: float | None = None
        self.disk: tuple[float | None, str] = (None, "")
        self.skipped: list[str] = []
        self.interrupted = False
        self._rounds = 3 if options.quick else 7
        self._longest = 15.0 if options.quick else 45.0  # seconds of one prefill
        self._done = 0

    def run(self) -> None:
        """Make and measure everything; an interrupt ends it and keeps what there is.

        Threads of kernels and torch are afterwards as they were.
        """
        before = torch.get_num_threads()
        native = kernels.get()
        kernel_threads = native.threads if native is not None else 1
        try:
            self._run()
        except KeyboardInterrupt:
            self.interrupted = True
        finally:
            self.weights.steer(None)
            torch.set_num_threads(before)
            if native is not None:
                native.set_threads(kernel_threads)

    def _run(self) -> None:
        start = time.perf_counter()
        spare = self.options.probe + min(_SPARE, self.options.probe)
        model, store = build(self.weights, spare=spare, on_progress=self.on_progress)
        self.made_s = time.perf_counter() - start
        self.slice = Slice(self.weights, model, store, most_rows=max(VERIFY_ROWS))
        self._step("measuring memory")
        self.memory = limits.Memory(self.options.probe)
        self._step("measuring disk")
        self.disk = limits.disk(self.folder, 0.3 if self.options.quick else 1.0)
        for threads in self._thread_counts():
            self.slice.runner.set_threads(threads)
            figures = Figures(threads)
            self.figures.append(figures)
            for stage, measure in self._stages(figures):
                self._step(stage)
                measure()
                rates = self.memory.samples
                figures.limits["stream_gb_s"] = _round(statistics.median(rates))
        self._step("measured")

    # -- what is measured ----------------------------------------------------------------------

    def _stages(self, figures: Figures) -> Iterator[tuple[str, Callable[[], None]]]:
        on = f"on {figures.threads} thread{'s' if figures.threads > 1 else ''}"
        yield f"measuring limits {on}", partial(self._limits, figures)
        yield f"measuring decode {on}", partial(self._decode, figures)
        yield f"measuring verify {on}", partial(self._verify, figures)
        for context in self.options.contexts:
            yield f"measuring attention {on}", partial(self._attention, figures, context)
        for tokens in sorted(self.options.prefill):
            yield f"measuring prefill {on}", partial(self._prefill, figures, tokens)

    def _thread_counts(self) -> tuple[int, ...]:
        """The most threads first: their figures are the headline, should the rest be stopped."""
        native = kernels.get()
        usable = hardware.usable_cores() if native is None else native.default_threads
        return tuple(sorted(set(self.options.threads or (usable, 1)), reverse=True))

    def _limits(self, figures: Figures) -> None:
        by_streams = self.memory.choose(3 if self.options.quick else 5)
        figures.limits |= {
            "streams": self.memory.streams,
            "gb_s_by_streams": {str(n): _round(rate) for n, rate in by_streams.items()},
            "matmul_tops": _round(statistics.median(limits.products() for _ in range(5))),
            "disk_gb_s": None if self.disk[0] is None else _round(self.disk[0]),
        }

    def _decode(self, figures: Figures) -> None:
        """Tokens one by one; then the mixture layers' experts alone."""
        self.slice.restart()
        touched = self.weights.touched()
        nbytes = sum(touched.values())
        seconds, share = self._paired(nbytes, lambda: self.slice.rows(1), steps=3)
        figures.decode = {
            "tok_s": _round(1 / seconds),
            "ms": _round(1e3 * seconds),
            "gb_s": _round(nbytes / seconds / 1e9),
            "share_of_limit": _round(share),
            "bytes": nbytes,
        }
        if touched["experts"]:
            seconds, share = self._paired(
                touched["experts"], lambda: self.slice.experts(1), steps=3
            )
            figures.decode["experts"] = {
                "ms": _round(1e3 * seconds),
                "gb_s": _round(touched["experts"] / seconds / 1e9),
                "share_of_limit": _round(share),
                "bytes": touched["experts"],
            }

    def _verify(self, figures: Figures) -> None:
        """1 to 4 rows in one step: on the same experts, as drafts mostly are, and on any."""
        cases: dict[str, Callable[[int], float]] = {
            "": lambda n: self.slice.rows(n, same=True),
            "independent_": self.slice.rows,
        }
        if self.weights.config.is_moe:
            cases["experts_"] = lambda n: self.slice.experts(n, same=True)
            cases["experts_independent_"] = self.slice.experts
        times: dict[tuple[str, int], list[float]] = {}
        self.slice.restart()
        for repetition in range(self._rounds + 1):
            for case, measure in cases.items():
                for n in VERIFY_ROWS:
                    seconds = measure(n)
                    if repetition:  # the first is a warm-up
                        times.setdefault((case, n), []).append(seconds)
        for n in VERIFY_ROWS:
            entry: dict[str, Any] = {"rows": n}
            for case in cases:
                mine, single = times[case, n], times[case, 1]
                ratios = [a / b for a, b in zip(mine, single, strict=True)]
                entry[f"{case}ms"] = _round(1e3 * statistics.median(mine))
                entry[f"{case}ratio"] = _round(statistics.median(ratios))
            figures.verify.append(entry)

    def _attention(self, figures: Figures, context: int) -> None:
        """One query row over a filled 16-bit cache of one full layer, cold."""
        spec = next(s for s in self.weights.config.layers if s.window is None)
        case = AttentionCase(spec, context, cold=min(256 << 20, self.options.probe))
        seconds, share = self._paired(case.nbytes, case.seconds, steps=5)
        figures.attention.append(
            {
                "context": context,
                "ms": _round(1e3 * seconds),
                "gb_s": _round(case.nbytes / seconds / 1e9),
                "share_of_limit": _round(share),
                "bytes": case.nbytes,
            }
        )

    def _prefill(self, figures: Figures, tokens: int) -> None:
        """A whole prompt; repeated while that takes seconds, left out if it takes minutes."""
        if figures.prefill:
            last = figures.prefill[-1]
            expected = tokens / last["tok_s"]
            if expected > self._longest:
                self.skipped.append(
                    f"prefill {tokens} with --threads {figures.threads}: about {expected:.0f} s"
                )
                return
        else:
            self.slice.prompt(min(tokens, 64))  # warm-up
        seconds: list[float] = []
        peaks = [limits.products()]
        while not seconds or (len(seconds) < self._rounds and sum(seconds) < 4.0):
            seconds.append(self.slice.prompt(tokens))
            peaks.append(limits.products())
        active = self.weights.active()
        operations = 2 * (tokens * (sum(active.values()) - active["head"]) + active["head"])
        rate = operations / statistics.median(seconds) / 1e12
        figures.prefill.append(
            {
                "tokens": tokens,
                "tok_s": _round(tokens / statistics.median(seconds)),
                "ms": _round(1e3 * statistics.median(seconds)),
                "tops": _round(rate),
                "share_of_limit": _round(rate / statistics.median(peaks)),
            }
        )

    # -- one measurement -----------------------------------------------------------------------

    def _paired(
        self, nbytes: int, measure: Callable[[], float], *, steps: int
    ) -> tuple[float, float]:
        """(median seconds, median share of what memory gave just before and after)."""
        measure()  # warm-up
        times: list[float] = []
        shares: list[float] = []
        before, start = self.memory.sample(), time.perf_counter()
        while len(shares) < self._rounds:
            seconds = statistics.median(measure() for _ in range(steps))
            after = self.memory.sample()
            times.append(seconds)
            shares.append(nbytes / seconds / 1e9 / ((before + after) / 2))
            before = after
            if time.perf_counter() - start > 8:
                break
        return statistics.median(times), statistics.median(shares)

    # -- helpers -------------------------------------------------------------------------------

    def _step(self, stage: str) -> None:
        """Say what comes next."""
        per_count = 3 + len(self.options.contexts) + len(self.options.prefill)
        total = 2 + per_count * len(self._thread_counts())
        if self.on_progress is not None:
            self.on_progress(Progress(stage, self._done, total, "steps"))
        self._done += 1

    # -- the report ----------------------------------------------------------------------------

    def to_dict(self, machine: hardware.Hardware) -> dict[str, Any]:
        """Plain data: the figures of the most threads on top, all of them in `runs`."""
        from mimo_local import __version__

        config, options = self.weights.config, asdict(self.options)
        for name in ("threads", "contexts", "prefill", "probe"):
            del options[name]
        options |= {
            "hidden": config.hidden_size,
            "n_experts": config.n_experts,
            "expert_bytes": self.weights.one_expert_nbytes,
            "bytes": self.weights.nbytes,
            "bytes_per_token": self.weights.touched(),
            "weights_per_token": self.weights.active(),
        }
        head = self.figures[0] if self.figures else Figures(0)
        empty = dict.fromkeys(("stream_gb_s", "matmul_tops", "disk_gb_s"))
        return {
            "tool": "mimo bench --shape",
            "version": __version__,
            "isa": kernels.describe(),
            **asdict(head),
            "limits": empty | head.limits,
            "config": options,
            "runs": [asdict(figures) for figures in self.figures],
            "skipped": self.skipped,
            "interrupted": self.interrupted,
            "disk_note": self.disk[1],
            "machine": benchmark.machine(machine),
            "made_s": None if self.made_s is None else _round(self.made_s),
            "peak_rss_bytes": hardware.peak_rss(),
        }


def _round(value: float) -> float:
    """Four digits: more would be noise."""
    return float(f"{value:.4g}")
