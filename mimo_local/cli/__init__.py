"""The `mimo` command: parse, call, render. One module per group of commands.

The only place that turns errors into text and exit codes. Imports typer and the settings, nothing
heavy: torch, textual and rich come with the command that needs them. `main` is the entry point.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated

import typer

from mimo_local import __version__
from mimo_local.cli import (
    chat,
    config,
    history,
    machine,
    measure,
    packs,
    plan,
    pull,
    replay,
    run,
    serve,
    sessions,
    summarize,
    trace,
)
from mimo_local.cli.status import say
from mimo_local.errors import ExitCode, MimoError
from mimo_local.settings import Paths

app = typer.Typer(
    name="mimo",
    rich_markup_mode=None,  # user text and [p. 12] must not be read as markup
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mimo {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def top(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="show the trace of an unexpected error")
    ] = False,
) -> None:
    """Run MiMo-V2-Flash (309 B parameters) on the desktop you own.

    Start with `mimo chat`: without a model of your own it uses a small demo model.
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


app.command(name="chat")(chat.chat)
app.command(name="summarize")(summarize.summarize)
app.command(name="serve")(serve.serve)
app.command(name="run")(run.run)
app.command(name="pull")(pull.pull)
app.command(name="quantize")(packs.quantize)
app.command(name="verify")(packs.verify)
app.command(name="measure")(measure.measure)
app.command(name="demo")(packs.demo)
app.command(name="plan")(plan.plan)
app.command(name="doctor")(machine.doctor)
app.command(name="bench")(machine.bench)
app.command(name="trace")(trace.trace)
app.command(name="replay")(replay.replay)
app.add_typer(history.app, name="history")
app.add_typer(sessions.app, name="sessions")
app.add_typer(config.app, name="config")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: this process's); returns the exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        code = typer.main.get_command(app).main(args, prog_name="mimo", standalone_mode=False)
    except MimoError as error:
        return fail(error.message, error.hint, error.exit_code)
    except (KeyboardInterrupt, typer.Abort):  # newer typers return 130 instead
        code = ExitCode.INTERRUPTED
    except BrokenPipeError:  # `mimo ... | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.FAILED
    except Exception as error:
        if hasattr(error, "format_message"):  # typer's own: a wrong option or argument
            shown = getattr(error, "ctx", None)
            where = shown.command_path if shown is not None else "mimo"
            return fail(error.format_message(), f"`{where} --help` lists them", ExitCode.USAGE)
        return unexpected(error, debug="--debug" in args)
    if code == ExitCode.INTERRUPTED:
        say("\nstopped")
    return int(code or ExitCode.OK)


def fail(message: str, hint: str, code: ExitCode) -> int:
    """One line, a blank line, a hint: on stderr."""
    say(f"error: {message.rstrip('.')}\n\nhint: {hint}")
    return code


def unexpected(error: Exception, *, debug: bool) -> int:
    """An error nobody foresaw: one line and the file with the trace, or with `debug` the trace."""
    if isinstance(error, MemoryError):
        return fail("out of memory", "`mimo plan` says what the model needs", ExitCode.MEMORY)
    trace = "".join(traceback.format_exception(error))
    message = f"unexpected {type(error).__name__}: {error}"
    if debug:
        say(trace.rstrip())
        return fail(message, "please report it with the lines above", ExitCode.FAILED)
    hint = "`mimo --debug ...` shows the trace"
    path = Paths.default().cache_dir / "logs" / f"{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"mimo {__version__}\n{trace}", encoding="utf-8")
        hint = f"the trace is in {path}; please report it"
    except OSError:
        pass  # a full or read-only disk must not hide the error itself
    return fail(message, hint, ExitCode.FAILED)
