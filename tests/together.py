"""What several test processes have in common: a folder for a session, and turns at making things.

conftest.py makes the folder before any worker starts and removes it at the end.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

SHARED = "MIMO_TEST_SHARED"
_PREFIX = "mimo-tests-"


def new_folder() -> str:
    """For the session this process runs; its name says which process that is."""
    return tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-")


def clear_away() -> None:
    """Remove what sessions that were killed have left: the demo model is a quarter of a GB."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*-*"):
        pid = folder.name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def shared_folder() -> Path:
    """Of this session, the same in all its processes."""
    return Path(os.environ[SHARED])


@contextmanager
def one_at_a_time(lock: Path) -> Iterator[None]:
    """Of all processes; given back also when one is killed."""
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
