"""Rows of a cache to the bytes of a file and back: chunks, checksums, the order of layers.

Knows tensors and open files, neither names nor manifests. Called by `session_files`.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Final

import torch

from mimo_local import kernels
from mimo_local.cache import KVCache, Snapshot
from mimo_local.cache_layers import FullKV, Rows
from mimo_local.errors import PackError
from mimo_local.session_manifest import VERSION, Piece
from mimo_local.session_store import write_all
from quant.tensorfile import bytes_of

CHUNK: Final = 16 << 20
"""Bytes written and made durable at a time: 10-20 ms on an SSD, which is how long a stop takes."""
READ: Final = 1 << 20
"""Bytes read at a time, then summed up while they are in the processor's cache."""
HINT: Final = "nothing to do: it is removed, and the text is read again"


class Stopped(Exception):
    """A request came while a session was being saved."""


def fingerprint(cache: KVCache, weights: str) -> str:
    """Who can use saved rows: the same weights, config, window and way to store rows."""
    layout = [
        [layer.kind, *((n, str(p.dtype), list(p.shape[1:])) for n, p in layer.stored.items())]
        for layer in cache.layers
    ]
    kept = None
    if cache.draft is not None:
        kept = [(n, str(p.dtype), list(p.shape[1:])) for n, p in cache.draft.snapshot()[1].items()]
    facts = [VERSION, weights, asdict(cache.config), cache.slack, layout, kept]
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()


def write_parts(
    fd: int, parts: Sequence[torch.Tensor], busy: Callable[[], bool]
) -> tuple[int, ...]:
    """Write tensors one after the other, durable every CHUNK -> crc32 of each. OSError, Stopped."""
    crcs, waiting = [], 0
    for part in parts:
        part = part.contiguous().cpu()
        crcs.append(crc32_of(part))
        data = bytes_of(part)
        for at in range(0, len(data), CHUNK):
            chunk = data[at : at + CHUNK]
            write_all(fd, chunk)
            waiting += len(chunk)
            if waiting >= CHUNK:
                _sync(fd)
                waiting = 0
                if busy():
                    raise Stopped
    _sync(fd)
    leave_page_cache(fd)
    if busy():
        raise Stopped
    return tuple(crcs)


def read_parts(fd: int, parts: Sequence[torch.Tensor], piece: Piece) -> None:
    """Fill tensors with a file's bytes. OSError; PackError if a checksum is not as written."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    for part, crc in zip(parts, piece.crcs, strict=True):
        if read_into(fd, part) != crc:
            raise PackError(f"{piece.name} is damaged", hint=HINT)
    leave_page_cache(fd)


def full_rows(cache: KVCache, n: int) -> Iterator[torch.Tensor]:
    """Rows 0 .. n of every part of every full layer, in the order of files."""
    for layer in cache.layers:
        if isinstance(layer, FullKV):
            yield from layer.rows(n)[1].values()


def parts_of(point: Snapshot) -> tuple[dict[str, int], list[torch.Tensor]]:
    """A restart point as a file has it: where its rows start, the tensors in order."""
    starts = {str(i): first for i, (first, _) in point.rings.items()}
    parts = [part for _, rows in point.rings.values() for part in rows.values()]
    if point.draft is not None:
        first, rows = point.draft
        starts |= {"draft": first, "draft rows": next(iter(rows.values())).shape[0]}
        parts += rows.values()
    return starts, parts


def rows_like(rows: Rows, n: int) -> Rows:
    """n rows of the same kind in this machine's memory, to be written."""
    with torch.inference_mode(False):
        return {
            name: torch.empty((n, *part.shape[1:]), dtype=part.dtype) for name, part in rows.items()
        }


def crc32_of(part: torch.Tensor) -> int:
    """crc32 of a tensor's bytes: 14 GB/s with the kernels, 4 without (blake2b: 0.5)."""
    native = kernels.get()
    if native is None or not part.nbytes:
        return zlib.crc32(bytes_of(part))
    return native.crc32(part.data_ptr(), part.nbytes)


def read_into(fd: int, part: torch.Tensor) -> int:
    """Fill a tensor from where the file stands -> crc32. OSError, PackError at an early end."""
    if not part.is_contiguous() or part.device.type != "cpu":
        blank = torch.empty(part.shape, dtype=part.dtype)
        crc = read_into(fd, blank)
        part.copy_(blank)
        return crc
    native, data, crc, at = kernels.get(), bytes_of(part), 0, 0
    address = part.data_ptr()
    while at < len(data):
        got = os.readv(fd, [data[at : at + READ]])
        if not got:
            raise PackError("a file of saved rows ends early", hint=HINT)
        if native is None:
            crc = zlib.crc32(data[at : at + got], crc)
        else:
            crc = native.crc32(address + at, got, crc)
        at += got
    return crc


def leave_page_cache(fd: int) -> None:
    """The session is in memory already, or the model needs that memory more."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def _sync(fd: int) -> None:
    getattr(os, "fdatasync", os.fsync)(fd)
