"""The CPU's share of a long prompt's experts, multiplied in a thread beside the device's.

Rows come down through a pinned buffer once per layer, one expert's after another; results go up the
same way. Knows rows and experts, not whose rows they are. Called by `device_sweep`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch

from mimo_local import kernels
from mimo_local.device import Mark, host_buffer
from mimo_local.experts.slots import MATRICES
from mimo_local.experts.store import apply
from mimo_local.weights import Expert


class HostShare:
    """A layer's share: `begin`, `give` for each expert in order, `settle`, `result`; or `stop`."""

    def __init__(self, hidden: int, device: torch.device) -> None:
        """`hidden`: columns of a row."""
        self._hidden, self._device = hidden, device
        self._pool = ThreadPoolExecutor(1, "mimo-share")
        self._down = host_buffer((0, hidden), torch.float32, device)
        self._up = host_buffer((0, hidden), torch.float32, device)
        self._arrived, self._sent = Mark(device), Mark(device)
        self._under_way: deque[Future[float]] = deque()
        self._rows = self._at = 0
        self._here = False
        """Whether the thread has waited for this layer's rows."""
        self._took = 0.0
        self.most = 1
        """Experts that may be under way at once."""

    def begin(self, rows: torch.Tensor, most: int) -> None:
        """`rows` (N, D) on the device: of all experts that will be given, in that order."""
        n = rows.shape[0]
        self._sent.wait()  # what the last layer sent from here has left
        if n > self._up.shape[0] or rows.dtype != self._down.dtype:
            room = max(n, self._up.shape[0])
            with torch.inference_mode(False):  # they outlive this call
                self._down = host_buffer((room, self._hidden), rows.dtype, self._device)
                self._up = host_buffer((room, self._hidden), torch.float32, self._device)
        self._down[:n].copy_(rows, non_blocking=True)
        self._arrived.set()
        self._here = False
        self._rows, self._at, self._took, self.most = n, 0, 0.0, most

    @property
    def idle(self) -> bool:
        """Whether nothing that was given is still in use."""
        return self._unfinished() == 0

    @property
    def has_room(self) -> bool:
        """Whether another expert may be given."""
        return self._unfinished() < self.most

    @property
    def seconds(self) -> float | None:
        """What the work of this layer took, waiting left out; None: there was none."""
        return self._took if self._at else None

    def give(self, expert: Expert, n: int) -> None:
        """The next n rows are this expert's, whose bytes must stay until it is settled."""
        a, self._at = self._at, self._at + n
        self._under_way.append(self._pool.submit(self._multiply, expert, a, a + n))

    def settle(self, most: int) -> None:
        """Wait until at most `most` are under way; raises what became of the others."""
        while self._unfinished() > most:
            self._done(self._under_way.popleft())

    def stop(self) -> None:
        """Wait for what is under way, whatever becomes of it."""
        for future in self._under_way:
            future.cancel()
        while self._under_way:
            future = self._under_way.popleft()
            if not future.cancelled():
                future.exception()

    def result(self) -> torch.Tensor:
        """(N, D) f32 on the device, once all are settled: a tensor of the caller's own."""
        y = torch.empty((self._rows, self._hidden), device=self._device)
        y.copy_(self._up[: self._rows], non_blocking=True)
        self._sent.set()
        return y

    def close(self) -> None:
        """End the thread."""
        self.stop()
        self._sent.wait()
        self._pool.shutdown()

    def _unfinished(self) -> int:
        while self._under_way and self._under_way[0].done():
            self._done(self._under_way.popleft())
        return len(self._under_way)

    def _done(self, future: Future[float]) -> None:
        self._took += future.result()

    @torch.inference_mode()
    def _multiply(self, expert: Expert, a: int, b: int) -> float:
        if not self._here:
            self._arrived.wait()
            self._here = True
        start = time.perf_counter()
        with _alone():
            _multiply(expert, self._down[a:b].float(), self._up[a:b])
        return time.perf_counter() - start


def _multiply(expert: Expert, x: torch.Tensor, y: torch.Tensor) -> None:
    """y (n, D) = expert(x (n, D))."""
    native = kernels.get()
    if native is None:
        y.copy_(apply(expert, x))
        return
    mlp, (n, d) = (kernels.Mlp * 1)(), x.shape
    for name in MATRICES:
        setattr(mlp[0], name, getattr(expert, name).matrix())
    chosen = torch.zeros((n, 1), dtype=torch.int32)
    native.call("moe", mlp, 1, x.data_ptr(), d, n, chosen.data_ptr(), None, 1, y.data_ptr(), d, 0)


@contextmanager
def _alone() -> Iterator[None]:
    """The kernels have threads of their own; torch's would spin beside them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
