"""Train the demo model's attention sinks on text the model wrote itself.

The demo pack cuts 24 of 30 layers down to a sliding window. Without a sink such a head must put
all its attention on something inside the window, and perplexity more than doubles; one learned
number per head gives it somewhere to put the rest. This script makes its own training text (chats
and prose sampled from the unchanged model, so that nothing shipped derives from anybody else's
text), then fits layers x heads sinks by gradient descent: the windowed model must agree with the
full-attention one.

    python bench/train_demo_sinks.py MODEL.gguf --work DIR --out mimo_local/demo_data/sinks.json

Restartable: sampled text and the state after every fifth step are kept in DIR. Last stdout line is
JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

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


class Trunk:
    """The original model in plain torch: full attention, or windowed with sinks in some layers."""

    def __init__(self, source: GgufSource) -> None:
        self.shape = source.shape
        s = self.shape
        self.embed = source.tensor("model.embed_tokens.weight")
        self.norm = source.tensor("model.norm.weight")
        self.layers: list[dict[str, torch.Tensor]] = []
        for i in range(s.layers):
            at = f"model.layers.{i}."
            names = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
            names |= {p: f"self_attn.{p}_proj" for p in "qkvo"}
            names |= {p: f"mlp.{p}_proj" for p in ("gate", "up", "down")}
            w = {k: source.tensor(f"{at}{n}.weight") for k, n in names.items()}
            w["qkv"] = torch.cat([w.pop("q"), w.pop("k"), w.pop("v")])
            w["gate_up"] = torch.cat([w.pop("gate"), w.pop("up")])
            self.layers.append(w)
        half = s.head_dim // 2
        freq = s.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = torch.arange(s.context, dtype=torch.float64)[:, None] * freq
        self.cos, self.sin = angle.cos().float(), angle.sin().float()

    def rms(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), w, self.shape.rms_eps)

    def rotate(self, x: torch.Tensor, first: int) -> torch.Tensor:
        """x (..., T, D) rotated for positions first .. first + T."""
        rows = slice(first, first + x.shape[-2])
        cos, sin = self.cos[rows], self.sin[rows]
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def project(
        self, w: dict[str, torch.Tensor], h: torch.Tensor, first: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """h (B, T, H) -> q (B, heads, T, D), k and v (B, kv_heads, T, D), q and k rotated."""
        s = self.shape
        b, t, _ = h.shape
        qkv = F.linear(h, w["qkv"]).view(b, t, -1, s.head_dim).transpose(1, 2)
        q, k, v = torch.split(qkv, [s.heads, s.kv_heads, s.kv_heads], 1)
        return self.rotate(q, first), self.rotate(k, first), v

    def mlp(self, w: dict[str, torch.Tensor], h: torch.Tensor) -> torch.Tensor:
        gate, up = F.linear(h, w["gate_up"]).chunk(2, -1)
        return F.linear(F.silu(gate) * up, w["down"])

    def hidden(
        self, ids: torch.Tensor, sinks: dict[int, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """ids (T,) -> normed last hidden (T, H); layers in `sinks` see WINDOW_KEYS keys."""
        s, t = self.shape, len(ids)
        age = torch.arange(t)[:, None] - torch.arange(t)
        outside = (age < 0) | (age >= WINDOW_KEYS)
        x = self.embed[ids][None]
        for i, w in enumerate(self.layers):
            q, k, v = self.project(w, self.rms(x, w["norm1"]), 0)
            k, v = (z.repeat_interleave(s.heads // s.kv_heads, 1) for z in (k, v))
            if sinks is not None and i in sinks:
                scores = (q @ k.transpose(-1, -2)) * s.head_dim**-0.5
                scores = scores.masked_fill(outside, -math.inf)
                # exp(sink) in the denominator only = the plain softmax times sigmoid(lse - sink)
                keep = torch.sigmoid(scores.logsumexp(-1, keepdim=True) - sinks[i][:, None, None])
                o = scores.softmax(-1) @ v * keep
            else:
                o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + F.linear(o.transpose(1, 2).reshape(1, t, -1), w["o"])
            x = x + self.mlp(w, self.rms(x, w["norm2"]))
        return self.rms(x, self.norm)[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, self.embed)


class Decoder:
    """Batched decoding with a preallocated cache: B rows, all of the same length."""

    def __init__(self, trunk: Trunk, batch: int, length: int) -> None:
        s = trunk.shape
        self.trunk, self.at = trunk, 0
        self.cache = torch.zeros(s.layers, 2, batch, s.kv_heads, length, s.head_dim)

    @torch.no_grad()
    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """ids (B,) -> logits (B, V) of the next position."""
        t, s = self.trunk, self.trunk.shape
        end = self.at + 1
        x = t.embed[ids][:, None]
        for w, (keys, values) in zip(t.layers, self.cache, strict=True):
            q, k, v = t.project(w, t.rms(x, w["norm1"]), self.at)
            keys[:, :, self.at], values[:, :, self.at] = k[:, :, 0], v[:, :, 0]
            q = q.reshape(len(ids), s.kv_heads, -1, s.head_dim)
            p = (q @ keys[:, :, :end].transpose(-1, -2) * s.head_dim**-0.5).softmax(-1)
            o = (p @ values[:, :, :end]).reshape(len(ids), 1, -1)
            x = x + F.linear(o, w["o"])
            x = x + t.mlp(w, t.rms(x, w["norm2"]))
        self.at = end
        return t.logits(t.rms(x[:, 0], t.norm))


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


def loss_of(
    trunk: Trunk, ids: torch.Tensor, sinks: dict[int, torch.Tensor], every: int = 8
) -> torch.Tensor:
    """KL(full || windowed) + half the relative error of the hidden, at every 8th position."""
    with torch.no_grad():
        goal = trunk.hidden(ids)[every - 1 :: every]
        target = trunk.logits(goal).log_softmax(-1)
    hidden = trunk.hidden(ids, sinks)[every - 1 :: every]
    kl = F.kl_div(
        trunk.logits(hidden).log_softmax(-1), target, reduction="batchmean", log_target=True
    )
    error = ((hidden - goal).norm(dim=-1) / goal.norm(dim=-1)).mean()
    loss: torch.Tensor = kl + 0.5 * error
    return loss


def train(trunk: Trunk, text: torch.Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """Fit the sinks; returns them with the loss curve. State is kept after every fifth step."""
    state_file = args.work / "state.pt"
    windowed = [i for i, kind in enumerate(attention_pattern(trunk.shape.layers)) if kind]
    table = torch.full((len(windowed), trunk.shape.heads), SINK_START, requires_grad=True)
    optimizer = torch.optim.AdamW([table], lr=0.15, betas=(0.9, 0.98), weight_decay=0.0)
    curve: list[float] = []
    held_out = [torch.full_like(table, v) for v in (-1e4, SINK_START)]
    heldout_rows, train_rows = text[: args.held_out], text[args.held_out :]
    if state_file.exists():
        state = torch.load(state_file)
        table.data.copy_(state["table"])
        optimizer.load_state_dict(state["optimizer"])
        curve = state["curve"]

    def as_dict(values: torch.Tensor) -> dict[int, torch.Tensor]:
        return dict(zip(windowed, values, strict=True))

    @torch.no_grad()
    def held_out_loss(values: torch.Tensor) -> float:
        losses = [float(loss_of(trunk, ids, as_dict(values))) for ids in heldout_rows]
        return sum(losses) / len(losses)

    for step in range(len(curve), args.steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.15 if step < args.steps // 2 else 0.2 * (1 - step / args.steps)
        optimizer.zero_grad()
        loss = loss_of(trunk, train_rows[step % len(train_rows)], as_dict(table))
        torch.autograd.backward(loss)
        optimizer.step()
        curve.append(round(float(loss.detach()), 4))
        print(f"step {step + 1}: loss {curve[-1]}", flush=True)
        if (step + 1) % 5 == 0 or step + 1 == args.steps:
            state = {"table": table.data, "optimizer": optimizer.state_dict(), "curve": curve}
            torch.save(state, state_file)
    final = table.detach()
    figures = {
        "no_sink": held_out_loss(held_out[0]),
        "start": held_out_loss(held_out[1]),
        "trained": held_out_loss(final),
    }
    return {
        "layers": windowed,
        "sinks": [[round(float(v), 3) for v in row] for row in final],
        "curve": curve,
        "held_out_loss": {k: round(v, 4) for k, v in figures.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=72)
    parser.add_argument("--batch", type=int, default=36)
    parser.add_argument("--length", type=int, default=640)
    parser.add_argument("--held-out", type=int, default=4)
    parser.add_argument("--steps", type=int, default=70)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    source = GgufSource(args.gguf)
    trunk = Trunk(source)
    began = time.monotonic()
    text_file = args.work / "text.pt"
    if text_file.exists():
        text = torch.load(text_file)
    else:
        text = generate(trunk, source, args)
        torch.save(text, text_file)
    wrote = time.monotonic()
    result = train(trunk, text, args)
    shipped = {
        "about": "attention sinks of the demo model, one per windowed layer and original head",
        "trained_by": "bench/train_demo_sinks.py on text sampled from the model itself",
        "window_keys": WINDOW_KEYS,
        "layers": result["layers"],
        "sinks": result["sinks"],
    }
    rows = ",\n    ".join(json.dumps(row) for row in shipped.pop("sinks"))
    head = json.dumps(shipped, indent=2)[:-2]
    args.out.write_text(f'{head},\n  "sinks": [\n    {rows}\n  ]\n}}\n', encoding="utf-8")
    report = {
        "tokens": text.numel(),
        "generate_s": round(wrote - began),
        "train_s": round(time.monotonic() - wrote),
        "threads": torch.get_num_threads(),
        "curve": result["curve"],
        "held_out_loss": result["held_out_loss"],
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
