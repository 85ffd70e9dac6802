"""`mimo chat`: one answer on stdout, or the chat window when there is nothing to answer.

Options become Settings; files are read by `documents`; the answering itself is in `answer`.
"""

from __future__ import annotations

import sys
from dataclasses import replace
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
    ThreadsOption,
    VramOption,
    option,
)
from mimo_local.errors import UsageError
from mimo_local.settings import Settings, describe

if TYPE_CHECKING:
    from tui.bridge import ChatDefaults

Prompt = Annotated[
    str | None, typer.Argument(help="what to answer; piped text is put before it", metavar="PROMPT")
]
Files = Annotated[
    list[str] | None,
    typer.Option("-f", "--file", help="add a document; repeatable, - is stdin", metavar="FILE"),
]
Stops = Annotated[
    list[str] | None,
    typer.Option("--stop", help="end the answer before this text; repeatable", metavar="TEXT"),
]
Preset = Annotated[str | None, option("preset", metavar="NAME")]
Temperature = Annotated[float | None, option("temperature", metavar="X")]
TopP = Annotated[float | None, option("top_p", metavar="X")]
TopK = Annotated[int | None, option("top_k", metavar="N")]
MinP = Annotated[float | None, option("min_p", metavar="X")]
Penalty = Annotated[float | None, option("repetition_penalty", metavar="X")]
Presence = Annotated[float | None, option("presence_penalty", metavar="X")]
Frequency = Annotated[float | None, option("frequency_penalty", metavar="X")]
System = Annotated[str | None, option("system", "-s", "--system", metavar="TEXT")]
Think = Annotated[bool | None, typer.Option("--think/--no-think", help=describe("think"))]
Stats = Annotated[bool, typer.Option("--stats", help="print speeds and token counts on stderr")]
Plain = Annotated[
    bool, typer.Option("--plain", help="chat line by line instead of in a window, no colours")
]
Last = Annotated[bool, typer.Option("-c", "--continue", help="go on with the last chat")]
Number = Annotated[
    int | None,
    typer.Option("--id", help="go on with this chat of `mimo history list`", metavar="N"),
]
Kept = Annotated[bool | None, typer.Option("--history/--no-history", help=describe("history"))]


def chat(
    prompt: Prompt = None,
    file: Files = None,
    model: ModelOption = None,
    preset: Preset = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = None,
    presence_penalty: Presence = None,
    frequency_penalty: Frequency = None,
    max_tokens: MaxTokensOption = None,
    seed: SeedOption = None,
    system: System = None,
    think: Think = None,
    stop: Stops = None,
    context: ContextOption = None,
    threads: ThreadsOption = None,
    ram: RamOption = None,
    device: DeviceOption = None,
    vram: VramOption = None,
    draft: DraftOption = None,
    json: JsonOption = False,
    stats: Stats = False,
    plain: Plain = False,
    last: Last = False,
    number: Number = None,
    history: Kept = None,
    remote: RemoteOption = None,
    remote_model: RemoteModelOption = None,
) -> int:
    """Answer one prompt, or open the chat window.

    The window opens when there is no PROMPT, no file and no piped text. The answer goes to stdout,
    everything else to stderr. Ctrl-C stops the answer and keeps it.
    """
    flags = {name: value for name, value in locals().items() if name in Settings.__slots__}
    settings = Settings.resolve(**flags)
    if last and number is not None:
        raise UsageError("-c and --id name two chats", hint="give one of them")
    from mimo_local.cli import answer
    from mimo_local.cli.keep import Keeper

    question = answer.question(prompt, tuple(file or ()))
    look = answer.Look(json=json, stats=stats, plain=plain, stop=tuple(stop or ()))
    if question is None:
        # Plain chat writes its answers wherever stdout goes; the window wants both to be terminals.
        if not sys.stdin.isatty() or not (sys.stdout.isatty() or plain):
            raise UsageError("there is no prompt", hint='try `mimo chat "your question"`')
        if not plain and not json and sys.stderr.isatty():  # the window is drawn on stderr
            return window(settings, look.stop, last=last, number=number)
    keeper = Keeper.open(settings, last=last, number=number)
    try:
        if question is not None:
            return answer.once(settings, question, look, keeper)
        return answer.lines(settings, look, keeper)
    finally:
        keeper.close()


def window(
    settings: Settings, stop: tuple[str, ...], *, last: bool = False, number: int | None = None
) -> int:
    """The chat window; without a model it finds or builds one itself, before the user's eyes."""
    chosen = settings
    if not models.is_remote(settings):
        chosen = replace(settings, remote=None)
        chosen = models.choose(chosen) if chosen.model is not None else chosen
    if last or number is not None:
        from mimo_local.cli.keep import find

        number = find(number)
    from tui.app import run

    return run(chosen, defaults(chosen, stop, number))


def defaults(settings: Settings, stop: tuple[str, ...], chat_id: int | None = None) -> ChatDefaults:
    """What a new chat of the window starts with."""
    from mimo_local.cli.answer import overrides
    from tui.bridge import ChatDefaults

    return ChatDefaults(
        preset=settings.preset,
        system=settings.system or "",
        thinking=settings.think,
        overrides=overrides(settings),
        stop=stop,
        chat_id=chat_id,
    )
