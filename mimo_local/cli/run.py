"""`mimo run`: a recipe and documents to an answer on stdout or in a file.

Recipes come from `mimo_local.recipes`, text from `documents`; the answering itself is in `answer`.
What a recipe says about sampling counts more than the settings, less than what is typed.
"""

from __future__ import annotations

import io
import json as jsonlib
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mimo_local.cli import models
from mimo_local.cli.chat import Preset, Stats, Temperature, Think
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
from mimo_local.cli.status import say
from mimo_local.errors import ContextOverflowError, ExitCode, UsageError
from mimo_local.settings import Paths, Settings

if TYPE_CHECKING:
    from mimo_local.chat import Attachment, Backend, Chat
    from mimo_local.cli.answer import Answer, Look
    from mimo_local.recipes import Recipe
    from mimo_local.sampler import SamplingParams

TEMPLATE = 32
"""Tokens of roles and marks around a system prompt and a message, at most."""
LEAST_ANSWER = 256
"""Tokens an answer must have room for, unless fewer were asked for."""

Name = Annotated[
    str | None, typer.Argument(help="a recipe of --list, or a .toml file", metavar="NAME")
]
Files = Annotated[
    list[str] | None,
    typer.Argument(help="documents: PDF, Markdown, HTML, text, code; - is stdin", metavar="FILE"),
]
Output = Annotated[
    Path | None, typer.Option("-o", "--output", help="write the answer to a file", metavar="FILE")
]
Values = Annotated[
    list[str] | None,
    typer.Option("--set", help="a variable's value; @FILE reads it", metavar="NAME=VALUE"),
]
Lang = Annotated[
    str | None, typer.Option("--lang", help="language to ask in: en, zh", metavar="LANG")
]
Pages = Annotated[str | None, typer.Option("--pages", help="only these: 3-9,12", metavar="RANGE")]
List = Annotated[bool, typer.Option("--list", help="list the recipes")]
Show = Annotated[bool, typer.Option("--show", help="print the recipe instead of running it")]


def run(
    name: Name = None,
    files: Files = None,
    values: Values = None,
    output: Output = None,
    lang: Lang = None,
    pages: Pages = None,
    list_: List = False,
    show: Show = False,
    model: ModelOption = None,
    preset: Preset = None,
    temperature: Temperature = None,
    max_tokens: MaxTokensOption = None,
    think: Think = None,
    seed: SeedOption = None,
    context: ContextOption = None,
    ram: RamOption = None,
    device: DeviceOption = None,
    vram: VramOption = None,
    draft: DraftOption = None,
    remote: RemoteOption = None,
    remote_model: RemoteModelOption = None,
    json: JsonOption = False,
    stats: Stats = False,
) -> int:
    """Run a recipe: a tried prompt for papers, contracts, translations, code, minutes, study.

    `mimo run paper article.pdf -o notes.md`; `mimo run translate letter.txt --set to=German`.
    Recipes of your own go into the folder that `--list` names. Ctrl-C keeps what was made.
    """
    flags = {key: value for key, value in locals().items() if key in Settings.__slots__}
    from mimo_local.cli import recipes
    from mimo_local.recipes import Shelf, choose_language

    shelf = Shelf(Paths.default().recipes_dir)
    if list_:
        return recipes.list_(shelf, lang or locale(), json=json)
    if name is None:
        raise UsageError("say which recipe", hint="`mimo run --list` shows them")
    recipe = shelf.get(name)
    language = choose_language(recipe, lang, locale())
    if show:
        return recipes.show(shelf, recipe, language, json=json)
    from mimo_local.cli.answer import Look

    settings = Settings.resolve(**flags)
    params, chat = prepared(recipe, settings)
    fill(chat, recipe, language, assigned(values or ()), given(recipe, files or (), pages))
    look = Look(json=json, stats=stats)
    return answered(
        settings, chat, params, look, output, {"recipe": name, "language": language or None}
    )


def locale() -> str:
    """The user's language as the system says it, like `zh_CN.UTF-8`."""
    names = ("LC_ALL", "LC_MESSAGES", "LANG")
    return next((value for name in names if (value := os.environ.get(name))), "")


def prepared(recipe: Recipe, settings: Settings) -> tuple[SamplingParams, Chat]:
    """Sampling values and an empty chat: what was typed, then the recipe, then the settings."""
    from mimo_local.chat import Chat, preset
    from mimo_local.cli.answer import overrides

    def typed(name: str) -> bool:
        return settings.origin.get(name) == "flag"

    chosen = settings.preset if typed("preset") else recipe.preset
    thinking = settings.think if typed("think") else recipe.thinking
    own = {
        name: value
        for name, value in overrides(settings).items()
        if name not in recipe.sampling or typed(name)
    }
    return (
        preset(chosen).params(**{**recipe.sampling, **own}),
        Chat(preset=chosen, thinking=thinking),
    )


def fill(
    chat: Chat,
    recipe: Recipe,
    language: str,
    values: dict[str, str],
    documents: Sequence[Attachment],
) -> None:
    """Put the filled recipe into an empty chat."""
    from mimo_local import recipes

    filled = recipes.fill(recipe, language, values, documents)
    chat.system = filled.system
    chat.messages.append(filled.message)


def assigned(values: Sequence[str]) -> dict[str, str]:
    """`name=value` as a table; `name=@file` is the file's text, `name=@@x` is `@x`."""
    found = {}
    for value in values:
        name, equals, text = value.partition("=")
        if not equals:
            raise UsageError(
                f"--set {value!r} has no value",
                hint='like `--set to=German` or `--set error="..."`',
            )
        if text.startswith("@@"):
            text = text[1:]
        elif text.startswith("@"):
            text = document(text[1:], None).text
        found[name.strip()] = text
    return found


def given(recipe: Recipe, files: Sequence[str], pages: str | None) -> list[Attachment]:
    """The documents: the files, or what comes from a pipe."""
    if not files and recipe.documents != "none" and not sys.stdin.isatty():
        data = sys.stdin.buffer.read()
        return [document("-", pages, data)] if data.strip() else []
    return [document(name, pages) for name in files]


def document(name: str, pages: str | None, data: bytes | None = None) -> Attachment:
    """The whole text of a file (`-`: stdin); what could not be read is said on stderr."""
    from mimo_local import documents
    from mimo_local.chat import Attachment

    if name == "-":
        data = sys.stdin.buffer.read() if data is None else data
        found = documents.read(data, name="stdin", pages=pages)
    else:
        found = documents.read(Path(name), name=name, pages=pages)
    for warning in found.warnings:
        say(f"{found.name}: {warning}")
    return Attachment(" ".join(found.name.split()), found.whole)


# -- the answer ------------------------------------------------------------------------------------


def answered(
    settings: Settings,
    chat: Chat,
    params: SamplingParams,
    look: Look,
    output: Path | None,
    about: dict[str, Any],
) -> int:
    """Answer the chat on stdout or into a file; the exit status."""
    from mimo_local.cli import answer
    from mimo_local.cli.summarize import check_writable

    if output is not None:
        check_writable(output)
    engine = models.open_backend(settings)
    try:
        check_room(engine, chat, params)
        if output is None:
            found = answer.ask(engine, None, chat, params, look)
            text = document_of(about, found, engine.name)
            if look.json:
                print(text)
        else:
            found = into_file(engine, chat, params, look, output, about)
    finally:
        engine.close()
    return ExitCode.INTERRUPTED if found.reason == "cancelled" else ExitCode.OK


def document_of(about: dict[str, Any], found: Answer, model: str) -> str:
    """The one document of --json."""
    from mimo_local.cli.answer import as_dict

    return jsonlib.dumps({**about, **as_dict(found, model)}, ensure_ascii=False)


def into_file(
    engine: Backend,
    chat: Chat,
    params: SamplingParams,
    look: Look,
    output: Path,
    about: dict[str, Any],
) -> Answer:
    """Answer into a file, with a look at it on stderr; what was made is saved in any case."""
    from mimo_local.cli import answer
    from mimo_local.cli.summarize import save

    copy = _Copy(live=sys.stderr.isatty())
    try:
        with redirect_stdout(copy):
            found = answer.ask(engine, None, chat, params, look)
    except BaseException:
        if copy.text.strip():
            save(output, copy.text)
            say(f"what was made until then is in {output}")
        raise
    text = document_of(about, found, engine.name) if look.json else found.text.strip()
    save(output, text + "\n")
    stopped = found.reason == "cancelled"
    say(f"stopped; what was made is in {output}" if stopped else f"written to {output}")
    return found


class _Copy(io.TextIOBase):
    """Stands in for stdout: keeps the text, and shows it on stderr if that is a terminal."""

    def __init__(self, *, live: bool) -> None:
        self.text = ""
        self._live = live

    def write(self, text: str) -> int:
        self.text += text
        if self._live:
            sys.stderr.write(text)
            sys.stderr.flush()
        return len(text)


def check_room(engine: Backend, chat: Chat, params: SamplingParams) -> None:
    """ContextOverflowError with the numbers if there is no room for an answer; a note if little."""
    if engine.tokenizer is None or not getattr(engine, "counts_exactly", True):
        return  # said by `ask`, or by a server that alone can count
    texts = (chat.system, chat.messages[-1].text)
    n = sum(len(engine.tokenizer.encode(text)) for text in texts) + TEMPLATE
    limit = engine.context_limit
    if n + min(LEAST_ANSWER, params.max_tokens) > limit:
        need = -(-(n + params.max_tokens) // 1024) * 1024
        config = getattr(engine, "config", None)  # a server's is its own
        most = config.max_context if config is not None else 0
        more = f"--context {need} makes it fit, " if need <= most else ""
        files = [file.name for file in chat.messages[-1].attachments if file.name != "stdin"]
        raise ContextOverflowError(
            f"recipe and documents are {n:,} tokens, the context holds {limit:,}",
            hint=f"{more}--pages takes a part of a document"
            f", `mimo summarize {' '.join(files) or '-'}` reads any length",
        )
    if n + params.max_tokens > limit:
        say(f"the prompt is {n:,} tokens: there is room for {limit - n:,} more in the context")
