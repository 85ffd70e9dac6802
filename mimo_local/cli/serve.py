"""`mimo serve`: an OpenAI-compatible server for one model, until Ctrl-C.

Options become `server.options.Options`; the server itself is `server.run`. stdout stays empty.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mimo_local.cli import models
from mimo_local.cli.models import (
    ContextOption,
    DeviceOption,
    DraftOption,
    ModelOption,
    RamOption,
    ThreadsOption,
    VramOption,
    option,
)
from mimo_local.cli.status import say
from mimo_local.errors import UsageError
from mimo_local.events import Progress
from mimo_local.settings import Settings, describe, parse_size

if TYPE_CHECKING:
    from mimo_local.engine import Engine
    from mimo_local.sampler import SamplingParams
    from mimo_local.server.options import Options

KEY_VARIABLE = "MIMO_API_KEY"

Host = Annotated[str, typer.Option(help="address to listen on", metavar="ADDRESS")]
Port = Annotated[
    int, typer.Option(help="port to listen on; 0: a free one", metavar="N", min=0, max=65535)
]
Keys = Annotated[
    list[str] | None,
    typer.Option("--api-key", help="a key that opens the server; repeatable", metavar="KEY"),
]
KeyFile = Annotated[
    Path | None, typer.Option("--api-key-file", help="a file of keys, one a line", metavar="FILE")
]
Cors = Annotated[
    list[str] | None,
    typer.Option("--cors", help="let web pages of this origin ask; repeatable", metavar="ORIGIN"),
]
AllowHost = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-host", help="another name of this machine in URLs; repeatable", metavar="NAME"
    ),
]
Alias = Annotated[
    list[str] | None,
    typer.Option("--alias", help="another name the model answers to; repeatable", metavar="NAME"),
]
Requests = Annotated[
    int,
    typer.Option(
        help="answers made or waiting at one time; more get 429", metavar="N", min=1, max=10_000
    ),
]
MaxBody = Annotated[str, typer.Option(help="largest request", metavar="SIZE")]
Grace = Annotated[
    float,
    typer.Option(
        help="seconds answers may take to finish after Ctrl-C", metavar="S", min=0, max=3600
    ),
]
Stall = Annotated[
    float,
    typer.Option(
        help="seconds a client may take nothing before it is cut off", metavar="S", min=1, max=86400
    ),
]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        help="longest answer where a request does not say; unset: what the context holds",
        metavar="N",
    ),
]
Preset = Annotated[str | None, option("preset", metavar="NAME")]
System = Annotated[str | None, option("system", "-s", "--system", metavar="TEXT")]
Think = Annotated[bool | None, typer.Option("--think/--no-think", help=describe("think"))]


def serve(
    host: Host = "127.0.0.1",
    port: Port = 8080,
    api_key: Keys = None,
    api_key_file: KeyFile = None,
    cors: Cors = None,
    allow_host: AllowHost = None,
    alias: Alias = None,
    max_requests: Requests = 64,
    max_body: MaxBody = "16MB",
    grace: Grace = 5.0,
    stall: Stall = 60.0,
    model: ModelOption = None,
    preset: Preset = None,
    max_tokens: MaxTokens = None,
    system: System = None,
    think: Think = None,
    context: ContextOption = None,
    threads: ThreadsOption = None,
    ram: RamOption = None,
    device: DeviceOption = None,
    vram: VramOption = None,
    draft: DraftOption = None,
) -> int:
    """Serve the model to programs that speak OpenAI's API.

    Any of them, pointed at http://127.0.0.1:8080/v1. Only this machine can reach it; for others
    give --host and a key. Values a request leaves out come from the preset (`default` unless you
    choose one) and the settings. A key can also stand in MIMO_API_KEY. Ctrl-C stops.
    """
    flags = {name: value for name, value in locals().items() if name in Settings.__slots__}
    settings = Settings.resolve(**flags)
    from mimo_local.server.options import Options

    options = Options(
        host=host,
        port=port,
        keys=keys(api_key or (), api_key_file),
        cors=tuple(origin.rstrip("/") for origin in cors or ()),
        allowed_hosts=tuple(allow_host or ()),
        aliases=tuple(alias or ()),
        max_requests=max_requests,
        max_body=_size(max_body),
        grace_s=grace,
        stall_s=stall,
        params=sampling(settings),
        max_tokens=settings.max_tokens,
        system=settings.system or "",
        thinking=settings.think,
    )
    options.check()
    return run(settings, options)


def run(settings: Settings, options: Options) -> int:
    """Serve until stopped."""
    from mimo_local.server.run import serve as serve_until_stopped

    def opener(tell: Callable[[Progress], None]) -> Engine:
        engine = models.open_engine(settings, tell)
        say(f"ready: {engine.name}")
        return engine

    def started(url: str) -> None:
        key = "with the API key" if options.keys else "this machine only, no key"
        say(f"serving {url}/v1 ({key}); Ctrl-C stops")

    serve_until_stopped(options, opener, started)
    say("stopped")
    return 0


def keys(given: tuple[str, ...] | list[str], file: Path | None) -> tuple[str, ...]:
    """All keys: typed, from the file, from the environment."""
    found = [*given, *((os.environ[KEY_VARIABLE],) if os.environ.get(KEY_VARIABLE) else ())]
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
            if stat.S_IMODE(file.stat().st_mode) & 0o077:
                say(f"note: others can read {file}: `chmod 600` it")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"{file} cannot be read: {error}", hint="it holds one key a line"
            ) from error
        in_file = [line.strip() for line in lines if line.strip() and line[0] != "#"]
        if not in_file:
            raise UsageError(f"there is no key in {file}", hint="it holds one key a line")
        found += in_file
    return tuple(found)


def sampling(settings: Settings) -> SamplingParams:
    """What requests get that say nothing: the preset's values, the user's own on top."""
    from mimo_local.chat import preset
    from mimo_local.sampler import SamplingParams

    chosen = settings.origin.get("preset", "default") != "default"
    names = [f.name for f in fields(SamplingParams) if f.name != "max_tokens"]
    own = {name: getattr(settings, name) for name in names}
    return preset(settings.preset if chosen else "default").params(**own)


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise UsageError(f"--max-body is {text!r}, but must be {error}", hint="like 16MB") from None
