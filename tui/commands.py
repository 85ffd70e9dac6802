"""The window's slash commands: those of the shared table it has and its own, the shared grammar.

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

OWN: tuple[Spec, ...] = (
    Spec("regen", "answer again; the old answer stays as a branch"),
    Spec("edit", "change the last prompt, as a branch", "TEXT"),
    Spec("file", "add a document; alone: choose one; `-`: none", "PATH"),
    Spec("save", "the chat as .md or .json; alone: ask where", "FILE"),
    Spec("system", "system prompt; alone: show it; `-`: the model's own", "TEXT"),
    Spec("chats", "the list of saved chats"),
    Spec("rename", "another title for this chat", "TITLE"),
    Spec("import", "chats from a JSON file", "FILE"),
    Spec("settings", "preset, thinking, system prompt on one page"),
)
"""Those plain chat has not, or that do a little more here."""
HERE = (
    *("help", "clear", "chats", "regen", "edit", "file", "preset", "system", "think", "settings"),
    *("rename", "save", "import", "stats", "exit"),
)
"""What the window has, in the order it is listed."""
COMMANDS: tuple[Spec, ...] = tuple(
    next(spec for spec in (*OWN, *shared.COMMANDS) if spec.name == name) for name in HERE
)
ALIASES = {alias: name for alias, name in shared.ALIASES.items() if name in HERE}


def parse(text: str, presets: Sequence[str] = ()) -> Command | BadCommand | None:
    """`/name argument` -> Command, a mistake -> BadCommand, everything else -> None (a prompt)."""
    return shared.parse(text, presets, COMMANDS)


def suggest(text: str, presets: Sequence[str] = ()) -> tuple[Suggestion, ...]:
    """What an unfinished command could become; nothing if the text is no command line."""
    return shared.suggest(text, presets, COMMANDS)
