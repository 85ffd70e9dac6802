"""One layer's keys and values: a ring of the last rows for sliding layers, all rows for full ones.

Knows rows and positions; `cache` makes one per layer, commits and takes back for all of them.
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypeAlias

import torch

from mimo_local.config import LayerSpec
from quant.buffers import huge_tensor

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


Rows: TypeAlias = dict[str, torch.Tensor]
"""What a layer stores of some positions, by name; dimension 0 of each tensor is the position."""


class _Store:
    k: torch.Tensor
    v: torch.Tensor
    where: tuple[int, int]
    """Addresses of row 0 of both."""

    def _hold(self, k: torch.Tensor, v: torch.Tensor) -> None:
        self.k, self.v = k, v
        self.where = (k.data_ptr(), v.data_ptr())

    @property
    def stored(self) -> Rows:
        """Everything held, by name: what `rows` gives parts of, copies and files go through it."""
        return {"k": self.k, "v": self.v}

    @property
    def nbytes(self) -> int:
        """Bytes held, used or not."""
        return sum(part.nbytes for part in self.stored.values())

    @property
    def row_bytes(self) -> int:
        """Bytes one position takes."""
        parts = self.stored.values()
        return sum(part.itemsize * math.prod(part.shape[1:]) for part in parts)

    def blank(self, first: int, n: int) -> Rows:
        """Forget all rows; those of positions first .. first + n, for the caller to write."""
        raise NotImplementedError

    def load(self, first: int, rows: Rows) -> None:
        """Take over what `rows` gave: of a snapshot, of another cache, of a file."""
        n = next(iter(rows.values())).shape[0]
        for name, part in self.blank(first, n).items():
            part.copy_(rows[name])


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
        self.wanted: tuple[int, ...] = ()
        """Positions before which rows are to be kept aside when a step passes them."""
        self.caught: dict[int, tuple[int, Rows]] = {}
        """As `rows` would have given them at a wanted position."""
        self._passing: tuple[View, int] | None = None

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
            view = View(self.k[: row + n_new], self.v[: row + n_new], self.first)
            self._passing = (view, end) if self.wanted else None
            return view
        start = max(self.first, end - self.keep)
        parts = (None, None) if self.pending is None else self.pending
        k, v = (
            _joined(ring[start - self.first :], end - start, part, n_new)
            for ring, part in zip((self.k, self.v), parts, strict=True)
        )
        fresh = end + n_new - max(start, length)
        self.pending = (k[-fresh:], v[-fresh:])
        view = View(k, v, start)
        self._passing = (view, end) if self.wanted else None
        return view

    def place(self, length: int, n_new: int) -> Place:
        """As `room` for up to SPARE_ROWS new rows, without views."""
        self.pending = None
        if length - self.first + n_new > self.capacity:
            self._shift(max(self.first, length - self.keep), length)
        return (*self.where, self.first)

    def settle(self) -> None:
        """Of the rows written into `room` for a long step, keep only those `advance` will need."""
        if self._passing is not None:
            self._catch(*self._passing)
            self._passing = None
        if self.pending is not None:
            k, v = self.pending
            tail = min(k.shape[0], self.keep)
            self.pending = (k[k.shape[0] - tail :].clone(), v[v.shape[0] - tail :].clone())

    def _catch(self, view: View, before: int) -> None:
        """Copies of the rows before wanted positions, of which the last came after `before`."""
        first = view.first_position
        end = first + view.k.shape[0]
        for n in self.wanted:
            if before < n <= end:
                a, b = max(0, n - self.keep - first), n - first
                self.caught[n] = first + a, {"k": view.k[a:b].clone(), "v": view.v[a:b].clone()}

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

    def rows(self, length: int) -> tuple[int, Rows]:
        """(first position, views) of what a snapshot has to hold."""
        start = max(self.first, length - self.keep)
        a, b = start - self.first, length - self.first
        return start, {name: part[a:b] for name, part in self.stored.items()}

    def blank(self, first: int, n: int) -> Rows:
        """Forget all rows; those of positions first .. first + n, for the caller to write."""
        self.pending, self.first = None, first
        return {name: part[:n] for name, part in self.stored.items()}


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

    def rows(self, length: int) -> tuple[int, Rows]:
        """(0, views) of every row."""
        return 0, {name: part[:length] for name, part in self.stored.items()}

    def blank(self, first: int, n: int) -> Rows:
        """Forget all rows; those of positions 0 .. n, for the caller to write."""
        if first:
            raise ValueError(f"a full layer starts at position 0, not {first}")
        if n > self.capacity:
            self._grow(0, n + n // 4)  # the next rows need not move these
        return {name: part[:n] for name, part in self.stored.items()}

    def trim(self, length: int) -> None:
        """Rows 0 .. `length` in memory of their own, with room for some more."""
        self.capacity = 0
        self._grow(length, length + length // 4)


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    # A buffer made inside inference mode could not be written outside it, as `restore` does.
    with torch.inference_mode(False):
        if device.type == "cpu":
            # 30 000 rows of the real model that come from a file or a copy: 0.09 s on huge pages,
            # 0.30 on small ones.
            return huge_tensor(shape, dtype)
        return torch.empty(shape, dtype=dtype, device=device)


def _joined(old: torch.Tensor, n: int, more: torch.Tensor | None, n_new: int) -> torch.Tensor:
    """A new buffer of n rows and n_new to come: the last are those of `more`, others of `old`."""
    with torch.inference_mode(False):
        joined = old.new_empty((n + n_new, *old.shape[1:]))
    rest = n if more is None else n - more.shape[0]
    joined[:rest] = old[:rest]
    if more is not None:
        joined[rest:n] = more
    return joined
