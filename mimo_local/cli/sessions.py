"""`mimo sessions`: chats whose keys and values rest on disk; how large they are, remove them.

Reads manifests only: no model, no torch. A removed one loses nothing but time: its chat is read
again from its text when it goes on.
"""

from __future__ import annotations

import json as jsonlib
import shutil
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mimo_local.cli.models import JsonOption
from mimo_local.cli.status import duration, say
from mimo_local.errors import ExitCode, UsageError

if TYPE_CHECKING:
    from mimo_local.session_store import SessionStore

app = typer.Typer(help="Chats that rest on disk and go on at once.", rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def group(context: typer.Context) -> None:
    """Chats that rest on disk and go on at once; without a command: list them."""
    if context.invoked_subcommand is None:
        show()


@app.command(name="list")
def show(json: JsonOption = False) -> int:
    """List what rests on disk: id, tokens, bytes, when it was used, first words."""
    from mimo_local.sizes import gb

    store = _store()
    saved = [
        {
            "id": s.id,
            "model": s.model,
            "tokens": len(s.ids),
            "bytes": s.nbytes,
            "used": s.used,
            "title": s.title,
        }
        for s in reversed(store.sessions())
    ]
    found = {
        "folder": str(store.folder),
        "bytes": store.nbytes,
        "limit": store.limit,
        "unreadable": store.unreadable,
        "sessions": saved,
    }
    if json:
        print(jsonlib.dumps(found, ensure_ascii=False))
        return ExitCode.OK
    print(_table(saved) if saved else "no chat rests on disk")
    print(f"\n{gb(store.nbytes)} of at most {gb(store.limit)} (`sessions_size`) in {store.folder}")
    if store.unreadable:
        say(f"note: {store.unreadable} more are of another version, or not yours to read")
    return ExitCode.OK


@app.command(name="rm")
def remove(
    ids: Annotated[
        list[str] | None, typer.Argument(help="ids from the list", metavar="ID...")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="all of them")] = False,
) -> int:
    """Delete saved sessions; the chats themselves stay, and are read again when they go on."""
    from mimo_local.sizes import gb

    store = _store()
    if everything == bool(ids):
        raise UsageError(
            "give either ids or --all", hint="`mimo sessions` lists what there is, with ids"
        )
    if not everything:
        known = {s.id for s in store.sessions()}
        unknown = [ident for ident in ids or () if ident not in known]
        if unknown:
            raise UsageError(
                f"no session is called `{unknown[0]}`", hint="`mimo sessions` lists them"
            )
    freed = store.remove_all() if everything else store.remove(*(ids or ()))
    print(f"{gb(freed)} freed in {store.folder}")
    return ExitCode.OK


def _store() -> SessionStore:
    from mimo_local.session_store import FOLDER, SessionStore
    from mimo_local.settings import Paths, Settings

    return SessionStore(Paths.default().cache_dir / FOLDER, Settings.resolve().sessions_size)


def _table(saved: list[dict[str, Any]]) -> str:
    """Newest first; what it takes is counted with what it shares with its branches."""
    from mimo_local.sizes import gb

    lines = [f"{'id':<9} {'tokens':>8} {'size':>9} {'used':>11}  {'model':<24} first words"]
    width = max(80, shutil.get_terminal_size().columns) if sys.stdout.isatty() else 1000
    for s in saved:
        age = f"{duration(max(0.0, time.time() - s['used']))} ago"
        row = f"{s['id']:<9} {s['tokens']:>8,} {gb(s['bytes']):>9} {age:>11}  "
        lines.append(_cut(f"{row}{_cut(s['model'], 24):<24} {s['title']}", width))
    return "\n".join(lines)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
