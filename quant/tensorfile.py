"""One safetensors file: its header, checked before it is believed, and row-wise `pread` reads.

No mmap: a page touched through a map counts as this process's memory, and a checkpoint is 313 GB.
Knows nothing about models, formats or packs. Called by `checkpoint` (files from anywhere) and
`pack` (our own files); either passes the error class its user should see.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mimo_local.errors import ModelFilesError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""What the names in a safetensors header mean to torch."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

MAX_HEADER = 100_000_000
"""Bytes; the limit of the format's own reader. A larger claim is damage or an attack."""
SAMPLES, SAMPLE = 16, 4096
"""How many places of a file's data a fingerprint looks at, and how many bytes of each."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One stored tensor: `offset` and `nbytes` are bytes in the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def pread_into(fd: int, view: memoryview, offset: int) -> int:
    """Fill `view` from `offset`; returns the bytes read, fewer only at the end of the file."""
    done = 0
    while done < len(view):
        got = os.preadv(fd, [view[done:]], offset + done)
        if got == 0:
            break
        done += got
    return done


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    array: Any = flat.numpy()  # numpy's stubs do not call an array a Buffer
    return memoryview(array)


class Scratch:
    """Memory used again and again: fresh pages cost more than the arithmetic done in them.

    Measured: of 81 ms to widen 8.4 M FP8 codes into a new tensor, 64 ms were page faults.
    """

    def __init__(self) -> None:
        self._slots: dict[str, torch.Tensor] = {}

    def take(self, slot: str, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """An uninitialised tensor, valid until `slot` is taken again."""
        need = math.prod(shape) * dtype.itemsize
        if slot not in self._slots or self._slots[slot].numel() < need:
            self._slots.pop(slot, None)
            self._slots[slot] = torch.empty(need, dtype=torch.uint8)
        return self._slots[slot][:need].view(dtype).view(shape)


class TensorFile:
    """A validated safetensors file; `entries` by name, `data_start` and `size` in bytes."""

    def __init__(
        self,
        path: Path,
        *,
        error: type[ModelFilesError],
        hint: str,
        known: tuple[int, bytes] | None = None,
    ) -> None:
        """Read and check the header of `path`; raises `error` naming the file and the fault.

        `known`: size and first bytes (length, header) of a file that is not all here yet.
        """
        self.path = path
        self._error = error
        self._hint = hint
        self.entries: dict[str, Entry] = {}
        self.metadata: dict[str, str] = {}
        try:
            self.size = path.stat().st_size if known is None else known[0]
            with path.open("rb") if known is None else io.BytesIO(known[1]) as file:
                head = file.read(8)
                length = int.from_bytes(head, "little")
                if len(head) < 8 or length > self.size - 8 or length > MAX_HEADER:
                    raise self.fail(
                        f"claims a header of {length} bytes in a file of {self.size} bytes"
                    )
                raw = file.read(length)
        except OSError as e:
            raise self.fail(f"cannot be read ({e.strerror})") from e
        self.data_start = 8 + length
        self._parse(raw)

    def samples(self) -> list[tuple[int, int]]:
        """Byte ranges that stand for the file in a fingerprint: its header, samples of its data."""
        room = self.size - self.data_start
        starts = [self.data_start + room * i // SAMPLES for i in range(SAMPLES)]
        return [(0, self.data_start), *((s, min(s + SAMPLE, self.size)) for s in starts)]

    def fail(self, what: str) -> ModelFilesError:
        """The caller's error about this file; `what` continues the file's name."""
        return self._error(f"{self.path.name} {what}", hint=self._hint)

    def _parse(self, raw: bytes) -> None:
        try:
            header = json.loads(raw, object_pairs_hook=_no_duplicates)
        except (ValueError, RecursionError) as e:
            raise self.fail(f"has a corrupt header ({e})") from e
        if not isinstance(header, dict):
            raise self.fail("has a header that is not a JSON object")
        metadata = header.pop("__metadata__", {})
        self.metadata = metadata if isinstance(metadata, dict) else {}
        for name, value in header.items():
            self.entries[name] = self._entry(name, value)
        end = self.data_start
        for name, entry in sorted(self.entries.items(), key=lambda i: (i[1].offset, i[1].nbytes)):
            if entry.offset != end:
                fault = "overlaps another tensor" if entry.offset < end else "leaves a hole before"
                raise self.fail(f"is corrupt: {name} {fault} at byte {entry.offset}")
            end = entry.offset + entry.nbytes
        if end != self.size:
            state = "short" if end > self.size else "too long"
            raise self.fail(f"is {state}: {self.size} bytes, its header needs {end}")

    def _entry(self, name: str, value: Any) -> Entry:
        match value:
            case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(a), int(b)]}:
                pass
            case _:
                raise self.fail(f"has a corrupt header entry for {name}")
        if dtype not in DTYPES:
            raise self.fail(f"stores {name} as {dtype}, which this version cannot read")
        if not all(type(n) is int and n >= 0 for n in shape):
            raise self.fail(f"claims the impossible shape {shape} for {name}")
        # Python integers do not overflow, so a hostile shape cannot wrap round to a small size.
        need = math.prod(shape) * DTYPES[dtype].itemsize
        if a < 0 or b - a != need:
            raise self.fail(f"claims {b - a} bytes for {name}; {dtype} {shape} needs {need}")
        if self.data_start + b > self.size:
            raise self.fail(
                f"is short: {name} ends at byte {self.data_start + b}, the file at {self.size}"
            )
        return Entry(dtype, tuple(shape), self.data_start + a, need)

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor in its stored dtype; one pread, nothing cached."""
        entry = self.entries[name]
        return self.load(entry.offset, DTYPES[entry.dtype], entry.shape, name)

    def load(
        self,
        offset: int,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        what: str,
        scratch: Scratch | None = None,
    ) -> torch.Tensor:
        """A tensor filled from byte `offset`, new or in `scratch`; `what` names it in an error."""
        out = (scratch or Scratch()).take("raw", dtype, shape)
        if out.numel():
            self.read_into(bytes_of(out), offset, what)
        return out

    def read_into(self, view: memoryview, offset: int, what: str) -> None:
        """Fill `view` from byte `offset`; raises the caller's error when the bytes are missing."""
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                got = pread_into(fd, view, offset)
            finally:
                os.close(fd)
        except OSError as e:
            raise self.fail(f"cannot be read at {what} ({e.strerror})") from e
        if got != len(view):
            raise self.fail(f"ended {len(view) - got} bytes early while {what} was read")


def read_json(path: Path, *, error: type[ModelFilesError], hint: str) -> dict[str, Any]:
    """A JSON object from `path`; raises `error` naming the file when it is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise error(f"{path.name} is missing in {path.parent}", hint=hint) from e
    except OSError as e:
        raise error(f"{path.name} cannot be read ({e.strerror})", hint=hint) from e
    except (ValueError, RecursionError) as e:
        raise error(f"{path.name} is not valid JSON ({e})", hint=hint) from e
    if not isinstance(value, dict):
        raise error(f"{path.name} holds no JSON object", hint=hint)
    return value


def _no_duplicates(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    items = list(pairs)
    result = dict(items)
    if len(result) != len(items):
        raise ValueError("a name appears twice")
    return result


@dataclass(frozen=True, slots=True)
class Placed:
    """A tensor given its place in a file to be written; `offset` counts from the data's start."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Layout:
    """Places tensors one after the other; gaps become U8 pad tensors, the format forbids holes."""

    def __init__(self, align: int) -> None:
        """`align`: bytes every tensor starts at a multiple of, unless `place` says otherwise."""
        self.align = align
        self.placed: list[Placed] = []
        self.end = 0
        self._pads = 0

    def pad_to(self, align: int) -> None:
        """Fill up to the next multiple of `align` bytes with one pad tensor, if need be."""
        gap = -self.end % align
        if gap:
            self._append(f"__pad__.{self._pads}", torch.uint8, (gap,))
            self._pads += 1

    def place(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Placed:
        """Give the tensor the next aligned offset."""
        self.pad_to(self.align)
        return self._append(name, dtype, shape)

    def _append(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Placed:
        placed = Placed(name, dtype, shape, self.end, math.prod(shape) * dtype.itemsize)
        self.placed.append(placed)
        self.end += placed.nbytes
        return placed

    def header(self, metadata: dict[str, str], page: int) -> bytes:
        """The safetensors header, space-padded so that the data starts at a multiple of `page`."""
        entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
        for p in self.placed:
            entries[p.name] = {
                "dtype": DTYPE_NAMES[p.dtype],
                "shape": list(p.shape),
                "data_offsets": [p.offset, p.offset + p.nbytes],
            }
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=True).encode()
        text += b" " * (-(8 + len(text)) % page)
        return len(text).to_bytes(8, "little") + text
