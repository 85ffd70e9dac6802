"""Finished parts on disk, so that a run that was stopped goes on where it was.

One JSON file per written part, named by a hash of all that shaped it: model, prompt, options.
Nothing here can fail a run: what cannot be kept is reported once, what cannot be read is redone.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

KEEP_DAYS = 30
"""Parts older than this are cleared away when a run begins."""


class Store:
    """A folder of parts; with `folder=None` nothing is kept."""

    def __init__(self, folder: Path | None) -> None:
        self.problem = ""
        """Why parts could not be kept, for people; empty if all is well."""
        self._folder = folder
        if folder is not None:
            self._guard(lambda: folder.mkdir(parents=True, exist_ok=True, mode=0o700))
            self._guard(lambda: self._clear_old(folder))

    @staticmethod
    def key(*facts: Any) -> str:
        """A name for what these JSON-able facts lead to."""
        text = json.dumps(facts, ensure_ascii=True, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def get(self, key: str) -> dict[str, Any] | None:
        """What was kept under this key; None if nothing, or if the file is damaged."""
        if self._folder is None:
            return None
        try:
            found = json.loads((self._folder / f"{key}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def put(self, key: str, value: dict[str, Any]) -> None:
        """Keep it, whole or not at all."""
        folder = self._folder
        if folder is not None:
            self._guard(lambda: _write(folder / f"{key}.json", json.dumps(value)))

    def _guard(self, action: Any) -> None:
        try:
            action()
        except OSError as error:
            if not self.problem:
                self.problem = (
                    f"finished parts cannot be kept in {self._folder} "
                    f"({error.strerror or error}): a stopped run would begin again"
                )

    @staticmethod
    def _clear_old(folder: Path) -> None:
        oldest = time.time() - KEEP_DAYS * 86400
        for path in folder.glob("*.json*"):
            with suppress(FileNotFoundError):
                if path.stat().st_mtime < oldest:
                    path.unlink()


def _write(path: Path, text: str) -> None:
    """Write beside, sync, rename: a kill leaves the old file or the new one."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
