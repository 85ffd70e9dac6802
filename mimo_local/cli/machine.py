"""`mimo doctor`, `mimo bench`: what is wrong with this machine, and what it does.

Facts come from `hardware`, judgements from `doctor`, figures from `benchmark`; the tables are drawn
in `tables`.
"""

from __future__ import annotations

import json as jsonlib
import re
import time
from typing import TYPE_CHECKING, Annotated

import typer

from mimo_local.cli import drafts, models, selftest, shapes
from mimo_local.cli.models import JsonOption, ModelOption
from mimo_local.cli.status import Status, say
from mimo_local.errors import ExitCode, UsageError
from mimo_local.settings import Settings

if TYPE_CHECKING:
    from mimo_local.benchmark import ModelRunner


def counts(text: str) -> tuple[int, ...]:
    """`128,512` as numbers."""
    fields = text.replace(" ", "").split(",")
    if not all(re.fullmatch("[0-9]{1,9}", field) for field in fields):
        raise UsageError(f"`{text}` is not a list of numbers", hint="write it like 128,512")
    return tuple(int(field) for field in fields)


def doctor(json: JsonOption = False) -> int:
    """Check this machine and this installation.

    Its output is the first thing to paste into a bug report.
    """
    from mimo_local.cli import tables
    from mimo_local.doctor import examine

    report = examine()
    print(jsonlib.dumps(report.to_dict(), ensure_ascii=False) if json else tables.doctor(report))
    return ExitCode.OK if report.ok else ExitCode.FAILED


Prompts = Annotated[str, typer.Option("-p", "--n-prompt", help="prompt lengths", metavar="N,N")]
Generate = Annotated[str, typer.Option("-n", "--n-gen", help="tokens to make", metavar="N,N")]
Depths = Annotated[
    str, typer.Option("-d", "--n-depth", help="tokens already in the context", metavar="N,N")
]
Threads = Annotated[
    str | None,
    typer.Option(
        "-t",
        "--threads",
        help="thread counts; left out: as for answers, and 1 with --shape",
        metavar="N,N",
    ),
]
Reps = Annotated[int, typer.Option("-r", "--reps", help="repetitions", metavar="N")]


def bench(
    n_prompt: Prompts = "128,512",
    n_gen: Generate = "32",
    n_depth: Depths = "0",
    threads: Threads = None,
    reps: Reps = 3,
    model: ModelOption = None,
    shape: shapes.Shape = None,
    layers: shapes.Layers = None,
    vocab: shapes.Vocab = None,
    experts: shapes.Experts = None,
    rest: shapes.Rest = None,
    context: shapes.Context = None,
    prefill: shapes.Prefill = None,
    quick: shapes.Quick = False,
    draft: drafts.Draft = False,
    gpu_selftest: selftest.SelfTestFlag = False,
    report: selftest.Report = selftest.REPORT,
    device: selftest.Device = "cuda",
) -> int:
    """Measure tokens per second, as llama-bench does or on the real model's shapes.

    Prints a table, then one line of JSON. `--shape real` needs no model: it makes layers of random
    weights and measures them beside what memory, processor and disk can do in the same minutes;
    Ctrl-C ends that early and keeps what was measured. `--draft` measures what drafting wins, on
    answers of the model or, with `--shape real`, on layers that are told what to answer.

    `--gpu-selftest` compares what a GPU computes with the CPU, and writes a report for an issue.
    """
    if gpu_selftest:
        if model is not None or shape is not None or draft:
            raise UsageError("--gpu-selftest measures no model", hint="give it no other option")
        return selftest.run(report, device)
    wished = {
        "layers": layers, "vocab": vocab, "experts": experts, "rest": rest,
        "context": counts(context) if context else None,
        "prefill": counts(prefill) if prefill else None,
        "quick": quick or None,
    }  # fmt: skip
    if shape is not None:
        if model is not None:
            raise UsageError("--shape measures no --model", hint="leave one of them out")
        if draft:
            return drafts.shape(shape, wished, counts(n_gen)[0], reps)
        return shapes.run(shape, counts(threads) if threads else (), wished)
    for name, value in wished.items():
        if value is not None:
            raise UsageError(f"--{name} is for real shapes", hint="add `--shape real`")
    if draft:
        return drafts.model(Settings.resolve(model=model), counts(n_gen)[0], reps)
    return _bench(
        Settings.resolve(model=model),
        (counts(n_prompt), counts(n_gen), counts(n_depth)),
        counts(threads) if threads else (),
        reps,
    )


def _bench(
    settings: Settings, sizes: tuple[tuple[int, ...], ...], threads: tuple[int, ...], reps: int
) -> int:
    """A loaded model; `sizes`: of prompts, answers and contexts."""
    from mimo_local import benchmark, hardware
    from mimo_local.cli import tables

    tests = benchmark.plan_tests(*sizes)
    facts = hardware.detect()
    runner, name, load_s = load_runner(settings)
    status = Status()
    try:
        results = benchmark.run(runner, tests, threads=threads, reps=reps, on_progress=status)
    finally:
        status.clear()
    print(tables.bench(results))
    print(jsonlib.dumps(benchmark.document(results, hardware=facts, model=name, load_s=load_s)))
    return ExitCode.OK


def load_runner(settings: Settings) -> tuple[ModelRunner, str, float]:
    """(runner, what it is, seconds to load) of the chosen model: the seam the tests replace."""
    chosen = models.choose(settings)
    from mimo_local.benchmark import ModelRunner
    from mimo_local.loading import load

    status, start = Status(), time.perf_counter()
    try:
        loaded = load(chosen, status)
    finally:
        status.clear()
    seconds = time.perf_counter() - start
    say(f"{loaded.description}, loaded in {seconds:.1f} s")
    return ModelRunner(loaded.model, loaded.new_cache), loaded.description, seconds
