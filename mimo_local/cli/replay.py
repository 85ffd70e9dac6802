"""`mimo replay`: what a cache of experts would have hit on recorded traces, as tables or JSON.

What is counted is `replay`'s; here it becomes text. The tables also serve
bench/routing_policies.py.
"""

from __future__ import annotations

import json as jsonlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mimo_local.cli.models import JsonOption
from mimo_local.cli.status import Status
from mimo_local.errors import ExitCode, UsageError

if TYPE_CHECKING:
    from mimo_local.replay import Replay
    from mimo_local.routing_trace import RoutingTrace

COLUMNS = 6  # shares in one table of 100 characters

Files = Annotated[list[Path], typer.Argument(help="from `mimo trace`", metavar="FILE...")]
Policies = Annotated[
    str | None, typer.Option("--policies", help="only these; left out: all", metavar="NAME,NAME")
]
Shares = Annotated[
    str, typer.Option("--shares", help="per cent of all experts that are held", metavar="N,N")
]
Rows = Annotated[
    str, typer.Option("--rows", help="tokens of a step, as when drafts are verified", metavar="N,N")
]
Prefetch = Annotated[
    int, typer.Option("--prefetch", help="guesses read ahead per token and layer", metavar="N")
]
Answers = Annotated[bool, typer.Option("--answers", help="only the tokens of answers")]


def replay(
    files: Files,
    policies: Policies = None,
    shares: Shares = "5,10,20,30,50,75",
    rows: Rows = "1",
    prefetch: Prefetch = 0,
    answers: Answers = False,
    json: JsonOption = False,
) -> int:
    """Show what each way of caching experts would have hit.

    A hit is an expert that a layer's step wants and that is held. belady is the oracle: no policy
    can have more. lfru-N counts how often an expert was wanted, worth half after N steps, and
    takes in what beats its victim (-all: whatever was wanted; lfru-slow: one per layer and step);
    layer-* give every layer a quota; pinned-* keep the first half's hottest.
    """
    from mimo_local.cli.machine import counts
    from mimo_local.replay import POLICIES
    from mimo_local.routing_trace import RoutingTrace

    names = policies.split(",") if policies else list(POLICIES)
    held = [n / 100 for n in counts(shares)]
    traces = [RoutingTrace.read(path) for path in files]
    found, status = [], Status()
    for path, trace in zip(files, traces, strict=True):
        for n in counts(rows):
            if not n:
                raise UsageError("a step of 0 tokens is none", hint="--rows 1,2,4")
            try:
                entry = run(
                    trace.only_answers() if answers else trace,
                    names, held, rows=n, prefetch=prefetch, name=str(path), status=status,
                )  # fmt: skip
            finally:
                status.clear()
            found.append(entry)
            if not json:
                print("" if len(found) == 1 else "\n", text(entry), sep="")
    if json:
        print(jsonlib.dumps(found))
    return ExitCode.OK


def run(
    trace: RoutingTrace,
    policies: Sequence[str],
    shares: Sequence[float],
    *,
    rows: int = 1,
    prefetch: int = 0,
    name: str = "",
    status: Status | None = None,
) -> dict[str, Any]:
    """Everything about one trace and one size of step, as JSON shows it."""
    from mimo_local.replay import Replay

    player = Replay(trace, rows=rows, prefetch=prefetch)
    results = player.table(policies, shares, status)
    return _facts(player, name) | {
        "results": [result.to_dict(trace.facts.expert_nbytes) for result in results],
    }


def _facts(player: Replay, name: str) -> dict[str, Any]:
    trace = player.trace
    return {
        "file": name,
        "trace": asdict(trace.facts),
        "texts": len(trace.texts),
        "tokens": trace.tokens,
        "answer_tokens": int(trace.is_answer.sum()),
        "rows": player.rows,
        "prefetch": player.prefetch,
        "distinct": player.distinct(),
        "recall": player.recall() if player.prefetch else None,
    }


def text(found: dict[str, Any]) -> str:
    """Heading, then hit rates and bytes with a row per policy and a column per share."""
    from mimo_local.sizes import gb

    facts, rows = found["trace"], found["rows"]
    lines = [
        f"{found['file']}: {facts['model']}, {len(facts['layers'])} layers of {facts['n_experts']} "
        f"experts, {facts['k']} chosen",
        f"{found['tokens']} tokens ({found['answer_tokens']} of answers) in steps of {rows}: "
        f"{found['distinct']:.1f} distinct experts per layer and step",
    ]
    if found["prefetch"]:
        lines.append(
            f"{found['prefetch']} guesses per token: {found['recall']:.0%} of the experts "
            "wanted are among them"
        )
    lines += ["", "hits in % of the experts wanted, second half (whole trace):"]
    lines += _tables(found, _rate)
    if found["prefetch"]:
        lines += ["", "hits or prefetched in %, second half (of the prefetched, for nothing):"]
        lines += _tables(found, _covered)
    lines += ["", "read per token, second half:"]
    lines += _tables(found, lambda result: gb(result["steady_bytes_per_token"]))
    lines += ["", "taken in per layer and step, whole trace:"]
    steps = found["tokens"] // rows * len(facts["layers"])
    lines += _tables(found, lambda result: f"{result['uploads'] / steps:.2f}")
    return "\n".join(lines)


def _rate(result: dict[str, Any]) -> str:
    return f"{100 * result['steady_rate']:.1f} ({100 * result['hit_rate']:.0f})"


def _covered(result: dict[str, Any]) -> str:
    return f"{100 * result['steady_covered']:.1f} ({100 * result['waste']:.0f})"


def _tables(found: dict[str, Any], cell: Callable[[dict[str, Any]], str]) -> Iterator[str]:
    """A row per policy; as many shares side by side as fit the width."""
    from mimo_local.cli import tables

    results = {(r["policy"], r["share"]): r for r in found["results"]}
    policies = list(dict.fromkeys(policy for policy, _ in results))
    shares = sorted({share for _, share in results})
    for start in range(0, len(shares), COLUMNS):
        some = shares[start : start + COLUMNS]
        rows = [[name, *(cell(results[name, share]) for share in some)] for name in policies]
        yield tables.table(["policy", *(f"{share:.0%}" for share in some)], rows)
