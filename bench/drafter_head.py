"""One MTP layer of the demo model in plain torch: what is trained, its loss, and its INT8 form.

Layer k (0, 1, 2) gets the trunk's hidden h_i after the final norm and the embedding of token
i + 1 + k, and predicts token i + 2 + k; no layer sees another one. Queries and keys have the
original's 64 dimensions, all rotated; the rewrite pads them (mimo_local.demo.drafter). Called by
train_demo_drafter.py and drafter_report.py.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import nn

from mimo_local.demo.healing import Healed
from mimo_local.demo.rewrite import WINDOW_KEYS
from mimo_local.demo.source import LlamaShape, Source
from quant.formats import get_format

Tensors: TypeAlias = dict[str, torch.Tensor]

INT8 = get_format("int8")
NORMS = ("enorm", "hnorm", "input_layernorm", "pre_mlp_layernorm", "final_layernorm")
ROWS_AT_ONCE = 512
"""Of the loss: with 6000 tokens to choose from, their logits stay in the cache."""


class Head(nn.Module):
    """eh_proj, one sliding attention layer without sinks, one SwiGLU, five norms."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.shape = shape
        for name, size in matrix_shapes(shape).items():
            setattr(self, name, nn.Parameter(torch.zeros(size)))
        for name in NORMS:
            setattr(self, name, nn.Parameter(torch.ones(shape.hidden)))
        half = shape.head_dim // 2
        frequency = shape.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = torch.arange(1024, dtype=torch.float64)[:, None] * frequency
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)

    def start_from(self, source: Source, seed: int) -> None:
        """The trunk's last layer over a residual stream taken back from its normed output."""
        s, generator = self.shape, torch.Generator().manual_seed(seed)
        at = f"model.layers.{s.layers - 1}."
        healed = Healed(source)
        w = {p: healed.tensor(f"{at}self_attn.{p}_proj.weight") for p in "qkvo"}
        w |= {p: source.tensor(f"{at}mlp.{p}_proj.weight") for p in ("gate", "up", "down")}
        norm = source.tensor("model.norm.weight")
        real, group, d = s.heads // s.kv_heads, padded_group(s), s.head_dim

        def small(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=generator) * 0.02

        q = small(s.kv_heads, group, d, s.hidden)
        q[:, :real] = w["q"].view(s.kv_heads, real, d, s.hidden)
        o = small(s.hidden, s.kv_heads, group, d)
        o[:, :, :real] = w["o"].view(s.hidden, s.kv_heads, real, d) / STREAM
        kv = (p.view(s.kv_heads, d, -1).repeat_interleave(2, 0) for p in (w["k"], w["v"]))
        k, v = (p.reshape(-1, s.hidden) for p in kv)
        back = torch.diag(1 / (norm / norm.square().mean().sqrt()).clamp(min=0.2))
        begin = {
            "eh": torch.cat([0.3 * torch.eye(s.hidden), back], 1),
            "q": q.view(-1, s.hidden), "k": k, "v": v, "o": o.view(s.hidden, -1),
            "gate": w["gate"], "up": w["up"], "down": w["down"] / STREAM,
            "input_layernorm": source.tensor(f"{at}input_layernorm.weight"),
            "pre_mlp_layernorm": source.tensor(f"{at}post_attention_layernorm.weight"),
            "final_layernorm": norm,
        }  # fmt: skip
        with torch.no_grad():
            for name, value in begin.items():
                getattr(self, name).copy_(value)

    def forward(self, embedded: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Embeddings of the next tokens and hidden (B, T, H) -> (B, T, H) for the shared head."""
        u = F.linear(
            torch.cat([self._rms(embedded, self.enorm), self._rms(hidden, self.hnorm)], -1), self.eh
        )
        u = u + self._attention(self._rms(u, self.input_layernorm))
        h = self._rms(u, self.pre_mlp_layernorm)
        u = u + F.linear(F.silu(F.linear(h, self.gate)) * F.linear(h, self.up), self.down)
        return self._rms(u, self.final_layernorm)

    def _rms(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), weight.shape, weight, self.shape.rms_eps)

    def _attention(self, h: torch.Tensor) -> torch.Tensor:
        b, t, _ = h.shape
        d = self.shape.head_dim

        def heads(w: torch.Tensor) -> torch.Tensor:
            return F.linear(h, w).view(b, t, -1, d).transpose(1, 2)

        q, k, v = self._rotated(heads(self.q)), self._rotated(heads(self.k)), heads(self.v)
        k, v = (p.repeat_interleave(q.shape[1] // k.shape[1], 1) for p in (k, v))
        age = torch.arange(t)[:, None] - torch.arange(t)
        seen = (age >= 0) & (age < WINDOW_KEYS)
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return F.linear(o.transpose(1, 2).reshape(b, t, -1), self.o)

    def _rotated(self, x: torch.Tensor) -> torch.Tensor:
        cos, sin = (table[: x.shape[-2]].to(x.dtype) for table in (self.cos, self.sin))
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


STREAM = 8.0
"""How much larger the trunk's last residual stream is, about, than the head's at the start."""


def padded_group(shape: LlamaShape) -> int:
    group = shape.heads // shape.kv_heads
    return group + group % 2


def matrix_shapes(shape: LlamaShape) -> dict[str, tuple[int, int]]:
    """The eight matrices of a head as trained and shipped."""
    h, d, inner = shape.hidden, shape.head_dim, shape.intermediate
    q, kv = shape.kv_heads * padded_group(shape) * d, 2 * shape.kv_heads * d
    return {
        "eh": (h, 2 * h), "q": (q, h), "k": (kv, h), "v": (kv, h), "o": (h, q),
        "gate": (inner, h), "up": (inner, h), "down": (h, inner),
    }  # fmt: skip


def backward(
    y: torch.Tensor, choices: torch.Tensor, target: torch.Tensor, p: torch.Tensor
) -> tuple[float, int]:
    """Cross-entropy against sparse targets, its gradient sent through y: (mean loss, hits).

    y (N, H) bf16, choices (V', H) bf16: head rows to choose among; target, p (N, K): row numbers
    and their probabilities, the likeliest first. Hits: rows whose best choice is the likeliest.
    """
    gradient = torch.empty_like(y)
    loss, hits, n = 0.0, 0, len(y)
    with torch.no_grad():
        for rows in torch.arange(n).split(ROWS_AT_ONCE):
            logp = F.linear(y[rows], choices).float().log_softmax(-1)
            loss -= float((p[rows] * logp.gather(1, target[rows])).sum())
            hits += int((logp.argmax(-1) == target[rows, 0]).sum())
            error = logp.exp_().scatter_add_(1, target[rows], -p[rows])
            gradient[rows] = (error / n).to(y.dtype) @ choices
    y.backward(gradient)
    return loss / n, hits


def to_int8(head: Head) -> Tensors:
    """What ships: codes and scales of the matrices, norms in float32.

    Codes are such that unpacking and packing again gives the same ones: the largest of a row is
    127. The search for a better scale keeps that when it shrinks the scale, and else is not used.
    """
    out: Tensors = {}
    for name in matrix_shapes(head.shape):
        weight = getattr(head, name).detach().float().contiguous()
        parts = INT8.pack(weight)
        plain = INT8.pack(weight, search=False)
        loose = parts["codes"].abs().amax(1) < 127
        for part in ("codes", "scales"):
            parts[part][loose] = plain[part][loose]
        again = INT8.pack(INT8.unpack(parts))
        moved = (again["codes"] != parts["codes"]).any(1)
        for part in ("codes", "scales"):
            parts[part][moved] = plain[part][moved]
        out |= {f"{name}.{part}": value for part, value in parts.items()}
    return out | {name: getattr(head, name).detach().float().clone() for name in NORMS}


def from_int8(shape: LlamaShape, tensors: Tensors) -> Head:
    """The head that those tensors are, in float32."""
    head = Head(shape)
    with torch.no_grad():
        for name in matrix_shapes(shape):
            parts = {part: tensors[f"{name}.{part}"] for part in ("codes", "scales")}
            getattr(head, name).copy_(INT8.unpack(parts))
        for name in NORMS:
            getattr(head, name).copy_(tensors[name])
    return head.eval()
