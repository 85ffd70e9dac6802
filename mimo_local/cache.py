"""KVCache: one sequence's keys and values; sliding layers keep a constant few rows, full ones all.

Knows positions and rows, not what attention does with them. A step calls `append` once per layer,
or for one piece of its rows after the other, and `advance` at its end; only `advance` commits, so a
step that fails or is cancelled on the way leaves the cache as it was. Called by `layers`; `model`
commits; `generate` and `session` truncate, snapshot and copy.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import torch

from mimo_local.cache_layers import FullKV, Place, RingKV, Rows, View, kept, stored_dtype
from mimo_local.config import ModelConfig
from mimo_local.errors import UsageError

SMALL_CHANGE: Final = 1024
"""Rows nobody gives back: 24 MB for the real model."""


@dataclass(eq=False)
class Snapshot:
    """A point a cache can return to: its length and copies of its rings.

    Full layers still hold their rows until the cache goes back below `length`: then it is stale.
    """

    length: int
    rings: dict[int, tuple[int, Rows]] = field(repr=False)
    draft: tuple[int, Rows] | None = field(default=None, repr=False)
    """What the cache's `draft` gave."""
    low: int = 0
    """Fewest rows it can bring back by a cut after it: as its rings hold rows to spare."""
    saved: object = None
    """Whatever tells where it lies on disk, for whoever saved it."""
    stale: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the copies of rings, and of what drafting keeps."""
        held = [rows for _, rows in self.rings.values()]
        held += [] if self.draft is None else [self.draft[1]]
        return sum(part.nbytes for rows in held for part in rows.values())

    def reach(self, n: int) -> int:
        """Most rows, up to n, that `restore` and a cut get to; 0 if they cannot."""
        return 0 if self.stale or n < self.low else min(n, self.length)


class Follower(Protocol):
    """What a sequence carries beside its keys and values, and takes back with them: drafting's."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""

    def truncate(self, n: int) -> None:
        """Forget what depends on ids from position n on; never fails."""

    def snapshot(self) -> tuple[int, Rows]:
        """What `restore` needs: the position of the first row, copies of rows."""

    def restore(self, point: tuple[int, Rows], n: int) -> None:
        """Go back to a snapshot made at n rows."""


class KVCache:
    """Keys and values of one sequence, one ring or growing store per layer."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype = torch.float32,
        slack: int = 4,
        capacity_hint: int = 0,
        device: torch.device | str | Sequence[torch.device] | None = None,
    ) -> None:
        """`slack`: rows that can always be taken back: deepest draft + 1; `capacity_hint`: rows.

        `dtype`: float32, bfloat16, or int8: full layers in 8 bits, sliding ones in bfloat16.
        `device`: of all layers, or one for each.
        """
        self.config, self.dtype, self.slack = config, dtype, slack
        if device is None or isinstance(device, (str, torch.device)):
            where = torch.device(device) if device is not None else torch.get_default_device()
            device = [where] * config.n_layers
        self.layers: list[RingKV | FullKV] = [
            FullKV(spec, capacity_hint, stored_dtype(spec, dtype), where)
            if spec.window is None
            else RingKV(spec, slack, stored_dtype(spec, dtype), where)
            for spec, where in zip(config.layers, device, strict=True)
        ]
        self.length = 0
        """Committed rows = the position of the next token."""
        self.draft: Follower | None = None
        """What drafting keeps of this sequence; None where nobody drafts."""
        self._snapshots: weakref.WeakSet[Snapshot] = weakref.WeakSet()
        self._peak = 0
        """Rows of full layers that were written before the cache last went back."""
        self._wanted: tuple[int, ...] = ()
        self._caught: list[Snapshot] = []

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes held, by kind of layer: {"swa": constant, "full": grows with the length}.

        And, where somebody drafts, {"draft": constant}.
        """
        sizes = [(layer.kind, layer.nbytes) for layer in self.layers]
        held = {kind: sum(n for k, n in sizes if k == kind) for kind in ("swa", "full")}
        return held if self.draft is None else held | {"draft": self.draft.nbytes}

    @property
    def row_bytes(self) -> int:
        """Bytes that one more position takes, in full layers."""
        return sum(layer.row_bytes for layer in self.layers if isinstance(layer, FullKV))

    @property
    def used_bytes(self) -> int:
        """Bytes of memory that were written: rows full layers only have room for cost nothing."""
        held = self.nbytes
        return sum(held.values()) - held["full"] + self.row_bytes * max(self._peak, self.length)

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor, *, at: int = 0) -> View:
        """Add k (T, G, dk), v (T, G, dv) after the committed rows of one layer, not yet committed.

        Appending again before `advance` replaces them. A step may come in pieces that follow each
        other: `at` is how many of its rows the layer already has. Rounded to the storage dtype, and
        the view shows the rounded rows: a prompt read in pieces attends to what it would see whole.
        """
        n, store = k.shape[0], self.layers[layer]
        view = store.room(self.length, n, at)
        view.write(k, v)
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
        self._peak = max(self._peak, self.length + n)
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
        if self._wanted:
            self._gather()

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
        if self.draft is not None:
            self.draft.truncate(n)

    def clear(self, start: int = 0) -> None:
        """Forget everything; capacity stays. The next row is position `start`.

        Sliding layers alone may start later than 0: their queries then see nothing before it.
        """
        if start and not all(isinstance(layer, RingKV) for layer in self.layers):
            raise ValueError(f"full layers cannot start at position {start}")
        self._mark_stale(0)
        self.length = start
        for layer in self.layers:
            if isinstance(layer, RingKV):
                layer.first, layer.pending = start, None
        if self.draft is not None:
            self.draft.truncate(0)

    def _mark_stale(self, n: int) -> None:
        self._peak = max(self._peak, self.length)
        for snapshot in self._snapshots:
            snapshot.stale |= snapshot.length > n

    def snapshot(self) -> Snapshot:
        """A restart point at this length: copies the rings (26 MB for the real model in bf16)."""
        rings = {}
        for i, ring in enumerate(self.layers):
            if isinstance(ring, RingKV):
                first, rows = ring.rows(self.length)
                rings[i] = (first, {name: kept(part) for name, part in rows.items()})
        draft = None if self.draft is None else self.draft.snapshot()
        return self.adopt(self.length, rings, draft)

    def catch(self, points: Sequence[int]) -> None:
        """Make restart points within what is read next, at these lengths; forget earlier wishes.

        A long prompt goes through all of a layer before the next: later they could not be made.
        """
        self._wanted, self._caught = tuple(points), []
        for layer in self.layers:
            if isinstance(layer, RingKV):
                layer.wanted, layer.caught = self._wanted, {}

    def caught(self) -> list[Snapshot]:
        """The points that were asked for and have been passed, each given once."""
        found, self._caught = self._caught, []
        return [snapshot for snapshot in found if not snapshot.stale]

    def _gather(self) -> None:
        """Wanted points that the committed rows have passed; the rings kept theirs aside."""
        rings = {i: layer for i, layer in enumerate(self.layers) if isinstance(layer, RingKV)}
        for n in [n for n in self._wanted if n <= self.length]:
            aside = {i: ring.caught.pop(n) for i, ring in rings.items() if n in ring.caught}
            if len(aside) == len(rings):
                self._caught.append(self.adopt(n, aside, None))
        self._wanted = tuple(n for n in self._wanted if n > self.length)
        for ring in rings.values():
            ring.wanted = self._wanted

    def adopt(
        self,
        length: int,
        rings: dict[int, tuple[int, Rows]],
        draft: tuple[int, Rows] | None,
        saved: object = None,
    ) -> Snapshot:
        """A restart point of this cache made of another one's: the same ids led to it."""
        firsts = [
            (first, layer.need)
            for i, (first, _) in rings.items()
            if isinstance(layer := self.layers[i], RingKV)
        ]
        low = max((first + need for first, need in firsts if first), default=0)
        snapshot = Snapshot(length, rings, draft, low, saved)
        self._snapshots.add(snapshot)
        return snapshot

    def blank(self, n: int) -> dict[int, Rows]:
        """Forget everything; rows 0 .. n of the full layers, for the caller to write.

        A restart point that was adopted then makes them count.
        """
        self.clear()
        self._peak = max(self._peak, n)
        return {i: ly.blank(0, n) for i, ly in enumerate(self.layers) if isinstance(ly, FullKV)}

    def fork(
        self, into: KVCache, at: Snapshot | None, points: Sequence[Snapshot]
    ) -> list[Snapshot]:
        """Make `into`, an empty cache of the same kind, a copy of this one as it is or was `at`.

        The restart points become its own; their copies of rings are shared, as nobody writes them.
        """
        here = at or self.snapshot()
        for i, rows in into.blank(here.length).items():
            for name, part in self.layers[i].rows(here.length)[1].items():
                rows[name].copy_(part)
        into.restore(into.adopt(here.length, here.rings, here.draft))
        return [into.adopt(p.length, p.rings, p.draft, p.saved) for p in points]

    def trim(self) -> None:
        """Give back the memory of rows the cache went back from, if that is worth a copy."""
        if self._peak <= self.length + self.length // 4 + SMALL_CHANGE:
            return
        for layer in self.layers:
            if isinstance(layer, FullKV):
                layer.trim(self.length)
        self._peak = self.length

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
        if self.draft is None:
            return
        if snapshot.draft is None:
            self.draft.truncate(snapshot.length)
        else:
            self.draft.restore(snapshot.draft, snapshot.length)
