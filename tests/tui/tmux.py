"""A real terminal for a test: tmux on a socket of its own, keys in, glass out.

Kills only its own server. Used by the end-to-end test; `available()` says whether tmux is there.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

EXITED = "[exited with "


def available() -> bool:
    return shutil.which("tmux") is not None


class Terminal:
    """`with Terminal(["mimo", "chat"], env={...}) as t: t.type("hi"); t.wait_for("hello")`."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        width: int = 80,
        height: int = 24,
    ) -> None:
        self._socket = f"mimo-test-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        # The exit status is printed where the test can see it; `sleep` keeps the glass readable.
        line = f"{shlex.join(command)}; echo '{EXITED}'$?']'; sleep 600"
        variables = [f"{name}={value}" for name, value in (env or {}).items()]
        self._start = [
            *("new-session", "-d", "-s", "main", "-x", str(width), "-y", str(height)),
            *(("-c", str(cwd)) if cwd else ()),
            shlex.join(["env", *variables, "sh", "-c", line]),
        ]

    def __enter__(self) -> Terminal:
        self._tmux(*self._start)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        subprocess.run(["tmux", "-L", self._socket, "kill-server"], capture_output=True, timeout=10)

    def _tmux(self, *args: str) -> str:
        command = ["tmux", "-L", self._socket, "-f", os.devnull, *args]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
        assert done.returncode == 0, (args, done.stderr)
        return done.stdout

    def press(self, *keys: str) -> None:
        """Keys by tmux's names: Enter, Escape, C-q, Up, ..."""
        self._tmux("send-keys", "-t", "main", *keys)

    def type(self, text: str) -> None:
        """Text as it is."""
        self._tmux("send-keys", "-t", "main", "-l", "--", text)

    def glass(self) -> str:
        """What is on the screen now."""
        return self._tmux("capture-pane", "-t", "main", "-p")

    def resize(self, width: int, height: int) -> None:
        self._tmux("resize-window", "-t", "main", "-x", str(width), "-y", str(height))

    def wait_for(self, wanted: str | Callable[[str], object], timeout_s: float = 30.0) -> str:
        """The screen once it holds `wanted` (or `wanted(screen)` is true)."""
        holds = wanted if callable(wanted) else (lambda screen: wanted in screen)
        end = time.monotonic() + timeout_s
        while not holds(screen := self.glass()):
            assert time.monotonic() < end, f"no {wanted!r} in {timeout_s} s:\n{screen}"
            time.sleep(0.1)
        return screen

    def exit_status(self, timeout_s: float = 30.0) -> int:
        """Wait for the command's end."""
        screen = self.wait_for(EXITED, timeout_s)
        return int(screen.rpartition(EXITED)[2].partition("]")[0])
