"""A long prompt's way through one layer's experts on a device, each expert brought there once.

Experts come from the host's store, go through pinned buffers and a copy stream into a few slots of
device memory, and meet all rows that chose them; those that lie in VRAM already are used there. The
CPU multiplies its share meanwhile (`shares` says which), and the device adds everything up. Of the
routing the host learns the number of rows per expert, and waits for nothing else.

A row adds the device's experts in ascending order, then the CPU's; who computes an expert depends
on measured rates, so the last digits of a prompt's results may differ from run to run. Runs on any
torch device, the CPU included. Called by `device_store`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias

import torch
import torch.nn.functional as F

from mimo_local import kernels
from mimo_local.device import Mark, Stream, host_buffer
from mimo_local.errors import CancelledError
from mimo_local.experts.host_share import HostShare
from mimo_local.experts.policy import Key
from mimo_local.experts.shares import Costs, Rates, Split, split
from mimo_local.experts.slots import MATRICES
from mimo_local.experts.store import Store
from mimo_local.experts.upload import Slot, Uploader
from mimo_local.weights import Expert, PackWeights, QuantLinear, Weights
from quant import on_device
from quant.formats import Parts

SLOTS: Final = 3
"""Experts on their way to or on the device: one is filled, one copied, one multiplied."""
ROWS: Final = 2048
"""Rows an expert multiplies at once: 130 MB of activations at the real model's width."""
HELD: Final = 4
"""Experts the CPU's share may be behind, if the store lends as many."""
ENOUGH: Final = 4
"""Uploads for each slot from which on the host's time is the device's."""
ASK_S: Final = 0.05
"""Seconds after which a prompt is asked whether to stop, as soon as the CPU's share is at rest."""

Cancel: TypeAlias = Callable[[], bool]
Lent: TypeAlias = Generator[tuple[int, Expert], None, None]


class Residents(Protocol):
    """Experts that lie on the device for good: `vram.VramTier`."""

    def __contains__(self, key: Key) -> bool: ...

    def run(self, key: Key, x: torch.Tensor) -> torch.Tensor:
        """x (n, D) on the device -> (n, D), in x's dtype; nothing waits."""


@dataclass(frozen=True, slots=True)
class _Pairs:
    """(row, expert) pairs of a layer in ascending order of the experts."""

    rows: torch.Tensor
    """(T * K,) int64 on the device: the row of each."""
    weights: torch.Tensor
    """(T * K, 1) f32 on the device."""
    starts: list[int]
    """Of expert e: pairs starts[e] .. starts[e + 1]."""

    def of(self, e: int) -> slice:
        """The pairs of expert e."""
        return slice(self.starts[e], self.starts[e + 1])

    def counts(self) -> dict[int, int]:
        """Expert -> rows, of those that have any."""
        pairs = zip(self.starts, self.starts[1:], strict=False)
        return {e: b - a for e, (a, b) in enumerate(pairs) if b > a}


class DeviceSweep:
    """`Store.sweep` with rows and result on a device."""

    def __init__(
        self,
        inner: Store,
        vram: Residents | None,
        device: torch.device | str,
        *,
        n_experts: int,
        hidden: int,
        width: int,
        nbytes: int,
        slots: int = SLOTS,
        costs: Costs | None = None,
    ) -> None:
        """Experts of three matrices `width` x `hidden`, `nbytes` at most as the host stores them.

        Device memory for `slots` of them is taken here, and given back by `close`. `costs`: None: a
        guess; in any case they are corrected by what layers take.
        """
        self.inner, self.vram, self.device = inner, vram, torch.device(device)
        self.n_experts, self.hidden, self.width = n_experts, hidden, width
        self.dtype = on_device.activations(self.device)
        self.uploader = Uploader(nbytes, self.device, slots)
        native = kernels.get()
        isa, cores = (native.isa, native.threads) if native else (None, 1)
        guess = Costs.guess(nbytes, 3 * hidden * width, isa=isa, cores=cores)
        self.rates = Rates(costs or guess)
        self.share = HostShare(hidden, self.device)
        self._counts = host_buffer((n_experts + 1,), torch.int64, self.device)
        self._experts = torch.arange(n_experts + 1, device=self.device)

    @classmethod
    def of(
        cls, inner: Store, vram: Residents | None, device: torch.device | str, weights: Weights
    ) -> DeviceSweep:
        """For the experts of `weights`, which `inner` holds."""
        config = weights.config
        hidden, width = config.hidden_size, config.moe_intermediate_size
        nbytes = 3 * 4 * hidden * width  # as float32, whatever a checkpoint has
        if isinstance(weights, PackWeights):
            pack = weights.pack
            nbytes = max(pack.expert_layout(layer).nbytes for layer in pack.expert_layers)
        return cls(
            inner, vram, device,
            n_experts=config.n_experts, hidden=hidden, width=width, nbytes=nbytes,
        )  # fmt: skip

    @property
    def nbytes(self) -> int:
        """Bytes of device memory: slots, and what one product of ROWS rows needs besides x, out."""
        size = 2 if self.dtype == torch.bfloat16 else 4
        row = size * (2 * self.hidden + 3 * self.width) + 8 * self.hidden
        return self.uploader.nbytes + ROWS * row + 2 * size * self.hidden * self.width

    def close(self) -> None:
        """End the threads, and give the slots back."""
        self.share.close()
        self.uploader.close()

    # ---- one layer -------------------------------------------------------------------------------

    def run(
        self,
        layer: int,
        x: torch.Tensor,
        ids: torch.Tensor,
        w: torch.Tensor,
        *,
        cancel: Cancel | None = None,
    ) -> torch.Tensor:
        """x (T, D), ids (T, K) int, w (T, K) f32 on the device -> (T, D) f32 there, as `sweep`.

        The work is queued when it returns, not done. An id of -1 leaves its entry out. `cancel` is
        asked between experts now and then, and others may step through the store while it is.
        CancelledError, PackError: nothing is under way any more then.
        """
        pairs = self._sorted(ids, w)
        counts = pairs.counts()
        there = [e for e in counts if self.vram is not None and (layer, e) in self.vram]
        found = split(counts, self.rates.costs, there, both=self.inner.lends >= 2)
        out = torch.zeros((x.shape[0], self.hidden), device=self.device)
        if counts:
            _Layer(self, layer, x, pairs, found, frozenset(there), out, cancel).run()
        return out

    def _sorted(self, ids: torch.Tensor, w: torch.Tensor) -> _Pairs:
        """The one time the host waits for the device."""
        k = ids.shape[1]
        sorted_ids, order = ids.to(self.device).flatten().sort(stable=True)
        # bincount would tell the host its largest entry first.
        starts = torch.searchsorted(sorted_ids, self._experts.to(sorted_ids.dtype))
        self._counts.copy_(starts, non_blocking=True)
        arrived = Mark(self.device)
        arrived.set()
        rows = order.div(k, rounding_mode="floor")
        weights = w.flatten().index_select(0, order).unsqueeze(1)
        arrived.wait()
        return _Pairs(rows, weights, self._counts.tolist())

    # ---- one expert ------------------------------------------------------------------------------

    def add(
        self,
        out: torch.Tensor,
        x: torch.Tensor,
        pairs: _Pairs,
        mine: slice,
        mlp: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """out (T, D) += weight * mlp(row), for the pairs of one expert."""
        for a in range(mine.start, mine.stop, ROWS):
            some = slice(a, min(a + ROWS, mine.stop))
            rows = pairs.rows[some]
            y = mlp(x.index_select(0, rows).to(self.dtype))
            # An expert is chosen once by a row at most: no two additions meet.
            out.index_add_(0, rows, y.float().mul_(pairs.weights[some]))

    def mlp(self, slot: Slot, expert: Expert) -> Callable[[torch.Tensor], torch.Tensor]:
        """x (n, D) -> down(silu(gate x) * up x) by the expert that was copied to `slot`."""
        there = {name: self._there(slot.parts[name], getattr(expert, name)) for name in MATRICES}

        def by(name: str, x: torch.Tensor) -> torch.Tensor:
            linear: QuantLinear = getattr(expert, name)
            return on_device.product(x, linear.format.name, there[name], linear.rows, linear.cols)

        return lambda x: by("down", F.silu(by("gate", x)).mul_(by("up", x)))

    def _there(self, raw: Parts, linear: QuantLinear) -> Parts:
        """A matrix's parts as the host stores them, to those products want: scales are widened."""
        shapes = on_device.parts_there(linear.format.name, linear.rows, linear.cols, self.device)
        return {name: raw[name].reshape(shape).to(dtype) for name, (dtype, shape) in shapes.items()}


class _Layer:
    """One layer's sweep: the device's experts in order, the CPU's beside them."""

    def __init__(
        self,
        sweep: DeviceSweep,
        layer: int,
        x: torch.Tensor,
        pairs: _Pairs,
        found: Split,
        there: frozenset[int],
        out: torch.Tensor,
        cancel: Cancel | None,
    ) -> None:
        self.sweep, self.layer, self.x, self.pairs = sweep, layer, x, pairs
        self.found, self.there, self.out, self.cancel = found, there, out, cancel
        self.counts = pairs.counts()
        self.compute = Stream(sweep.device, current=True)
        self.asked = -1e9
        self.waited = 0.0
        """Seconds spent on others: the disk, whoever stepped in between, the CPU's share."""
        self.left = len(found.host)

    def run(self) -> None:
        """Add everything to `out`."""
        sweep, uploads = self.sweep, [e for e in self.found.device if e not in self.there]
        lends = sweep.inner.lends
        mine = max(1, lends // 2 if self.found.host and uploads else lends)
        share, held = sweep.share, max(1, min(HELD, mine // 2))
        # Both before the first expert is lent: a store may give memory back when it is asked.
        up = self._stream(uploads, 1, mine)
        down = self._stream(self.found.host, held, mine)
        start = time.perf_counter()
        with closing(up), closing(down):
            try:
                if self.found.host:
                    self._send_rows(held)
                self._device(up, down)
                took = time.perf_counter() - start - self.waited
                self._host(down)
                share.settle(0)
            finally:
                share.stop()  # before what it reads from goes back to the store
                sweep.uploader.stop()
        if self.found.host:
            self._add_share()
        # The host is ahead of the device by the slots: a short time says nothing of a few experts.
        full = len(uploads) >= ENOUGH * sweep.uploader.slots
        known = took if full or took > self.found.device_s else None
        sweep.rates.observe(self.found, known, share.seconds if self.found.host else None)

    def _stream(self, experts: list[int], held: int, slots: int) -> Lent:
        wanted = {e: self.counts[e] for e in experts}
        if not wanted:
            return _nothing()
        return self.sweep.inner.stream(self.layer, wanted, held=held, slots=slots)

    # ---- the device's share ----------------------------------------------------------------------

    def _device(self, up: Lent, down: Lent) -> None:
        """An expert's product is queued while the next one's bytes are gathered."""
        sweep = self.sweep
        ready: tuple[int, Slot, Expert] | None = None
        for e in self.found.device:
            self._between(down)
            if e in self.there:
                self._multiply(ready)
                self._resident(e)
                ready = None
                continue
            before = time.perf_counter()
            _, expert = next(up)
            self.waited += time.perf_counter() - before
            slot = sweep.uploader.begin(expert)
            self._multiply(ready)
            self._feed(down)
            sweep.uploader.send(slot)
            ready = e, slot, expert
        self._multiply(ready)

    def _multiply(self, ready: tuple[int, Slot, Expert] | None) -> None:
        if ready is None:
            return
        e, slot, expert = ready
        slot.arrived.hold(self.compute)
        mlp = self.sweep.mlp(slot, expert)
        self.sweep.add(self.out, self.x, self.pairs, self.pairs.of(e), mlp)
        slot.used.set()

    def _resident(self, e: int) -> None:
        vram, key = self.sweep.vram, (self.layer, e)
        assert vram is not None
        self.sweep.add(self.out, self.x, self.pairs, self.pairs.of(e), lambda x: vram.run(key, x))

    # ---- the CPU's share -------------------------------------------------------------------------

    def _send_rows(self, held: int) -> None:
        """The rows of the CPU's experts on their way to it, one after another."""
        rows = torch.cat([self.pairs.rows[self.pairs.of(e)] for e in self.found.host])
        self.sweep.share.begin(self.x.index_select(0, rows).to(self.sweep.dtype), held)

    def _feed(self, down: Lent) -> None:
        """Give the CPU what it can take without waiting for it."""
        share = self.sweep.share
        while self.left and share.has_room and not self._due():
            self._give(down)

    def _give(self, down: Lent) -> None:
        before = time.perf_counter()
        e, expert = next(down)
        self.waited += time.perf_counter() - before
        self.left -= 1
        self.sweep.share.give(expert, self.counts[e])

    def _host(self, down: Lent) -> None:
        """What is left when the device has all of its own."""
        share = self.sweep.share
        while self.left:
            share.settle(0 if self._due() else share.most - 1)
            self._between(down)

    def _add_share(self) -> None:
        at, y = 0, self.sweep.share.result()
        for e in self.found.host:
            mine, n = self.pairs.of(e), self.counts[e]
            self.out.index_add_(
                0, self.pairs.rows[mine], y[at : at + n].mul_(self.pairs.weights[mine])
            )
            at += n

    # ---- between two experts ---------------------------------------------------------------------

    def _due(self) -> bool:
        return self.cancel is not None and time.perf_counter() - self.asked > ASK_S

    def _between(self, down: Lent) -> None:
        """Ask whether to stop, once nothing that is lent is in use; then feed the CPU."""
        share = self.sweep.share
        if self._due():
            # The CPU gets nothing more; after a while it is waited for.
            late = time.perf_counter() - self.asked > 4 * ASK_S
            if late or share.idle:
                before = time.perf_counter()
                share.settle(0)
                assert self.cancel is not None
                if self.cancel():
                    raise CancelledError(
                        "stopped while reading the prompt", hint="ask again to start over"
                    )
                self.asked = time.perf_counter()
                self.waited += self.asked - before
                if self.left:
                    self._give(down)
        self._feed(down)


def _nothing() -> Lent:
    yield from ()
