"""The MTP layers: from the model's last hidden state and the id it led to, guess the ids after it.

Each of them is one layer of its own kind of weights, and all read the main model's hidden states:
layer k takes h_i and the id at i + 1 + k and predicts the id at i + 2 + k. They are not chained;
only the drafted ids are (MiMo-V2-Flash report, section 2.3.2; SGLang's mimo_v2_nextn). A guess may
be wrong: `generate` has the model check it. How many are worth making is `draft_control`'s to say.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Final

import torch

from mimo_local import ops
from mimo_local.cache import KVCache
from mimo_local.cache_layers import SPARE_ROWS
from mimo_local.device import moved
from mimo_local.device_linear import placed, placed_tensor
from mimo_local.draft_cache import DraftCache
from mimo_local.layers import MLP, Layer, Step
from mimo_local.model import Model, head_of
from mimo_local.sizes import SMALL_HEAD
from mimo_local.weights import QuantLinear, Weights
from quant.buffers import huge_tensor
from quant.formats import get_format

_HEAD_FORMAT: Final = "nf4"
_HEAD_ROWS: Final = 4096  # of the head, repacked at once: 64 MB in float32 for the real model


class Drafter:
    """All MTP layers of a model. Constant after loading: a sequence's own is passed in."""

    def __init__(self, weights: Weights, model: Model, *, small_head: bool = True) -> None:
        """Read the layers `weights.config` says there are; embedding and head are the model's.

        `small_head`: draft with a 4-bit copy of the head, of whose bytes a step is two thirds. The
        model checks every draft with its own head.
        """
        self.config, self._embedding = model.config, model.embedding
        where = model.devices.drafter
        self.device = model.devices.of(where)
        """Where the layers are; None: on the host."""
        self._where = where
        self.layers = [MtpLayer(weights, k, self.device) for k in range(self.config.n_mtp_layers)]
        spec = self.layers[0].block.attention.spec
        self._ropes = {spec.attention: ops.RopeTable(spec.rope_theta, spec.rotary_dim)}
        if model.devices.of(model.devices.head) is self.device is None:
            self.head = packed_smaller(model.head) if small_head else model.head
        else:
            head = head_of(weights, model.embedding)
            self.head = placed(packed_smaller(head) if small_head else head, self.device)

    def new_cache(self, dtype: torch.dtype, slack: int) -> DraftCache:
        """What one sequence needs for drafting."""
        return DraftCache(self.config, dtype=dtype, slack=slack, device=self._where)

    def drafts(self, cache: KVCache, ids: Sequence[int]) -> Iterator[tuple[int, float]]:
        """Guesses for the ids after `ids`, each with the probability its layer gives it.

        `ids`: those the cache holds and one more, just drawn. Made one by one as they are asked
        for, as many as there are layers; none where the cache's last hidden state is not known.
        """
        state = cache.draft
        if not isinstance(state, DraftCache) or not state.first < state.length == cache.length:
            return
        known = list(ids[state.first :])
        for k in range(len(self.layers)):
            found, p = self._next(k, state, known)
            known.append(found)
            yield found, p

    @torch.inference_mode()
    def _next(self, k: int, state: DraftCache, known: list[int]) -> tuple[int, float]:
        """What layer k makes of the last hidden state; `known`: ids from `state.first` on."""
        ring, layer, end = state.rings[k], self.layers[k], state.length
        if ring.length < state.first:
            ring.clear(state.first)
        while (left := end - ring.length) > ops.EXACT_ROWS:
            n = min(SPARE_ROWS, left - ops.EXACT_ROWS)
            layer.remember(self._rows(k, state, known, n), self._step(ring, n))
            ring.advance(n)
        # Rows made with ids the cache does not hold yet are not kept: others may stand there then.
        n, exact = end - ring.length, max(0, end - 1 - k - ring.length)
        with ops.threads_for(n):
            hidden = layer.last(self._rows(k, state, known, n), self._step(ring, n))
            ring.advance(exact)
            return likeliest(self.head(hidden.to(self.layers[k].block.dtype))[0])

    def _rows(self, k: int, state: DraftCache, known: list[int], n: int) -> torch.Tensor:
        """The next n rows (n, D) of layer k's stream."""
        start = state.rings[k].length
        at = start + 1 + k - state.first
        ids = torch.tensor(known[at : at + n])
        embedded = moved(self._embedding.rows(ids), self.device)
        return self.layers[k].joined(embedded, state.hidden(start)[:n])

    def _step(self, ring: KVCache, n: int) -> Step:
        return Step([ring], [n], self._ropes)


class MtpLayer:
    """One MTP layer: a dense sliding layer over a mix of two streams, with norms of its own."""

    def __init__(self, weights: Weights, k: int, device: torch.device | None) -> None:
        config, prefix = weights.config, f"model.mtp.layers.{k}."
        assert config.mtp_layer is not None
        self.eps = config.rms_eps
        self.id_norm = placed_tensor(weights.tensor(prefix + "enorm.weight"), device)
        self.hidden_norm = placed_tensor(weights.tensor(prefix + "hnorm.weight"), device)
        self.final_norm = placed_tensor(weights.tensor(prefix + "final_layernorm.weight"), device)
        self.join = placed(weights.linear(prefix + "eh_proj.weight"), device)
        # Number 0 in its own ring's cache.
        spec = dataclasses.replace(config.mtp_layer, index=0)
        self.block = Layer(
            weights, spec, config, None,
            prefix=prefix, post_norm="pre_mlp_layernorm", device=device,
        )  # fmt: skip

    @property
    def nbytes(self) -> int:
        """Bytes of its matrices."""
        a, mlp = self.block.attention, self.block.mlp
        assert isinstance(mlp, MLP)
        parts = (self.join, a.qkv, a.out, mlp.gate, mlp.up, mlp.down)
        return sum(part.nbytes for part in parts)

    def joined(self, embedded: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Embeddings and hidden states (n, D) -> (n, D): both normed, side by side, projected."""
        n, d = embedded.shape
        both = torch.empty((n, 2 * d), device=embedded.device)
        ops.norm_into(embedded, self.id_norm, self.eps, both[:, :d])
        ops.norm_into(hidden, self.hidden_norm, self.eps, both[:, d:])
        return self.join(both.to(self.block.dtype)).float()

    def remember(self, x: torch.Tensor, step: Step) -> None:
        """x (n, D): keys and values into the ring, nothing more."""
        self.block.remember(x, step)

    def last(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        """x (n, D), n <= EXACT_ROWS, overwritten -> (1, D) normed: of the last row.

        All rows go through attention, whose weights are read once; only the last one goes on.
        """
        self.block.attend(x, step)
        row = x[-1:]
        self.block.mix(row, step)
        ops.norm_into(row, self.final_norm, self.eps, row)
        return row


def likeliest(logits: torch.Tensor) -> tuple[int, float]:
    """Logits (V,) -> the id with the largest, and its probability."""
    if logits.device.type != "cpu":  # one wait for both; ids below 2^24 are exact in float32
        logits = logits.float()
        top, at = logits.max(0)
        both = moved(torch.stack((at.float(), logits.sub(top).exp_().sum())), None).tolist()
        return int(both[0]), 1.0 / both[1]
    top, found = logits.max(0)
    return int(found), float(1.0 / logits.sub(top).exp_().sum())


def packed_smaller(head: QuantLinear) -> QuantLinear:
    """A 4-bit copy of a large head; the head itself where that would not be faster."""
    fmt = get_format(_HEAD_FORMAT)
    small = head.rows * head.cols < SMALL_HEAD
    if small or head.format.name in ("nf4", "mxfp4") or not fmt.supports(head.rows, head.cols):
        return head
    parts = {
        name: huge_tensor(shape, dtype)
        for name, (dtype, shape) in fmt.parts(head.rows, head.cols).items()
    }
    for start in range(0, head.rows, _HEAD_ROWS):
        rows = slice(start, start + _HEAD_ROWS)
        some = head.format.unpack({name: part[rows] for name, part in head.parts.items()})
        fmt.pack(some, search=False, out={name: part[rows] for name, part in parts.items()})
    return QuantLinear(fmt, parts, head.rows, head.cols)
