"""The window in a real terminal: once with a fake engine, once with the demo model."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from tmux import Terminal, available

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not available(), reason="tmux is not installed"),
]


def ready(screen: str) -> bool:
    """The status line begins with it ("you can type already" is no match)."""
    return any(line.split()[:1] == ["ready"] for line in screen.splitlines())


def test_the_window_in_a_terminal() -> None:
    launcher = [sys.executable, str(ROOT / "tests/tui/launcher.py")]
    with Terminal(launcher, cwd=ROOT) as terminal:
        terminal.wait_for(ready, 60)
        terminal.type("[b]hello[/b]")
        terminal.press("C-j")
        terminal.type("second line")
        terminal.press("Enter")
        screen = terminal.wait_for(lambda s: "2. two" in " ".join(s.split()) and "tok/s" in s)
        assert "[b]hello[/b]" in screen
        assert "You said:" in screen
        terminal.wait_for(ready)
        terminal.type("hold on")
        terminal.press("Enter")
        terminal.wait_for("holding on")
        terminal.press("Escape")
        terminal.wait_for("stopped · 2 tokens")
        terminal.resize(100, 30)
        terminal.press("Up")
        terminal.wait_for("│ hold on")
        terminal.resize(60, 16)
        terminal.wait_for("stopped · 2 tokens")
        terminal.press("C-c")
        terminal.wait_for("Ctrl+Q quits")
        terminal.press("C-q")
        assert terminal.exit_status() == 0


@pytest.fixture
def demo_home(demo_cache: Path, demo_pack_dir: Path, tmp_path: Path) -> Path:
    """A MIMO_HOME whose cache holds the demo pack."""
    (tmp_path / "cache").symlink_to(demo_cache, target_is_directory=True)
    return tmp_path


@pytest.mark.demo
def test_the_demo_model_chats_in_a_terminal(demo_home: Path) -> None:
    env = {"MIMO_HOME": str(demo_home), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
    command = [sys.executable, "-m", "mimo_local", "chat", "--temperature", "0"]
    command += ["--max-tokens", "60", "--seed", "1"]
    with Terminal(command, env=env, cwd=ROOT) as terminal:
        screen = terminal.wait_for(ready, 120)
        assert "not MiMo itself" in screen
        terminal.type("What is the capital of France?")
        terminal.press("Enter")
        screen = terminal.wait_for(lambda s: ready(s) and "tok/s" in s, 120)
        assert "Paris" in screen
        terminal.press("M-Up")
        terminal.wait_for("y Copy")
        terminal.press("r")  # greedy: the same words, but a branch of their own
        terminal.wait_for(lambda s: ready(s) and "‹ 2/2 ›" in s, 60)
        terminal.press("Left")
        screen = terminal.wait_for("‹ 1/2 ›", 30)
        assert "Paris" in screen
        terminal.press("M-Down")  # past the last message: back to the prompt
        terminal.type("Tell me a long story about the sea.")
        terminal.press("Enter")
        terminal.wait_for(lambda s: "answering" in s, 60)
        terminal.press("Escape")
        terminal.wait_for("stopped", 30)
        terminal.press("C-q")
        assert terminal.exit_status() == 0
    with Terminal(command, env=env, cwd=ROOT) as terminal:
        terminal.wait_for(ready, 120)
        terminal.press("F2")
        terminal.wait_for("5 messages", 30)
        terminal.type("capital")
        terminal.wait_for("found", 30)
        terminal.press("Enter")
        # Whichever of the two answers is found first: its branch is shown.
        screen = terminal.wait_for(lambda s: "‹ 1/2 ›" in s or "‹ 2/2 ›" in s, 30)
        assert "▌ What is the capital of France?" in screen
        terminal.press("C-q")
        assert terminal.exit_status() == 0
    with Terminal([*command, "-c"], env=env, cwd=ROOT) as terminal:
        terminal.wait_for("long story about the sea", 120)
        terminal.wait_for(ready, 120)
        terminal.type("And now a short one.")
        terminal.press("Enter")
        terminal.wait_for(lambda s: "▌ And now a short one." in s and ready(s), 120)
        terminal.press("C-q")
        assert terminal.exit_status() == 0
