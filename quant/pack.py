"""The pack: our folder on disk. `Pack` opens, reads and verifies it (`PackWriter` made it).

Knows files, offsets and checksums (docs/format.md, byte by byte), no models. A pack without
pack.json is unfinished: that file is written last. Called by `convert` and `mimo_local.weights`.
"""

from __future__ import annotations

import hashlib
import os
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from mimo_local.errors import MimoError, PackError
from mimo_local.events import Progress
from quant.buffers import huge_empty, huge_tensor
from quant.formats import Parts
from quant.inventory import EXPERT_PARTS, expert_name
from quant.layout import (
    ExpertLayout,
    TensorEntry,
    TensorSpec,
    expert_views,
    experts_from_json,
    part_bytes,
    stored_name,
    tensor_from_json,
)
from quant.tensorfile import DTYPE_NAMES, TensorFile, bytes_of, pread_into, read_json
from quant.writer import FORMAT_VERSION, MANIFEST, PackWriter, manifest_digest

__all__ = ["ExpertLayout", "Pack", "PackWriter", "TensorEntry", "TensorSpec", "expert_views"]

JOURNAL = "convert.journal"

_REDO = "make the pack again with `mimo quantize`, or copy the file again from where it was made"
_CHUNK = 8 << 20

OnProgress = Callable[[Progress], None]


class Pack:
    """A finished pack, opened and checked: sizes, headers against the manifest; data on demand."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        """Use `Pack.open`."""
        self.path = path
        self.manifest = manifest
        self.config: dict[str, Any] = {}
        self.tensors: dict[str, TensorEntry] = {}
        self._experts: dict[int, ExpertLayout] = {}
        self._fds: dict[str, int] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: str | Path) -> Pack:
        """Open a folder; raises PackError naming what is missing, short, newer or damaged."""
        folder = Path(path)
        if not (folder / MANIFEST).exists() and (folder / JOURNAL).exists():
            raise PackError(
                f"the conversion into {folder} is unfinished",
                hint="run the same `mimo quantize` or `mimo pull` again: it goes on from there",
            )
        manifest = read_json(
            folder / MANIFEST,
            error=PackError,
            hint="give a folder made by `mimo quantize`; if its conversion was interrupted, "
            "run it again to resume",
        )
        version = manifest.get("format_version")
        if type(version) is not int or version < 1:
            raise _damaged(f"its format_version is {version!r}")
        if version > FORMAT_VERSION:
            raise PackError(
                f"{folder.name} has pack format {version}, this version reads {FORMAT_VERSION}",
                hint="update mimo-local, or make the pack again with this version",
            )
        if manifest.get("manifest_sha256") != manifest_digest(manifest):
            raise _damaged("its checksum does not match")
        self = cls(folder, manifest)
        try:
            self._parse()
            self._check_files()
        except MimoError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as e:
            raise _damaged(f"{type(e).__name__}: {e}") from e
        return self

    @property
    def nbytes(self) -> int:
        """Bytes of all files the manifest lists."""
        return sum(int(f["bytes"]) for f in self.manifest["files"].values())

    @property
    def expert_layers(self) -> tuple[int, ...]:
        """Layers that have experts, ascending."""
        return tuple(sorted(self._experts))

    def expert_layout(self, layer: int) -> ExpertLayout:
        """Where the experts of `layer` are; raises PackError for a layer without any."""
        if layer not in self._experts:
            raise PackError(
                f"layer {layer} of {self.path.name} has no experts",
                hint="the pack belongs to another model than its config.json says",
            )
        return self._experts[layer]

    def aux_path(self, name: str) -> Path | None:
        """Path of a copied file (tokenizer.json, chat_template.jinja, ...), None if not there."""
        return self.path / name if name in self.manifest["files"] else None

    def read(self, name: str) -> Parts:
        """The parts of a tensor, one pread each; raises PackError if the pack has no such name."""
        if name not in self.tensors:
            raise PackError(
                f"{name} is not in the pack {self.path.name}",
                hint="the pack belongs to another model than its config.json says",
            )
        entry = self.tensors[name]
        parts: Parts = {}
        for part, (dtype, shape, offset) in entry.parts.items():
            tensor = huge_tensor(shape, dtype)
            self._read_into(bytes_of(tensor), entry.file, offset, name)
            parts[part] = tensor
        return parts

    def read_expert(self, layer: int, expert: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """One expert's bytes: uint8 (stride,), address a multiple of 4096; one pread.

        `out`, a uint8 buffer of at least stride bytes, is filled instead of a new one.
        """
        layout = self.expert_layout(layer)
        if not 0 <= expert < layout.count:
            raise PackError(
                f"layer {layer} has experts 0..{layout.count - 1}, not {expert}",
                hint="the pack belongs to another model than its config.json says",
            )
        buffer = huge_empty(layout.stride) if out is None else out[: layout.stride]
        offset = layout.offset0 + expert * layout.stride
        what = f"expert {expert} of layer {layer}"
        self._read_into(bytes_of(buffer), layout.file, offset, what)
        return buffer

    def verify(self, on_progress: OnProgress | None = None) -> None:
        """Read every byte; raises PackError naming the first damaged file and tensor or expert."""
        total, done = self.nbytes, 0
        pieces: dict[str, list[tuple[int, int, int, str]]] = {}  # start, end, crc32, what
        for name, e in self.tensors.items():
            start = min(p[2] for p in e.parts.values())
            end = max(p[2] + part_bytes(p) for p in e.parts.values())
            pieces.setdefault(e.file, []).append((start, end, e.crc32, name))
        for layer, x in self._experts.items():
            for i in range(x.count):
                start = x.offset0 + i * x.stride
                what = f"expert {i} of layer {layer}"
                pieces.setdefault(x.file, []).append((start, start + x.stride, x.crc32[i], what))
        for file, listed in self.manifest["files"].items():
            digest = hashlib.sha256()
            for chunk in self._chunks(file, 0, listed["bytes"]):
                digest.update(chunk)
                done += len(chunk)
                if on_progress:
                    on_progress(Progress(f"verifying {file}", done, total))
            if digest.hexdigest() != listed["sha256"]:
                raise self._damage(file, sorted(pieces.get(file, [])))

    def close(self) -> None:
        """Close the files; reading opens them again."""
        with self._lock:
            while self._fds:
                os.close(self._fds.popitem()[1])

    def __enter__(self) -> Pack:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        with suppress(Exception):
            self.close()

    def _parse(self) -> None:
        files = self.manifest["files"]
        for name, listed in files.items():
            # A manifest from anywhere may only name files in its own folder.
            if name in ("", ".", "..") or any(c in name for c in "/\\\0:"):
                raise ValueError(f"file name {name!r} leaves the folder")
            if type(listed["bytes"]) is not int or type(listed["sha256"]) is not str:
                raise ValueError(f"no size and checksum for {name}")
        self.tensors = {n: tensor_from_json(e) for n, e in self.manifest["tensors"].items()}
        self._experts = {int(n): experts_from_json(e) for n, e in self.manifest["experts"].items()}
        used = {e.file for e in self.tensors.values()} | {x.file for x in self._experts.values()}
        for name in sorted(used | {"config.json"}):
            if name not in files:
                raise ValueError(f"{name} is not listed")

    def _check_files(self) -> None:
        for name, listed in self.manifest["files"].items():
            path = self.path / name
            size = path.stat().st_size if path.is_file() else -1
            if size != listed["bytes"]:
                state = "missing" if size < 0 else f"{size} bytes long, not {listed['bytes']}"
                raise PackError(f"{name} of the pack {self.path.name} is {state}", hint=_REDO)
        self.config = read_json(self.path / "config.json", error=PackError, hint=_REDO)
        headers = {
            name: TensorFile(self.path / name, error=PackError, hint=_REDO)
            for name in self.manifest["files"]
            if name.endswith(".safetensors")
        }
        for name, e in self.tensors.items():
            for part, place in e.parts.items():
                _check_part(headers[e.file], stored_name(name, part), *place)
        for layer, x in self._experts.items():
            for expert in range(x.count):
                start = x.offset0 + expert * x.stride
                for matrix in EXPERT_PARTS:
                    name = expert_name(layer, expert, matrix)
                    for key, (dtype, shape, offset) in x.parts.items():
                        of, part = key.split(".")
                        if of == matrix:
                            stored = stored_name(name, part)
                            _check_part(headers[x.file], stored, dtype, shape, start + offset)
            if x.offset0 + x.count * x.stride > headers[x.file].size:
                raise ValueError(f"the experts of layer {layer} end behind {x.file}")

    def _fd(self, file: str) -> int:
        with self._lock:
            if file not in self._fds:
                try:
                    self._fds[file] = os.open(self.path / file, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as e:
                    raise PackError(f"cannot open {file} ({e.strerror})", hint=_REDO) from e
            return self._fds[file]

    def _read_into(self, view: memoryview, file: str, offset: int, what: str) -> None:
        try:
            got = pread_into(self._fd(file), view, offset)
        except OSError as e:
            raise PackError(f"cannot read {what} from {file} ({e.strerror})", hint=_REDO) from e
        if got != len(view):
            raise PackError(f"{file} ends inside {what}", hint=_REDO)

    def _chunks(self, file: str, start: int, stop: int) -> Iterator[memoryview]:
        buffer = memoryview(bytearray(_CHUNK))
        for at in range(start, stop, _CHUNK):
            view = buffer[: min(_CHUNK, stop - at)]
            self._read_into(view, file, at, f"byte {at}")
            yield view

    def _damage(self, file: str, pieces: list[tuple[int, int, int, str]]) -> PackError:
        """Which tensor or expert of a file with a wrong sha256 is the damaged one."""
        for start, end, crc32, what in pieces:
            crc = 0
            spans = (
                [(p[2], p[2] + part_bytes(p)) for p in self.tensors[what].parts.values()]
                if what in self.tensors
                else [(start, end)]
            )
            for a, b in spans:
                for chunk in self._chunks(file, a, b):
                    crc = zlib.crc32(chunk, crc)
            if crc != crc32:
                return PackError(f"{file} is damaged: checksum of {what} is wrong", hint=_REDO)
        where = " in its header or padding" if pieces else ""
        return PackError(f"{file} is damaged{where}: its sha256 is wrong", hint=_REDO)


def _check_part(
    file: TensorFile, name: str, dtype: torch.dtype, shape: tuple[int, ...], offset: int
) -> None:
    entry = file.entries.get(name)
    if entry is None:
        raise file.fail(f"does not hold {name}, which {MANIFEST} says it does")
    if (entry.dtype, entry.shape, entry.offset) != (DTYPE_NAMES[dtype], shape, offset):
        raise file.fail(f"and {MANIFEST} disagree about {name}")


def _damaged(what: str) -> PackError:
    return PackError(f"{MANIFEST} is damaged: {what}", hint=_REDO)
