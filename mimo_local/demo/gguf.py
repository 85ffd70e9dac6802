"""Reader of GGUF files as far as the demo needs it: metadata, F32, F16, Q8_0 and Q4_1 tensors.

Every count and length in the file is checked against the file's size before it is believed, so a
truncated or hostile file ends in a CheckpointError, never in a huge allocation. Knows nothing about
what the tensors mean. Called by mimo_local.demo.source.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NoReturn, TypeAlias

from mimo_local.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np
    import torch

Scalar: TypeAlias = int | float | bool | str
Value: TypeAlias = Scalar | list[Scalar]

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_KEYS = 4096
MAX_TENSORS = 65536
MAX_STRING = 1 << 24
"""16 MiB: 500 times the longest chat template seen."""
MAX_ARRAY = 1 << 24
"""16 M entries: vocabularies have at most some 300 000."""
MAX_DIMS = 4

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q",
    12: "<d",
}  # fmt: skip
# ggml type id -> (name, weights per block, bytes per block)
_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    3: ("Q4_1", 32, 20),
    8: ("Q8_0", 32, 34),
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: `shape` is row-major (GGUF's reversed), `offset` is absolute."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Gguf:
    """An opened GGUF file: `metadata`, `tensors`, and `read(name)`; keeps no file handle."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                header = _Header(path, file, size)
                self.metadata: dict[str, Value] = header.metadata
                self.tensors: dict[str, TensorInfo] = header.tensors
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot be read ({error.strerror or error})",
                hint="Check that the file exists and may be read.",
            ) from error

    def read(self, name: str) -> torch.Tensor:
        """One tensor as float32 of `tensors[name].shape`; CheckpointError if absent or damaged."""
        import numpy as np
        import torch

        info = self.tensors.get(name)
        if info is None:
            _fail(self.path, f"has no tensor {name!r}")
        with self.path.open("rb") as file:
            file.seek(info.offset)
            raw = file.read(info.nbytes)
        if len(raw) != info.nbytes:
            _fail(self.path, f"ends inside tensor {name!r}")
        values = _DECODE[info.dtype](np.frombuffer(raw, dtype=np.uint8))
        if not np.isfinite(values).all():
            _fail(self.path, f"tensor {name!r} holds values that are not finite")
        return torch.from_numpy(values.reshape(info.shape))


def _fail(path: Path, what: str) -> NoReturn:
    raise CheckpointError(
        f"{path}: {what}",
        hint="The file is damaged or of an unknown kind; delete it and fetch it again.",
    )


class _Header:
    """Parses key/values and tensor table of an open file, never reading past `size`."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file, self.size = path, file, size
        self.position = 0
        if self.take(4) != MAGIC:
            _fail(path, "does not start with the GGUF magic")
        version = self.number("<I")
        if version not in VERSIONS:
            _fail(path, f"GGUF version {version} is unknown (known: {VERSIONS})")
        n_tensors = self.count("tensors", MAX_TENSORS)
        n_keys = self.count("keys", MAX_KEYS)
        self.metadata: dict[str, Value] = {}
        for _ in range(n_keys):
            key = self.string()
            if key in self.metadata:
                _fail(path, f"key {key!r} appears twice")
            self.metadata[key] = self.value(self.number("<I"))
        entries = [self.tensor_entry() for _ in range(n_tensors)]
        self.tensors = self.place(entries)

    def take(self, n: int) -> bytes:
        if n > self.size - self.position:
            _fail(self.path, f"is truncated: {n} bytes wanted at {self.position} of {self.size}")
        data = self.file.read(n)
        if len(data) != n:
            _fail(self.path, f"ended at byte {self.position + len(data)} while being read")
        self.position += n
        return data

    def number(self, layout: str) -> int:
        value: int = struct.unpack(layout, self.take(struct.calcsize(layout)))[0]
        return value

    def count(self, what: str, limit: int) -> int:
        value = self.number("<Q")
        if value > limit:
            _fail(self.path, f"claims {value} {what} (limit {limit})")
        return value

    def string(self) -> str:
        length = self.count("bytes in a string", MAX_STRING)
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            _fail(self.path, f"has a string at byte {self.position - length} that is not UTF-8")

    def value(self, kind: int) -> Value:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        if kind not in _SCALARS:
            _fail(self.path, f"has a metadata value of unknown type {kind}")
        layout = _SCALARS[kind]
        scalar: Scalar = struct.unpack(layout, self.take(struct.calcsize(layout)))[0]
        return scalar

    def array(self) -> list[Scalar]:
        kind = self.number("<I")
        n = self.count("array entries", MAX_ARRAY)
        if kind == _STRING:
            if n * 8 > self.size - self.position:  # each string has at least its length field
                _fail(self.path, f"claims an array of {n} strings, more than the file can hold")
            return [self.string() for _ in range(n)]
        if kind not in _SCALARS:
            _fail(self.path, f"has an array of unknown or nested type {kind}")
        layout = _SCALARS[kind]
        data = self.take(n * struct.calcsize(layout))
        return [item[0] for item in struct.iter_unpack(layout, data)]

    def tensor_entry(self) -> tuple[str, str, tuple[int, ...], int, int]:
        name = self.string()
        n_dims = self.number("<I")
        if not 1 <= n_dims <= MAX_DIMS:
            _fail(self.path, f"tensor {name!r} has {n_dims} dimensions")
        shape = tuple(reversed([self.number("<Q") for _ in range(n_dims)]))
        kind = self.number("<I")
        offset = self.number("<Q")
        if kind not in _TYPES:
            _fail(self.path, f"tensor {name!r} has type {kind}, which this reader does not know")
        dtype, block, block_bytes = _TYPES[kind]
        elements = math.prod(shape)
        if elements == 0 or shape[-1] % block:
            _fail(self.path, f"tensor {name!r} of type {dtype} has the impossible shape {shape}")
        return name, dtype, shape, offset, elements // block * block_bytes

    def place(
        self, entries: list[tuple[str, str, tuple[int, ...], int, int]]
    ) -> dict[str, TensorInfo]:
        """Absolute offsets; refuses misaligned, overlapping, repeated or out-of-file tensors."""
        align = self.metadata.get("general.alignment", 32)
        if not isinstance(align, int) or not 1 <= align <= 1 << 16 or align & (align - 1):
            _fail(self.path, f"has the impossible alignment {align!r}")
        start = -(-self.position // align) * align
        tensors: dict[str, TensorInfo] = {}
        end = start
        for name, dtype, shape, offset, nbytes in sorted(entries, key=lambda entry: entry[3]):
            if name in tensors:
                _fail(self.path, f"tensor {name!r} appears twice")
            begin = start + offset
            if offset % align or begin < end or begin + nbytes > self.size:
                _fail(
                    self.path,
                    f"tensor {name!r} at {begin}..{begin + nbytes} is misaligned, overlaps another"
                    f" or leaves the file of {self.size} bytes",
                )
            tensors[name] = TensorInfo(name, dtype, shape, begin, nbytes)
            end = begin + nbytes
        return tensors


def _f32(raw: np.ndarray) -> np.ndarray:
    return raw.view("<f4").astype("f4")


def _f16(raw: np.ndarray) -> np.ndarray:
    return raw.view("<f2").astype("f4")


def _q8_0(raw: np.ndarray) -> np.ndarray:
    """Blocks of 32: float16 scale, 32 int8 codes; value = scale x code."""
    blocks = raw.reshape(-1, 34)
    scale = blocks[:, :2].copy().view("<f2").astype("f4")
    values: np.ndarray = scale * blocks[:, 2:].view("i1")
    return values.reshape(-1)


def _q4_1(raw: np.ndarray) -> np.ndarray:
    """Blocks of 32: float16 scale, float16 minimum, 16 bytes; value = scale x code + minimum.

    Byte j holds weight j in its low and weight j + 16 in its high nibble.
    """
    import numpy as np

    blocks = raw.reshape(-1, 20)
    scale = blocks[:, 0:2].copy().view("<f2").astype("f4")
    low = blocks[:, 2:4].copy().view("<f2").astype("f4")
    codes = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    values: np.ndarray = codes * scale + low
    return values.reshape(-1)


_DECODE = {"F32": _f32, "F16": _f16, "Q8_0": _q8_0, "Q4_1": _q4_1}
