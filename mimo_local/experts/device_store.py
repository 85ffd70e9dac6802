"""DeviceStore: the experts of layers on an accelerator, in VRAM as far as it goes, else the host's.

What the router chose goes to the host; experts in VRAM start at once on the device, the host's own
store computes the others beside them, and the two sums meet on the device. A step waits for the
device once a layer: for the choice. Knows rows and who computes them; where the host's experts lie
is the inner store's to know. Built by `loading`, called by the model.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Generator, Mapping
from functools import partial
from typing import Final

import torch

from mimo_local import kernels
from mimo_local.device import Mark, host_buffer
from mimo_local.experts.device_sweep import DeviceSweep
from mimo_local.experts.store import Store, Watcher
from mimo_local.experts.tiered import KEEP_ROWS
from mimo_local.experts.vram import VramTier
from mimo_local.weights import Expert

STEP_ROWS: Final = KEEP_ROWS
"""Up to so many rows are a step, as in the inner store; longer ones are prompts. In a step every
expert in VRAM is given all rows: a product that reads its weights once hardly takes longer, and no
list of rows has to go up."""

_PAIRED: Final = 8
"""Rows up to which a product for each (row, expert) pair is no more work than one for each expert:
codes that rows share come from the card's cache."""


class DeviceStore(Store):
    """What mixture layers on a device see; `host` is the store of those that are not."""

    def __init__(
        self,
        inner: Store,
        vram: VramTier | None,
        device: torch.device | str,
        layers: list[int],
        prompts: DeviceSweep | None = None,
    ) -> None:
        """`inner`: the host's store, `layers`: those with experts, all or some on `device`.

        `prompts`: multiplies those of long prompts; None: the inner store does.
        """
        self.inner, self.vram, self.device = inner, vram, torch.device(device)
        self.prompts = prompts
        self.meters = inner.meters
        self._first = min(layers)
        self._sent: _Letter | None = None
        self._back = [_Return(self.device), _Return(self.device)]
        self._turn = 0

    @property
    def host(self) -> Store:
        """The inner store."""
        return self.inner

    @property
    def nbytes(self) -> dict[str, int]:
        """VRAM's slots, and what the host holds."""
        held = {} if self.vram is None else {"vram": self.vram.nbytes}
        return held | self.inner.nbytes

    @property
    def notes(self) -> list[str]:
        """The inner store's."""
        return self.inner.notes

    @property
    def wants_guesses(self) -> bool:
        """Whether the inner store does."""
        return self.inner.wants_guesses

    def resident(self, layer: int) -> bool:
        """No: rows are not in this machine's memory."""
        return False

    def mlps(self, layer: int) -> tuple[ctypes.Array[kernels.Mlp], object]:
        """Not for rows on a device."""
        raise ValueError("rows on a device are not for the kernels")

    def held(self, layer: int, e: int) -> Expert | None:
        """As the inner store."""
        return self.inner.held(layer, e)

    def expect(self, layer: int, ids: torch.Tensor) -> None:
        """For the inner store, but for those in VRAM; ids on the host."""
        if self.vram is not None:
            ids = torch.tensor([e for e in ids.tolist() if (layer, e) not in self.vram])
        self.inner.expect(layer, ids)

    def watch(self, watcher: Watcher | None) -> None:
        """Both, as layers may be on either side; from the device the whole choice is told."""
        super().watch(watcher)
        self.inner.watch(watcher)

    def run(
        self,
        layer: int,
        x: torch.Tensor,
        ids: torch.Tensor,
        w: torch.Tensor,
        *,
        meanwhile: Callable[[], None] | None = None,
        guess: tuple[int, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """As `Store.run`, all on the device; results are the CPU's to the rounding of bfloat16.

        `guess` has its ids on the device.
        """
        if x.shape[0] > STEP_ROWS:
            return self.sweep(layer, x, ids, w)
        if layer == self._first and self.vram is not None:
            self.vram.end_of_step()
        letter = self._letter(x, ids)
        letter.send(x, ids, w, None if guess is None else guess[1])
        rows, chosen, weights, guessed = letter.read()
        numbers: list[list[int]] = chosen.tolist()
        here = self._touched(layer, numbers)
        out = self._in_vram(layer, x, ids, w, numbers, here)
        others = chosen
        if here:
            mine = torch.tensor([[e in here for e in row] for row in numbers])
            others = chosen.masked_fill(mine, -1)
        if guess is not None and guessed is not None:
            meanwhile = partial(self.expect, guess[0], guessed)
        args = (rows, others, weights)
        y = self._by_host(self.inner.run, layer, chosen, *args, meanwhile=meanwhile)
        self._promote(layer, numbers, here)
        there = self._give_back(y)
        return there if out is None else out.add_(there)

    def sweep(
        self,
        layer: int,
        x: torch.Tensor,
        ids: torch.Tensor,
        w: torch.Tensor,
        *,
        cancel: Callable[[], bool] | None = None,
    ) -> torch.Tensor:
        """As `Store.sweep`, all on the device."""
        if self.prompts is not None:
            if self._watcher is not None:
                self._watcher(layer, ids.to("cpu", torch.int32))
            return self.prompts.run(layer, x, ids, w, cancel=cancel)
        return self._on_the_host(partial(self.inner.sweep, cancel=cancel), layer, x, ids, w)

    @property
    def lends(self) -> int:
        """As many as the inner store."""
        return self.inner.lends

    def stream(
        self, layer: int, wanted: Mapping[int, int], *, held: int = 1, slots: int = 1
    ) -> Generator[tuple[int, Expert], None, None]:
        """The inner store's."""
        return self.inner.stream(layer, wanted, held=held, slots=slots)

    def close(self) -> None:
        """The threads of prompts, the inner store's, its files, and what is on its way to VRAM."""
        if self.prompts is not None:
            self.prompts.close()
        self.inner.close()
        if self.vram is not None:
            self.vram.close()

    # ---- the device's share ----------------------------------------------------------------------

    def _touched(self, layer: int, numbers: list[list[int]]) -> set[int]:
        """Those of the chosen experts that lie in VRAM; the others are nearer to coming in."""
        if self.vram is None:
            return set()
        wanted = dict.fromkeys(e for row in numbers for e in row if e >= 0)
        here = {e for e in wanted if self.vram.touch((layer, e))}
        self.meters.vram_hits += len(here)
        return here

    def _in_vram(
        self,
        layer: int,
        x: torch.Tensor,
        ids: torch.Tensor,
        w: torch.Tensor,
        numbers: list[list[int]],
        here: set[int],
    ) -> torch.Tensor | None:
        """The weighted sum (T, D) f32 of the experts in VRAM; None without any."""
        if self.vram is None or not here:
            return None
        rows = x.to(self.vram.dtype)
        joint = None
        if len(numbers) <= _PAIRED:
            joint = self.vram.together(layer, rows, numbers, w)
        if joint is not None:
            return joint
        out = torch.zeros(x.shape, device=x.device)
        for e in sorted(here):
            if len(numbers) == 1:
                at = numbers[0].index(e)
                share = w[:, at : at + 1]
            else:
                share = (w * (ids == e)).sum(-1, keepdim=True)
            out.add_(self.vram.run((layer, e), rows) * share)
        return out

    def _promote(self, layer: int, numbers: list[list[int]], here: set[int]) -> None:
        """Experts that were wanted often enough and lie in RAM now are copied to the device."""
        if self.vram is None:
            return
        wanted = dict.fromkeys(e for row in numbers for e in row if e >= 0)
        busy = [(layer, e) for e in wanted]
        for e in wanted:
            if e in here:
                continue
            expert = self.inner.held(layer, e)
            if expert is not None and self.vram.consider((layer, e), expert, busy):
                self.meters.uploads += 1

    # ---- the host's share ------------------------------------------------------------------------

    def _letter(self, x: torch.Tensor, ids: torch.Tensor) -> _Letter:
        if self._sent is None:
            self._sent = _Letter(x.shape[1], ids.shape[1], self.device)
        return self._sent

    def _by_host(
        self,
        call: Callable[..., torch.Tensor],
        layer: int,
        chosen: torch.Tensor,
        *args: torch.Tensor,
        **more: object,
    ) -> torch.Tensor:
        """The inner store's answer to rows, ids, weights; who watches is told `chosen`, the whole.

        By us: the inner store is not asked for what is in VRAM.
        """
        if self._watcher is None:
            return call(layer, *args, **more)
        self._watcher(layer, chosen)
        self.inner.watch(None)
        try:
            return call(layer, *args, **more)
        finally:
            self.inner.watch(self._watcher)

    def _give_back(self, y: torch.Tensor) -> torch.Tensor:
        """y (T, D) f32 of the host, on the device."""
        self._turn += 1
        return self._back[self._turn % len(self._back)].send(y)

    def _on_the_host(
        self,
        call: Callable[..., torch.Tensor],
        layer: int,
        x: torch.Tensor,
        ids: torch.Tensor,
        w: torch.Tensor,
    ) -> torch.Tensor:
        """Everything by the inner store: the rows go down, the result comes up."""
        rows, chosen, weights = x.float().cpu(), ids.cpu(), w.cpu()
        return self._by_host(call, layer, chosen, rows, chosen, weights).to(x.device)


class _Letter:
    """Pinned memory for what the host wants to know of a few rows; used again by every layer."""

    def __init__(self, d: int, k: int, device: torch.device) -> None:
        self._rows = host_buffer((STEP_ROWS, d), torch.float32, device)
        self._ids = host_buffer((STEP_ROWS, k), torch.int32, device)
        self._weights = host_buffer((STEP_ROWS, k), torch.float32, device)
        self._guess = host_buffer((STEP_ROWS * k,), torch.int32, device)
        self._there = Mark(device)
        self._n = self._guesses = 0

    def send(
        self, x: torch.Tensor, ids: torch.Tensor, w: torch.Tensor, guess: torch.Tensor | None
    ) -> None:
        """Queue the copies."""
        self._n = n = x.shape[0]
        self._guesses = 0 if guess is None else guess.shape[0]
        # The dtype is changed there: a copy that does both would wait.
        self._ids[:n].copy_(ids.to(torch.int32), non_blocking=True)
        self._weights[:n].copy_(w, non_blocking=True)
        self._rows[:n].copy_(x, non_blocking=True)
        if guess is not None:
            self._guess[: self._guesses].copy_(guess.to(torch.int32), non_blocking=True)
        self._there.set()

    def read(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Wait -> rows f32, ids int32, weights f32, the guess; good until the next `send`."""
        self._there.wait()
        n, guess = self._n, self._guess[: self._guesses] if self._guesses else None
        return self._rows[:n], self._ids[:n], self._weights[:n], guess


class _Return:
    """Pinned memory for results on their way to the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._rows: torch.Tensor | None = None
        self._sent = Mark(device)

    def send(self, y: torch.Tensor) -> torch.Tensor:
        """y (T, D) f32, T <= STEP_ROWS -> the same on the device, as the copy is queued."""
        self._sent.wait()
        if self._rows is None:
            self._rows = host_buffer((STEP_ROWS, y.shape[1]), torch.float32, self._device)
        part = self._rows[: y.shape[0]].copy_(y)
        there = torch.empty(part.shape, device=self._device)
        there.copy_(part, non_blocking=True)
        self._sent.set()
        return there
