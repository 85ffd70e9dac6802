"""`mimo trace`: texts in, a file of which experts the model chose for them out.

Texts become ids here, progress goes to stderr; recording is `tracing`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mimo_local.chat import Message
from mimo_local.cli import answer, models
from mimo_local.cli.models import ContextOption, ModelOption, SeedOption, ThreadsOption
from mimo_local.cli.status import Status, amount, say
from mimo_local.errors import ExitCode, UsageError
from mimo_local.events import Progress
from mimo_local.settings import Settings

if TYPE_CHECKING:
    from mimo_local.loading import Loaded
    from mimo_local.tracing import Tracer

Texts = Annotated[
    list[str], typer.Argument(help="texts, or documents; - is stdin", metavar="TEXT-OR-FILE...")
]
Out = Annotated[Path, typer.Option("-o", "--output", help="the trace file", metavar="FILE")]
Generate = Annotated[
    int,
    typer.Option("--generate", help="answer each as a message, up to N tokens", metavar="N"),
]
Guesses = Annotated[
    bool, typer.Option("--guesses", help="also what the next layer's router would have guessed")
]


def trace(
    texts: Texts,
    output: Out,
    generate: Generate = 0,
    guesses: Guesses = False,
    model: ModelOption = None,
    context: ContextOption = None,
    threads: ThreadsOption = None,
    seed: SeedOption = None,
) -> int:
    """Record which experts the model chooses, token by token.

    Reads each text as it is; with --generate as a message it answers. Ctrl-C ends it and keeps what
    was traced. `mimo replay` shows what a cache of experts would have made of it.
    """
    found = [source(text) for text in texts]
    settings = Settings.resolve(model=model, context=context, threads=threads, seed=seed)
    loaded, expert_nbytes = load(settings)
    from mimo_local.routing_trace import TraceWriter
    from mimo_local.tracing import Tracer, facts_of

    facts = facts_of(loaded.model, loaded.name, expert_nbytes, guesses=guesses)
    stopped: list[bool] = []
    with (
        TraceWriter(output, facts) as out,
        Tracer(loaded.model, loaded.new_cache, out, loaded.context_limit) as tracer,
        answer.on_interrupt(lambda: stopped.append(True)),
    ):
        _record(tracer, loaded, settings, found, generate, stopped)
    if not out.tokens:
        say("nothing was traced")
        return ExitCode.INTERRUPTED if stopped else ExitCode.FAILED
    say(f"{amount(out.tokens, 'tokens')} traced")
    print(output)
    return ExitCode.INTERRUPTED if stopped else ExitCode.OK


def source(given: str) -> tuple[str, str]:
    """(name, text) of an argument: a document if there is such a file, else itself."""
    if given == "-" or Path(given).is_file():
        return given, Message("user", "", attachments=(answer.attachment(given),)).text
    if " " not in given and (Path(given).suffix or "/" in given):
        raise UsageError(f"there is no file `{given}`", hint="a text of one word needs no dots")
    return "argument", given


def load(settings: Settings) -> tuple[Loaded, int]:
    """(parts of an engine, bytes of an expert) of the chosen model: the seam the tests replace."""
    chosen = models.choose(settings)
    from mimo_local.cli.plan import subject
    from mimo_local.loading import load as load_parts

    status = Status()
    try:
        loaded = load_parts(chosen, status)
    finally:
        status.clear()
    say(loaded.description)
    if loaded.tokenizer is None:
        raise UsageError(
            f"{loaded.name} has no tokenizer", hint="put its tokenizer files into its folder"
        )
    assert chosen.model is not None
    return loaded, subject(chosen.model, "nf4")[1].expert


def _record(
    tracer: Tracer,
    loaded: Loaded,
    settings: Settings,
    texts: Sequence[tuple[str, str]],
    generate: int,
    stopped: list[bool],
) -> None:
    tokenizer, status = loaded.tokenizer, Status()
    assert tokenizer is not None
    params = answer.sampling(settings)
    work = [
        (
            name,
            tokenizer.render_chat([{"role": "user", "content": text}])
            if generate
            else tokenizer.encode(text),
        )
        for name, text in texts
    ]
    total = sum(len(ids) + generate for _, ids in work)
    done = 0

    def on_token(n: int) -> None:
        nonlocal done
        done += n
        status(Progress("tracing", done, total, "tokens"))

    try:
        for name, ids in work:
            if stopped:
                return
            if generate:
                tracer.answer(
                    ids, name, replace(params, max_tokens=generate),
                    stop_ids=tokenizer.stop_ids, cancel=lambda: bool(stopped), on_token=on_token,
                )  # fmt: skip
            else:
                tracer.read(ids, name, cancel=lambda: bool(stopped), on_token=on_token)
    finally:
        status.clear()
