"""The folder a pull works in: what is pinned, which bytes are here, what was seen of files gone.

Beside the pack, `<pack>.source`: whole files under their own names, so that it is a checkpoint
folder if they are kept; everything unfinished in `.pull` below it. Knows no network. Called by
`remote`, `fetch` and `run`.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Final

from mimo_local.errors import CheckpointError, UsageError
from mimo_local.pull.hub import RemoteFile, Snapshot
from mimo_local.pull.ranges import noted, written
from quant.tensorfile import TensorFile
from quant.writer import sync_folder, writing

STATE: Final = ".pull"
VERSION: Final = 1


class Staging:
    """The folder of one pull, and the lock that keeps a second one out."""

    def __init__(self, folder: Path) -> None:
        """Touches nothing yet."""
        self.folder = folder
        self.state = folder / STATE
        self._lock = -1

    def open(self) -> None:
        """Make the folder and lock it; UsageError if another pull is at work there."""
        with writing(self.folder, 0, 0):
            self.state.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.state / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                self.close()
                raise UsageError(
                    f"another pull into {self.folder} is running",
                    hint="wait for it to end, or choose another name with `--to`",
                ) from error

    def close(self) -> None:
        """Release the lock."""
        if self._lock >= 0:
            fd, self._lock = self._lock, -1
            os.close(fd)

    @property
    def locked(self) -> bool:
        """Whether this pull owns the folder: only then it writes there."""
        return self._lock >= 0

    def pinned(self) -> tuple[Snapshot, str] | None:
        """The commit an earlier run chose, with its files, and the revision it was asked for."""
        try:
            data = json.loads((self.state / "pull.json").read_text(encoding="utf-8"))
            files = {f["name"]: RemoteFile(**f) for f in data["files"]}
            if data["version"] != VERSION:
                return None
            return Snapshot(str(data["repo"]), str(data["commit"]), files), str(data["revision"])
        except (OSError, ValueError, KeyError, TypeError):
            return None  # written whole or not at all; what else is there is not ours

    def pin(self, snapshot: Snapshot, revision: str) -> None:
        """Remember the commit: all later runs go on with it."""
        files = [asdict(file) for file in snapshot.files.values()]
        data = {"version": VERSION, "repo": snapshot.repo, "commit": snapshot.commit}
        self.keep("pull.json", json.dumps(data | {"revision": revision, "files": files}).encode())

    def keep(self, name: str, data: bytes) -> None:
        """Write a small file of ours, whole or not at all."""
        path = self.state / name
        with writing(path, 0, len(data)):
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(path.name + ".tmp")
            with part.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
            sync_folder(path.parent)

    def kept(self, name: str) -> bytes | None:
        """What `keep` wrote, or None."""
        try:
            return (self.state / name).read_bytes()
        except OSError:
            return None

    def here(self, file: RemoteFile) -> bool:
        """Whether the whole file is here under its name, proven right when it landed."""
        try:
            size = (self.folder / file.name).stat().st_size
            return size == file.size and (self.state / f"{file.name}.samples").is_file()
        except OSError:
            return False

    def adopt(self, file: RemoteFile) -> None:
        """A file of the right size that nobody proved (small, or put here by hand): to be proven.

        It becomes a part with all its bytes, of which only the checksum is left to do.
        """
        path, part = self.folder / file.name, self.state / f"{file.name}.part"
        with writing(path, 0, 0), suppress(FileNotFoundError):
            if not self.here(file) and path.stat().st_size == file.size:
                path.replace(part)
                log = written(file.identity, [(0, file.size)] if file.size else [])
                part.with_suffix(".ranges").write_text(log, encoding="ascii")

    def missing(self, file: RemoteFile) -> int:
        """Bytes of a file that are not here, as far as one can tell without looking into it."""
        with suppress(OSError):
            if (self.folder / file.name).stat().st_size == file.size:
                return 0
        text = (self.kept(f"{file.name}.ranges") or b"").decode("ascii", "replace")
        return file.size - sum(b - a for a, b in noted(text, file.identity, file.size))

    def nbytes(self) -> int:
        """Bytes of source files, whole or not, that are here now."""
        total = 0
        for folder in (self.folder, self.state):
            with suppress(OSError):
                for path in folder.iterdir():
                    with suppress(OSError):
                        found = path.stat()
                        total += min(found.st_size, found.st_blocks * 512)
        return total

    def drop(self, file: RemoteFile) -> None:
        """Remove a file whose layers are safe."""
        (self.folder / file.name).unlink(missing_ok=True)

    def clear(self, *, everything: bool) -> None:
        """Remove what only a pull needs, or the whole folder."""
        shutil.rmtree(self.folder if everything else self.state, ignore_errors=True)


class StagedFile(TensorFile):
    """A source file whose bytes come and go: what the fingerprint looks at outlives them."""

    def __init__(self, staging: Staging, file: RemoteFile, header: bytes) -> None:
        super().__init__(
            staging.folder / file.name,
            error=CheckpointError,
            hint=DAMAGED,
            known=(file.size, header),
        )
        self._staging = staging

    def read_into(self, view: memoryview, offset: int, what: str) -> None:
        """Fill `view` from the file, or from the samples kept of it."""
        kept = None if self.path.exists() else self._staging.kept(f"{self.path.name}.samples")
        if kept is None:
            super().read_into(view, offset, what)
            return
        at = 0
        for start, stop in self.samples():
            if (start, stop - start) == (offset, len(view)):
                view[:] = kept[at : at + len(view)]
                return
            at += stop - start
        raise self.fail(f"was removed before {what} was read")


DAMAGED = "`--restart` fetches everything anew; if it stays wrong, the repository is damaged"
