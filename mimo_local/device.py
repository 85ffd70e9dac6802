"""Which part runs where; streams, events and pinned memory of whatever accelerator there is.

The one place that names them, always by torch's device-generic interface, so that the same lines
run on CUDA, on a stand-in device in the tests, and on the CPU (where every copy is over when it
returns). Knows no model. Called by `model` and by the experts' stores.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import psutil
import torch

HOST: Final = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Devices:
    """Where the parts of a model besides its experts run: on the host or on one accelerator.

    The embedding is looked up on the host always: a step needs a row per token of it.
    """

    layers: tuple[torch.device, ...]
    """By layer: its weights, its keys and values."""
    head: torch.device
    drafter: torch.device
    pretend: bool = False
    """Take the accelerator's way on the CPU too, instead of the native kernels: for tests."""

    @classmethod
    def all_on(cls, device: torch.device | str, layers: int, *, pretend: bool = False) -> Devices:
        """Everything on one device."""
        where = torch.device(device)
        return cls((where,) * layers, where, where, pretend)

    def of(self, device: torch.device) -> torch.device | None:
        """`device` as the layers are told: None for the host's own way."""
        return device if self.pretend or is_accelerator(device) else None

    @property
    def accelerator(self) -> torch.device | None:
        """The device that takes part, if there is one."""
        for device in (*self.layers, self.head, self.drafter):
            if self.of(device) is not None:
                return device
        return None


def is_accelerator(device: torch.device) -> bool:
    """Whether copies to it may run beside the host."""
    return device.type not in ("cpu", "meta")


def host_buffer(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Host memory that `device` can copy from and to without a detour: pinned where that exists."""
    return torch.empty(shape, dtype=dtype, pin_memory=is_accelerator(device))


def moved(x: torch.Tensor, device: torch.device | None) -> torch.Tensor:
    """x on `device` (None: the host). Upwards it does not wait; downwards it does."""
    target = HOST if device is None else device
    if x.device == target or (x.device.type == target.type and target.index is None):
        return x
    if not is_accelerator(target):
        return x.to(target)
    staged = host_buffer(tuple(x.shape), x.dtype, target)
    return staged.copy_(x).to(target, non_blocking=True)


def free_memory(device: torch.device) -> int:
    """Bytes of a device that nobody uses; 1 GB of one that does not tell."""
    if not is_accelerator(device):
        return int(psutil.virtual_memory().available)
    try:
        free, _ = torch.accelerator.get_memory_info(device)
        # Torch keeps what it has been given once.
        kept = torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(
            device
        )
    except (RuntimeError, AssertionError):
        return 1 << 30
    return int(free + kept)


class Mark:
    """A point in a stream of work that others wait for; nothing to wait for on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.Event(device) if is_accelerator(device) else None
        self._set = False

    def set(self) -> None:
        """Here: after what the current stream has been given so far."""
        if self._event is not None:
            self._event.record()
            self._set = True

    def hold(self, stream: Stream) -> None:
        """What `stream` is given from now on starts after the mark."""
        if self._event is not None and self._set and stream.raw is not None:
            stream.raw.wait_event(self._event)

    def wait(self) -> None:
        """Until the device has passed the mark."""
        if self._event is not None and self._set:
            self._event.synchronize()


class Stream:
    """A queue of a device's work beside its default one; none on the CPU."""

    def __init__(self, device: torch.device, *, current: bool = False) -> None:
        """`current`: the one that ordinary calls go to."""
        self.raw: torch.Stream | None = None
        if is_accelerator(device):
            self.raw = torch.accelerator.current_stream(device) if current else torch.Stream(device)

    @contextmanager
    def use(self) -> Iterator[None]:
        """Give what happens inside to this stream."""
        if self.raw is None:
            yield
        else:
            with self.raw:
                yield
