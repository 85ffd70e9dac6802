"""Which model a command runs, and opening it: the one seam to the engine, replaced in tests.

Order: --model, MIMO_MODEL, config.toml (all three are `settings.model`), the first finished pack in
the packs folder, the demo model. Says on stderr what it chose. `open_backend` asks the server of
`settings.remote` instead. Used by all commands that answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mimo_local.cli.status import Status, say
from mimo_local.errors import UsageError
from mimo_local.settings import Paths, Settings, describe

if TYPE_CHECKING:
    from mimo_local.chat import Backend
    from mimo_local.engine import Engine
    from mimo_local.events import Progress

DEMO_NOTE = "demo model: SmolLM2-135M in MiMo-V2's architecture, not MiMo"


def option(name: str, *flags: str, metavar: str, **more: Any) -> Any:
    """A typer option whose help is the setting's own description."""
    return typer.Option(
        *(flags or (f"--{name.replace('_', '-')}",)), help=describe(name), metavar=metavar, **more
    )


ModelOption = Annotated[str | None, option("model", "-m", "--model", metavar="PATH")]
ContextOption = Annotated[int | None, option("context", metavar="N")]
ThreadsOption = Annotated[int | None, option("threads", metavar="N")]
DeviceOption = Annotated[str | None, option("device", metavar="WHERE")]
VramOption = Annotated[str | None, option("vram", metavar="SIZE")]
RamOption = Annotated[str | None, option("ram", metavar="SIZE")]
DraftOption = Annotated[str | None, option("draft", metavar="HOW")]
SeedOption = Annotated[int | None, option("seed", metavar="N")]
MaxTokensOption = Annotated[int | None, option("max_tokens", metavar="N")]
RemoteOption = Annotated[str | None, option("remote", metavar="URL")]
RemoteModelOption = Annotated[str | None, option("remote_model", metavar="NAME")]
JsonOption = Annotated[bool, typer.Option("--json", help="print one JSON document")]


def choose(settings: Settings) -> Settings:
    """The same settings with `model` filled in; builds the demo pack if there is nothing else."""
    if settings.model is not None:
        if not settings.model.exists():
            origin = settings.origin.get("model", "flag").replace("flag", "--model")
            raise UsageError(
                f"the model `{settings.model}` (from {origin}) does not exist",
                hint="give the folder of a pack or a checkpoint, or none for the demo model",
            )
        return settings
    pack = Paths.default().first_pack()
    if pack is not None:
        say(f"model: {pack.name} (from {pack.parent})")
        return replace(settings, model=pack)
    model = demo_pack()
    say(DEMO_NOTE)
    return replace(settings, model=model)


def demo_pack(*, variant: str = "swa", fmt: str = "int8", rebuild: bool = False) -> Path:
    """The demo's pack, built on first use with progress on stderr."""
    from mimo_local import demo

    status = Status()
    try:
        return demo.demo_pack(on_progress=status, variant=variant, fmt=fmt, rebuild=rebuild)
    finally:
        status.clear()


def open_engine(settings: Settings, tell: Callable[[Progress], None] | None = None) -> Engine:
    """Choose and load the model, with progress on stderr (and to `tell`); says what it is."""
    chosen = choose(settings)
    from mimo_local.engine import Engine

    status = Status()

    def on_event(progress: Progress) -> None:
        status(progress)
        if tell is not None:
            tell(progress)

    try:
        engine = Engine.load(chosen, on_event)
    finally:
        status.clear()
    say(engine.description)
    return engine


def is_remote(settings: Settings) -> bool:
    """Whether a server answers: one is set, and no model was typed over a setting."""
    if not settings.remote:
        return False
    typed = {name for name in ("model", "remote") if settings.origin.get(name) == "flag"}
    if typed == {"model", "remote"}:
        raise UsageError(
            "--model is a model here, --remote one somewhere else",
            hint="give one of them; --remote-model names the model there",
        )
    return "model" not in typed


def open_backend(settings: Settings) -> Backend:
    """The engine of a model here or the server of `settings.remote`; says which on stderr."""
    if not is_remote(settings):
        return open_engine(settings)
    from mimo_local.remote import Remote

    status = Status()
    try:
        remote = Remote.open(settings, status)
    finally:
        status.clear()
    say(remote.description)
    say(remote.privacy)
    return remote
