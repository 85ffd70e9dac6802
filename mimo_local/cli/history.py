"""`mimo history`: list, find, show, export, import, rename and remove saved chats.

Data goes to stdout and fits the terminal, notes to stderr; what was saved never reaches a terminal
with control characters in it. All work is in `mimo_local.history`.
"""

from __future__ import annotations

import json as jsonlib
import re
import sys
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mimo_local.cli.models import JsonOption
from mimo_local.cli.status import colours, say
from mimo_local.errors import ExitCode, UsageError
from mimo_local.settings import Paths

if TYPE_CHECKING:
    from mimo_local.history import ChatInfo, History, Hit, Stored

app = typer.Typer(
    help="List, find, show, export, import and remove saved chats; alone it lists them.",
    rich_markup_mode=None,
)
BOLD, DIM, PLAIN = "\x1b[1m", "\x1b[2m", "\x1b[0m"
MOST_BYTES = 1 << 30
"""Of a file to import; parsed JSON takes several times that."""

Identity = Annotated[int, typer.Argument(help="number of the chat, as in `list`", metavar="ID")]
Identities = Annotated[
    list[int], typer.Argument(help="numbers of chats, as in `list`", metavar="ID")
]
Limit = Annotated[int, typer.Option("-n", "--limit", help="at most so many", min=1, metavar="N")]
Output = Annotated[
    Path | None, typer.Option("-o", "--output", help="write to this file", metavar="FILE")
]
Yes = Annotated[bool, typer.Option("-y", "--yes", help="do not ask")]


@app.callback(invoke_without_command=True)
def group(context: typer.Context) -> None:
    """List, find, show, export, import and remove saved chats; alone it lists them."""
    if context.invoked_subcommand is None:
        list_()


@app.command(name="list")
def list_(limit: Limit = 20, json: JsonOption = False) -> int:
    """List chats, those used last first."""
    with opened() as history:
        found = history.chats(limit + 1)
    if json:
        return document({"chats": [asdict(chat) for chat in found[:limit]]})
    if not found:
        say("no chats are saved yet: `mimo chat` begins one")
        return ExitCode.OK
    width = max(2, *(len(str(chat.id)) for chat in found))
    print(fit(f"{'id':>{width}}  {'last used':<16}  messages  title"))
    for chat in found[:limit]:
        print(fit(f"{chat.id:>{width}}  {when(chat.updated)}  {chat.n_messages:>8}  {name(chat)}"))
    if len(found) > limit:
        say("there are more: `-n` shows them, `mimo history search` finds them")
    return ExitCode.OK


@app.command()
def search(
    text: Annotated[list[str], typer.Argument(help="words that all must be there", metavar="TEXT")],
    limit: Limit = 20,
    json: JsonOption = False,
) -> int:
    """Find chats by the words of their titles and messages.

    The last word may be just a beginning. Parts of Chinese text are found too.
    """
    with opened() as history:
        found = history.search(" ".join(text), limit)
    if json:
        return document({"hits": [_hit(hit) for hit in found]})
    if not found:
        say("nothing found")
        return ExitCode.OK
    chats = {hit.chat.id: hit.chat for hit in found}
    titles = {hit.chat.id: hit.snippet for hit in found if hit.message_id is None}
    width = max(len(str(chat)) for chat in chats)
    for chat in chats.values():  # in the order of their best hit
        title = titles.get(chat.id, name(chat))
        print(marked(fit(f"{chat.id:>{width}}  {when(chat.updated)}  {title}")))
        for hit in found:
            if hit.chat.id == chat.id and hit.message_id is not None:
                print(marked(fit(f"{'':{width}}  {hit.snippet}")))
    return ExitCode.OK


@app.command()
def show(
    chat: Annotated[
        int | None, typer.Argument(help="number of the chat; default: the last one", metavar="ID")
    ] = None,
    json: JsonOption = False,
) -> int:
    """Print a chat: its active branch, or with --json everything."""
    from mimo_local.history.export import visible

    with opened() as history:
        identity = _last(history) if chat is None else chat
        if json:
            return document(history.export_json(identity))
        info, branch = history.chat(identity), history.messages(identity)
    bold, plain = (BOLD, PLAIN) if colours(sys.stdout) else ("", "")
    print(f"{bold}{name(info)}{plain}\nchat {info.id}, {_facts(info)}")
    if info.system:
        print(f"\n{bold}System{plain}\n{visible(info.system)}")
    for stored in branch:
        _show(stored)
    if info.n_branches > 1:
        say(f"\none of {info.n_branches} branches; `mimo history export --json {info.id}` has all")
    return ExitCode.OK


@app.command()
def export(
    chats: Annotated[
        list[int] | None, typer.Argument(help="numbers of chats, as in `list`", metavar="ID")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="every chat")] = False,
    output: Output = None,
    json: Annotated[
        bool, typer.Option("--json", help="all branches and figures, for `mimo history import`")
    ] = False,
) -> int:
    """Write chats as Markdown, or with --json as a backup of everything."""
    from mimo_local.cli.summarize import check_writable, save

    if bool(chats) == every:
        raise UsageError("say which chats", hint="give their numbers, or --all")
    if output is not None:
        check_writable(output)
    with opened() as history:
        wanted = list(chats or ()) or [chat.id for chat in history.chats(limit=-1)]
        if json:
            found = [history.export_json(chat) for chat in wanted]
            data = found[0] if len(found) == 1 and not every else {"chats": found}
            text = jsonlib.dumps(data, ensure_ascii=False, indent=1) + "\n"
        else:
            text = "\n---\n\n".join(map(history.export_markdown, wanted))
    if output is None:
        print(escaped(text) if json else text, end="")
    else:
        save(output, text)
        say(f"{len(wanted)} {'chat' if len(wanted) == 1 else 'chats'} written to {output}")
    return ExitCode.OK


@app.command(name="import")
def import_(
    files: Annotated[
        list[str],
        typer.Argument(help="JSON, or a ChatGPT export's zip; - is stdin", metavar="FILE"),
    ],
    json: JsonOption = False,
) -> int:
    """Save chats from files: our own exports, OpenAI messages, ChatGPT exports.

    A file is imported whole or not at all.
    """
    ids: list[int] = []
    with opened() as history:
        for file in files:
            found = history.import_chats(parsed(file))
            ids += found
            if not json:
                for chat in found[:10]:
                    print(fit(f"{chat}  {name(history.chat(chat))}"))
                say(f"{len(found)} {'chat' if len(found) == 1 else 'chats'} imported from {file}")
    return document({"imported": ids}) if json else ExitCode.OK


@app.command()
def rename(
    chat: Identity,
    title: Annotated[list[str], typer.Argument(help="the new title", metavar="TITLE")],
    json: JsonOption = False,
) -> int:
    """Give a chat another title."""
    with opened() as history:
        history.rename(chat, " ".join(title))
        info = history.chat(chat)
    if json:
        return document({"id": info.id, "title": info.title})
    say(f"chat {info.id} is now: {name(info)}")
    return ExitCode.OK


@app.command()
def rm(chats: Identities, yes: Yes = False, json: JsonOption = False) -> int:
    """Remove chats with all their branches; nothing of them is kept."""
    with opened() as history:
        found = [history.chat(chat) for chat in dict.fromkeys(chats)]  # all there, before any goes
        if not yes:
            for info in found:
                say(fit(f"{info.id}  {when(info.updated)}  {name(info)} ({messages(info)})"))
            if not sys.stdin.isatty():
                raise UsageError("removing asks first", hint="`--yes` removes without asking")
            what = "this chat" if len(found) == 1 else f"these {len(found)} chats"
            print(f"remove {what} for good? [y/N] ", end="", file=sys.stderr, flush=True)
            if sys.stdin.readline().strip().lower() not in ("y", "yes"):
                say("nothing was removed")
                return ExitCode.FAILED
        for info in found:
            history.remove(info.id)
    if json:
        return document({"removed": [info.id for info in found]})
    say(f"{len(found)} {'chat' if len(found) == 1 else 'chats'} removed")
    return ExitCode.OK


@app.command()
def path(json: JsonOption = False) -> int:
    """Print the file chats are saved in."""
    file = Paths.default().history_file
    if json:
        size = file.stat().st_size if file.is_file() else 0
        return document({"path": str(file), "exists": file.is_file(), "bytes": size})
    print(file)
    return ExitCode.OK


# -- below -----------------------------------------------------------------------------------------


def opened() -> History:
    """The user's history."""
    from mimo_local.history import History

    return History.open(Paths.default().history_file)


def parsed(file: str) -> Any:
    """The JSON in a file, in a ChatGPT export's zip, or on stdin; UsageError if there is none."""
    try:
        data = sys.stdin.buffer.read(MOST_BYTES + 1) if file == "-" else _bytes(Path(file))
    except OSError as error:
        raise UsageError(
            f"`{file}` cannot be read: {error.strerror or error}", hint="give a file that exists"
        ) from error
    if len(data) > MOST_BYTES:
        raise UsageError(f"`{file}` has more than 1 GiB", hint="import it in parts")
    try:
        return jsonlib.loads(data)
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"`{file}` is no JSON: {error}",
            hint="give an export of `mimo history export --json`, OpenAI messages, "
            "or the zip or conversations.json of a ChatGPT export",
        ) from error


def _bytes(file: Path) -> bytes:
    """A file's content, or that of the conversations.json in a zip; at most one byte too many."""
    import zipfile

    with file.open("rb") as opened:
        if opened.read(4) != b"PK\x03\x04":
            opened.seek(0)
            return opened.read(MOST_BYTES + 1)
    try:
        with zipfile.ZipFile(file) as archive, archive.open("conversations.json") as inside:
            return inside.read(MOST_BYTES + 1)
    except (KeyError, zipfile.BadZipFile, RuntimeError, EOFError) as error:
        raise UsageError(
            f"there is no readable conversations.json in `{file}`",
            hint="give the zip of a ChatGPT export, or a JSON file",
        ) from error


def document(data: Any) -> int:
    """The one document of --json."""
    print(escaped(jsonlib.dumps(data, ensure_ascii=False)))
    return ExitCode.OK


def escaped(text: str) -> str:
    """JSON without the control characters that JSON itself leaves as they are."""
    return re.sub(
        r"[\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]", lambda m: f"\\u{ord(m[0]):04x}", text
    )


def fit(line: str) -> str:
    """A line cut to the terminal."""
    from mimo_local.cli.tables import fit as cut

    return cut(line)


def marked(line: str) -> str:
    """Matches in bold on a terminal with colours, else as they are."""
    bold, plain = (BOLD, PLAIN) if colours(sys.stdout) else ("", "")
    return line.replace("\x02", bold).replace("\x03", plain)


def name(chat: ChatInfo) -> str:
    """A chat's title, safe for any terminal."""
    from mimo_local.history.words import plain

    return plain(chat.title) or "(no title)"


def messages(chat: ChatInfo) -> str:
    """How many there are, in words."""
    return f"{chat.n_messages} {'message' if chat.n_messages == 1 else 'messages'}"


def when(seconds: float) -> str:
    """Date and time here, 16 places."""
    return f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M}"


def _last(history: History) -> int:
    last = history.last()
    if last is None:
        raise UsageError("no chats are saved yet", hint="`mimo chat` begins one")
    return last.id


def _facts(info: ChatInfo) -> str:
    from mimo_local.history.words import plain

    parts = [when(info.created), messages(info), f"preset {plain(info.preset)}"]
    parts += ["thinking"] if info.thinking else []
    parts += [plain(info.model)] if info.model else []
    return ", ".join(parts)


def _show(stored: Stored) -> None:
    """A message under who said it; thinking is dim."""
    from mimo_local.history.export import NAMES, visible
    from mimo_local.history.words import plain as line

    bold, dim, plain = (BOLD, DIM, PLAIN) if colours(sys.stdout) else ("", "", "")
    message, tokens = stored.message, stored.stats.get("completion_tokens")
    figures = f"  {dim}{tokens} tokens{plain}" if isinstance(tokens, int) else ""
    print(f"\n{bold}{NAMES[message.role]}{plain}  {dim}{when(stored.created)}{plain}{figures}")
    for attachment in message.attachments:
        print(f"{dim}[{line(attachment.name)}, {len(attachment.text):,} characters]{plain}")
    if message.reasoning:
        print(f"{dim}(thinking) {visible(message.reasoning).strip()}{plain}\n")
    if message.content:
        print(visible(message.content).rstrip())
    for call in message.tool_calls:
        print(f"{dim}calls{plain} {line(call.name)}({line(call.arguments)})")


def _hit(hit: Hit) -> dict[str, Any]:
    """A hit for scripts: the snippet without marks, and where they were."""
    text, places, start = "", list[list[int]](), 0
    for char in hit.snippet:
        if char == "\x02":
            start = len(text)
        elif char == "\x03":
            places.append([start, len(text)])
        else:
            text += char
    chat = asdict(hit.chat)
    return {"chat": chat, "message_id": hit.message_id, "snippet": text, "matches": places}
