"""Choose which layers of the demo model keep full attention.

Cutting a layer down to a window costs nothing where its heads look nearby, and everything where
they find what a question refers to. This script measures it: the model answers a request about
texts of its own making (the text of bench/train_demo_window.py), and a choice of full layers is
judged by the KL divergence of the answer's tokens from the unchanged model's. Windowed layers also
see the first token here: where trained sinks would put their attention.

    python bench/choose_demo_layers.py MODEL.gguf --work DIR [--full 15,17,18,20,22,23]

DIR holds text.pt from bench/train_demo_window.py. Without --full: the loss from windowing each
layer alone, then a greedy choice among the costliest. Last stdout line is JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from demo_trunk import Trunk
from train_demo_window import answers

from mimo_local.demo.rewrite import WINDOW_KEYS
from mimo_local.demo.source import GgufSource


@torch.no_grad()
def hidden(trunk: Trunk, ids: torch.Tensor, full: Iterable[int]) -> torch.Tensor:
    """ids (B, T) -> normed last hidden (B, T, H); layers not in `full` see window + first token."""
    b, t = ids.shape
    age = torch.arange(t)[:, None] - torch.arange(t)
    seen = (age >= 0) & (age < WINDOW_KEYS)
    seen[:, 0] = True
    causal = age >= 0
    x = trunk.embed[ids]
    for i, w in enumerate(trunk.layers):
        q, k, v = trunk.project(w, trunk.rms(x, w["norm1"]), 0)
        mask = causal if i in full else seen
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        x = x + F.linear(o.transpose(1, 2).reshape(b, t, -1), w["o"])
        x = x + trunk.mlp(w, trunk.rms(x, w["norm2"]))
    return trunk.rms(x, trunk.norm)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--answer", type=int, default=71)
    parser.add_argument("--candidates", type=int, default=9)
    parser.add_argument("--full", type=str, help="judge this choice only, as 1,2,3")
    args = parser.parse_args()
    source = GgufSource(args.gguf)
    trunk = Trunk(source)
    # Even rows are prose: texts one can ask about.
    text = torch.load(args.work / "text.pt")[0 : 2 * args.rows : 2]
    ids, first = answers(trunk, source, text, args.answer)
    layers = set(range(len(trunk.layers)))

    def log_probs(full: Iterable[int]) -> torch.Tensor:
        return trunk.logits(hidden(trunk, ids, full)[:, first - 1 : -1]).log_softmax(-1)

    goal = log_probs(layers)

    def cost(full: Iterable[int]) -> float:
        return round(float((goal.exp() * (goal - log_probs(full))).sum(-1).mean()), 4)

    if args.full:
        chosen = [int(i) for i in args.full.split(",")]
        print(json.dumps({"full": chosen, "kl": cost(chosen)}))
        return
    alone = {i: cost(layers - {i}) for i in layers}
    print("windowed alone:", alone, flush=True)
    candidates = sorted(alone, key=lambda i: -alone[i])[: args.candidates]
    full: set[int] = set()
    for _ in range(len(layers) // 5):
        best = min((cost(full | {c}), c) for c in candidates if c not in full)
        full.add(best[1])
        print("full:", sorted(full), "kl", best[0], flush=True)
    rule = {i for i in layers if i == 0 or (i + 1) % 6 == 0}
    print(json.dumps({"full": sorted(full), "kl": cost(full), "kl_of_the_rule": cost(rule)}))


if __name__ == "__main__":
    main()
