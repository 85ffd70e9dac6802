"""What a recipe is once it has been read and checked. Plain frozen data.

Knows no file format; reading builds these, filling and cli take them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

ANY = ""
"""The language of texts that are given once, for all."""
Documents: TypeAlias = Literal["none", "optional", "required"]


@dataclass(frozen=True, slots=True)
class Text:
    """What is said in one language."""

    description: str
    system: str
    prompt: str


@dataclass(frozen=True, slots=True)
class Variable:
    """A value the prompt waits for. `{{name}}` stands for it."""

    name: str
    description: Mapping[str, str]
    """By language, or under ANY."""
    default: Mapping[str, str] | None
    """None: it must be given."""

    def said(self, which: Mapping[str, str], lang: str) -> str:
        """The text in this language, else the one for all, else none."""
        return which.get(lang, which.get(ANY, ""))


@dataclass(frozen=True, slots=True)
class Recipe:
    """A prompt template and how it is to be answered."""

    name: str
    path: Path
    texts: Mapping[str, Text]
    """By language, in the file's order; under ANY if there are no languages."""
    variables: Mapping[str, Variable] = field(default_factory=dict)
    preset: str = "default"
    thinking: bool = False
    documents: Documents = "optional"
    instead: str = ""
    """The variable that may be given in place of a document."""
    sampling: Mapping[str, float] = field(default_factory=dict)
    """What differs from the preset: max_tokens, temperature, top_p, repetition_penalty."""

    @property
    def languages(self) -> tuple[str, ...]:
        """Codes; empty if the texts are for all."""
        return tuple(lang for lang in self.texts if lang != ANY)
