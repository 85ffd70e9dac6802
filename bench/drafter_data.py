"""Chats that the demo model writes with itself, and what it thought at every token of them.

The trunk is the one that ships (window, sinks and corrections), as a dense model in bfloat16 that
decodes a hundred chats at once; a finished chat makes room for the next. User turns are sampled,
half of them after the first words of a request; most answers are greedy, as most drafting is.
Called by train_demo_drafter.py.
"""

from __future__ import annotations

import random
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F

from mimo_local.demo.healing import Healed, trained_sinks
from mimo_local.demo.rewrite import WINDOW_KEYS, attention_pattern
from mimo_local.demo.source import Source

IM_END = 2
N_SPECIAL = 17
TOP = 12
"""Of each distribution, so many likeliest tokens are kept; the drafter learns those."""
CANDIDATES = 64
"""Rescored in float32: bfloat16 logits tie too often to choose among them."""
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
LENGTH = 448
LONGEST_TURN = 140
CHATS_PER_SHARD = 48

# First words of requests; the model writes the rest. None of them is a prompt of the evaluation.
OPENINGS = """
What is|What are the|What does|What happens when|What would|Who was|Who wrote|Where is|Where can I
When did|When should I|Why do|Why is|Why are|How do I|How does|How can I|How many|How would you
Which|Is it|Are there|Can you|Can you explain|Could you|Should I|Do you know|Does|Tell me about
Tell me a|Explain|Explain how|Explain why|Explain the difference between|Describe|Describe the
List|List three|List five|Name|Give me|Give me a list of|Give me five|Give me an example of
Write a|Write a short story about|Write a poem about|Write a letter to|Write an email|Write a list
Write a paragraph|Write a dialogue between|Write a product description|Write a Python function that
Write a function|Write code|Write instructions for|Write a recipe|Write a short essay on
Write a speech|Create a|Create a plan|Design a|Make a|Make a list of|Suggest|Recommend|Compare
Summarize|Summarize the following text:|Summarize this paragraph:|Rewrite|Rewrite this sentence
Translate|Correct the|Fix the|Convert|Calculate|Solve|Find|Define|Classify|Identify|Continue
Complete the|Read the following|Here is a text.|Help me|I want to|I need|I need help with|I have a
I am|I'm|My|My friend|My child|We are|Let's|Please|Please explain|Please write|Imagine|Pretend
In one sentence,|In a few words,|Briefly,|Step by step,|Hi|Hello|Thank you|Good morning|A
The|In the|For|Given|Suppose|Think of|Brainstorm|Outline|Plan|Draft|Edit|Use|Choose|Discuss
"""

Chat: TypeAlias = dict[str, Any]
"""ids (T,) int32, hidden (T, H) bf16 after the final norm, top_ids (T, TOP) int32 and top_logits
(T, TOP) f16 below the highest: of the next token; answer (first position of it), greedy."""


class Trunk:
    """The shipped windowed model, dense and in bfloat16 but for norms and the residual stream."""

    def __init__(self, source: Source) -> None:
        healed = Healed(source)
        shape = self.shape = source.shape
        self.windowed = [bool(kind) for kind in attention_pattern(shape.layers)]
        sinks = trained_sinks(shape, [i for i, kind in enumerate(self.windowed) if kind])
        self.embed = healed.tensor("model.embed_tokens.weight")
        self.head = self.embed.bfloat16()
        self.norm = healed.tensor("model.norm.weight")
        self.layers: list[dict[str, torch.Tensor]] = []
        for i in range(shape.layers):

            def part(name: str, at: str = f"model.layers.{i}.") -> torch.Tensor:
                return healed.tensor(f"{at}{name}.weight")

            attention = [part(f"self_attn.{p}_proj") for p in "qkv"]
            layer = {
                "norm1": part("input_layernorm"),
                "norm2": part("post_attention_layernorm"),
                "qkv": torch.cat(attention).bfloat16(),
                "o": part("self_attn.o_proj").bfloat16(),
                "gate_up": torch.cat([part("mlp.gate_proj"), part("mlp.up_proj")]).bfloat16(),
                "down": part("mlp.down_proj").bfloat16(),
            }
            if i in sinks:
                layer["sink"] = torch.tensor(sinks[i]).view(1, shape.kv_heads, -1, 1)
            self.layers.append(layer)
        half = shape.head_dim // 2
        frequency = shape.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = torch.arange(LENGTH, dtype=torch.float64)[:, None] * frequency
        self.cos, self.sin = angle.cos().float(), angle.sin().float()

    def rms(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, weight.shape, weight, self.shape.rms_eps)


class Decoder:
    """B chats in B slots, each at its own position; a slot can start over at any time."""

    def __init__(self, trunk: Trunk, batch: int) -> None:
        s, self.trunk, self.batch = trunk.shape, trunk, batch
        rows = [WINDOW_KEYS if windowed else LENGTH for windowed in trunk.windowed]
        self.keys = [
            torch.zeros(batch, s.kv_heads, n, s.head_dim, dtype=torch.bfloat16) for n in rows
        ]
        self.values = [torch.zeros_like(keys) for keys in self.keys]
        self.slots = torch.arange(batch)

    @torch.inference_mode()
    def step(self, ids: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """ids (B,) at positions `at` (B,) -> hidden (B, H) f32 after the final norm."""
        t, s, b = self.trunk, self.trunk.shape, self.batch
        cos, sin = t.cos[at][:, None], t.sin[at][:, None]
        # A ring of the window's size: the order of keys does not matter, their rotation is in them.
        unseen = {n: (torch.arange(n) > at[:, None])[:, None, None] for n in (WINDOW_KEYS, LENGTH)}
        x = t.embed[ids]
        heads = (s.heads, s.kv_heads, s.kv_heads)
        for w, keys, values in zip(t.layers, self.keys, self.values, strict=True):
            n = keys.shape[2]
            h = t.rms(x, w["norm1"]).bfloat16()
            qkv = F.linear(h, w["qkv"]).float().view(b, -1, s.head_dim)
            q, k, v = torch.split(qkv, heads, 1)
            keys[self.slots, :, at % n] = rotated(k, cos, sin).bfloat16()
            values[self.slots, :, at % n] = v.bfloat16()
            q = rotated(q, cos, sin).bfloat16().view(b, s.kv_heads, -1, s.head_dim)
            scores = (q @ keys.transpose(-1, -2)).float() * s.head_dim**-0.5
            scores = scores.masked_fill_(unseen[n], -torch.inf)
            p = scores.softmax(-1)
            if "sink" in w:  # in the denominator only
                p *= torch.sigmoid(scores.logsumexp(-1, keepdim=True) - w["sink"])
            o = (p.bfloat16() @ values).view(b, -1)
            x = x + F.linear(o, w["o"]).float()
            gate, up = F.linear(t.rms(x, w["norm2"]).bfloat16(), w["gate_up"]).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, w["down"]).float()
        return t.rms(x, t.norm)

    @torch.inference_mode()
    def best(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden (B, H) -> (logits, ids) (B, CANDIDATES) of the likeliest next tokens, falling."""
        ids = F.linear(hidden.bfloat16(), self.trunk.head).topk(CANDIDATES).indices
        logits = torch.einsum("bch,bh->bc", self.trunk.embed[ids], hidden)
        logits, order = logits.sort(-1, descending=True)
        return logits, ids.gather(1, order)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (..., D), its halves as the pairs' two coordinates; cos, sin (..., D/2)."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def draw(
    logits: torch.Tensor, ids: torch.Tensor, temperature: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """One id per row of candidates: the best at temperature 0, else from the nucleus of 0.95."""
    banned = (ids < N_SPECIAL) & (ids != IM_END)
    logits = logits.masked_fill(banned, -torch.inf)
    p = (logits / temperature.clamp(min=0.05)[:, None]).softmax(-1)
    p[p.cumsum(-1) - p > 0.95] = 0
    drawn = torch.multinomial(p, 1, generator=generator)[:, 0]
    drawn = torch.where(temperature > 0, drawn, logits.argmax(-1))
    return ids.gather(1, drawn[:, None])[:, 0]


@dataclass
class Slot:
    """One chat being written: ids it is forced to say next, and how free ones are chosen."""

    forced: list[int]
    temperature: float
    at: int = 0
    turn_began: int = 0
    answer: int = 0
    """First position of the answer; 0 during the user's turn."""
    ids: list[int] = field(default_factory=list)


class Writer:
    """Writes chats for ever."""

    def __init__(self, source: Source, batch: int, seed: int) -> None:
        from tokenizers import Tokenizer

        encode = Tokenizer.from_str(source.tokenizer_files()["tokenizer.json"]).encode
        opening = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
        self.opening = encode(opening).ids
        self.answering = encode("\n<|im_start|>assistant\n").ids
        words = [line for part in OPENINGS.strip().split("\n") for line in part.split("|")]
        self.requests = [encode(text).ids for text in words]
        self.trunk = Trunk(source)
        self.decoder = Decoder(self.trunk, batch)
        self.random = random.Random(seed)
        self.torch = torch.Generator().manual_seed(seed)
        self.hidden = torch.zeros(batch, LENGTH, source.shape.hidden, dtype=torch.bfloat16)
        self.top_ids = torch.zeros(batch, LENGTH, TOP, dtype=torch.int32)
        self.top_logits = torch.zeros(batch, LENGTH, TOP, dtype=torch.float16)
        self.slots = [self.begin() for _ in range(batch)]

    def begin(self) -> Slot:
        """A new chat: half the time the user's first words are given."""
        words = self.random.choice(self.requests) if self.random.random() < 0.6 else []
        slot = Slot(self.opening + words, temperature=1.0)
        slot.turn_began = len(self.opening)
        return slot

    def say(self, slot: Slot, free: int) -> bool:
        """Append the next id, forced or free; False once the chat is over."""
        forced = bool(slot.forced)
        token = slot.forced.pop(0) if forced else free
        slot.ids.append(token)
        if len(slot.ids) == LENGTH:
            return False
        if forced:
            return True
        if not slot.answer:
            if token != IM_END and len(slot.ids) - slot.turn_began >= LONGEST_TURN:
                slot.forced = [IM_END]
                token = IM_END
            if token == IM_END:
                slot.forced += self.answering
                slot.answer = len(slot.ids) + len(slot.forced)
                mood = self.random.random()
                slot.temperature = 0.0 if mood < 0.75 else 0.5 if mood < 0.9 else 0.8
            return True
        return token != IM_END

    def chats(self) -> Iterator[Chat]:
        """Chats as they end."""
        batch = len(self.slots)
        free = torch.zeros(batch, dtype=torch.int64)
        while True:
            over = [not self.say(slot, int(free[i])) for i, slot in enumerate(self.slots)]
            ids = torch.tensor([slot.ids[-1] for slot in self.slots])
            at = torch.tensor([len(slot.ids) - 1 for slot in self.slots])
            hidden = self.decoder.step(ids, at)
            logits, best = self.decoder.best(hidden)
            rows = self.decoder.slots
            self.hidden[rows, at] = hidden.bfloat16()
            self.top_ids[rows, at] = best[:, :TOP].int()
            self.top_logits[rows, at] = (logits[:, :TOP] - logits[:, :1]).half()
            for i, slot in enumerate(self.slots):
                if over[i]:
                    if slot.answer:
                        yield self.finished(i, slot)
                    self.slots[i] = self.begin()
            temperature = torch.tensor([slot.temperature for slot in self.slots])
            free = draw(logits, best, temperature, self.torch)

    def finished(self, i: int, slot: Slot) -> Chat:
        n = len(slot.ids)
        return {
            "ids": torch.tensor(slot.ids, dtype=torch.int32),
            "hidden": self.hidden[i, :n].clone(),
            "top_ids": self.top_ids[i, :n].clone(),
            "top_logits": self.top_logits[i, :n].clone(),
            "answer": slot.answer,
            "greedy": slot.temperature == 0,
        }


def write_chats(source: Source, folder: Path, *, tokens: int, batch: int, seed: int) -> None:
    """Fill `folder` with shards until it holds `tokens` tokens; goes on where it stopped.

    Several processes may fill one folder if their seeds differ.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mine = len(list(folder.glob(f"{seed:03d}-*.pt")))
    writer = Writer(source, batch, seed * 1000 + mine)
    began, written, shard = time.monotonic(), 0, list[Chat]()
    for chat in writer.chats():
        shard.append(chat)
        written += len(chat["ids"])
        if len(shard) < CHATS_PER_SHARD:
            continue
        count = sum(len(chat["ids"]) for chat in shard)
        path = folder / f"{seed:03d}-{mine:04d}-{count}.pt"
        torch.save(shard, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)
        mine, shard = mine + 1, []
        total = sum(int(file.stem.rpartition("-")[2]) for file in folder.glob("*.pt"))
        rate = written / (time.monotonic() - began)
        print(f"{total} of {tokens} tokens, {rate:.0f} tokens/s", flush=True)
        if total >= tokens:
            return


def read_chats(folder: Path, skip: Collection[str] = ()) -> dict[str, list[Chat]]:
    """The chats of every shard by its name, but those in `skip`; their tensors stay on disk."""
    return {
        file.name: torch.load(file, mmap=True)
        for file in sorted(folder.glob("*.pt"))
        if file.name not in skip
    }
