"""Recipes: prompts for one kind of work, as TOML files; shipped ones and the user's own.

`Shelf(folder).get(name)`, then `fill` makes a system prompt and a message of it. Knows messages,
no engine and no screen; called by cli. The format is in docs/recipes.md.
"""

from mimo_local.recipes.filling import Filled, choose_language, fill
from mimo_local.recipes.shelf import Shelf
from mimo_local.recipes.types import Recipe, Text, Variable

__all__ = ["Filled", "Recipe", "Shelf", "Text", "Variable", "choose_language", "fill"]
