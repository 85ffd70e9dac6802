"""What drafting keeps of one sequence: its last hidden states, and the MTP layers' own rings.

Row i of the hidden states is the model's normed output at position i. Row i of MTP layer k's ring
comes from that and from the id at i + 1 + k. Because each MTP layer is one layer, its row depends
on nothing else, so that a ring can be made again, exactly, from the last window of hidden states:
after a prompt, a rewind, or a time without drafting. Goes back with the `KVCache` it belongs to.
"""

from __future__ import annotations

import dataclasses

import torch

from mimo_local.cache import KVCache
from mimo_local.cache_layers import SPARE_ROWS, Rows, kept
from mimo_local.config import ModelConfig
from mimo_local.device import HOST


class DraftCache:
    """A `cache.Follower`; filled by `generate` (hidden states) and `mtp` (rings)."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype,
        slack: int = 4,
        device: torch.device = HOST,
    ) -> None:
        """For a config with MTP layers; `dtype` of the rings, hidden states are float32."""
        spec = config.mtp_layer
        if spec is None or spec.window is None:
            raise ValueError("the model has no MTP layers")
        one = dataclasses.replace(
            config, layers=(dataclasses.replace(spec, index=0),), n_mtp_layers=0, mtp_layer=None
        )
        self.rings = [
            KVCache(one, dtype=dtype, slack=slack, device=device)
            for _ in range(config.n_mtp_layers)
        ]
        self.keep = spec.window + slack
        """Hidden states that are always there, once they were: a window, after going back."""
        with torch.inference_mode(False):
            self._rows = torch.empty((self.keep + SPARE_ROWS, config.hidden_size), device=device)
        self.first = 0
        """Position of the first hidden state."""
        self.length = 0
        """Position after the last one; equal to `first` where there is none."""

    @property
    def nbytes(self) -> int:
        """Bytes held, used or not."""
        return self._rows.nbytes + sum(sum(ring.nbytes.values()) for ring in self.rings)

    def hidden(self, start: int) -> torch.Tensor:
        """Hidden states (n, D) f32 from position `start` to the last, a view."""
        return self._rows[start - self.first : self.length - self.first]

    def add(self, hidden: torch.Tensor, end: int) -> None:
        """hidden (T, D): of the T positions before `end`; as many of them as may be needed later.

        Where they do not follow the last ones, those are forgotten.
        """
        rows = hidden[-self.keep :]
        n = rows.shape[0]
        start = end - n
        if start != self.length:
            self._begin(start)
        used = self.length - self.first
        if used + n > self._rows.shape[0]:
            kept = min(used, self.keep - min(n, self.keep))
            self._rows[:kept] = self._rows[used - kept : used].clone()
            self.first, used = self.length - kept, kept
        self._rows[used : used + n] = rows
        self.length = end

    def truncate(self, n: int) -> None:
        """Forget what depends on ids from position n on."""
        if n < self.first:
            self._begin(n)
        self.length = min(self.length, n)
        for k, ring in enumerate(self.rings):
            end = n - 1 - k  # row i was made with the id at i + 1 + k
            if ring.length <= end:
                continue
            if end >= 0 and ring.can_truncate(end):
                ring.truncate(end)
            else:
                ring.clear()

    def snapshot(self) -> tuple[int, Rows]:
        """(position of the first, hidden states): the rings are made again when they are needed."""
        start = max(self.first, self.length - self.keep)
        return start, {"hidden": kept(self.hidden(start))}

    def restore(self, point: tuple[int, Rows], n: int) -> None:
        """Go back to a snapshot made at n rows."""
        self.truncate(n)
        start, rows = point[0], point[1]["hidden"]
        self._begin(start)
        self.add(rows, start + rows.shape[0])

    def _begin(self, position: int) -> None:
        self.first = self.length = position
