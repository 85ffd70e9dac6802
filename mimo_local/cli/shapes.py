"""`mimo bench --shape real`: its options, its run and its table.

What is measured is `shape_bench`'s; here it becomes text. Called by `machine.bench`.
"""

from __future__ import annotations

import json as jsonlib
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer

from mimo_local.cli.status import Status
from mimo_local.errors import ExitCode, NativeError
from mimo_local.settings import Paths

Shape = Annotated[
    str | None,
    typer.Option("--shape", help="real: layers of the real model, random weights", metavar="NAME"),
]
Layers = Annotated[
    int | None,
    typer.Option("--layers", help="how many of its layers (first ones); left out: 2", metavar="N"),
]
Vocab = Annotated[
    int | None, typer.Option("--vocab", help="size of its vocabulary; left out: 32768", metavar="N")
]
Experts = Annotated[
    str | None,
    typer.Option("--experts", help="format of its experts: nf4, mxfp4, int8", metavar="F"),
]
Rest = Annotated[
    str | None,
    typer.Option("--rest", help="of attention, dense and head: int8, nf4, bf16", metavar="F"),
]
Context = Annotated[
    str | None,
    typer.Option("--context", help="attention alone; left out: 1024,8192,32768", metavar="N,N"),
]
Prefill = Annotated[
    str | None,
    typer.Option("--prefill", help="prompt lengths; left out: 128,512,2048,8192", metavar="N,N"),
]
Quick = Annotated[bool, typer.Option("--quick", help="fewer repetitions, no long prompts")]

OPTIONS = {"context": "contexts"}  # the option's name -> the field's, where they differ
LIMITS = ("limit with threads", "RAM GB/s", "streams", "TOP/s", "disk GB/s")
SPEEDS = ("measured", "threads", "ms", "tok/s", "GB/s", "TOP/s", "of limit")
VERIFY = ("rows", "threads", "ms, same experts", "any", "experts only, same", "any")
QUICK_PREFILL = (128, 512)
SMALL_PROBE = 64 << 20


def run(shape: str, threads: tuple[int, ...], wished: Mapping[str, Any]) -> int:
    """Measure, print the table and the line of JSON; `wished`: what was typed, by option."""
    from mimo_local import hardware, kernels
    from mimo_local.shape_bench import Options, ShapeBench

    given = {OPTIONS.get(key, key): value for key, value in wished.items() if value is not None}
    if given.get("quick"):
        given.setdefault("prefill", QUICK_PREFILL)
    if shape != "real":  # a caricature for tests needs no gigabytes beside it
        given["probe"] = SMALL_PROBE
    status = Status()
    bench = ShapeBench(
        Options(shape=shape, threads=threads, **given),
        Paths.default().cache_dir,
        on_progress=status,
    )
    if shape == "real" and kernels.get() is None:
        # Unpacking in torch: minutes for a token, hours for a prompt, and not what anybody runs.
        raise NativeError(
            "real shapes are measured with the native kernels only",
            hint=kernels.why_unavailable(),
        )
    try:
        bench.run()
    finally:
        status.clear()
    found = bench.to_dict(hardware.detect())
    print(text(found))
    print(jsonlib.dumps(found), flush=True)
    return ExitCode.INTERRUPTED if found["interrupted"] else ExitCode.OK


def text(found: Mapping[str, Any]) -> str:
    """Achieved beside limit, one row per measurement."""
    from mimo_local.cli import tables
    from mimo_local.sizes import gb

    config = found["config"]
    made = "" if found["made_s"] is None else f", made in {found['made_s']:.1f} s"
    lines = [
        f"{config['layers']} layers of {config['shape']} shapes, vocabulary {config['vocab']}, "
        f"experts {config['experts']}, rest {config['rest']}: {gb(config['bytes'])}{made}",
        f"{found['machine']['cpu']}, {found['isa']} kernels",
        "",
        tables.table(LIMITS, [_limits(run) for run in found["runs"]]),
        "",
        tables.table(SPEEDS, [row for run in found["runs"] for row in _speeds(run)]),
        "",
        tables.table(VERIFY, [row for run in found["runs"] for row in _verify(run)]),
    ]
    lines += [f"left out: {what}" for what in found["skipped"]]
    if found["disk_note"]:
        lines.append(f"disk: {found['disk_note']}")
    return "\n".join(lines)


def _limits(run: Mapping[str, Any]) -> tuple[str, ...]:
    keys = ("stream_gb_s", "streams", "matmul_tops", "disk_gb_s")
    return str(run["threads"]), *(_cell(run["limits"].get(key)) for key in keys)


def _speeds(run: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    named: list[tuple[str, Mapping[str, Any]]] = []
    if run["decode"] is not None:
        named.append(("decode", run["decode"]))
        if "experts" in run["decode"]:
            named.append(("decode, experts only", run["decode"]["experts"]))
    named += [(f"attention, {entry['context']} keys", entry) for entry in run["attention"]]
    named += [(f"prefill {entry['tokens']}", entry) for entry in run["prefill"]]
    for name, entry in named:
        cells = (_cell(entry.get(key)) for key in ("ms", "tok_s", "gb_s", "tops"))
        yield name, str(run["threads"]), *cells, f"{entry['share_of_limit']:.0%}"


def _verify(run: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for entry in run["verify"]:
        cells = (
            f"{entry[case + 'ms']:.4g} ({entry[case + 'ratio']:.2f}x)"
            if case + "ms" in entry
            else ""
            for case in ("", "independent_", "experts_", "experts_independent_")
        )
        yield str(entry["rows"]), str(run["threads"]), *cells


def _cell(value: float | None) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.4g}"
