"""Hidden states of a long prompt between two layers: in memory, or in an unlinked file.

Rows are read, changed and written back in pieces, in order, once per layer. Knows no layers. Called
by `prefill`.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch

from mimo_local.errors import DiskSpaceError, UsageError


class Hidden(Protocol):
    """(T, D) float32; a context manager, because its rows may lie in a file."""

    def blank(self, a: int, b: int) -> torch.Tensor:
        """Rows a .. b to be filled and then written, whatever they hold."""

    def read(self, a: int, b: int) -> torch.Tensor:
        """Rows a .. b; changes count once they are written. Good until the next call."""

    def write(self, a: int, x: torch.Tensor) -> None:
        """`x` is what `blank` or `read` gave for the rows from a on."""

    def __enter__(self) -> Hidden: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class InMemory:
    """Rows in one tensor."""

    def __init__(self, n: int, d: int, device: torch.device) -> None:
        self._x = torch.empty((n, d), device=device)

    def blank(self, a: int, b: int) -> torch.Tensor:
        """Rows a .. b themselves."""
        return self._x[a:b]

    def read(self, a: int, b: int) -> torch.Tensor:
        """Rows a .. b themselves."""
        return self._x[a:b]

    def write(self, a: int, x: torch.Tensor) -> None:
        """Nothing to do."""

    def __enter__(self) -> InMemory:
        return self

    def __exit__(self, *_: object) -> None:
        del self._x


class Spilled:
    """Rows in a file that has no name, so that nothing is left behind whatever happens.

    Plain reads and writes: a mapped file would end the process when the disk is full.
    """

    def __init__(self, n: int, d: int, most: int, folder: Path | None = None) -> None:
        """Pieces have up to `most` rows. The whole file is reserved here.

        Raises DiskSpaceError, and UsageError where no file can be made.
        """
        self._folder = spill_folder() if folder is None else folder
        self._buffer = torch.empty((most, d))
        self._bytes = memoryview(self._buffer.numpy()).cast("B")  # type: ignore[arg-type]
        self._row, self._size = 4 * d, 4 * d * n
        with self._told():
            self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115
        try:
            with self._told():
                if hasattr(os, "posix_fallocate"):  # not on macOS: there a full disk is met later
                    os.posix_fallocate(self._file.fileno(), 0, self._size)
        except BaseException:
            self._file.close()
            raise

    def blank(self, a: int, b: int) -> torch.Tensor:
        """The buffer of the pieces."""
        return self._buffer[: b - a]

    def read(self, a: int, b: int) -> torch.Tensor:
        """Rows a .. b in the buffer of the pieces."""
        self._all(os.preadv, a, b - a)
        return self._buffer[: b - a]

    def write(self, a: int, x: torch.Tensor) -> None:
        """The buffer's first rows to the file."""
        self._all(os.pwritev, a, x.shape[0])

    def _all(
        self, call: Callable[[int, list[memoryview], int], int], first: int, rows: int
    ) -> None:
        at, left = first * self._row, self._bytes[: rows * self._row]
        with self._told():
            while left:
                done = call(self._file.fileno(), [left], at)
                if not done:
                    raise OSError(errno.EIO, "the file ends early")
                at, left = at + done, left[done:]

    @contextmanager
    def _told(self) -> Iterator[None]:
        """An error of the system in our terms."""
        try:
            yield
        except OSError as e:
            if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise DiskSpaceError(
                    f"`{self._folder}` has no room for {self._size / 1e9:.1f} GB of hidden states",
                    hint="free some space, set TMPDIR to a folder on another disk, or give a "
                    "shorter prompt",
                ) from e
            raise UsageError(
                f"cannot keep hidden states in `{self._folder}`: {e}",
                hint="set TMPDIR to a folder on a disk that can be written to",
            ) from e

    def __enter__(self) -> Spilled:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def spill_folder() -> Path:
    """TMPDIR, else /var/tmp: unlike /tmp it is on a disk everywhere, not in memory."""
    common = Path("/var/tmp")
    wished = os.environ.get("TMPDIR")
    return common if not wished and common.is_dir() else Path(tempfile.gettempdir())
