"""`mimo config`: what is set, and where each value came from."""

from __future__ import annotations

import json as jsonlib

import typer

from mimo_local.cli.models import JsonOption
from mimo_local.errors import ExitCode
from mimo_local.settings import OPTIONS, Paths, Settings

app = typer.Typer(help="Show the settings in force.", rich_markup_mode=None, no_args_is_help=True)


@app.callback()
def group() -> None:
    """Show the settings in force."""


@app.command(name="show")
def show(json: JsonOption = False) -> int:
    """Print every setting, its value and where it came from."""
    settings = Settings.resolve()
    values = {name: getattr(settings, name) for name in OPTIONS}
    if json:
        shown = {
            name: {
                "value": value if value is None else _plain(value),
                "from": settings.origin[name],
            }
            for name, value in values.items()
        }
        print(jsonlib.dumps(shown, ensure_ascii=False))
        return ExitCode.OK
    for name, value in values.items():
        print(f"{name:<20} {'(unset)' if value is None else value!s:<24} {settings.origin[name]}")
    print(f"\nsettings file: {Paths.default().config_file}")
    return ExitCode.OK


def _plain(value: object) -> object:
    return value if isinstance(value, bool | int | float) else str(value)
