"""Slash commands of a chat: what there is, and text -> command. Pure functions, no screen.

Does not know what a command does: window and plain chat act on the returned dataclass and list the
same table, each with the commands it has. Called by tui and cli.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches


@dataclass(frozen=True, slots=True)
class Spec:
    """One command of the table."""

    name: str
    help: str
    argument: str = ""
    """How the argument is written in help; empty if the command takes none."""

    @property
    def label(self) -> str:
        """As it is typed."""
        return f"/{self.name} {self.argument}".rstrip()


COMMANDS: tuple[Spec, ...] = (
    Spec("help", "keys and commands"),
    Spec("clear", "start a new chat"),
    Spec("regen", "answer the last prompt again"),
    Spec("edit", "change the last prompt and send it again", "TEXT"),
    Spec("branch", "versions of the last answer or prompt; with N: go on with that one", "N"),
    Spec("undo", "take back the last prompt and its answer"),
    Spec("file", "add a document to the next prompt; alone: list them; `-`: none", "PATH"),
    Spec("preset", "sampling for a kind of task; alone: list them", "NAME"),
    Spec("system", "set the system prompt; alone: show it; `-`: the model's own", "TEXT"),
    Spec("think", "let the model think first; alone: toggle", "on|off"),
    Spec("save", "write the chat to a file: .md or .json", "FILE"),
    Spec("stats", "figures of the last answer and the model"),
    Spec("exit", "quit"),
)
ALIASES = {
    "?": "help",
    "new": "clear",
    "quit": "exit",
    "bye": "exit",
    "regenerate": "regen",
    "read": "file",
    "attach": "file",
    "export": "save",
}
THINK_WORDS = {"": "toggle", "on": "on", "off": "off", "yes": "on", "no": "off"}


@dataclass(frozen=True, slots=True)
class Command:
    """A command the user meant; `argument` is checked and stripped."""

    name: str
    argument: str = ""


@dataclass(frozen=True, slots=True)
class BadCommand:
    """Something that looks like a command but is none."""

    message: str
    hint: str


def parse(
    text: str, presets: Sequence[str] = (), commands: Sequence[Spec] = COMMANDS
) -> Command | BadCommand | None:
    """`/name argument` -> Command, a mistake -> BadCommand, everything else -> None (a prompt).

    A path (`/etc/fstab says ...`) and `//anything` are prompts.
    """
    match = re.fullmatch(r"/([A-Za-z]+|\?)(?:\s+(.*))?", text.rstrip(), re.DOTALL)
    if match is None:
        return None
    name = match[1].lower()
    name = ALIASES.get(name, name)
    argument = (match[2] or "").strip()
    spec = next((c for c in commands if c.name == name), None)
    if spec is None:
        close = get_close_matches(name, [c.name for c in commands], n=1)
        hint = f"did you mean `/{close[0]}`? " if close else "`/help` lists the commands; "
        return BadCommand(f"there is no command `/{name}`", hint + "`//` sends a leading slash")
    return _with_argument(spec, argument, presets)


def _with_argument(spec: Spec, argument: str, presets: Sequence[str]) -> Command | BadCommand:
    if not spec.argument and argument:
        return BadCommand(f"`/{spec.name}` takes no argument", f"type `/{spec.name}` alone")
    if spec.name == "think":
        if argument.lower() not in THINK_WORDS:
            return BadCommand(f"`/think {argument}` is neither on nor off", "`/think on|off`")
        return Command("think", THINK_WORDS[argument.lower()])
    if spec.name == "preset" and argument:
        if argument.lower() not in presets:
            return BadCommand(f"there is no preset `{argument}`", "one of " + ", ".join(presets))
        return Command("preset", argument.lower())
    return Command(spec.name, argument)


def unescape(text: str) -> str:
    """The prompt that `//...` stands for."""
    return text[1:] if text.startswith("//") else text


@dataclass(frozen=True, slots=True)
class Suggestion:
    """One line under the prompt: `insert` replaces the text when Tab is pressed."""

    insert: str
    label: str
    help: str


def suggest(
    text: str, presets: Sequence[str] = (), commands: Sequence[Spec] = COMMANDS
) -> tuple[Suggestion, ...]:
    """What an unfinished command could become; nothing if the text is no command line."""
    match = re.fullmatch(r"/([A-Za-z]*)", text)
    if match is not None:
        return tuple(
            Suggestion(f"/{c.name}" + (" " if c.argument else ""), c.label, c.help)
            for c in commands
            if c.name.startswith(match[1].lower())
        )
    match = re.fullmatch(r"/(preset|think) +(\w*)", text)
    if match is None:
        return ()
    words = presets if match[1] == "preset" else ("on", "off")
    return tuple(
        Suggestion(f"/{match[1]} {word}", f"/{match[1]} {word}", "")
        for word in words
        if word.startswith(match[2].lower())
    )
