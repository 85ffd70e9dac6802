"""What several test processes have in common: a folder for a session, and turns at making things.

conftest.py makes the folder before any worker starts and removes it at the end.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SHARED = "MIMO_TEST_SHARED"


def shared_folder() -> Path:
    """Of this session, the same in all its processes."""
    return Path(os.environ[SHARED])


@contextmanager
def one_at_a_time(lock: Path) -> Iterator[None]:
    """Of all processes; given back also when one is killed."""
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
