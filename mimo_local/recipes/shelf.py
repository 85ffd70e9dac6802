"""Where recipes are: the shipped ones, and the user's own folder, whose names win.

A file of the user's may extend another recipe: it says only what differs. A broken file is no
reason not to list the others. Called by cli.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Final

from mimo_local.errors import UsageError
from mimo_local.recipes.reading import Source, recipe
from mimo_local.recipes.types import Recipe

SHIPPED: Final = Path(__file__).with_name("shipped")


class Shelf:
    """The recipes of a user; `folder` may not exist."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def is_own(self, found: Recipe) -> bool:
        """Whether it is the user's, not a shipped one."""
        return found.path.parent != SHIPPED

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(
            {path.stem for path in (*SHIPPED.glob("*.toml"), *self.folder.glob("*.toml"))}
        )

    def all(self) -> tuple[list[Recipe], list[UsageError]]:
        """Every recipe that can be read, and what is wrong with the others."""
        found, wrong = [], []
        for name in self.names():
            try:
                found.append(self.get(name))
            except UsageError as error:
                wrong.append(error)
        return found, wrong

    def get(self, name: str) -> Recipe:
        """The recipe of this name, or in this .toml file; UsageError says what is wrong."""
        path = Path(name) if name.endswith(".toml") else self._path(name)
        if path is None:
            names = self.names()
            close = difflib.get_close_matches(name, names, n=1)
            raise UsageError(
                f"there is no recipe `{name}`",
                hint=f"did you mean `{close[0]}`?" if close else f"recipes: {', '.join(names)}",
            )
        source = Source(path)
        return recipe(source, path.stem, self._whole(source, ()))

    def _path(self, name: str, but: tuple[Path, ...] = ()) -> Path | None:
        """The user's file of this name, else the shipped one; not one of `but`."""
        for folder in (self.folder, SHIPPED):
            path = folder / f"{name}.toml"
            if path not in but and path.parent == folder and path.is_file():
                return path
        return None

    def _whole(self, source: Source, below: tuple[Path, ...]) -> dict[str, Any]:
        """A file's table on top of that of the recipe it extends."""
        table = source.table()
        base = table.pop("extends", None)
        if base is None:
            return table
        if not isinstance(base, str):
            raise source.wrong("extends", "`extends` must be the name of a recipe")
        # A recipe that extends its own name means the shipped one.
        chain = (*below, source.path)
        path = self._path(base, chain)
        if path is None:
            raise source.wrong(
                "extends", f"there is no other recipe `{base}` to extend", "`mimo run --list`"
            )
        return _merged(self._whole(Source(path), chain), table)


def _merged(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Own values over those of the base, table by table."""
    found = dict(base)
    for key, value in own.items():
        both = isinstance(value, dict) and isinstance(found.get(key), dict)
        found[key] = _merged(found[key], value) if both else value
    return found
