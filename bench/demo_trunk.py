"""The demo's original model in plain torch, whole or windowed with sinks; batched decoding.

What bench/train_demo_window.py samples texts from and trains against, and what
bench/choose_demo_layers.py measures with. Knows tensors, no training.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
import torch.nn.functional as F

from mimo_local.demo.rewrite import WINDOW_KEYS
from mimo_local.demo.source import GgufSource

LowRank: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


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
        self,
        ids: torch.Tensor,
        sinks: dict[int, torch.Tensor] | None = None,
        low_rank: dict[int, LowRank] | None = None,
    ) -> torch.Tensor:
        """ids (T,) -> normed last hidden (T, H); layers in `sinks` see WINDOW_KEYS keys.

        `low_rank`: layer -> corrections (qkv down, qkv up, o down, o up) added to the projections.
        """
        s, t = self.shape, len(ids)
        age = torch.arange(t)[:, None] - torch.arange(t)
        outside = (age < 0) | (age >= WINDOW_KEYS)
        x = self.embed[ids][None]
        for i, w in enumerate(self.layers):
            if low_rank is not None:
                qkv_down, qkv_up, o_down, o_up = low_rank[i]
                w = {**w, "qkv": w["qkv"] + qkv_up @ qkv_down, "o": w["o"] + o_up @ o_down}
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
    def prefill(self, ids: torch.Tensor) -> torch.Tensor:
        """ids (B, T) -> logits (B, V) of the next position."""
        t, n = self.trunk, ids.shape[1]
        x = t.embed[ids]
        for w, (keys, values) in zip(t.layers, self.cache, strict=True):
            q, k, v = t.project(w, t.rms(x, w["norm1"]), 0)
            keys[:, :, :n], values[:, :, :n] = k, v
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x = x + F.linear(o.transpose(1, 2).reshape(*ids.shape, -1), w["o"])
            x = x + t.mlp(w, t.rms(x, w["norm2"]))
        self.at = n
        return t.logits(t.rms(x[:, -1], t.norm))

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
