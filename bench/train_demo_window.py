"""Teach the demo model to live with its window, on text the model wrote itself.

The demo pack cuts 24 of 30 layers down to a sliding window. Without a sink such a head must put
all its attention on something inside the window, and perplexity more than doubles; one learned
number per head gives it somewhere to put the rest. A low-rank correction of every attention
projection then teaches the layers around the window to find what it hid. The windowed model must
agree with the full-attention one on text sampled from that one: chats, prose, and answers to
requests about prose. Nothing shipped derives from anybody else's text.

    python bench/train_demo_window.py MODEL.gguf --work DIR \\
        --out mimo_local/demo_data/window.safetensors

Restartable between its stages (text, requests, sinks, corrections): each leaves a file in DIR.
Last stdout line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from demo_trunk import Decoder, LowRank, Trunk
from safetensors.torch import save_file

from mimo_local.demo.rewrite import SINK_START, WINDOW_KEYS, attention_pattern
from mimo_local.demo.source import GgufSource

IM_START, IM_END = 1, 2
N_SPECIAL = 17
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
# Openings of the prose half, written for this script; the model continues each.
OPENINGS = [
    "# How bread is made\n\nBread begins with flour and water.",
    "The ferry left the harbour at six, and Anna was the only passenger who",
    "# A short history of the compass\n\nLong before anyone understood magnetism,",
    "Dear Thomas,\n\nThank you for your letter. I have been meaning to write since",
    "## Installing the pump\n\nBefore you begin, check that the water supply is closed.",
    "Most people believe that deserts are hot, dry and empty. In fact,",
    "Chapter 1\n\nThe old house at the end of the lane had been empty for years when",
    "# Why leaves change colour\n\nIn autumn the days become shorter and",
    "The committee met on Tuesday to discuss the new library. The first question was",
    '"You are late," said the clockmaker without looking up.\n\n"The road was',
    "# Notes on teaching arithmetic\n\nChildren learn to count before they learn to",
    "Economists disagree about what causes inflation. One school holds that",
    'def read_table(path):\n    """Read a table of numbers from a text file."""\n',
    "The human heart beats about one hundred thousand times a day. Each beat",
    "# Caring for a small garden\n\nStart with the soil. A handful of earth",
    "When the railway came to the valley, everything changed. Farmers who had",
]


REQUESTS = [
    "Summarize the text above in a few sentences.",
    "What is the text above about?",
    "List the main points of the text.",
    "Write a short summary of this text.",
]
PARTS = ("qkv.down", "qkv.up", "o.down", "o.up")

Student: TypeAlias = Callable[[torch.Tensor], torch.Tensor]


class Row:
    """What one row must say next: forced ids (prompts, turn markers) or free sampling."""

    def __init__(self, opening: list[int], turns: dict[str, list[int]] | None) -> None:
        self.forced, self.turns, self.speaker = list(opening), turns, "user"

    def settings(self) -> tuple[float, float]:
        """(temperature, top_p): questions are sampled wider than answers and prose."""
        if self.turns is None:
            return 0.85, 0.95
        return (1.0, 0.95) if self.speaker == "user" else (0.7, 0.95)

    def saw(self, token: int) -> None:
        if token == IM_END and self.turns is not None and not self.forced:
            self.speaker = "assistant" if self.speaker == "user" else "user"
            self.forced = list(self.turns[self.speaker])


def draw(logits: torch.Tensor, rows: list[Row], generator: torch.Generator) -> torch.Tensor:
    """Nucleus sampling per row over its 256 likeliest tokens; prose rows never emit a special."""
    temperature = torch.tensor([row.settings()[0] for row in rows])[:, None]
    top_p = torch.tensor([row.settings()[1] for row in rows])[:, None]
    logits[:, :N_SPECIAL] = torch.where(
        torch.arange(N_SPECIAL) == IM_END, logits[:, :N_SPECIAL], -math.inf
    )
    prose = torch.tensor([row.turns is None for row in rows])
    logits[prose, IM_END] = -math.inf
    top, ids = (logits / temperature).topk(256)
    p = top.softmax(-1)
    p[p.cumsum(-1) - p > top_p] = 0
    return ids.gather(1, torch.multinomial(p, 1, generator=generator))[:, 0]


def generate(trunk: Trunk, source: GgufSource, args: argparse.Namespace) -> torch.Tensor:
    """(rows, length) ids sampled from the model: half chats from an empty user turn, half prose."""
    from tokenizers import Tokenizer

    encode = Tokenizer.from_str(source.tokenizer_files()["tokenizer.json"]).encode
    turns = {who: encode(f"\n<|im_start|>{who}\n").ids for who in ("user", "assistant")}
    chat = encode(f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n").ids
    generator = torch.Generator().manual_seed(args.seed)
    done: list[torch.Tensor] = []
    for start in range(0, args.rows, args.batch):
        rows = [
            Row(chat, turns) if i % 2 else Row(encode(OPENINGS[i // 2 % len(OPENINGS)]).ids, None)
            for i in range(start, min(start + args.batch, args.rows))
        ]
        decoder = Decoder(trunk, len(rows), args.length)
        out = torch.zeros(len(rows), args.length, dtype=torch.int64)
        logits: torch.Tensor | None = None
        for t in range(args.length):
            free = draw(logits, rows, generator) if logits is not None else out[:, 0]
            for i, row in enumerate(rows):
                out[i, t] = row.forced.pop(0) if row.forced else free[i]
                row.saw(int(out[i, t]))
            logits = decoder.step(out[:, t])
            if t % 80 == 79:
                print(f"rows {start}+{len(rows)}: {t + 1} of {args.length} tokens", flush=True)
        done.append(out)
    return torch.cat(done)


def answers(
    trunk: Trunk, source: GgufSource, prose: torch.Tensor, length: int, seed: int = 1
) -> tuple[torch.Tensor, int]:
    """(ids (B, T), first position of the answer): requests about prose, answered by the model."""
    from tokenizers import Tokenizer

    encode = Tokenizer.from_str(source.tokenizer_files()["tokenizer.json"]).encode
    generator = torch.Generator().manual_seed(seed)
    head = encode(f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n").ids
    rows = []
    for i, row in enumerate(prose):
        request = f"\n\n{REQUESTS[i % len(REQUESTS)]}<|im_end|>\n<|im_start|>assistant\n"
        rows.append((row[:560].tolist(), encode(request).ids))
    first = min(len(head) + len(text) + len(ask) for text, ask in rows)
    ids = torch.tensor([[*head, *text[: first - len(head) - len(ask)], *ask] for text, ask in rows])
    decoder = Decoder(trunk, len(ids), first + length)
    logits = decoder.prefill(ids)
    for _ in range(length):
        new = torch.multinomial((logits / 0.5).softmax(-1), 1, generator=generator)
        ids = torch.cat([ids, new], 1)
        logits = decoder.step(new[:, 0])
    return ids, first


@dataclass(frozen=True, slots=True)
class Example:
    """A sequence and the positions whose predictions must agree."""

    ids: torch.Tensor
    positions: torch.Tensor


def plain(ids: torch.Tensor, every: int) -> Example:
    return Example(ids, torch.arange(every - 1, len(ids), every))


def answered(ids: torch.Tensor, first: int) -> Example:
    """Every token of the answer, and the text past one window here and there."""
    before = torch.arange(WINDOW_KEYS + 6, first, 16)
    return Example(ids, torch.cat([torch.arange(first - 1, len(ids) - 1), before]))


def loss_of(trunk: Trunk, example: Example, student: Student) -> tuple[torch.Tensor, torch.Tensor]:
    """(KL(full || windowed) + half the relative error of the hidden, the KL alone)."""
    with torch.no_grad():
        goal = trunk.hidden(example.ids)[example.positions]
        target = trunk.logits(goal).log_softmax(-1)
    hidden = student(example.ids)[example.positions]
    kl = F.kl_div(
        trunk.logits(hidden).log_softmax(-1), target, reduction="batchmean", log_target=True
    )
    error = ((hidden - goal).norm(dim=-1) / goal.norm(dim=-1)).mean()
    return kl + 0.5 * error, kl


class Window:
    """What is trained: sinks (windowed layers, heads) and, in stage two, low-rank corrections."""

    def __init__(self, trunk: Trunk, rank: int) -> None:
        s = trunk.shape
        self.trunk = trunk
        self.layers = [i for i, kind in enumerate(attention_pattern(s.layers)) if kind]
        self.sinks = torch.full((len(self.layers), s.heads), SINK_START, requires_grad=True)
        generator = torch.Generator().manual_seed(1)
        rows, wide = (s.heads + 2 * s.kv_heads) * s.head_dim, s.heads * s.head_dim
        self.low_rank: dict[int, LowRank] = {}
        for layer in range(s.layers):
            pair = []
            for out, inner in ((rows, s.hidden), (s.hidden, wide)):
                down = torch.randn(rank, inner, generator=generator) / inner**0.5
                pair += [down.requires_grad_(), torch.zeros(out, rank, requires_grad=True)]
            self.low_rank[layer] = (pair[0], pair[1], pair[2], pair[3])

    def sinks_only(self, ids: torch.Tensor) -> torch.Tensor:
        return self.trunk.hidden(ids, dict(zip(self.layers, self.sinks, strict=True)))

    def healed(self, ids: torch.Tensor) -> torch.Tensor:
        sinks = dict(zip(self.layers, self.sinks, strict=True))
        return self.trunk.hidden(ids, sinks, self.low_rank)

    def save(self, path: Path) -> None:
        """The file that ships: sinks in float32, corrections in float16."""
        tensors = {"sinks": self.sinks.detach()}
        for layer, parts in self.low_rank.items():
            for name, part in zip(PARTS, parts, strict=True):
                tensors[f"layers.{layer}.{name}"] = part.detach().half().contiguous()
        facts = {"windowed_layers": json.dumps(self.layers), "window_keys": str(WINDOW_KEYS)}
        facts["trained_by"] = "bench/train_demo_window.py on text sampled from the model itself"
        save_file(tensors, path, metadata=facts)


def fit(
    trunk: Trunk,
    student: Student,
    groups: list[dict[str, Any]],
    examples: list[Example],
    steps: int,
    warm_up: int,
) -> list[float]:
    """AdamW over `examples` in turn, each group's rate falling to 2 %; the KL of every step."""
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
    peak = [group["lr"] for group in optimizer.param_groups]
    curve = []
    for step in range(steps):
        share = min(1.0, (step + 1) / warm_up) * (1 - step / steps) ** 0.7 + 0.02
        for group, rate in zip(optimizer.param_groups, peak, strict=True):
            group["lr"] = rate * share
        optimizer.zero_grad()
        loss, kl = loss_of(trunk, examples[step % len(examples)], student)
        torch.autograd.backward(loss)
        for group in optimizer.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
        optimizer.step()
        curve.append(round(float(kl.detach()), 4))
        print(f"step {step + 1} of {steps}: KL {curve[-1]}", flush=True)
    return curve


@torch.no_grad()
def held_out(trunk: Trunk, examples: list[Example], student: Student) -> float:
    """Mean KL over the examples."""
    losses = [float(loss_of(trunk, example, student)[1]) for example in examples]
    return round(sum(losses) / len(losses), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=72)
    parser.add_argument("--batch", type=int, default=36)
    parser.add_argument("--length", type=int, default=640)
    parser.add_argument("--held-out", type=int, default=4)
    parser.add_argument("--sink-steps", type=int, default=60)
    parser.add_argument("--steps", type=int, default=90)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    source = GgufSource(args.gguf)
    trunk, began = Trunk(source), time.monotonic()

    def kept(name: str, make: Callable[[], Any]) -> Any:
        file = args.work / name
        if not file.exists():
            torch.save(make(), file)
        return torch.load(file)

    text = kept("text.pt", lambda: generate(trunk, source, args))
    # Even rows are prose: texts one can ask about.
    asked, first = kept("requests.pt", lambda: answers(trunk, source, text[12:60:2], 63))
    unseen, start = kept("unseen.pt", lambda: answers(trunk, source, text[0:4:2], 71, seed=2))
    tests = [answered(ids, start) for ids in unseen]
    window = Window(trunk, args.rank)
    tables: dict[str, Any] = {"start": held_out(trunk, tests, window.sinks_only)}

    def sinks() -> Any:
        examples = [plain(ids, 8) for ids in text[args.held_out :]]
        groups = [{"params": [window.sinks], "lr": 0.15}]
        curve = fit(trunk, window.sinks_only, groups, examples, args.sink_steps, 1)
        return window.sinks.data, curve

    window.sinks.data, tables["sinks_curve"] = kept("sinks.pt", sinks)
    tables["sinks"] = held_out(trunk, tests, window.sinks_only)
    examples = [plain(ids, 6) for ids in text[args.held_out :]]
    examples += 2 * [answered(ids, first) for ids in asked]
    random.Random(1).shuffle(examples)
    corrections = [part for parts in window.low_rank.values() for part in parts]
    groups = [{"params": corrections, "lr": 2e-3}, {"params": [window.sinks], "lr": 0.03}]
    tables["curve"] = fit(trunk, window.healed, groups, examples, args.steps, 8)
    tables["healed"] = held_out(trunk, tests, window.healed)
    window.save(args.out)
    tables |= {"tokens": text.numel() + asked.numel(), "threads": torch.get_num_threads()}
    print(json.dumps(tables | {"seconds": round(time.monotonic() - began)}))


if __name__ == "__main__":
    main()
