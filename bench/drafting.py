"""Drafting in every regime: experts in RAM, half of them, few of them; drafts of set quality.

    python bench/drafting.py PACK [--ram 5GB,10GB,all] [--right 0.78,0.3] [--overlap 0.25,0.41]

PACK: layers of the real shapes (bench/random_pack.py). The model is told its answer, whose tokens
share experts with their neighbours as set; an oracle guesses it with a set chance, after the time a
draft would take (`mimo_local.draft_bench`). Depths take turns. Prints a table for each regime, then
one line of JSON with the controller's speed over no drafting and over the best fixed depth.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mimo_local.cli.drafts import text
from mimo_local.draft_bench import scripted, set_overlap
from mimo_local.errors import MimoError
from mimo_local.loading import load
from mimo_local.settings import Settings


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pack", type=Path)
    parser.add_argument("--ram", default="all", help="most memory, like 5GB; all: no limit")
    parser.add_argument("--right", default="0.78,0.3")
    parser.add_argument("--overlap", default="0.25,0.41")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(argv)
    try:
        regimes = {}
        for ram in args.ram.split(","):
            regimes |= measured(args, None if ram == "all" else ram)
    except MimoError as error:
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
        return int(error.exit_code)
    print(text({"model": str(args.pack), "regimes": regimes}))
    print(json.dumps(document(args, regimes)))
    return 0


def measured(args: argparse.Namespace, ram: str | None) -> dict[str, list[dict[str, Any]]]:
    """All regimes with so much memory."""
    settings = Settings.resolve(model=args.pack, ram=ram, context=2048, draft="off")
    loaded, found = load(settings), {}
    for overlap in map(float, args.overlap.split(",")):
        shared = set_overlap(loaded.model, overlap)
        for right in map(float, args.right.split(",")):
            name = f"RAM {ram or 'for all'}, neighbours share {shared:.0%}, right {right:.0%}"
            print(name, file=sys.stderr, flush=True)
            found[name] = scripted(
                loaded.model, loaded.new_cache, right, tokens=args.tokens, rounds=args.rounds
            )
    loaded.model.experts.close()
    return found


def document(args: argparse.Namespace, regimes: dict[str, Any]) -> dict[str, Any]:
    """Everything, and how the controller did."""
    verdicts = {}
    for name, depths in regimes.items():
        *fixed, auto = (depth["speedup"] for depth in depths)
        verdicts[name] = {"over_none": auto, "over_best_fixed": auto / max(fixed)}
    return {
        "tool": "bench/drafting.py",
        "tokens": args.tokens,
        "rounds": args.rounds,
        "verdicts": verdicts,
        "regimes": regimes,
    }


if __name__ == "__main__":
    sys.exit(main())
