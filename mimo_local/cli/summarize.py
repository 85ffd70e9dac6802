"""`mimo summarize`: documents to a summary on stdout or in a file, progress on stderr.

Reads with `documents`, hands over to `mimo_local.summarize`; finished parts are kept in the cache
folder, so a run that was stopped goes on where it was.
"""

from __future__ import annotations

import json as jsonlib
import os
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mimo_local.cli import models
from mimo_local.cli.models import (
    ContextOption,
    DeviceOption,
    DraftOption,
    JsonOption,
    MaxTokensOption,
    ModelOption,
    RamOption,
    RemoteModelOption,
    RemoteOption,
    SeedOption,
    VramOption,
)
from mimo_local.cli.status import Status, say
from mimo_local.errors import ExitCode, UsageError
from mimo_local.settings import Paths, Settings

if TYPE_CHECKING:
    from mimo_local.documents import Document
    from mimo_local.summarize import Options

Files = Annotated[
    list[str], typer.Argument(help="PDF, Markdown, HTML or text; - is stdin", metavar="FILE")
]
Output = Annotated[
    Path | None, typer.Option("-o", "--output", help="write Markdown to this file", metavar="FILE")
]
Pages = Annotated[str | None, typer.Option("--pages", help="only these: 3-9,12", metavar="RANGE")]
Lang = Annotated[str | None, typer.Option("--lang", help="language to write in", metavar="LANG")]
Length = Annotated[
    str, typer.Option("--length", help="short, medium, long, or a number of words", metavar="L")
]
Focus = Annotated[str, typer.Option("--focus", help="what to pay attention to", metavar="TEXT")]


def summarize(
    files: Files,
    output: Output = None,
    pages: Pages = None,
    lang: Lang = None,
    length: Length = "medium",
    focus: Focus = "",
    model: ModelOption = None,
    context: ContextOption = None,
    ram: RamOption = None,
    device: DeviceOption = None,
    vram: VramOption = None,
    draft: DraftOption = None,
    max_tokens: MaxTokensOption = None,
    seed: SeedOption = None,
    remote: RemoteOption = None,
    remote_model: RemoteModelOption = None,
    json: JsonOption = False,
) -> int:
    """Summarize whole documents, naming the pages.

    Every page is read, in one pass or part by part; a run that was stopped goes on where it was.
    """
    from mimo_local.summarize import Options

    settings = Settings.resolve(
        model=model,
        context=context,
        ram=ram,
        device=device,
        vram=vram,
        draft=draft,
        max_tokens=max_tokens,
        seed=seed,
        remote=remote,
        remote_model=remote_model,
    )
    options = Options(
        pages=pages,
        lang=lang,
        length=int(length) if length.isdecimal() else length,
        focus=focus,
        temperature=settings.temperature,
        top_p=settings.top_p,
        repetition_penalty=settings.repetition_penalty,
        max_tokens=settings.max_tokens,
        seed=settings.seed,
    )
    return run(settings, [read(name, pages) for name in files], options, output, json=json)


def read(name: str, pages: str | None) -> Document:
    """One document; `-` is stdin."""
    from mimo_local import documents

    if name == "-":
        return documents.read(sys.stdin.buffer.read(), name="stdin", pages=pages)
    return documents.read(Path(name), pages=pages)


def run(
    settings: Settings,
    documents: list[Document],
    options: Options,
    output: Path | None,
    *,
    json: bool,
) -> int:
    """Summarize and print; Ctrl-C stops within one step, finished parts are kept."""
    from mimo_local.cli.answer import engine_notes, on_interrupt
    from mimo_local.summarize import summarize as summarized

    if output is not None:
        check_writable(output)
    engine, status, stop = models.open_backend(settings), Status(), threading.Event()
    try:
        with on_interrupt(stop.set):
            found = summarized(
                engine,
                documents,
                options,
                work_dir=Paths.default().cache_dir / "summaries",
                on_event=status,
                cancel=stop.is_set,
            )
    finally:
        status.clear()
        engine.close()
    text = jsonlib.dumps(found.to_dict(), ensure_ascii=False) if json else found.text
    if output is not None:
        save(output, text + "\n" if json else found.to_markdown(parts=True))
        say(f"written to {output}")
    else:
        print(text)
    for note in (*found.notes(), *engine_notes(engine)):
        say(note)
    return ExitCode.OK


def check_writable(path: Path) -> None:
    """UsageError before the work, not after it, if `path` cannot become a file."""
    folder = path.parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UsageError(
            f"`{path}` cannot be written", hint="give a file name in a folder that exists"
        )


def save(path: Path, text: str) -> None:
    """Write beside and rename, so that a full disk leaves no half file."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UsageError(
            f"`{path}` cannot be written: {error.strerror}", hint="give another file with -o"
        ) from error
