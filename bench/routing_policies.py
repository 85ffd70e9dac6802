"""Expert policies on synthetic routing of the real model's shape: hit rates by policy and share.

Two kinds of text: drifting (calibrated on reported hit rates) and stable (favourites that every
text shares: the best case for pins and slow counts). Replays as `mimo replay` does.

    python bench/routing_policies.py --tokens 1500 --rows 1,4
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mimo_local.cli.replay import run, text
from mimo_local.cli.status import Status
from mimo_local.replay import POLICIES, SHARES
from mimo_local.synthetic_routing import Routing, synthetic

TEXTS = {"drifting": Routing(), "stable": Routing(topic_share=0.7, topic_tokens=300)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=1500)
    parser.add_argument("--layers", type=int, default=47)
    parser.add_argument("--rows", default="1", help="tokens of a step")
    parser.add_argument("--prefetch", type=int, default=0, help="guesses per token and layer")
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, help="folder: keep the traces for `mimo replay`")
    args = parser.parse_args()
    found, status = [], Status()
    for name, routing in TEXTS.items():
        trace = synthetic(
            args.tokens, layers=args.layers, routing=routing,
            guesses=args.prefetch > 0, seed=args.seed,
        )  # fmt: skip
        if args.save:
            trace.write(args.save / f"{name}.trace")
        for rows in map(int, args.rows.split(",")):
            entry = run(
                trace, args.policies.split(","), SHARES,
                rows=rows, prefetch=args.prefetch, name=name, status=status,
            )  # fmt: skip
            status.clear()
            print(text(entry), end="\n\n")
            found.append(entry)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
