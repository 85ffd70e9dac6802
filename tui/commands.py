"""The window's slash commands: the part of the shared table it has, and the shared grammar.

Does not know what a command does: the chat screen acts on the returned dataclass, the help screen
and the palette list the same table.
"""

from __future__ import annotations

from collections.abc import Sequence

from mimo_local import commands as shared
from mimo_local.commands import BadCommand, Command, Spec, Suggestion, unescape

__all__ = [
    "ALIASES",
    "COMMANDS",
    "BadCommand",
    "Command",
    "Spec",
    "Suggestion",
    "parse",
    "suggest",
    "unescape",
]

HERE = ("help", "clear", "preset", "system", "think", "stats", "regen", "exit")
"""What the window has, in the order it is listed."""
COMMANDS: tuple[Spec, ...] = tuple(
    next(spec for spec in shared.COMMANDS if spec.name == name) for name in HERE
)
ALIASES = {alias: name for alias, name in shared.ALIASES.items() if name in HERE}


def parse(text: str, presets: Sequence[str] = ()) -> Command | BadCommand | None:
    """`/name argument` -> Command, a mistake -> BadCommand, everything else -> None (a prompt)."""
    return shared.parse(text, presets, COMMANDS)


def suggest(text: str, presets: Sequence[str] = ()) -> tuple[Suggestion, ...]:
    """What an unfinished command could become; nothing if the text is no command line."""
    return shared.suggest(text, presets, COMMANDS)
