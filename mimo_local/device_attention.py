"""Attention on an accelerator: few rows by two products, many by the fused kernel or in blocks.

The same numbers as `ops.attention`, made for a device that multiplies tensors in bfloat16 and has
no patience for many small calls. Scores and their sums are float32, whatever the keys are. Knows
tensors and their shapes, no weights and no cache. Called by `layers`. T rows of this step, H query
heads, G key/value heads, R = H / G, S keys.
"""

from __future__ import annotations

from typing import Final

import torch

FEW: Final = 16
"""Up to so many rows all of them are one block: a step, or a draft being judged."""
_BLOCK: Final = 256
"""Rows of a sliding layer's block: it sees its own and a window more."""
_SCORES: Final = 1 << 26
"""Float32 scores held at once where no fused kernel serves: 256 MB."""


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    start: int,
    first: int,
    window: int | None,
    sink: torch.Tensor | None,
) -> torch.Tensor:
    """As `ops.attention`: q (T, H, dk), k (S, G, dk), v (S, G, dv) -> (T, H * dv) in q's dtype."""
    n, n_keys = q.shape[0], k.shape[0]
    k, v = k.to(q.dtype), v.to(q.dtype)
    if n <= FEW:
        low = 0 if window is None else max(0, start + 1 - window - first)
        k, v = k[low:], v[low:]
        hidden = _hidden(start, n, first + low, k.shape[0], window, q.device) if n > 1 else None
        return _block(q, k, v, hidden, sink)
    if window is None:
        if sink is not None:
            return _in_blocks(q, k, v, start, first, n_keys, sink)
        return _full(q, k, v)
    return _in_blocks(q, k, v, start, first, window, sink)


def _hidden(
    start: int, n: int, first: int, n_keys: int, window: int | None, device: torch.device
) -> torch.Tensor:
    """(n, n_keys) bool: keys that a row may not see."""
    query = torch.arange(start, start + n, device=device)[:, None]
    key = torch.arange(first, first + n_keys, device=device)
    hidden = key > query
    return hidden if window is None else hidden | (key <= query - window)


def _in_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start: int,
    first: int,
    window: int,
    sink: torch.Tensor | None,
) -> torch.Tensor:
    """Blocks of rows, each against the keys it may see."""
    n, heads = q.shape[:2]
    block = max(1, min(_BLOCK, _SCORES // (heads * min(k.shape[0], window + _BLOCK))))
    out = q.new_empty((n, heads * v.shape[2]))
    for a in range(0, n, block):
        b = min(a + block, n)
        low, high = max(0, start + a + 1 - window - first), start + b - first
        hidden = _hidden(start + a, b - a, first + low, high - low, window, q.device)
        out[a:b] = _block(q[a:b], k[low:high], v[low:high], hidden, sink)
    return out


def _grouped(q: torch.Tensor, groups: int) -> torch.Tensor:
    """q (T, H, dk) -> (G, R * T, dk): the query heads that share a key head are rows together."""
    n, heads, dk = q.shape
    shared = heads // groups
    return q.view(n, groups, shared, dk).permute(1, 2, 0, 3).reshape(groups, shared * n, dk)


def _ungrouped(out: torch.Tensor, n: int) -> torch.Tensor:
    """(G, R * T, dv) -> (T, H * dv)."""
    groups, rows, dv = out.shape
    return out.view(groups, rows // n, n, dv).permute(2, 0, 1, 3).reshape(n, -1)


def _scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """q (G, N, dk), k (S, G, dk) -> (G, N, S) float32, scaled."""
    keys, scale = k.permute(1, 2, 0), q.shape[2] ** -0.5
    if q.dtype == torch.float32:
        return torch.bmm(q, keys).mul_(scale)
    if q.device.type == "cuda":  # the one device whose bmm gives the sums as they are
        return torch.bmm(q, keys, out_dtype=torch.float32).mul_(scale)
    return torch.bmm(q.float(), keys.float()).mul_(scale)


def _block(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    hidden: torch.Tensor | None,
    sink: torch.Tensor | None,
) -> torch.Tensor:
    """q (T, H, dk) against all of k, v but `hidden` (T, S) -> (T, H * dv).

    In as few calls as can be: a step makes one of these per layer, and each costs the host 5 us.
    """
    n, groups, n_keys = q.shape[0], k.shape[1], k.shape[0]
    scores = _scores(_grouped(q, groups), k)
    if hidden is not None:
        scores.view(groups, -1, n, n_keys).masked_fill_(hidden, -torch.inf)
    if sink is not None:  # a key without a value
        column = sink.view(groups, -1, 1).expand(-1, -1, n).reshape(groups, -1, 1)
        scores = torch.cat((scores, column), -1)
    weights = scores.softmax(-1).to(v.dtype)[..., :n_keys]
    return _ungrouped(torch.bmm(weights, v.transpose(0, 1)), n)


def _part(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q (G, N, dk) -> sums of values (G, N, dv), of masses (G, N, 1), largest scores; float32."""
    scores = _scores(q, k)
    if hidden is not None:
        n = hidden.shape[0]
        scores.view(q.shape[0], -1, n, k.shape[0]).masked_fill_(hidden, -torch.inf)
    most = scores.amax(-1, keepdim=True)
    weights = scores.sub_(most).exp_()
    out = torch.bmm(weights.to(v.dtype), v.transpose(0, 1))
    return out.float(), weights.sum(-1, keepdim=True), most


def _full(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Many rows, the last keys theirs: those before are seen by every row, so nothing is masked.

    The two parts are joined by the logarithms of their masses.
    """
    n, groups, before = q.shape[0], k.shape[1], k.shape[0] - q.shape[0]
    out, mass = _own(q, k[before:], v[before:])
    if before:
        old, old_mass = _before(_grouped(q, groups), k[:before], v[:before])
        joint = torch.logaddexp(mass, old_mass)
        out = out * (mass - joint).exp_() + old * (old_mass - joint).exp_()
    return _ungrouped(out.to(q.dtype), n)


def _own(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """q (T, H, dk) against its own T keys -> (G, R * T, dv) f32, log of the mass (G, R * T, 1)."""
    n, heads, _ = q.shape
    groups = k.shape[1]
    if _has_fused(q.device):
        # The kernel knows no shared heads in torch 2.13: the step's own keys are few, repeat them.
        each = [x.transpose(0, 1).repeat_interleave(heads // groups, 0) for x in (k, v)]
        out, lse = _fused(q.transpose(0, 1), *each, causal=True)
        return out.reshape(groups, -1, v.shape[2]).float(), lse.reshape(groups, -1, 1)
    hidden = _hidden(0, n, 0, n, None, q.device)
    out, mass, most = _part(_grouped(q, groups), k, v, hidden)
    return out / mass, mass.log_().add_(most)


def _before(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """q (G, N, dk) against keys that all rows see -> (G, N, dv) f32, log of the mass (G, N, 1)."""
    if _has_fused(q.device):
        out, lse = _fused(q, k.transpose(0, 1), v.transpose(0, 1), causal=False)
        return out.float(), lse[..., None]
    # Rows are independent: as many at once as the scores have room for.
    step = max(1, _SCORES // (q.shape[0] * k.shape[0]))
    outs, masses = [], []
    for rows in torch.split(q, step, 1):
        out, mass, most = _part(rows, k, v, None)
        outs.append(out / mass)
        masses.append(mass.log_().add_(most))
    return torch.cat(outs, 1), torch.cat(masses, 1)


def _has_fused(device: torch.device) -> bool:
    return device.type == "cuda"


def _fused(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """q (B, N, dk), k (B, S, dk), v (B, S, dv) -> out (B, N, dv), log of the mass (B, N) f32.

    The memory-efficient kernel: the only one of CUDA's that takes values narrower than keys.
    """
    out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(
        q[None], k[None], v[None], None, True, 0.0, causal
    )[:2]
    return out[0], lse[0, :, : q.shape[1]]  # padded to whole tiles of 32
