"""CUDA without a card: device tensors have shapes and no numbers, and every rule is checked.

`with fake_cuda() as cuda:` makes torch's device "cuda" usable in this process on any build of
torch. Tensors there hold nothing; tensors on the host stay real, so native kernels, expert stores
and files take part. `real_host=False` takes the host's numbers away too, for sizes no test holds.

Raised at once:
* `MixedDevices`: one operator was given tensors of two devices (what CUDA refuses, and what an
  operator of bitsandbytes would take for an address);
* `HostWait`: a number of the device is asked for in passing (`.item()`, `if tensor`, nonzero);
  inside `cuda.no_waits()` also by a copy that blocks;
* `Hazard`: work of one stream, or of the host, on bytes that another may not be done with: an event
  not waited for, a staging buffer refilled too early, memory freed under a running kernel.

Counted: copies and their bytes each way, waits, copies that wanted to run beside the host from
memory that is not pinned, bytes of device memory (live and peak, as the caching allocator rounds).

Bytes copied to the host arrive when the host waits for them; before that they are poison (NaN, huge
ids). What arrives is `deliver`'s to say; by default ids count up along a row and floats are 1/16.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from built import built
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

# torch's own stand-in for this guard is missing from its CPU build; with it, fake tensors may say
# that they are on a CUDA device.
GUARD = """\
#include <c10/core/impl/DeviceGuardImplInterface.h>
using Guard = c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>;
static c10::impl::DeviceGuardImplRegistrar registered(c10::DeviceType::CUDA, new Guard());
"""
BLOCK = 512  # bytes: the caching allocator's smallest piece
aten = torch.ops.aten
_COPIES = (aten.copy_.default, aten._to_copy.default)


class Broken(AssertionError):
    """A rule of the device path is broken."""


class MixedDevices(Broken):
    """Tensors of two devices in one operator."""


class HostWait(Broken):
    """The host would stand still until the device is done."""


class Hazard(Broken):
    """Two queues touch the same bytes and nothing says who is first."""


def build() -> Path:
    """The device guard as a library, compiled if this torch has none yet (3 s)."""
    return built("guard", GUARD, "c10")


_guard: ctypes.CDLL | None = None


def _register() -> None:
    """Once in a process, for good. Without a fake mode, device "cuda" is refused as before."""
    global _guard
    if _guard is None and not hasattr(torch._C, "_cuda_getDeviceCount"):
        _guard = ctypes.CDLL(str(build()))


# ---- streams and events ------------------------------------------------------------------------

Clock = dict[int, int]
"""Stream -> how much of its work is known to be over. The host is stream 0."""
HOST = 0


def _merge(clock: Clock, other: Clock) -> None:
    for stream, n in other.items():
        clock[stream] = max(clock.get(stream, 0), n)


class FakeStream:
    """In place of torch.Stream."""

    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self.cuda, self.name = cuda, name
        self.id = len(cuda.names)
        cuda.names.append(name)
        self.clock: Clock = {}
        self._before: list[FakeStream] = []

    def wait_event(self, event: FakeEvent) -> None:
        _merge(self.clock, event.clock)

    def wait_stream(self, stream: FakeStream) -> None:
        _merge(self.clock, stream.clock)

    def record_event(self, event: FakeEvent | None = None) -> FakeEvent:
        event = event or FakeEvent(self.cuda)
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.cuda.wait_for(self.clock)

    def __enter__(self) -> FakeStream:
        self._before.append(self.cuda.current)
        self.cuda.current = self
        return self

    def __exit__(self, *_: object) -> None:
        self.cuda.current = self._before.pop()


class FakeEvent:
    """In place of torch.Event."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.clock: Clock = {}

    def record(self, stream: FakeStream | None = None) -> None:
        self.clock = dict((stream or self.cuda.current).clock)

    def wait(self, stream: FakeStream | None = None) -> None:
        (stream or self.cuda.current).wait_event(self)

    def query(self) -> bool:
        return all(self.cuda.host.get(s, 0) >= n for s, n in self.clock.items())

    def synchronize(self) -> None:
        self.cuda.wait_for(self.clock)


# ---- who touched which bytes -------------------------------------------------------------------


@dataclass
class Memory:
    """One storage: where it is, and the last accesses to its byte ranges."""

    owner: int
    """The stream it was allocated on."""
    nbytes: int
    device: bool
    pinned: bool = False
    accesses: dict[tuple[int, int, int, bool], tuple[int, str]] | None = None
    """(first byte, end, stream, written) -> (time on the stream, operator)."""

    def touch(
        self, span: tuple[int, int], write: bool, stream: int, clock: Clock, names: list[str],
        what: str,
    ) -> None:  # fmt: skip
        """An access that has to come after all others it could clash with; Hazard if it may not."""
        if self.accesses is None:
            self.accesses = {}
        for key, (at, by) in list(self.accesses.items()):
            low, high, other, wrote = key
            if not (write or wrote) or high <= span[0] or low >= span[1]:
                continue
            if other != stream and clock.get(other, 0) < at:
                verb = ("reads", "writes")[write], ("reads", "writes")[wrote]
                # Memory the allocator hands out may be what kernels of its stream still use.
                fresh = ": a new stream has to wait for where its memory comes from" * (
                    "empty" in by
                )
                raise Hazard(
                    f"{what} ({names[stream]}) {verb[0]} bytes that {by} ({names[other]}) "
                    f"{verb[1]}, and does not wait for it{fresh}"
                )
            if write and span[0] <= low and high <= span[1]:
                del self.accesses[key]
        self.accesses[*span, stream, write] = (clock.get(stream, 0), what)


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    size = tensor.element_size()
    first = tensor.storage_offset() * size
    if tensor.numel() == 0:
        return first, first
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return first, first + (sum((n - 1) * step for n, step in pairs) + 1) * size


def _fill(tensor: torch.Tensor) -> None:
    """What comes from the device when nothing else is said: valid ids, small numbers."""
    if tensor.dtype.is_floating_point:
        tensor.fill_(1 / 16)
    elif tensor.dtype is torch.bool or tensor.dim() == 0:
        tensor.zero_()
    else:
        tensor.copy_(torch.arange(tensor.shape[-1]).expand(tensor.shape))


def _poison(tensor: torch.Tensor) -> None:
    if tensor.dtype.is_floating_point:
        tensor.fill_(float("nan"))
    elif tensor.dtype is not torch.bool:
        tensor.fill_(torch.iinfo(tensor.dtype).max)


# ---- the mode ------------------------------------------------------------------------------------


@dataclass
class Counters:
    """What happened since the start, or the last `reset`."""

    ops: int = 0
    """Operators the device was given: about as many kernels."""
    h2d: int = 0
    h2d_bytes: int = 0
    d2h: int = 0
    d2h_bytes: int = 0
    waits: int = 0
    """Asked for: events and streams."""
    blocking: int = 0
    """Copies that make the host wait until the device has done all before them."""
    unpinned: int = 0
    """Copies meant to run beside the host, which pageable memory cannot."""


class FakeCuda(TorchDispatchMode):
    """The checks; made by `fake_cuda`."""

    def __init__(
        self, *, real_host: bool, ordering: bool, deliver: Callable[[torch.Tensor], None]
    ) -> None:
        super().__init__()
        self.real_host, self.ordering, self.deliver = real_host, ordering, deliver
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.count = Counters()
        self.live = self.peak = 0
        self.host: Clock = {}
        self.names = ["host"]
        self.default = self.current = FakeStream(self, "default stream")
        self.problems: list[str] = []
        """Found where nothing can be raised; raised at the end."""
        self._strict = False
        self._memory = WeakIdKeyDictionary()
        self._coming: list[tuple[int, int, torch.Tensor]] = []
        """(stream, time, host tensor) of copies that the host has not waited for."""

    # -- for tests ---------------------------------------------------------------------------------

    def reset(self) -> None:
        """Count from here; the peak starts at what is held now."""
        self.count = Counters()
        self.peak = self.live

    @contextmanager
    def no_waits(self) -> Iterator[None]:
        """Inside, copies that block are HostWait too; events may be waited for."""
        before, self._strict = self._strict, True
        try:
            yield
        finally:
            self._strict = before

    def synchronize(self, device: object = None) -> None:
        """The host waits for everything."""
        for memory in list(self._memory.values()):
            for (_, _, stream, _), (at, _) in (memory.accesses or {}).items():
                self.host[stream] = max(self.host.get(stream, 0), at)
        self.wait_for(self.default.clock)

    # -- ordering ----------------------------------------------------------------------------------

    def wait_for(self, clock: Clock) -> None:
        """The host has waited until this point of the device's work."""
        self.count.waits += 1
        self._arrived(clock)

    def _arrived(self, clock: Clock) -> None:
        _merge(self.host, clock)
        left = []
        for stream, at, tensor in self._coming:
            if self.host.get(stream, 0) >= at:
                with (
                    unset_fake_temporarily(),
                    torch.utils._python_dispatch._disable_current_modes(),
                ):
                    self.deliver(tensor)
            else:
                left.append((stream, at, tensor))
        self._coming = left

    def _known(self, tensor: torch.Tensor, *, pinned: bool = False) -> Memory:
        storage = tensor.untyped_storage()
        memory: Memory | None = self._memory.get(storage)
        if memory is None:
            device = tensor.device.type == "cuda"
            owner = self.current.id if device else HOST
            nbytes = -(-storage.nbytes() // BLOCK) * BLOCK
            memory = self._memory[storage] = Memory(owner, nbytes, device, pinned)
            if device:
                self.live += nbytes
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._freed, memory, self.current.clock).atexit = False
        return memory

    def _freed(self, memory: Memory, owner: Clock) -> None:
        self.live -= memory.nbytes
        if not self.ordering:
            return
        for (_, _, stream, _), (at, by) in (memory.accesses or {}).items():
            if stream != memory.owner and max(owner.get(stream, 0), self.host.get(stream, 0)) < at:
                self.problems.append(
                    f"memory of the {self.names[memory.owner]} was given back while {by} "
                    f"({self.names[stream]}) may still use it"
                )

    def _touch(self, func: Any, args: Any, kwargs: Any, out: Any, clock: Clock, me: int) -> None:
        """Note, and check, every access of an operator that runs on stream `me`."""
        clock[me] = clock.get(me, 0) + 1
        schema = func._schema.arguments
        named = [(schema[i], value) for i, value in enumerate(args)]
        named += [(a, kwargs[a.name]) for a in schema if a.name in kwargs]
        seen = set()
        for argument, value in named:
            write = argument.alias_info is not None and argument.alias_info.is_write
            for tensor in _tensors(value):
                seen.add(tensor.untyped_storage()._cdata)
                self._known(tensor).touch(_span(tensor), write, me, clock, self.names, str(func))
        for tensor in _tensors(out):
            if tensor.untyped_storage()._cdata not in seen:
                self._known(tensor).touch(_span(tensor), True, me, clock, self.names, str(func))

    # -- every operator passes here ----------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensors = _tensors((args, kwargs))
        here = any(t.device.type == "cuda" for t in tensors)
        asked = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.device))
        there = any(device.type == "cuda" for device in asked)
        if not (here or there):
            return self._on_host(func, args, kwargs)
        if func.namespace == "prim":
            return func(*args, **kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if func in _COPIES:
            return self._copy(func, args, kwargs)
        self._lint(func, tensors, kwargs)
        out = self._run(func, args, kwargs)
        self.count.ops += not func.is_view
        if self.ordering and not func.is_view:
            _merge(self.current.clock, self.host)
            self._touch(func, args, kwargs, out, self.current.clock, self.current.id)
        for tensor in _tensors(out):
            self._known(tensor)
        return out

    def _on_host(self, func: Any, args: Any, kwargs: Any) -> Any:
        pinned = bool(kwargs.pop("pin_memory", False))
        if self.real_host:
            with unset_fake_temporarily():
                out = func(*args, **kwargs)
        else:
            out = self._run(func, args, kwargs)
        if pinned:
            self._known(out, pinned=True)
        elif self.ordering and self._coming_or_going(args, kwargs) and not func.is_view:
            self._touch(func, args, kwargs, None, self.host, HOST)
        return out

    def _coming_or_going(self, args: Any, kwargs: Any) -> bool:
        """Whether the device has to do with any of these host tensors: others are not looked at."""
        return any(t.untyped_storage() in self._memory for t in _tensors((args, kwargs)))

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = tree_map(self._as_fake, (args, kwargs))
        try:
            return func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise HostWait(f"{func} asks the device for a number and waits for it") from error

    def _as_fake(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor):
            return self.fake.from_tensor(value)
        return value

    def _lint(self, func: Any, tensors: list[torch.Tensor], kwargs: Any) -> None:
        if func.namespace == "bitsandbytes":
            for tensor in tensors:
                # Its kernels get addresses and read 16 bytes at a time.
                if (
                    not tensor.is_contiguous()
                    or tensor.storage_offset() * tensor.element_size() % 16
                ):
                    raise Broken(
                        f"{func} was given {tuple(tensor.shape)} by strides or off 16 bytes"
                    )
        kinds = {t.device.type for t in tensors if t.dim() > 0}
        if len(kinds) > 1:
            shapes = ", ".join(f"{t.device.type} {tuple(t.shape)}" for t in tensors)
            raise MixedDevices(f"{func} was given {shapes}")

    def _copy(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A copy within the device, to it, or back."""
        within = func is aten.copy_.default
        source = args[1] if within else args[0]
        to = (
            args[0].device.type
            if within
            else torch.device(kwargs.get("device", source.device)).type
        )
        if source.device.type == to or source.device.type == "meta":
            out = self._run(func, args, kwargs)
            self.count.ops += 1
            if self.ordering:
                _merge(self.current.clock, self.host)
                self._touch(func, args, kwargs, out, self.current.clock, self.current.id)
            self._known(out)
            return out
        beside = kwargs.pop("non_blocking", args[2] if within and len(args) > 2 else False)
        args = args[:2] if within else args
        back = to == "cpu"
        if back and not within:
            out = self._landing(func, args, kwargs, pinned=beside)
        elif back and self.real_host:
            out = args[0]
        else:
            out = self._run(func, args, kwargs)
        host = self._memory.get((out if back else source).untyped_storage())
        pinned = host is not None and host.pinned
        self._tally(back, source.nbytes, beside, pinned)
        stream = self.current
        _merge(stream.clock, self.host)
        if self.ordering:
            self._touch(func, args, kwargs, out, stream.clock, stream.id)
        self._known(out)
        if back and self.real_host:
            with unset_fake_temporarily(), torch.utils._python_dispatch._disable_current_modes():
                _poison(out)
            self._coming.append((stream.id, stream.clock.get(stream.id, 0), out))
        if not beside or not (pinned or back):
            self._arrived(stream.clock)
        return out

    def _landing(self, func: Any, args: Any, kwargs: Any, *, pinned: bool) -> torch.Tensor:
        """The new host tensor of `device_tensor.to("cpu")`; pinned if it does not block."""
        shape: torch.Tensor = self._run(func, args, kwargs)
        if self.real_host:
            with unset_fake_temporarily():
                shape = torch.empty_strided(shape.shape, shape.stride(), dtype=shape.dtype)
        self._known(shape, pinned=pinned)
        return shape

    def _tally(self, back: bool, nbytes: int, beside: bool, pinned: bool) -> None:
        count = self.count
        if back:
            count.d2h, count.d2h_bytes = count.d2h + 1, count.d2h_bytes + nbytes
        else:
            count.h2d, count.h2d_bytes = count.h2d + 1, count.h2d_bytes + nbytes
        if beside:
            count.unpinned += not pinned
            return
        if self._strict:
            raise HostWait(f"a copy {'from' if back else 'to'} the device blocks the host")
        count.blocking += 1


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


@contextmanager
def fake_cuda(
    *,
    real_host: bool = True,
    ordering: bool = True,
    deliver: Callable[[torch.Tensor], None] = _fill,
) -> Iterator[FakeCuda]:
    """Device "cuda" until the end, checked; see the top of this file."""
    _register()
    cuda = FakeCuda(real_host=real_host, ordering=ordering, deliver=deliver)
    with (
        mock.patch.object(
            torch, "Stream", lambda *_, **__: FakeStream(cuda, f"stream {len(cuda.names)}")
        ),
        mock.patch.object(torch, "Event", lambda *_, **__: FakeEvent(cuda)),
        mock.patch.object(torch.accelerator, "current_stream", lambda *_: cuda.current),
        mock.patch.object(torch.accelerator, "synchronize", cuda.synchronize),
        cuda.fake,
        cuda,
    ):
        yield cuda
    if cuda.problems:
        raise Hazard("; ".join(dict.fromkeys(cuda.problems)))
