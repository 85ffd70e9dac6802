"""Writes a pack's files: whole or not at all, counted, hashed, durable, one by one.

Knows layouts and checksums, not where the weights come from. Called by `convert`, through `pack`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import torch

from mimo_local.errors import DiskSpaceError, PackError
from quant.formats import Parts
from quant.layout import (
    ALIGN,
    ExpertLayout,
    TensorSpec,
    expert_views,
    experts_to_json,
    plan_tensors,
    tensor_to_json,
)
from quant.pipeline import BEHIND, Behind
from quant.tensorfile import bytes_of

FORMAT_VERSION = 1
MANIFEST = "pack.json"
PART = ".part"
FLUSH = 64 << 20
"""Bytes after which the system is asked to begin with the disk; else `fsync` would do it all."""

Record: TypeAlias = dict[str, Any]
"""What the manifest says about one finished file; also one line of the conversion's journal."""


class _Crc:
    """A CRC-32 that grows piece by piece."""

    value = 0


_Piece: TypeAlias = tuple[memoryview, _Crc | None]


class _Output:
    """One file being written as `<name>.part`: counted, hashed, and put in place when complete."""

    def __init__(self, path: Path, total: int) -> None:
        self.path = path
        self.part = path.with_name(path.name + PART)
        self.total = total
        self.done = 0
        self._sha = hashlib.sha256()
        self._stored = 0
        self._flushed = 0
        self._behind: Behind[_Piece] = Behind(self._digest, self._check, self._store)
        with writing(self.path, 0, total):
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
            self._fd = os.open(self.part, flags, 0o644)

    def write(self, data: bytes | memoryview, crc: _Crc | None = None) -> None:
        """Hash and write the next bytes, behind the caller; `Behind` says when they may change.

        `crc` goes on over them and is right after `commit`. An error may come with a later call.
        """
        self.done += len(data)
        self._behind.put((memoryview(data), crc))

    def _digest(self, piece: _Piece) -> None:
        self._sha.update(piece[0])

    def _check(self, piece: _Piece) -> None:
        data, crc = piece
        if crc is not None:
            crc.value = zlib.crc32(data, crc.value)

    def _store(self, piece: _Piece) -> None:
        data = piece[0]
        with writing(self.path, self._stored, self.total):
            while data:
                n = os.write(self._fd, data)
                self._stored += n
                data = data[n:]
            if self._stored - self._flushed >= FLUSH and hasattr(os, "posix_fadvise"):
                # Linux starts writing such pages to the disk: nothing to wait for in `commit` then.
                count = self._stored - self._flushed
                os.posix_fadvise(self._fd, self._flushed, count, os.POSIX_FADV_DONTNEED)
                self._flushed = self._stored

    def zeros_until(self, offset: int) -> None:
        """Padding up to `offset`; a larger gap means that data is missing."""
        gap = offset - self.done
        if not 0 <= gap < ALIGN:
            raise ValueError(f"{self.path.name}: at byte {self.done}, expected {offset}")
        self.write(bytes(gap))

    def commit(self) -> Record:
        """Make it durable, then give it its name; in this order a name means a whole file."""
        if self.done != self.total:
            raise ValueError(f"{self.path.name}: {self.done} of {self.total} bytes were given")
        self._behind.finish()
        with writing(self.path, self.done, self.total):
            os.fsync(self._fd)
            self.close()
            self.part.replace(self.path)
            sync_folder(self.path.parent)
        return {"file": self.path.name, "bytes": self.total, "sha256": self._sha.hexdigest()}

    def close(self) -> None:
        self._behind.close()
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def __enter__(self) -> _Output:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.close()
        if isinstance(error, DiskSpaceError):  # a full disk should not stay full of a torso
            with suppress(OSError):
                self.part.unlink()


class _Places:
    """A file that is filled place by place, over several runs, as `<name>.part`."""

    def __init__(self, path: Path, total: int) -> None:
        self.path, self.total, self._written = path, total, 0
        self._behind: Behind[tuple[memoryview, int, _Crc]] = Behind(self._check, self._store)
        with writing(path, 0, total):
            flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
            self._fd = os.open(path.with_name(path.name + PART), flags, 0o644)
            os.ftruncate(self._fd, total)

    def put(self, data: memoryview, offset: int, crc: _Crc) -> None:
        """Write behind the caller; see `_Output.write`."""
        self._behind.put((data, offset, crc))

    def _check(self, piece: tuple[memoryview, int, _Crc]) -> None:
        piece[2].value = zlib.crc32(piece[0])

    def _store(self, piece: tuple[memoryview, int, _Crc]) -> None:
        data, offset, _ = piece
        with writing(self.path, self._written, self.total):
            while data:
                n = os.pwrite(self._fd, data, offset)
                self._written += n
                data, offset = data[n:], offset + n

    def finish(self) -> None:
        """Return when all is on the disk."""
        self._behind.finish()
        with writing(self.path, self._written, self.total):
            os.fsync(self._fd)
            sync_folder(self.path.parent)

    def __enter__(self) -> _Places:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._behind.close()
        os.close(self._fd)


@contextmanager
def writing(path: Path, done: int, total: int) -> Iterator[None]:
    """Turn what the operating system says about a full or read-only disk into our errors."""
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            short = f"{path.name} needs {total} bytes, {done} were written"
            raise DiskSpaceError(
                f"the disk is full: {short if total else f'cannot write {path.name}'}",
                hint="free some space and run the same command again: finished files are kept",
            ) from e
        raise PackError(
            f"cannot write {path} ({e.strerror})",
            hint="choose a folder on a disk you can write to",
        ) from e


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class PackWriter:
    """Writes a pack's files one by one; each call returns the file's record for the manifest."""

    def __init__(self, dst: Path) -> None:
        """`dst` is created if need be; raises PackError when it cannot be."""
        self.dst = dst
        with writing(dst, 0, 0):
            dst.mkdir(parents=True, exist_ok=True)

    def tensors(
        self,
        file: str,
        specs: Iterable[TensorSpec],
        produce: Callable[[TensorSpec], Iterator[Parts]],
    ) -> Record:
        """A file of single tensors; `produce(spec)` yields parts of consecutive row ranges.

        The first part is written as it comes, the others (scales, at most a sixteenth of it) wait
        for its end: so memory holds one row range of the largest tensor.
        """
        header, size, entries = plan_tensors(file, specs)
        crcs = {name: _Crc() for name in entries}
        with _Output(self.dst / file, size) as out:
            out.write(header)
            for name, entry in entries.items():
                spec = TensorSpec(name, entry.format, entry.shape)
                first, *later = entry.parts
                waiting: dict[str, list[torch.Tensor]] = {part: [] for part in later}
                out.zeros_until(entry.parts[first][2])
                for parts in produce(spec):
                    out.write(bytes_of(parts[first]), crcs[name])
                    for part in later:
                        waiting[part].append(parts[part])
                for part in later:
                    out.zeros_until(entry.parts[part][2])
                    for piece in waiting[part]:
                        out.write(bytes_of(piece), crcs[name])
            record = out.commit()
        done = {n: replace(entry, crc32=crcs[n].value) for n, entry in entries.items()}
        return record | {"tensors": {n: tensor_to_json(e) for n, e in done.items()}}

    def experts(
        self,
        layer: int,
        planned: tuple[bytes, int, ExpertLayout],
        produce: Callable[[int, dict[str, Parts]], None],
    ) -> Record:
        """A layer's experts, from `layout.plan_experts`; `produce(e, matrix -> parts)` fills one.

        The next expert is made while the last ones are written.
        """
        header, size, layout = planned
        buffers = [torch.zeros(layout.stride, dtype=torch.uint8) for _ in range(BEHIND + 1)]
        views = [expert_views(buffer, layout) for buffer in buffers]
        crcs = [_Crc() for _ in range(layout.count)]
        with _Output(self.dst / layout.file, size) as out:
            out.write(header)
            for expert, crc in enumerate(crcs):
                turn = expert % len(buffers)
                produce(expert, views[turn])
                out.write(bytes_of(buffers[turn]), crc)
            record = out.commit()
        done = replace(layout, crc32=tuple(crc.value for crc in crcs))
        return record | {"experts": {str(layer): experts_to_json(done)}}

    def fill(
        self,
        planned: tuple[bytes, int, ExpertLayout],
        experts: Iterable[int],
        produce: Callable[[int, dict[str, Parts]], None],
    ) -> dict[str, int]:
        """Some of a layer's experts into their places in `<file>.part`: durable when this returns.

        Gives each one's CRC-32 by its number, as JSON has it; `close` makes the file of them.
        """
        _, size, layout = planned
        buffers = [torch.zeros(layout.stride, dtype=torch.uint8) for _ in range(BEHIND + 1)]
        views = [expert_views(buffer, layout) for buffer in buffers]
        crcs: dict[str, _Crc] = {}
        with _Places(self.dst / layout.file, size) as out:
            for i, expert in enumerate(experts):
                turn = i % len(buffers)
                produce(expert, views[turn])
                crcs[str(expert)] = crc = _Crc()
                out.put(bytes_of(buffers[turn]), layout.offset0 + expert * layout.stride, crc)
            out.finish()
        return {expert: crc.value for expert, crc in crcs.items()}

    def close(
        self,
        layer: int,
        planned: tuple[bytes, int, ExpertLayout],
        crcs: Iterable[int],
        on_bytes: Callable[[int], None],
    ) -> Record:
        """Make the file of which all experts were filled in, after reading it: the file's record.

        PackError if an expert is not what was written, as after a crash of the system.
        """
        header, size, layout = planned
        done = replace(layout, crc32=tuple(crcs))
        path = self.dst / layout.file
        part = path.with_name(path.name + PART)
        sha = hashlib.sha256(header)
        with writing(path, 0, size), part.open("r+b", buffering=0) as file:
            file.write(header)
            buffer = memoryview(bytearray(layout.stride))
            for expert, crc in enumerate(done.crc32):
                count = file.readinto(buffer)
                if count != len(buffer) or zlib.crc32(buffer) != crc:
                    raise PackError(
                        f"expert {expert} in {part} is not what was written there",
                        hint=f"the disk may be damaged; delete {self.dst} to make the pack anew",
                    )
                sha.update(buffer)
                on_bytes(len(buffer))
            os.fsync(file.fileno())
            part.replace(path)
            sync_folder(self.dst)
        record = {"file": path.name, "bytes": size, "sha256": sha.hexdigest()}
        return record | {"experts": {str(layer): experts_to_json(done)}}

    def copy(self, source: Path, name: str | None = None) -> Record:
        """A small file (config, tokenizer) as it is."""
        try:
            data = source.read_bytes()
        except OSError as e:
            raise PackError(
                f"cannot read {source} ({e.strerror})",
                hint="make the file readable, then run the same command again",
            ) from e
        return self.blob(name or source.name, data)

    def blob(self, name: str, data: bytes) -> Record:
        """A small file with this content."""
        with _Output(self.dst / name, len(data)) as out:
            out.write(data)
            return out.commit()

    def finish(self, about: dict[str, Any], records: Iterable[Record]) -> None:
        """Write pack.json: from here on the folder is a pack."""
        manifest: dict[str, Any] = {"format_version": FORMAT_VERSION, **about}
        manifest |= {"files": {}, "tensors": {}, "experts": {}}
        for record in records:
            manifest["files"][record["file"]] = {k: record[k] for k in ("bytes", "sha256")}
            manifest["tensors"] |= record.get("tensors", {})
            manifest["experts"] |= record.get("experts", {})
        manifest["manifest_sha256"] = manifest_digest(manifest)
        self.blob(MANIFEST, (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode())


def manifest_digest(manifest: dict[str, Any]) -> str:
    """Hex sha256 of the manifest without its own `manifest_sha256`, in canonical JSON."""
    body = {k: v for k, v in manifest.items() if k != "manifest_sha256"}
    return hashlib.sha256(
        json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()
