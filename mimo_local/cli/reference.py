"""docs/cli.md out of the commands' own help: `python -m mimo_local.cli.reference`; a test compares.

Knows no command by name: what is registered is documented.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer

from mimo_local.cli import app

WIDTH = 100
HEAD = """# The `mimo` command

Generated from `--help` by `python -m mimo_local.cli.reference`; do not edit.

Exit status: 0 done, 1 failed, 2 wrong usage, 3 model files, 4 not enough memory, 5 kernel library,
130 interrupted. Every setting is also an environment variable (`--top-p`: `MIMO_TOP_P`) and a line
of `config.toml`; what is typed wins over the variable, the variable over the file.
"""


def helps() -> Iterator[tuple[str, str]]:
    """(command line, help text) of `mimo` and every command below it."""
    yield from _walk(typer.main.get_command(app), None)


def _walk(command: Any, parent: Any) -> Iterator[tuple[str, str]]:
    name = command.name if parent else "mimo"
    context = typer.Context(
        command,
        info_name=name,
        parent=parent,
        terminal_width=WIDTH,
        help_option_names=["-h", "--help"],
    )
    yield context.command_path, command.get_help(context)
    for below in getattr(command, "commands", {}).values():
        yield from _walk(below, context)


def markdown() -> str:
    """The whole page."""
    parts = [f"\n## {name}\n\n```\n{text}\n```\n" for name, text in helps()]
    return HEAD + "".join(parts)


if __name__ == "__main__":
    print(markdown(), end="")
