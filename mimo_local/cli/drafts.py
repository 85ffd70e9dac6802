"""`mimo bench --draft`: what drafting wins, for a model with MTP layers or for the real shapes.

What is measured is `draft_bench`'s; here it becomes text. Called by `machine.bench`.
"""

from __future__ import annotations

import json as jsonlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from mimo_local.cli import models
from mimo_local.cli.status import Status, say
from mimo_local.errors import ExitCode, UsageError
from mimo_local.settings import Settings

Draft = Annotated[
    bool, typer.Option("--draft", help="what drafting tokens wins, at each depth and as decided")
]

PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Write a short story about a lighthouse keeper who finds a letter.",
    "List five ways to save water at home.",
    "Explain to a child why the sky is blue.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Give me a simple recipe for pancakes.",
    "Summarize: The museum opened in 1912. It burned down in 1944 and was rebuilt by citizens.",
    "Write a polite letter that asks a neighbour to turn the music down.",
)
HEAD = ("depth", "tok/s", "speedup", "tokens/pass", "right, by step", "from disk/token")
ACCEPTANCE = 0.78
"""Of a draft of the real model, if those before it were right: 0.75 to 0.82 are reported."""
OVERLAPS = (0.25, 0.41)
"""Experts neighbours share, as measured on models of 256 experts: the least and the most."""


def model(settings: Settings, tokens: int, rounds: int) -> int:
    """A model's own MTP layers on its own answers, greedy and as chats are sampled."""
    from mimo_local.draft_bench import DraftBench
    from mimo_local.loading import load
    from mimo_local.sampler import SamplingParams

    status = Status()
    try:
        loaded = load(models.choose(settings), status)
    finally:
        status.clear()
    say(loaded.description)
    if loaded.drafter is None:
        raise UsageError(
            "this model does not draft: no MTP layers, or no memory for them",
            hint="see `mimo plan`; `--shape real --draft` needs no model",
        )
    if loaded.tokenizer is None:
        raise UsageError("drafts are measured on answers", hint="the model has no tokenizer files")
    prompts = [
        loaded.tokenizer.render_chat([{"role": "user", "content": text}]) for text in PROMPTS
    ]
    stop = [*loaded.model.config.eos_ids, *loaded.tokenizer.stop_ids]
    found = {}
    for name, temperature in (("greedy", 0.0), ("sampled", 0.8)):
        params = SamplingParams(temperature=temperature, seed=1, max_tokens=tokens)
        bench = DraftBench(
            loaded.model, loaded.drafter, loaded.new_cache, prompts, params,
            stop_ids=stop, on_progress=status,
        )  # fmt: skip
        try:
            found[name] = bench.run(rounds)
        finally:
            status.clear()
    show({"model": loaded.description, "tokens": tokens, "regimes": found})
    return ExitCode.OK


def shape(name: str, wished: Mapping[str, Any], tokens: int, rounds: int) -> int:
    """Layers of the real model, told what to answer, all experts in RAM."""
    given = {option: value for option, value in wished.items() if value is not None}
    layers, vocab = given.pop("layers", 3), given.pop("vocab", 4096)
    for option in given:
        raise UsageError(f"--{option} is not for drafts", hint="leave out --draft or the option")
    import torch

    from mimo_local import draft_bench
    from mimo_local.shape_bench import real_shape_model

    status = Status()
    made = real_shape_model(layers, vocab, shape=name, on_progress=status)
    found = {}
    try:
        for wanted in OVERLAPS:
            shared = draft_bench.set_overlap(made, wanted)
            found[f"neighbours share {shared:.0%} of their experts"] = draft_bench.scripted(
                made, lambda: made.new_cache(dtype=torch.bfloat16), ACCEPTANCE,
                tokens=tokens, rounds=rounds, on_progress=status,
            )  # fmt: skip
    finally:
        status.clear()
    what = f"{layers} layers of {name} shapes, drafts right with {ACCEPTANCE:.0%} each"
    show({"model": what, "tokens": tokens, "regimes": found})
    return ExitCode.OK


def show(found: Mapping[str, Any]) -> None:
    """The tables, then one line of JSON."""
    print(text(found))
    print(jsonlib.dumps({"tool": "mimo bench --draft", **found}), flush=True)


def text(found: Mapping[str, Any]) -> str:
    """A table for each regime."""
    from mimo_local.cli import tables

    lines = [found["model"], ""]
    for name, depths in found["regimes"].items():
        lines += [name, tables.table(HEAD, [_row(depth) for depth in depths])]
        lines += [f"auto: {depths[-1]['note']}", ""]
    return "\n".join(lines).rstrip()


def _row(depth: Mapping[str, Any]) -> Sequence[str]:
    from mimo_local.sizes import gb

    rates = ", ".join(f"{rate:.0%}" for rate in depth["acceptance"])
    low, high = depth["speedup_range"]
    disk = depth["disk_bytes"] / max(depth["tokens"], 1)
    return (
        depth["name"], f"{depth['tokens_per_s']:.2f}",
        f"{depth['speedup']:.3f} ({low:.2f} - {high:.2f})", f"{depth['tokens_per_pass']:.2f}",
        rates, gb(disk) if disk else "",
    )  # fmt: skip
