"""Reads what a person types into a plain chat: a line editor on a terminal, bare lines elsewhere.

`PromptReader` is prompt_toolkit with our keys: Enter sends, Ctrl-J, Esc Enter and an open triple
quote go on in the next line, Ctrl-R searches, Tab completes commands and paths. Knows no model and
no chat; called by `plain`. prompt_toolkit (0.35 s) is imported when the first reader is made.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from mimo_local.chat import PRESETS
from mimo_local.cli.status import colours, say
from mimo_local.commands import suggest

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import CompleteEvent, Completion
    from prompt_toolkit.document import Document
    from prompt_toolkit.history import History
    from prompt_toolkit.input import Input
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.output import Output

QUOTE = '"""'
KEPT = 2000
"""Prompts kept in the file: more than a person goes back through."""
LONGEST = 20_000
"""Characters of a prompt that is remembered: a pasted book would make every start slow."""


class Reader(Protocol):
    """Where the messages of a chat come from."""

    edits: bool
    """Whether a text can be offered for editing."""

    def read(self, label: str = "> ", offered: str = "") -> str | None:
        """The next message; empty if nothing was meant; None at the end."""
        ...

    def quiet(self) -> AbstractContextManager[None]:
        """While an answer is written: what is typed meanwhile does not get in between."""
        ...


def reader(*, plain: bool, json: bool, remember: Path | None) -> Reader:
    """The best reader these streams allow. `remember`: where typed prompts are kept, if at all.

    `json`: a program reads the answers, so it writes the prompts as well.
    """
    terminal = _is_terminal(sys.stdin) and _is_terminal(sys.stderr)
    if not terminal or json or os.environ.get("TERM") == "dumb":
        return LineReader()
    return PromptReader(colour=colours(sys.stderr) and not plain, remember=remember)


def _is_terminal(stream: TextIO) -> bool:
    """Whether the system says so, not only the object: the editor needs the real thing."""
    try:
        return os.isatty(stream.fileno())
    except (OSError, ValueError):
        return False


def unquoted(text: str) -> str:
    """The text between triple quotes; what is not quoted is the text itself."""
    text = text.strip()
    if text.startswith(QUOTE):
        return text.removeprefix(QUOTE).removesuffix(QUOTE).strip("\n")
    return text


def is_open(text: str) -> bool:
    """Whether a triple quote at the beginning has not been closed yet."""
    text = text.strip()
    return text.startswith(QUOTE) and not (len(text) >= 2 * len(QUOTE) and text.endswith(QUOTE))


class LineReader:
    """A line is a message; triple quotes hold several. For pipes and terminals without a cursor."""

    edits = False

    def read(self, label: str = "> ", offered: str = "") -> str | None:
        """The next message. A text offered for editing cannot be shown here: it is left out."""
        text = self._line(label)
        while text is not None and is_open(text):
            more = self._line(". ")
            if more is None:
                break
            text += "\n" + more
        return None if text is None else unquoted(text)

    def quiet(self) -> AbstractContextManager[None]:
        """Nothing: a pipe shows no typing, and this terminal does not show it anew later."""
        return nullcontext()

    def _line(self, label: str) -> str | None:
        try:
            print(label, end="", file=sys.stderr, flush=True)
            text = sys.stdin.readline()
        except KeyboardInterrupt:
            say("\nCtrl-D ends the chat")
            return ""
        return text.rstrip("\r\n") if text else None


class PromptReader:
    """The line editor. Draws on stderr: stdout belongs to the answer and may be a file."""

    edits = True

    def __init__(
        self,
        *,
        colour: bool = True,
        remember: Path | None = None,
        input: Input | None = None,  # noqa: A002  (prompt_toolkit's name for it)
        output: Output | None = None,
    ) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.output import ColorDepth, create_output

        self._session: PromptSession[str] = PromptSession(
            multiline=True,
            prompt_continuation="  ",
            history=history(remember),
            completer=completer(),
            complete_while_typing=True,
            key_bindings=keys(),
            enable_open_in_editor=True,
            reserve_space_for_menu=5,
            color_depth=None if colour else ColorDepth.DEPTH_1_BIT,
            input=input,
            output=output or create_output(stdout=sys.stderr),
        )

    def read(self, label: str = "> ", offered: str = "") -> str | None:
        """The next message, starting from the text `offered`."""
        try:
            return unquoted(self._session.prompt(label, default=offered))
        except EOFError:
            return None
        except KeyboardInterrupt:
            text = self._session.default_buffer.text
            if text.strip():
                # What was typed is not lost: the Up key brings it back.
                self._session.history.append_string(text)
            else:
                say("Ctrl-D or /exit ends the chat")
            return ""

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Keys typed during an answer are not echoed into it; the next prompt takes them.

        Enter must stay what it is (a CR; an LF would be Ctrl-J), Ctrl-C must not drop the rest, and
        Ctrl-D must not be swallowed.
        """
        if sys.platform == "win32":
            yield
            return
        import termios

        try:
            before = termios.tcgetattr(sys.stdin)
            off = bytes([os.fpathconf(sys.stdin.fileno(), "PC_VDISABLE")])
        except (OSError, ValueError, termios.error):
            yield
            return
        silent = list(before)
        silent[0] &= ~termios.ICRNL
        silent[3] = (silent[3] & ~termios.ECHO) | termios.NOFLSH
        silent[6] = [*before[6]]
        silent[6][termios.VEOF] = off
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, silent)
        try:
            yield
        finally:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def keys() -> KeyBindings:
    """Enter sends, unless a quote is open; Ctrl-J and Esc Enter go on in the next line."""
    from prompt_toolkit.filters import has_focus
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.key_binding.key_processor import KeyPressEvent

    bindings = KeyBindings()
    typing = has_focus("DEFAULT_BUFFER")  # not while Ctrl-R's field has the cursor

    @bindings.add("enter", filter=typing)
    def _send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if is_open(buffer.text):
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @bindings.add("c-j", filter=typing)
    @bindings.add("escape", "enter", filter=typing)
    def _newline(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    return bindings


def completer() -> Any:
    """Completes commands and their words, and paths after `/file` and `/save`."""
    from prompt_toolkit.completion import Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document

    paths = PathCompleter(expanduser=True)

    class Commands(Completer):
        def get_completions(
            self, document: Document, complete_event: CompleteEvent
        ) -> Iterable[Completion]:
            text = document.text
            if not text.startswith("/") or "\n" in text or document.text_after_cursor:
                return
            name, space, rest = text.partition(" ")
            if space and name in ("/file", "/read", "/save"):
                yield from paths.get_completions(Document(rest.lstrip()), complete_event)
                return
            for found in suggest(text, tuple(PRESETS)):
                yield Completion(
                    found.insert,
                    start_position=-len(text),
                    display=found.label,
                    display_meta=found.help,
                )

    return Commands()


def history(path: Path | None) -> History:
    """Prompts typed before, from a file only its owner can read; None: of this run alone.

    A file that cannot be read or written is said once; the prompts of this run are there anyway.
    """
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    if path is None:
        return InMemoryHistory()
    file = path

    class Prompts(FileHistory):
        broken = False

        def load_history_strings(self) -> Iterable[str]:
            return self._try(lambda: list(super(Prompts, self).load_history_strings())) or []

        def store_string(self, string: str) -> None:
            if string.strip() and len(string) <= LONGEST:
                self._try(lambda: super(Prompts, self).store_string(string))

        def _try(self, work: Callable[[], Any]) -> Any:
            if self.broken:
                return None
            try:
                secure(file)
                return work()
            except OSError as error:
                self.broken = True
                say(f"prompts are not kept: {file}: {error.strerror}")
                return None

    found = Prompts(str(file))
    found._try(lambda: trim(file))
    return found


def secure(path: Path) -> None:
    """Make the file, or its rights, such that nobody else reads it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))
    if path.stat().st_mode & 0o077:
        path.chmod(0o600)


def trim(path: Path) -> None:
    """Drop the oldest prompts beyond KEPT, by writing beside and renaming."""
    entries = list(_entries(path))
    if len(entries) <= KEPT + KEPT // 4:  # not at every start
        return
    part = path.with_name(path.name + ".part")
    secure(part)
    part.write_bytes(b"".join(entries[-KEPT:]))
    part.replace(path)


def _entries(path: Path) -> Iterator[bytes]:
    """The file's entries, each with the line that says when it was typed."""
    entry: list[bytes] = []
    for line in path.read_bytes().splitlines(keepends=True):
        if line.startswith(b"#") and any(part.startswith(b"+") for part in entry):
            yield b"".join(entry)
            entry = []
        entry.append(line)
    if any(part.startswith(b"+") for part in entry):
        yield b"".join(entry)
