"""What a conversion has finished so far, one JSON line per file, durable before the next begins.

Knows lines and locks, not what they mean. A line torn by a crash is dropped. Called by `convert`.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from mimo_local.errors import UsageError
from quant.writer import writing


class Journal:
    """A locked file: its first line says what is being made, `records` what is done."""

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        """Create or resume; raises UsageError if another conversion owns it or is using it."""
        self.path = path
        self.head = head
        self.records: list[dict[str, Any]] = []
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        with writing(path, 0, 0):
            self._fd = os.open(path, flags, 0o644)
        try:
            with writing(path, 0, 0):
                self._resume()
        except BaseException:
            self.close()
            raise

    def _resume(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise UsageError(
                f"another conversion into {self.path.parent} is running",
                hint="wait for it to end, or choose another folder",
            ) from e
        data = self.path.read_bytes()
        lines, kept = [], 0
        for line in data.splitlines(keepends=True):
            try:
                value = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n") or not isinstance(value, dict):
                break
            lines.append(value)
            kept += len(line)
        os.ftruncate(self._fd, kept)
        if not lines:
            self._append(self.head)
            return
        if lines[0] != self.head:
            keys = sorted(self.head.keys() | lines[0].keys())
            other = [k for k in keys if self.head.get(k) != lines[0].get(k)]
            raise UsageError(
                f"{self.path.parent} holds an unfinished conversion with another "
                + " and ".join(other),
                hint="finish it with the same source and options, choose another folder, or "
                "delete this one to start over",
            )
        self.records = lines[1:]

    def add(self, record: dict[str, Any]) -> None:
        """Note a finished file; returns when the line is on the disk."""
        with writing(self.path, 0, 0):
            self._append(record)
        self.records.append(record)

    def _append(self, value: dict[str, Any]) -> None:
        data = (json.dumps(value, sort_keys=True) + "\n").encode()
        while data:
            data = data[os.write(self._fd, data) :]
        os.fsync(self._fd)

    def close(self) -> None:
        """Release the lock."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)
