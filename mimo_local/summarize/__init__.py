"""Documents to a summary: the whole text is read, in one pass if it fits, else part by part.

Drives the engine through its public face only. Every page mark in the result exists; what was not
read is said. Called by cli, tui and api; knows no files, no tensors and no screen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from mimo_local.documents import Document
from mimo_local.errors import UsageError
from mimo_local.summarize.citations import Citation
from mimo_local.summarize.job import Job
from mimo_local.summarize.runner import EngineLike, OnEvent
from mimo_local.summarize.types import Figures, Mode, Options, Part, Summary

__all__ = ["Citation", "Figures", "Mode", "Options", "Part", "Summary", "summarize"]


def summarize(
    engine: EngineLike,
    documents: Sequence[Document],
    options: Options | None = None,
    *,
    work_dir: Path | None = None,
    on_event: OnEvent | None = None,
    cancel: Callable[[], bool] | None = None,
) -> Summary:
    """One summary of all documents. `work_dir` keeps finished parts, so a stopped run goes on.

    UsageError: impossible options. DocumentError: nothing to read. ContextOverflowError: the
    context is too small to work in. CancelledError: `cancel` said so; finished parts are kept.
    """
    if not documents:
        raise UsageError("there is no document to summarize", hint="name at least one file")
    if engine.tokenizer is None:
        raise UsageError(
            f"{engine.name} has no tokenizer, so it cannot read text",
            hint="use a pack or checkpoint folder with tokenizer.json",
        )
    return Job(engine, documents, options or Options(), work_dir, on_event, cancel).run()
