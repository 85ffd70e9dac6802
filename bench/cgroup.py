"""A memory limit for child processes: a cgroup of our own, version 1 or 2. Needs root.

with MemoryLimit(2 << 30) as limit:
    subprocess.run(limit.command(["program", "argument"]))
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from mimo_local.errors import UsageError

V1 = Path("/sys/fs/cgroup/memory")
V2 = Path("/sys/fs/cgroup")


class MemoryLimit:
    """Processes started through `command` have `nbytes` of memory together, page cache included."""

    def __init__(self, nbytes: int) -> None:
        """UsageError where no limit can be made."""
        first = V1.is_dir()
        self.folder = (V1 if first else V2) / f"mimo-bench-{os.getpid()}-{time.monotonic_ns()}"
        self.file = "memory.limit_in_bytes" if first else "memory.max"
        self.peak_file = "memory.max_usage_in_bytes" if first else "memory.peak"
        try:
            self.folder.mkdir()
            if not first:
                (self.folder / "memory.swap.max").write_text("0")
            (self.folder / self.file).write_text(str(nbytes))
        except OSError as error:
            with suppress(OSError):
                self.folder.rmdir()
            raise UsageError(
                f"no memory limit can be set here: {error}",
                hint="run as root, on a system with memory cgroups",
            ) from error

    def command(self, command: Sequence[str]) -> list[str]:
        """The command, entering the group before it starts."""
        enter = f'echo $$ > "{self.folder}/cgroup.procs" && exec "$@"'
        return ["sh", "-c", enter, "sh", *command]

    @property
    def peak(self) -> int | None:
        """Most bytes the group ever had, page cache included; None where that is not counted."""
        try:
            return int((self.folder / self.peak_file).read_text())
        except (OSError, ValueError):
            return None

    def close(self) -> None:
        """Take the group away; its processes have to have ended."""
        for _ in range(50):  # the last process may still be leaving
            with suppress(OSError):
                self.folder.rmdir()
                return
            time.sleep(0.1)

    def __enter__(self) -> MemoryLimit:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
