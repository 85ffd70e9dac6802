"""`@path` in a prompt: which one the cursor is in, what it could become, which files are meant.

Reads folders, no files; knows no screen. Called by the prompt and the chat screen.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

MENTION = re.compile(r"(?<!\S)@(\"[^\"\n]*\"|(?:\\ |[^\s\"])*)")
SCANNED = 2000
"""Entries of a folder that are looked at: this runs at every key."""
OFFERED = 6


@dataclass(frozen=True, slots=True)
class Offer:
    """One way to complete a mention: the path as it is to be typed, without the `@`."""

    path: str
    folder: bool


def mention_at(text: str, cursor: int) -> tuple[int, str] | None:
    """(index of the `@`, what follows it up to the cursor) if the cursor is in a mention."""
    for match in MENTION.finditer(text):
        if match.start() < cursor <= match.end():
            return match.start(), text[match.start() + 1 : cursor]
    return None


def offers(typed: str, folder: Path | None = None) -> tuple[Offer, ...]:
    """Paths that begin with what was typed, folders first; hidden ones only if asked for."""
    plain = _unquoted(typed)
    head, _, start = plain.rpartition("/")
    shown = f"{head}/" if "/" in plain else ""
    base = (folder or Path.cwd()) / Path(shown or ".").expanduser()
    try:
        with os.scandir(base) as found:
            entries = [
                (not e.is_dir(), e.name)
                for e in islice(found, SCANNED)
                if e.name.lower().startswith(start.lower()) and (start or e.name[0] != ".")
            ]
    except OSError:
        return ()
    return tuple(
        Offer(_quoted(shown + name + ("" if is_file else "/")), not is_file)
        for is_file, name in sorted(entries)[:OFFERED]
        if name.isprintable()
    )


def files_in(text: str) -> tuple[str, tuple[Path, ...]]:
    """The text with each mention of an existing file replaced by its name, and those files.

    Anything else after an `@` (a name, an address, a folder) stays as it is.
    """
    found: list[Path] = []

    def name(match: re.Match[str]) -> str:
        path = Path(_unquoted(match[1])).expanduser()
        try:
            if match[1] and path.is_file():
                found.append(path)
                return path.name
        except (OSError, ValueError):
            pass
        return match[0]

    return MENTION.sub(name, text), tuple(found)


def _unquoted(typed: str) -> str:
    return typed.replace("\\ ", " ").strip('"')


def _quoted(path: str) -> str:
    return path.replace(" ", "\\ ")
