"""One layer's keys and values: a ring of the last rows for sliding layers, all rows for full ones.

Knows rows and positions, and how a number is stored: as a float, or in full layers as an 8-bit code
with one scale per row and head. `cache` makes one per layer, commits and takes back for all.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import NamedTuple, TypeAlias

import torch

from mimo_local.config import LayerSpec
from quant.buffers import huge_tensor

# A ring is kept unrolled: rows lie in order, and when the end is reached the rows still needed move
# to the front. 32 spare rows: one move of W - 1 + slack rows per 32 tokens, and every view a slice.
SPARE_ROWS = 32


# Largest magnitudes below it count as zero, as in the kernels: their reciprocals stay finite.
_LEAST = 1e-30


def stored_dtype(spec: LayerSpec, dtype: torch.dtype) -> torch.dtype:
    """How a layer keeps its rows in a cache of `dtype`: rings do not grow, int8 is not for them."""
    return torch.bfloat16 if dtype == torch.int8 and spec.window is not None else dtype


def coded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x (T, G, d) float -> codes (T, G, d) int8, scales (T, G) f32; x is about codes * scales.

    What the kernels do, bit for bit. A row with NaN or infinity gets NaN as its scale.
    """
    x = x.float()
    most = x.abs().amax(-1)
    good, any_ = most.isfinite(), most >= _LEAST
    inverse = torch.where(good & any_, 127 / most, 0.0)
    scales = torch.where(good, torch.where(any_, most / 127, 0.0), torch.nan)
    codes = (x * inverse[..., None]).nan_to_num_(nan=0.0).round_().clamp_(-127, 127)
    return codes.to(torch.int8), scales


class View(NamedTuple):
    """Keys and values a step may attend to: row i is position `first_position` + i.

    k (S, G, dk), v (S, G, dv) as they are stored, int8 with scales (S, G); valid until the cache is
    touched again.
    """

    k: torch.Tensor
    v: torch.Tensor
    first_position: int
    k_scales: torch.Tensor | None = None
    v_scales: torch.Tensor | None = None

    def write(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """The last rows, as many as there are in k (T, G, dk) and v (T, G, dv), any float dtype."""
        start = self.k.shape[0] - k.shape[0]
        for x, to, scales in ((k, self.k, self.k_scales), (v, self.v, self.v_scales)):
            if scales is None:
                to[start:] = x
            else:
                to[start:], scales[start:] = coded(x)

    def numbers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as floats; those of int8 are computed anew each time."""
        if self.k_scales is None or self.v_scales is None:
            return self.k, self.v
        return self.k * self.k_scales[..., None], self.v * self.v_scales[..., None]

    @property
    def where(self) -> tuple[int, int, int, int]:
        """Addresses of row 0 of keys, values and their scales; 0 where there are none."""
        return _addresses(self.k, self.v, self.k_scales, self.v_scales)


def _addresses(*parts: torch.Tensor | None) -> tuple[int, int, int, int]:
    # Addresses are for the kernels: on a device there are none for them.
    k, v, k_scales, v_scales = (
        0 if part is None or part.device.type != "cpu" else part.data_ptr() for part in parts
    )
    return k, v, k_scales, v_scales


Place: TypeAlias = tuple[int, int, int, int, int]
"""`View.where`, position of row 0."""


Rows: TypeAlias = dict[str, torch.Tensor]
"""What a layer stores of some positions, by name; dimension 0 of each tensor is the position."""


class _Store(ABC):
    k: torch.Tensor
    v: torch.Tensor
    stored: Rows
    """Everything held, by name: what `rows` gives parts of, copies and files go through it."""
    where: tuple[int, int, int, int]
    """As `View.where`."""

    def _hold(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        k_scales: torch.Tensor | None = None,
        v_scales: torch.Tensor | None = None,
    ) -> None:
        self.k, self.v, self.stored = k, v, {"k": k, "v": v}
        if k_scales is not None and v_scales is not None:
            self.stored |= {"k_scales": k_scales, "v_scales": v_scales}
        self.where = _addresses(k, v, k_scales, v_scales)

    @property
    def nbytes(self) -> int:
        """Bytes held, used or not."""
        return sum(part.nbytes for part in self.stored.values())

    @property
    def row_bytes(self) -> int:
        """Bytes one position takes."""
        parts = self.stored.values()
        return sum(part.itemsize * math.prod(part.shape[1:]) for part in parts)

    @abstractmethod
    def blank(self, first: int, n: int) -> Rows:
        """Forget all rows; those of positions first .. first + n, for the caller to write."""

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
                self.caught[n] = first + a, {"k": kept(view.k[a:b]), "v": kept(view.v[a:b])}

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
        shape = (capacity, spec.kv_heads)
        self._hold(
            _empty((*shape, spec.head_dim), dtype, device),
            _empty((*shape, spec.v_head_dim), dtype, device),
            *(_empty(shape, torch.float32, device) for _ in range(2 * (dtype == torch.int8))),
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
        return View(first_position=0, **{name: part[:end] for name, part in self.stored.items()})

    def settle(self) -> None:
        """Nothing to do."""

    def advance(self, length: int, n_new: int) -> None:
        """Nothing to do: rows below the cache's length count."""

    def _grow(self, length: int, end: int) -> None:
        # Memory nobody has written costs nothing on the host; on a device it does.
        more = self.capacity // (2 if self.k.device.type == "cpu" else 8)
        capacity = max(end, self.capacity + more, 64)
        larger = {}
        for name, old in self.stored.items():
            larger[name] = _empty((capacity, *old.shape[1:]), old.dtype, old.device)
            larger[name][:length] = old[:length]
        self.capacity = capacity
        self._hold(**larger)

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


def kept(rows: torch.Tensor) -> torch.Tensor:
    """A copy to return to, in the host's memory: that of a device is too dear for it."""
    return rows.clone() if rows.device.type == "cpu" else rows.cpu()


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
