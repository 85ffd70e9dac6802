"""What a summary is asked with and what it comes back as. Plain frozen data, printable.

Knows no engine. `cli` and `api` fill `Options` and print `Summary`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

from mimo_local.summarize.citations import Citation

Mode: TypeAlias = Literal["one pass", "map and merge"]


@dataclass(frozen=True, slots=True)
class Options:
    """What the summary should be like; None takes the preset's value."""

    pages: str | None = None
    """A range like `3-9,12`, the same for every document."""
    lang: str | None = None
    """A language code or name; None lets the model choose."""
    length: str | int = "medium"
    """short (60 words), medium (180), long (450), or a number of words."""
    focus: str = ""
    """What to pay special attention to."""
    preset: str = "summarize"
    temperature: float | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    max_tokens: int | None = None
    """Longest summary in tokens."""
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """One stretch of the documents the model read in one go, and what it noted."""

    where: str
    """Its pages as in a mark: `p. 3-7`."""
    title: str
    """Headings that begin in it, the first few."""
    tokens: int
    notes: str
    """Empty in one pass."""
    cited: bool
    """False: the model named no page; the marks were matched by words, or are the stretch."""
    reused: bool = False


@dataclass(frozen=True, slots=True)
class Figures:
    """What the summary cost."""

    prompt_tokens: int
    completion_tokens: int
    prefill_s: float
    decode_s: float
    seconds: float
    requests: int
    reused_parts: int
    removed_citations: int


@dataclass(frozen=True, slots=True)
class Summary:
    """The summary and how far it can be trusted."""

    text: str
    citations: tuple[Citation, ...]
    coverage: float
    """Share of the pages asked for that the model read: 1.0 unless something was unreadable."""
    parts: tuple[Part, ...]
    mode: Mode
    documents: tuple[str, ...]
    pages: int
    """Pages asked for, over all documents."""
    unit: str
    """`pages` or `sections`."""
    model: str
    warnings: tuple[str, ...]
    stats: Figures
    sources: tuple[str, ...] = ()
    """What the marks of documents without pages stand for: `sec. 3: Its heading`."""

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return asdict(self)

    def to_markdown(self, *, parts: bool = False) -> str:
        """The summary as a Markdown page; `parts` adds the notes on every part."""
        lines = [f"# Summary of {', '.join(self.documents)}", "", self.text, ""]
        if parts and any(part.notes for part in self.parts):
            lines += ["## Part by part", ""]
            for part in self.parts:
                lines += [f"### {part.where}{f': {part.title}' if part.title else ''}", ""]
                lines += [part.notes or "(no notes)", ""]
        cited = {c.first for c in self.citations}
        shown = [s for s in self.sources if not cited or s.split(":")[0].split()[-1] in cited]
        if shown:
            lines += ["## Sections", "", *(f"- {source}" for source in shown), ""]
        lines += ["---", "", *(f"- {note}" for note in self.notes())]
        return "\n".join(lines) + "\n"

    def notes(self) -> tuple[str, ...]:
        """What a reader should know about how this came about, one line each."""
        how = self.mode if self.mode == "one pass" else f"{self.mode} over {len(self.parts)} parts"
        lines = [f"{self.model}, {how}, {self.coverage:.0%} of {self.pages} {self.unit} read"]
        if self.stats.reused_parts:
            n = self.stats.reused_parts
            lines.append(f"{n} part{'s' * (n > 1)} taken over from an earlier run")
        return (*lines, *self.warnings)
