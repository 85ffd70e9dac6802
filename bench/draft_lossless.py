"""Drafting on and off give the same ids: prompts x greedy and presets, through one engine each.

    python bench/draft_lossless.py [-m PACK] [--prompts 200] [--tokens 48]

Every prompt is answered without drafting, with three drafts always, and as the controller decides;
sampled with the temperature and nucleus of each preset, seeded by its number. Prints a line for
each preset and one of JSON; 1 is returned if any id differs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from mimo_local.chat import PRESETS
from mimo_local.cli import models
from mimo_local.draft_control import DraftController
from mimo_local.errors import MimoError
from mimo_local.generate import Drafting, generate
from mimo_local.loading import Loaded, load
from mimo_local.sampler import SamplingParams
from mimo_local.settings import Settings

STARTS = (
    "Explain", "Write a poem about", "List three facts about", "Tell me a story about", "What is",
    "Write a short letter about", "Compare two kinds of", "Give advice on", "Describe",
    "Write Python code about",
)  # fmt: skip
THINGS = (
    "rain", "bridges", "sorting a list", "bees", "the moon", "bread", "old maps", "trains",
    "a garden in winter", "prime numbers", "cats", "glass", "mountains", "a lost key", "tea",
    "rivers", "a small shop", "stars", "paper", "music",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-m", "--model", type=Path)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=48)
    args = parser.parse_args(argv)
    try:
        loaded = load(models.choose(Settings.resolve(model=args.model, context=2048)))
    except MimoError as error:
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
        return int(error.exit_code)
    if loaded.drafter is None or loaded.tokenizer is None:
        print("error: this model does not draft, or has no tokenizer", file=sys.stderr)
        return 1
    found = {}
    for name, params in presets(args.tokens):
        found[name] = compare(loaded, params, args.prompts)
        print(name, found[name], flush=True)
    print(json.dumps({"tool": "bench/draft_lossless.py", "prompts": args.prompts, "found": found}))
    return int(any(figures["different"] for figures in found.values()))


def presets(tokens: int) -> Iterator[tuple[str, SamplingParams]]:
    """Greedy, then every preset."""
    yield "greedy", SamplingParams(temperature=0.0, max_tokens=tokens)
    for name, preset in PRESETS.items():
        yield name, SamplingParams(
            temperature=preset.temperature, top_p=preset.top_p,
            repetition_penalty=preset.repetition_penalty, max_tokens=tokens,
        )  # fmt: skip


def compare(loaded: Loaded, params: SamplingParams, n: int) -> dict[str, float]:
    """Answers that differ, passes and tokens with three drafts, seconds by way."""
    assert loaded.drafter is not None
    auto = DraftController(len(loaded.drafter.layers))
    always = DraftController(len(loaded.drafter.layers), fixed=len(loaded.drafter.layers))
    different, tokens, passes = 0, 0, 0
    seconds = {"off": 0.0, "always": 0.0, "auto": 0.0}
    for number in range(n):
        answers = []
        for way, control in (("off", None), ("always", always), ("auto", auto)):
            start = time.perf_counter()
            answers.append(answer(loaded, params, number, control))
            seconds[way] += time.perf_counter() - start
            if way == "always":
                tokens += sum(always.figures.accepted) + always.figures.passes
                passes += always.figures.passes
        different += answers[0] != answers[1] or answers[0] != answers[2]
    return {
        "prompts": n, "different": different, "tokens_per_pass": round(tokens / passes, 3),
        **{f"{way}_s": round(took, 2) for way, took in seconds.items()},
    }  # fmt: skip


def answer(
    loaded: Loaded, params: SamplingParams, number: int, control: DraftController | None
) -> list[int]:
    """The ids of one answer."""
    assert loaded.tokenizer is not None
    assert loaded.drafter is not None
    words = f"{STARTS[number % len(STARTS)]} {THINGS[number // len(STARTS) % len(THINGS)]}."
    ids = loaded.tokenizer.render_chat([{"role": "user", "content": words}])
    seeded = replace(params, seed=number)
    drafting = None if control is None else Drafting(loaded.drafter, control)
    stop = [*loaded.model.config.eos_ids, *loaded.tokenizer.stop_ids]
    return list(
        generate(loaded.model, loaded.new_cache(), ids, seeded, stop_ids=stop, drafting=drafting)
    )


if __name__ == "__main__":
    sys.exit(main())
