"""The arithmetic of a layer as short functions: norm, rotary positions, routing, attention.

Knows tensors and their shapes, no weights and no cache. Everything is float32 and runs on whatever
device its arguments are on. Called by `model`. T rows of this step, D hidden, H query heads, G
key/value heads, S keys, E experts, K chosen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from mimo_local import kernels
from mimo_local.config import ModelConfig

# Up to this many rows every row is computed alone, so its bits do not depend on its company: a
# draft of a few tokens must be judged by the numbers one token at a time would give.
EXACT_ROWS = 8
# Below this many rows torch's own threads cost more than they give: between two products they spin
# on the cores the kernels' threads need. Demo model, 2 cores, `mimo chat`, medians of 4 pairs: a
# 38-token prompt at 43 tokens/s with them and 83 without, decoding at 11.2 and 14.5. From 128 rows
# on they pay: 258 against 176.
_WIDE_ROWS = 64
# Float32 scores held at once (H x queries x keys): 64 MiB.
_SCORES = 1 << 24
# Fewer queries than this per block and the products of sliding layers stop filling the cores.
_MIN_BLOCK = 64


@contextmanager
def threads_for(n_rows: int) -> Iterator[None]:
    """One torch thread for a step of few rows, if the kernels do its products; else all."""
    threads = torch.get_num_threads()
    if n_rows >= _WIDE_ROWS or threads == 1 or kernels.get() is None:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x (T, D) float32, weight (D,) -> weight * x / sqrt(mean(x^2) + eps)."""
    return F.rms_norm(x, weight.shape, weight, eps)


def norm_into(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    """As `rms_norm`, into `out` (T, D), whose rows may lie apart and which may be x.

    By the kernels where they serve: torch takes 70 us for one row.
    """
    native = kernels.get()
    if native is None or x.device.type != "cpu":
        out.copy_(rms_norm(x, weight, eps))
        return
    (n, d), to = x.shape, out.data_ptr()
    native.call(
        "rms_norm", x.data_ptr(), x.stride(0), n, d, weight.data_ptr(), eps, to, out.stride(0)
    )


def scores(x: torch.Tensor, router: torch.Tensor) -> torch.Tensor:
    """x (T, D), router (E, D) float32 -> sigmoid(x router^T) (T, E)."""
    if 1 < x.shape[0] <= EXACT_ROWS and x.device.type == "cpu":
        # Row by row twice over: the product of one row takes another path than that of several, and
        # torch's sigmoid rounds differently in the last few elements of a tensor.
        return torch.cat([F.linear(x[i : i + 1], router).sigmoid_() for i in range(x.shape[0])])
    return F.linear(x, router).sigmoid_()


class RopeTable:
    """cos and sin of one rotary base, made in blocks of positions, of which the last are kept.

    A table of a million positions would take 0.5 GB for each base.
    """

    BLOCK = 1024
    KEPT = 256
    """Blocks kept: 128 MB with 64 rotated dims, more than the sequences of a step are apart in."""

    def __init__(self, theta: float, rotary_dim: int, device: torch.device | None = None) -> None:
        """Angles are float32 products, as in training: float64 would differ at far positions."""
        exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=device) / rotary_dim
        self.frequencies = 1.0 / theta**exponents
        self._row = 4 * rotary_dim
        self._blocks: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._where: dict[int, tuple[int, int]] = {}
        self._span: tuple[torch.Tensor, torch.Tensor] | None = None
        self._there: dict[torch.device, torch.Tensor] = {}
        """The frequencies by device."""

    def place(self, start: int, n: int) -> tuple[int, int]:
        """Addresses of `rows` of one sequence, good until the next call."""
        index, at = divmod(start, self.BLOCK)
        if at + n > self.BLOCK:
            self._span = cos, sin = self.rows([(start, n)])
            return cos.data_ptr(), sin.data_ptr()
        where = self._where.get(index)
        if where is None:
            cos, sin = self._block(index)
            where = self._where[index] = (cos.data_ptr(), sin.data_ptr())
        return where[0] + at * self._row, where[1] + at * self._row

    def rows(
        self, spans: list[tuple[int, int]], device: torch.device | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(first position, count) per sequence -> cos, sin (T, 1, rotary_dim), T = all counts.

        sin's first half is negated: the rotation is then x * cos + swapped halves * sin. `device`:
        where they are wanted, None: where the table is.
        """
        if device is not None and device.type != self.frequencies.device.type:
            return self._computed(spans, device)
        pieces = []
        for start, n in spans:
            for index in range(start // self.BLOCK, -(-(start + n) // self.BLOCK)):
                low = index * self.BLOCK
                piece = slice(max(start - low, 0), min(start + n - low, self.BLOCK))
                pieces.append([part[piece] for part in self._block(index)])
        cos, sin = zip(*pieces, strict=True)
        return (cos[0], sin[0]) if len(pieces) == 1 else (torch.cat(cos), torch.cat(sin))

    def _block(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin (BLOCK, 1, rotary_dim) of the positions from index * BLOCK on."""
        found = self._blocks.pop(index, None)
        if found is None:
            while len(self._blocks) >= self.KEPT:
                gone = next(iter(self._blocks))
                del self._blocks[gone]
                self._where.pop(gone, None)
            low = index * self.BLOCK
            with torch.inference_mode(False):
                positions = torch.arange(low, low + self.BLOCK, dtype=torch.float32)
                angles = positions.to(self.frequencies.device)[:, None] * self.frequencies
                cos, sin = angles.cos(), angles.sin()
                found = torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None]
        self._blocks[index] = found  # the last used is the last to go
        return found

    def _computed(
        self, spans: list[tuple[int, int]], device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same on an accelerator, anew each step.

        A few small calls for all layers; the table would be 0.5 GB of its memory at a million rows.
        """
        if device not in self._there:
            with torch.inference_mode(False):
                self._there[device] = self.frequencies.to(device)
        ranges = [
            torch.arange(start, start + n, dtype=torch.float32, device=device) for start, n in spans
        ]
        positions = ranges[0] if len(ranges) == 1 else torch.cat(ranges)
        angles = positions[:, None] * self._there[device]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None]


def rotate_(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotate in place the first r dims of x (T, heads, dim); cos, sin (T, 1, r).

    Dim i pairs with i + r/2. The rest of each head is left alone.
    """
    r = cos.shape[-1]
    part = x[..., :r]
    wide = part.float()  # the part itself, or a copy: then it is rounded once, at the end
    swapped = torch.cat((wide[..., r // 2 :], wide[..., : r // 2]), -1)
    wide.mul_(cos).addcmul_(swapped, sin)
    if wide is not part:
        part.copy_(wide)


def election(score: torch.Tensor, bias: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """score (T, E), bias (E,) -> (T, E): by this the experts of a row are chosen.

    With groups, only the experts of the best groups (by their two best votes) stand: the others
    get -inf.
    """
    votes = score + bias
    if config.n_group == 1:
        return votes
    groups = votes.view(score.shape[0], config.n_group, -1)
    strength = groups.topk(2, dim=-1).values.sum(-1)
    best = strength.topk(config.topk_group, dim=-1).indices
    out = torch.ones_like(strength, dtype=torch.bool).scatter_(1, best, False)
    return groups.masked_fill(out[..., None], -torch.inf).flatten(1)


def route(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, config: ModelConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """x (T, D), router weight (E, D), bias (E,), all float32 -> ids (T, K) int64, weights (T, K).

    Scores are sigmoids. The bias decides who is chosen, never how much a chosen expert counts.
    Also where `config.router_dtype` is bfloat16 (V2.6: the weights are stored so) the product is
    float32, as in the model's own code: rounding logits to bfloat16, as serving engines do, would
    be a second rounding of numbers that differ by less among themselves.
    """
    score = scores(x, weight)
    votes = election(score, bias, config)
    ids = votes.topk(config.experts_per_token, dim=-1, sorted=False).indices
    weights = score.gather(1, ids)
    if config.norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True).add_(1e-20)
    if config.routed_scaling_factor != 1.0:
        weights = weights * config.routed_scaling_factor
    return ids, weights


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
    """Causal attention of one sequence: q (T, H, dk), k (S, G, dk), v (S, G, dv) -> (T, H * dv).

    Row t of q is position `start` + t, row s of k position `first` + s; a query sees keys at its
    own and earlier positions, at most `window` of them. `sink` (H,) joins the softmax's denominator
    and contributes no value. Query head a uses key/value head a // (H / G). k, v: any float dtype.
    """
    n_rows, n_heads, n_keys = q.shape[0], q.shape[1], k.shape[0]
    if n_rows == 1:
        low = 0 if window is None else max(0, start + 1 - window - first)
        return _attend(q, k[low:], v[low:], None, sink)
    if k.dtype != torch.float32:
        k, v = k.float(), v.float()
    if n_rows <= EXACT_ROWS:
        block = 1
    elif window is None:
        block = max(1, _SCORES // (n_heads * n_keys))
    else:
        # Blocks of about a window see twice a window of keys: less waste would be slower products.
        block = max(1, min(max(window, _MIN_BLOCK), _SCORES // (n_heads * 2 * window)))
    out = []
    for a in range(0, n_rows, block):
        b = min(a + block, n_rows)
        low = 0 if window is None else max(0, start + a + 1 - window - first)
        high = start + b - first
        hidden = None
        if b - a > 1:
            query = torch.arange(start + a, start + b, device=q.device)[:, None]
            key = torch.arange(first + low, first + high, device=q.device)
            hidden = key > query
            if window is not None:
                hidden |= key <= query - window
        out.append(_attend(q[a:b], k[low:high], v[low:high], hidden, sink))
    return torch.cat(out) if len(out) > 1 else out[0]


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    hidden: torch.Tensor | None,
    sink: torch.Tensor | None,
) -> torch.Tensor:
    """One block: q (B, H, dk), k (S, G, dk), v (S, G, dv) -> (B, H * dv); `hidden` (B, S) bool.

    The R = H / G query heads that share a key head are rows of one product: K and V are read once
    and never repeated.
    """
    n, heads, dk = q.shape
    groups, dv = k.shape[1], v.shape[2]
    shared = heads // groups
    keys, values = k.float().permute(1, 2, 0), v.float().transpose(0, 1)
    grouped = q.view(n, groups, shared, dk).permute(1, 2, 0, 3).reshape(groups, shared * n, dk)
    scores = torch.bmm(grouped * dk**-0.5, keys)
    if hidden is not None:
        scores.view(groups, shared, n, -1).masked_fill_(hidden, -torch.inf)
    if sink is None:
        mass = scores.softmax(-1)
    else:
        column = sink.view(groups, shared, 1).expand(-1, -1, n).reshape(groups, shared * n, 1)
        mass = torch.cat((scores, column), -1).softmax(-1)[..., :-1]
    out = torch.bmm(mass, values)
    return out.view(groups, shared, n, dv).permute(2, 0, 1, 3).reshape(n, heads * dv)
