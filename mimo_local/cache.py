"""KVCache: one sequence's keys and values; sliding layers keep a constant few rows, full ones all.

Knows positions and rows, not what attention does with them. A step calls `append` once per layer,
or for one piece of its rows after the other, and `advance` at its end; only `advance` commits, so a
step that fails or is cancelled on the way leaves the cache as it was. Called by `layers`; `model`
commits; `generate` and `engine` truncate, snapshot and save.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch

from mimo_local import cache_file
from mimo_local.config import LayerSpec, ModelConfig
from mimo_local.errors import UsageError

# A ring is kept unrolled: rows lie in order, and when the end is reached the rows still needed move
# to the front. 32 spare rows: one move of W - 1 + slack rows per 32 tokens, and every view a slice.
SPARE_ROWS = 32


class View(NamedTuple):
    """Keys and values a step may attend to: row i is position `first_position` + i.

    k (S, G, dk), v (S, G, dv) in the storage dtype; valid until the cache is touched again.
    """

    k: torch.Tensor
    v: torch.Tensor
    first_position: int


Place: TypeAlias = tuple[int, int, int]
"""Addresses of keys and of values, position of their row 0."""


class _Store:
    k: torch.Tensor
    v: torch.Tensor
    where: tuple[int, int]
    """Addresses of row 0 of both."""

    def _hold(self, k: torch.Tensor, v: torch.Tensor) -> None:
        self.k, self.v = k, v
        self.where = (k.data_ptr(), v.data_ptr())

    @property
    def nbytes(self) -> int:
        """Bytes held, used or not."""
        return self.k.nbytes + self.v.nbytes


class RingKV(_Store):
    """One sliding layer: the last W - 1 + slack rows and a little room, never more."""

    kind = "swa"

    def __init__(self, spec: LayerSpec, slack: int, dtype: torch.dtype, device: torch.device):
        if spec.window is None:
            raise ValueError(f"layer {spec.index} has no window")
        self.need = spec.window - 1
        """Rows before the first new one that the next query may see."""
        self.keep = self.need + slack
        shape = (self.keep + SPARE_ROWS, spec.kv_heads)
        self.capacity = shape[0]
        self._hold(
            _empty((*shape, spec.head_dim), dtype, device),
            _empty((*shape, spec.v_head_dim), dtype, device),
        )
        self.first = 0
        """Position of row 0; every row from there to the cache's length is valid."""
        self.pending: tuple[torch.Tensor, torch.Tensor] | None = None
        """The last uncommitted rows of a step too long for the spare room."""

    def room(self, length: int, n_new: int, at: int = 0) -> View:
        """Rows up to length + at + n_new, the last n_new of them still to be written.

        The `at` rows from `length` on came before in the same step; nothing is committed.
        """
        if at == 0:
            self.pending = None
            if length - self.first + n_new > self.k.shape[0]:
                self._shift(max(self.first, length - self.keep), length)
        end = length + at
        row = end - self.first
        if self.pending is None and row + n_new <= self.k.shape[0]:
            # Beyond `length` nothing is valid yet: a failed step leaves only unread bytes behind.
            return View(self.k[: row + n_new], self.v[: row + n_new], self.first)
        start = max(self.first, end - self.keep)
        parts = (None, None) if self.pending is None else self.pending
        k, v = (
            _joined(ring[start - self.first :], end - start, part, n_new)
            for ring, part in zip((self.k, self.v), parts, strict=True)
        )
        fresh = end + n_new - max(start, length)
        self.pending = (k[-fresh:], v[-fresh:])
        return View(k, v, start)

    def place(self, length: int, n_new: int) -> Place:
        """As `room` for up to SPARE_ROWS new rows, without views."""
        self.pending = None
        if length - self.first + n_new > self.capacity:
            self._shift(max(self.first, length - self.keep), length)
        return (*self.where, self.first)

    def settle(self) -> None:
        """Of the rows written into `room` for a long step, keep only those `advance` will need."""
        if self.pending is not None:
            k, v = self.pending
            tail = min(k.shape[0], self.keep)
            self.pending = (k[k.shape[0] - tail :].clone(), v[v.shape[0] - tail :].clone())

    def advance(self, length: int, n_new: int) -> None:
        """Commit the rows of the last append; `length` is the one before them."""
        if self.pending is None:
            return
        k, v = self.pending
        self.pending = None
        # Of the old rows only those within `keep` of the new end are worth moving.
        end = length + n_new
        old = max(0, min(self.keep - k.shape[0], length - self.first))
        self._shift(length - old, length)
        self.k[old : old + k.shape[0]] = k
        self.v[old : old + v.shape[0]] = v
        self.first = end - k.shape[0] - old

    def _shift(self, new_first: int, length: int) -> None:
        """Move rows new_first .. length to the front; changes no content anybody may read."""
        a, b = new_first - self.first, length - self.first
        if a:
            self.k[: b - a] = self.k[a:b].clone()
            self.v[: b - a] = self.v[a:b].clone()
            self.first = new_first

    def reaches(self, n: int) -> bool:
        """Whether the rows a query at position n may see are all still here."""
        return self.first <= max(0, n - self.need)

    def rows(self, length: int) -> tuple[int, torch.Tensor, torch.Tensor]:
        """(first position, keys, values) of what a snapshot has to hold, as views."""
        start = max(self.first, length - self.keep)
        a, b = start - self.first, length - self.first
        return start, self.k[a:b], self.v[a:b]

    def load(self, first: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Take over the rows of a snapshot."""
        self.pending = None
        self.k[: k.shape[0]] = k
        self.v[: v.shape[0]] = v
        self.first = first


class FullKV(_Store):
    """One full layer: every row since position 0, capacity growing by half when it runs out."""

    kind = "full"

    def __init__(self, spec: LayerSpec, capacity: int, dtype: torch.dtype, device: torch.device):
        self.capacity = capacity
        self._hold(
            _empty((capacity, spec.kv_heads, spec.head_dim), dtype, device),
            _empty((capacity, spec.kv_heads, spec.v_head_dim), dtype, device),
        )

    def place(self, length: int, n_new: int) -> Place:
        """As `room`, without views."""
        if length + n_new > self.capacity:
            self._grow(length, length + n_new)
        return (*self.where, 0)

    def room(self, length: int, n_new: int, at: int = 0) -> View:
        """All rows, `at` uncommitted ones, and n_new more, which are still to be written."""
        end = length + at + n_new
        if end > self.k.shape[0]:
            self._grow(length + at, end)
        return View(self.k[:end], self.v[:end], 0)

    def settle(self) -> None:
        """Nothing to do."""

    def advance(self, length: int, n_new: int) -> None:
        """Nothing to do: rows below the cache's length count."""

    def _grow(self, length: int, end: int) -> None:
        capacity = max(end, self.capacity * 3 // 2, 64)
        k, v = (
            _empty((capacity, *old.shape[1:]), old.dtype, old.device) for old in (self.k, self.v)
        )
        k[:length], v[:length] = self.k[:length], self.v[:length]
        self.capacity = capacity
        self._hold(k, v)

    def reaches(self, n: int) -> bool:
        """Always: nothing is ever dropped."""
        return True

    def rows(self, length: int) -> tuple[int, torch.Tensor, torch.Tensor]:
        """(0, keys, values), as views."""
        return 0, self.k[:length], self.v[:length]

    def load(self, first: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Take over rows 0 .. k.shape[0]."""
        view = self.room(0, k.shape[0])
        view.k.copy_(k)
        view.v.copy_(v)


@dataclass(eq=False)
class Snapshot:
    """A point a cache can return to: its length and copies of its rings.

    Full layers still hold their rows until the cache goes back below `length`: then it is stale.
    """

    length: int
    rings: dict[int, tuple[int, torch.Tensor, torch.Tensor]] = field(repr=False)
    stale: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the copies."""
        return sum(k.nbytes + v.nbytes for _, k, v in self.rings.values())


class KVCache:
    """Keys and values of one sequence, one ring or growing store per layer."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype = torch.float32,
        slack: int = 4,
        capacity_hint: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        """`slack`: rows that can always be taken back: deepest draft + 1; `capacity_hint`: rows."""
        self.config, self.dtype, self.slack = config, dtype, slack
        where = torch.device(device) if device is not None else torch.get_default_device()
        self.layers: list[RingKV | FullKV] = [
            FullKV(spec, capacity_hint, dtype, where)
            if spec.window is None
            else RingKV(spec, slack, dtype, where)
            for spec in config.layers
        ]
        self.length = 0
        """Committed rows = the position of the next token."""
        self._snapshots: weakref.WeakSet[Snapshot] = weakref.WeakSet()

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes held, by kind of layer: {"swa": constant, "full": grows with the length}."""
        sizes = [(layer.kind, layer.nbytes) for layer in self.layers]
        return {kind: sum(n for k, n in sizes if k == kind) for kind in ("swa", "full")}

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor, *, at: int = 0) -> View:
        """Add k (T, G, dk), v (T, G, dv) after the committed rows of one layer, not yet committed.

        Appending again before `advance` replaces them. A step may come in pieces that follow each
        other: `at` is how many of its rows the layer already has. Rounded to the storage dtype, and
        the view shows the rounded rows: a prompt read in pieces attends to what it would see whole.
        """
        n, store = k.shape[0], self.layers[layer]
        view = store.room(self.length, n, at)
        view.k[view.k.shape[0] - n :] = k
        view.v[view.v.shape[0] - n :] = v
        store.settle()
        return view

    def room(self, layer: int, n: int, *, at: int = 0) -> View:
        """As `append`, with the last n rows of the view still to be written by the caller.

        Once they are, `settle(layer)`: only the next piece or `advance` is left to do.
        """
        return self.layers[layer].room(self.length, n, at)

    def places(self, n: int) -> list[Place]:
        """`room` of every layer for a step of n <= SPARE_ROWS rows; nothing is left to settle.

        Numbers, because two views take as long as half a layer of a small model.
        """
        return [layer.place(self.length, n) for layer in self.layers]

    def reserve(self, n: int) -> None:
        """Have room for n more rows in full layers: they grow once, not piece by piece."""
        for layer in self.layers:
            if isinstance(layer, FullKV):
                layer.room(self.length, n)

    def settle(self, layer: int) -> None:
        """The rows asked for by `room` are written: let go of what `advance` will not need."""
        self.layers[layer].settle()

    def advance(self, n: int) -> None:
        """Commit the n rows every layer has been given."""
        for layer in self.layers:
            layer.advance(self.length, n)
        self.length += n

    def can_truncate(self, n: int) -> bool:
        """Whether `truncate(n)` would work: within `slack` of the highest length, always."""
        return 0 <= n <= self.length and all(layer.reaches(n) for layer in self.layers)

    def truncate(self, n: int) -> None:
        """Forget all rows from position n on. Raises UsageError if a ring has lost what n needs."""
        if not 0 <= n <= self.length:
            raise UsageError(f"cannot cut {self.length} rows to {n}", hint="cut to 0 or more rows")
        if not self.can_truncate(n):
            raise UsageError(
                f"cannot go back from {self.length} to {n} rows: the sliding layers keep "
                f"{self.slack} more than their window",
                hint="restore a snapshot taken at or before that point, or read the text again",
            )
        self._mark_stale(n)
        self.length = n

    def clear(self) -> None:
        """Forget everything; capacity stays."""
        self._mark_stale(0)
        self.length = 0
        for layer in self.layers:
            if isinstance(layer, RingKV):
                layer.first, layer.pending = 0, None

    def _mark_stale(self, n: int) -> None:
        for snapshot in self._snapshots:
            snapshot.stale |= snapshot.length > n

    def snapshot(self) -> Snapshot:
        """A restart point at this length: copies the rings (26 MB for the real model in bf16)."""
        rings = {}
        for i, ring in enumerate(self.layers):
            if isinstance(ring, RingKV):
                first, k, v = ring.rows(self.length)
                rings[i] = (first, k.clone(), v.clone())
        snapshot = Snapshot(self.length, rings)
        self._snapshots.add(snapshot)
        return snapshot

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot of this cache; it can be restored again. UsageError if stale."""
        if snapshot not in self._snapshots or snapshot.stale:
            raise UsageError(
                f"the snapshot at {snapshot.length} rows is not one of this cache as it is now",
                hint="the cache went back below it since; use an earlier snapshot",
            )
        for i, rows in snapshot.rings.items():
            self.layers[i].load(*rows)
        self._mark_stale(snapshot.length)
        self.length = snapshot.length

    def save(self, path: Path | str) -> None:
        """Write the committed rows to a safetensors file, whole or not at all. DiskSpaceError."""
        tensors: dict[str, torch.Tensor] = {}
        firsts: list[int] = []
        for i, layer in enumerate(self.layers):
            first, k, v = layer.rows(self.length)
            firsts.append(first)
            tensors[f"layers.{i}.k"], tensors[f"layers.{i}.v"] = k.contiguous(), v.contiguous()
        facts = {"first": firsts, "length": self.length, "slack": self.slack}
        cache_file.write(Path(path), self.config, facts, tensors)

    @classmethod
    def load(
        cls, path: Path | str, config: ModelConfig, *, device: torch.device | str | None = None
    ) -> KVCache:
        """Read a saved cache of the same model configuration. Raises PackError if it is not one."""
        facts, tensors = cache_file.read(Path(path), config)
        dtype = tensors["layers.0.k"].dtype
        cache = cls(config, dtype=dtype, slack=facts["slack"], device=device)
        for i, layer in enumerate(cache.layers):
            layer.load(facts["first"][i], tensors[f"layers.{i}.k"], tensors[f"layers.{i}.v"])
        cache.length = facts["length"]
        return cache


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    # A buffer made inside inference mode could not be written outside it, as `restore` does.
    with torch.inference_mode(False):
        return torch.empty(shape, dtype=dtype, device=device)


def _joined(old: torch.Tensor, n: int, more: torch.Tensor | None, n_new: int) -> torch.Tensor:
    """A new buffer of n rows and n_new to come: the last are those of `more`, others of `old`."""
    joined = _empty((n + n_new, *old.shape[1:]), old.dtype, old.device)
    rest = n if more is None else n - more.shape[0]
    joined[:rest] = old[:rest]
    if more is not None:
        joined[rest:n] = more
    return joined
