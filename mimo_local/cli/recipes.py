"""`mimo run --list` and `--show`: recipes as tables and text that fit the terminal.

Called by run; plain data in, text on stdout.
"""

from __future__ import annotations

import json as jsonlib
import textwrap
from typing import TYPE_CHECKING, Any

from mimo_local.chat import preset
from mimo_local.cli.status import say
from mimo_local.cli.tables import fit
from mimo_local.errors import ExitCode
from mimo_local.history.export import visible
from mimo_local.recipes import choose_language

if TYPE_CHECKING:
    from mimo_local.recipes import Recipe, Shelf


def list_(shelf: Shelf, locale: str, *, json: bool) -> int:
    """All recipes; broken ones are named on stderr."""
    found, wrong = shelf.all()
    if json:
        print(jsonlib.dumps([as_dict(shelf, recipe) for recipe in found], ensure_ascii=False))
    else:
        width = max(len(recipe.name) for recipe in found)
        for recipe in found:
            text = recipe.texts[choose_language(recipe, None, locale)]
            own = "yours: " if shelf.is_own(recipe) else ""
            spoken = " ".join(recipe.languages) or "-"
            about = " ".join(visible(text.description).split())
            print(fit(f"{recipe.name:<{width}}  {spoken:<5}  {own}{about}"))
        say(f"\n`mimo run NAME --show` prints one; yours go into {shelf.folder}")
    for error in wrong:
        say(f"left out: {error.message}\nhint: {error.hint}")
    return ExitCode.OK


def show(shelf: Shelf, recipe: Recipe, lang: str, *, json: bool) -> int:
    """One recipe: what it is answered with, its variables, its texts in one language."""
    if json:
        print(jsonlib.dumps(as_dict(shelf, recipe), ensure_ascii=False))
        return ExitCode.OK
    text = recipe.texts[lang]
    print(visible(f"{recipe.name}: {text.description}".rstrip(": ")))
    print(f"file: {recipe.path}")
    for line in facts(recipe):
        print(fit(line))
    if recipe.variables:
        print("\nvariables, for --set NAME=VALUE:")
        width = max(map(len, recipe.variables))
        for variable in recipe.variables.values():
            about = variable.said(variable.description, lang)
            default = None if variable.default is None else variable.said(variable.default, lang)
            note = "must be given" if default is None else f"else: {default}" if default else ""
            line = " ".join(visible(f"{about}{f' ({note})' if note else ''}").split())
            print(fit(f"  {variable.name:<{width}}  {line}"))
    for head, body in (("system prompt", text.system), ("prompt", text.prompt)):
        if body:
            print(f"\n{head}:\n{textwrap.indent(visible(body), '  ')}")
    return ExitCode.OK


def facts(recipe: Recipe) -> list[str]:
    """How it is answered, and what it takes."""
    params = preset(recipe.preset).params(**recipe.sampling)
    own = [f"{k} {v:g}" for k, v in recipe.sampling.items() if k != "max_tokens"]
    parts = [f"preset {recipe.preset}", *own, f"at most {params.max_tokens:,} tokens"]
    parts += ["thinking"] if recipe.thinking else []
    instead = f", or --set {recipe.instead}=..." if recipe.instead else ""
    return [", ".join(parts), f"documents: {recipe.documents}{instead}"]


def as_dict(shelf: Shelf, recipe: Recipe) -> dict[str, Any]:
    """Everything about a recipe, for --json."""
    return {
        "name": recipe.name,
        "path": str(recipe.path),
        "own": shelf.is_own(recipe),
        "languages": list(recipe.languages),
        "preset": recipe.preset,
        "thinking": recipe.thinking,
        "sampling": dict(recipe.sampling),
        "documents": recipe.documents,
        "instead": recipe.instead,
        "variables": {
            name: {
                "description": dict(variable.description),
                "default": None if variable.default is None else dict(variable.default),
            }
            for name, variable in recipe.variables.items()
        },
        "texts": {
            lang: {"description": t.description, "system": t.system, "prompt": t.prompt}
            for lang, t in recipe.texts.items()
        },
    }
