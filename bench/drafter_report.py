"""How good the trained MTP layers are, on hand-written prompts; and the files that ship.

The demo pack answers the prompts of drafter_prompts.txt greedily through this project's engine; the
layers, already rounded to INT8, guess along. Teacher-forced counting is exact here: a draft is only
looked at while all before it were right. Called by train_demo_drafter.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from drafter_head import Head, Tensors, from_int8, to_int8
from safetensors.torch import save_file

from mimo_local.demo import demo_pack
from mimo_local.demo.source import Source
from mimo_local.experts.store import ExpertStore
from mimo_local.model import Model, Segment
from mimo_local.ops import EXACT_ROWS
from mimo_local.tokenizer import Tokenizer
from mimo_local.weights import open_weights

HERE = Path(__file__).parent
PROMPTS = HERE / "drafter_prompts.txt"
SHIPPED = HERE.parent / "mimo_local" / "demo_data" / "drafter.safetensors"
PICTURE = HERE.parent / "docs" / "drafter.svg"
DRAFTS = 3
ANSWER_TOKENS = 200
COLOURS = ("#3465a4", "#73a020", "#cc5500")


def prompts() -> list[str]:
    return [text.strip() for text in PROMPTS.read_text(encoding="utf-8").split("\n---\n")]


def answer(model: Model, tokenizer: Tokenizer, texts: Sequence[str]) -> list[dict[str, Any]]:
    """Greedy answers to a few prompts at once: ids, hidden (T, D) of all, first of the answer."""
    rows = []
    for text in texts:
        ids = tokenizer.render_chat([{"role": "user", "content": text}])
        cache = model.new_cache()
        hidden = model.forward([Segment(torch.tensor(ids), cache)])
        token = int(model.logits(hidden[-1:]).argmax())
        row = {"ids": [*ids, token], "hidden": [hidden], "answer": len(ids), "cache": cache}
        rows.append(row)
    for _ in range(ANSWER_TOKENS - 1):
        live = [row for row in rows if row["ids"][-1] not in tokenizer.stop_ids]
        if not live:
            break
        hidden = model.forward([Segment(torch.tensor(r["ids"][-1:]), r["cache"]) for r in live])
        chosen = model.logits(hidden).argmax(-1).tolist()
        for row, state, token in zip(live, hidden, chosen, strict=True):
            row["hidden"].append(state[None])
            row["ids"].append(token)
    return [{**row, "hidden": torch.cat(row["hidden"]), "cache": None} for row in rows]


@torch.no_grad()
def guesses(model: Model, head: Head, k: int, row: dict[str, Any]) -> torch.Tensor:
    """(T,) int64: what layer k drafts for every position of the answer; -1 elsewhere.

    The draft for position j follows from hidden j - 2 - k and token j - 1.
    """
    given = torch.tensor(row["ids"][1 + k : -1])
    y = head(model.embedding.rows(given)[None], row["hidden"][: len(given)][None])[0]
    out = torch.full((len(row["ids"]),), -1)
    first = max(row["answer"], 2 + k)
    out[first:] = model.logits(y[first - 2 - k :]).argmax(-1)
    return out


def passes(right: torch.Tensor, first: int) -> tuple[int, int]:
    """(tokens, verify passes) of an answer whose first token, at `first`, is already known.

    right (DRAFTS, T): whether the draft of each layer for each position is the answer's token.
    """
    at, end, count = first, right.shape[1], 0
    while at + 1 < end:  # a pass verifies token `at` and its drafts, and adds one of its own
        accepted = 0
        while accepted < DRAFTS and at + 1 + accepted < end and right[accepted, at + 1 + accepted]:
            accepted += 1
        at, count = min(at + accepted + 1, end - 1), count + 1
    return end - 1 - first, count


def measure(model: Model, heads: Sequence[Head], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Acceptance of the heads over the answers."""
    hits, chances = [0] * DRAFTS, [0] * DRAFTS
    joint, bases, tokens, verified = [0] * DRAFTS, 0, 0, 0
    for row in rows:
        ids, first = torch.tensor(row["ids"]), row["answer"]
        made = [guesses(model, head, k, row) for k, head in enumerate(heads)]
        right = torch.stack([guess == ids for guess in made])
        for k in range(DRAFTS):
            hits[k] += int(right[k, first + 1 + k :].sum())
            chances[k] += max(0, len(ids) - first - 1 - k)
        # At base n (the last position read) the drafts are for n + 2, n + 3, n + 4.
        for n in range(first - 1, len(ids) - 1 - DRAFTS):
            bases += 1
            for k in range(DRAFTS):
                if not right[k, n + 2 + k]:
                    break
                joint[k] += 1
        got, count = passes(right, first)
        tokens, verified = tokens + got, verified + count
    return {
        "prompts": len(rows),
        "answer_tokens": tokens,
        "per_layer": [round(h / c, 4) for h, c in zip(hits, chances, strict=True)],
        "joint": [round(j / bases, 4) for j in joint],
        "tokens_per_pass": round(tokens / verified, 4),
    }


def evaluate(source: Source, work: Path, cache: Path | None) -> dict[str, Any]:
    """Figures of the INT8 layers on the hand-written prompts, and how they were trained."""
    weights = open_weights(demo_pack(cache_dir=cache))
    model = Model(weights, ExpertStore(weights))
    tokenizer = Tokenizer.from_dir(demo_pack(cache_dir=cache))
    kept = work / "answers.pt"
    if not kept.exists():
        rows, texts = [], prompts()
        for start in range(0, len(texts), EXACT_ROWS):
            rows += answer(model, tokenizer, texts[start : start + EXACT_ROWS])
            print(f"{len(rows)} of {len(texts)} prompts answered", flush=True)
        torch.save(rows, kept)
    rows = torch.load(kept)
    heads = [from_int8(source.shape, to_int8(trained(source, work, k))) for k in range(DRAFTS)]
    return measure(model, heads, rows) | {"training": [log(work, k)[-1] for k in range(DRAFTS)]}


def trained(source: Source, work: Path, k: int) -> Head:
    head = Head(source.shape)
    head.load_state_dict(torch.load(work / f"head-{k}.pt", weights_only=False)["head"])
    return head


def log(work: Path, k: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (work / f"head-{k}.jsonl").read_text().splitlines()]


def ship(source: Source, work: Path, results: dict[str, Any]) -> None:
    """drafter.safetensors with its figures in the metadata, and the picture of the training."""
    tensors: Tensors = {}
    for k in range(DRAFTS):
        parts = to_int8(trained(source, work, k))
        tensors |= {f"layers.{k}.{name}": part.contiguous() for name, part in parts.items()}
    facts = {
        "trained_by": "bench/train_demo_drafter.py on chats the model wrote with itself",
        "figures": json.dumps(results),
    }
    save_file(tensors, SHIPPED, metadata=facts)
    SHIPPED.chmod(0o644)
    PICTURE.write_text(picture([log(work, k) for k in range(DRAFTS)]), encoding="utf-8")


# ---- the picture ---------------------------------------------------------------------------------


def picture(logs: Sequence[list[dict[str, Any]]]) -> str:
    """An SVG of two panels over the tokens visited: loss, and acceptance on held-out chats."""
    width, height = 760, 300
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    millions = max(line["visits"] for lines in logs for line in lines) / 1e6
    for left, key, title in (
        (45, "held_out_loss", "cross-entropy, held-out chats"),
        (425, "held_out", "drafts accepted, held-out chats"),
    ):
        values = [line[key] for lines in logs for line in lines if key in line]
        low, high = (0.0, 0.7) if key == "held_out" else (2.0, min(7.0, max(values)))
        parts += panel(left, title, millions, (low, high))
        for lines, colour in zip(logs, COLOURS, strict=True):
            points = [
                (
                    left + 300 * line["visits"] / 1e6 / millions,
                    250 - 210 * (min(max(line[key], low), high) - low) / (high - low),
                )
                for line in lines
                if key in line
            ]
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            parts.append(
                f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
            )
    for k, colour in enumerate(COLOURS):
        x = 585 + 50 * k
        parts.append(f'<text x="{x}" y="240" fill="{colour}">layer {k}</text>')
    return "\n".join([*parts, "</svg>\n"])


def panel(left: int, title: str, millions: float, limits: tuple[float, float]) -> list[str]:
    """Axes, ticks and words of one panel, 300 x 210 from (left, 40)."""
    low, high = limits
    parts = [
        f'<text x="{left}" y="20" font-weight="bold">{title}</text>',
        f'<path d="M{left},40 V250 H{left + 300}" fill="none" stroke="black"/>',
        f'<text x="{left + 150}" y="285" text-anchor="middle">million tokens visited</text>',
    ]
    step = 0.1 if high < 1 else 1.0
    for i in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1):
        y = 250 - 210 * (i * step - low) / (high - low)
        parts.append(f'<path d="M{left},{y:.1f} h300" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 5}" y="{y + 4:.1f}" text-anchor="end">{i * step:g}</text>')
    wide = next(s for s in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 1000) if millions / s <= 7)
    for i in range(math.floor(millions / wide) + 1):
        x = left + 300 * i * wide / millions
        parts.append(f'<text x="{x:.1f}" y="265" text-anchor="middle">{i * wide:g}</text>')
    return parts
