"""A chat without a window: prompts from a reader, answers to stdout, slash commands between them.

Whatever fails keeps the prompt: it is offered again for editing. What is said is kept by `keep`.
Called by `mimo chat --plain`; knows the engine through `answer.ask` only.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mimo_local.chat import PRESETS, Attachment, Chat, Message, preset
from mimo_local.cli import answer
from mimo_local.cli.status import say
from mimo_local.commands import COMMANDS, BadCommand, Command, parse, unescape
from mimo_local.errors import MimoError, UsageError

if TYPE_CHECKING:
    from mimo_local.chat import Backend
    from mimo_local.cli.answer import Answer, Look
    from mimo_local.cli.keep import Keeper
    from mimo_local.cli.prompt import Reader
    from mimo_local.sampler import SamplingParams
    from mimo_local.settings import Settings

KEYS = (
    ("Enter", "send"),
    ("Ctrl-J, Esc Enter", 'next line; so does Enter after """, until another """'),
    ("Up, Ctrl-R", "earlier prompts, and a search in them"),
    ("Tab", "complete a command or a path"),
    ("Ctrl-X Ctrl-E", "write the prompt in $EDITOR"),
    ("Ctrl-C", "stop the answer and keep it"),
    ("Ctrl-D", "end"),
)


@dataclass(slots=True)
class PlainChat:
    """One chat at a time: `run` it, or `handle` one text after another."""

    engine: Backend
    settings: Settings
    look: Look
    reader: Reader
    keeper: Keeper
    chat: Chat
    files: list[Attachment] = field(default_factory=list)
    """Documents that go with the next prompt."""
    last: Answer | None = None
    attempts: int = 0
    """How often the last prompt has been answered again: a fixed seed must not repeat itself."""
    _offered: str = ""
    _editing: bool = False
    """The next prompt replaces the last one."""
    _failed: Message | None = None
    """A prompt whose answer failed; it is not part of the chat."""
    _over: bool = False

    def run(self) -> None:
        """Read and answer until the end of input or `/exit`."""
        while not self._over:
            offered, self._offered = self._offered, ""
            text = self.reader.read(self._label(), offered)
            if text is None:
                return
            text = text.encode("utf-8", "replace").decode().strip()
            if not text:
                self._cancel_edit()
                continue
            self.handle(text)

    def handle(self, text: str) -> None:
        """A command is carried out, everything else is asked."""
        match parse(text, tuple(PRESETS)):
            case BadCommand(message, hint):
                say(f"{message}\nhint: {hint}")
                self._offered = text
            case Command(name, argument):
                getattr(self, f"_{name}")(argument)
            case None:
                self.send(unescape(text))

    def send(self, text: str) -> None:
        """Ask; in an edit it takes the place of the last prompt."""
        before, editing = list(self.chat.messages), self._editing
        if editing:
            self._drop_last()
        self._editing, self.attempts = False, 0
        message = Message("user", text, attachments=tuple(self.files))
        self.files.clear()
        if not self._ask(message, before):
            self.files, self._failed = list(message.attachments), message
            self._editing = editing and self.reader.edits
            if self.reader.edits:
                self._offered = _escape(text)
            else:
                say("/regen asks it again")

    # ---- asking ----------------------------------------------------------------------------------

    def _ask(self, message: Message, before: list[Message]) -> bool:
        """Append the prompt and answer it; without an answer the chat is as it was `before`."""
        self._failed = None
        self.chat.messages.append(message)
        self.keeper.prompt(self.chat)
        try:
            with self.reader.quiet():
                found = answer.ask(self.engine, None, self.chat, self._params(), self.look)
        except MimoError as error:
            say(f"error: {error.message.rstrip('.')}\nhint: {error.hint}")
            self.chat.messages[:] = before
            return False
        if found.reason == "cancelled" and not found.text + found.thinking:
            say("stopped before the answer began")
            self.chat.messages[:] = before
            return False
        self.last = found
        self.keeper.answer(self.chat, found.stats, self.engine.name)
        if self.look.json:
            document = answer.as_dict(found, self.engine.name)
            print(json.dumps(document, ensure_ascii=False), flush=True)
        return True

    def _params(self) -> SamplingParams:
        params = preset(self.chat.preset).params(**answer.overrides(self.settings))
        if self.attempts and params.seed is not None:
            params = replace(params, seed=params.seed + self.attempts)
        return params

    def _drop_last(self) -> Message | None:
        """Take the last prompt and what follows it out of the chat."""
        found = _last_prompt(self.chat)
        if found is None:
            return None
        at, message = found
        del self.chat.messages[at:]
        return message

    def _label(self) -> str:
        if self._editing:
            return "edit> "
        if self.files:
            return f"[{len(self.files)} file{'s' * (len(self.files) > 1)}] > "
        return "> "

    def _cancel_edit(self) -> None:
        if self._editing:
            self._editing = False
            self.files.clear()
            say("not edited")

    # ---- commands --------------------------------------------------------------------------------

    def _help(self, _: str) -> None:
        rows = [(spec.label, spec.help) for spec in COMMANDS]
        if self.reader.edits:
            rows += KEYS
        for left, right in rows:
            say(f"  {left:<18} {right}")

    def _exit(self, _: str) -> None:
        self._over = True

    def _clear(self, _: str) -> None:
        self.chat = answer.new_chat(self.settings, like=self.chat)
        self.keeper.new()
        self.files.clear()
        self._failed, self.last, self._editing = None, None, False
        say("a new chat")

    def _regen(self, _: str) -> None:
        failed, before = self._failed, list(self.chat.messages)
        message = failed or self._drop_last()
        if message is None:
            say("there is no prompt to answer again")
            return
        if failed is None:
            self.attempts += 1
        self.files.clear()
        if not self._ask(message, before):
            self._failed = failed

    def _edit(self, text: str) -> None:
        found = _last_prompt(self.chat)
        if found is None:
            say("there is no prompt to edit")
        elif text:
            self.files, self._editing = list(found[1].attachments), True
            self.send(text)
        elif not self.reader.edits:
            say("`/edit TEXT` sends TEXT in place of the last prompt")
        else:
            self._offered, self._editing = _escape(found[1].content), True
            self.files = list(found[1].attachments)

    def _branch(self, number: str) -> None:
        versions = self.keeper.versions(self.chat)
        if not versions:
            kept = self.keeper.number is not None
            say("there is one version only" if kept else "only a saved chat has branches")
        elif not number:
            for at, (_, message, here) in enumerate(versions, 1):
                say(f"{'*' if here else ' '} {at}  {_short(message.content, 70)}")
        elif not number.isdecimal() or not 0 < int(number) <= len(versions):
            say(f"`/branch N` with N from 1 to {len(versions)}")
        elif messages := self.keeper.choose(versions[int(number) - 1][0]):
            self.chat.messages[:] = messages
            self._failed = None
            say(f"going on after: {_short(messages[-1].content, 70)}")

    def _undo(self, _: str) -> None:
        message = self._drop_last()
        if message is None:
            say("there is nothing to take back")
            return
        left = sum(m.role == "user" for m in self.chat.messages)
        say(f"taken back: {_short(message.content)} ({left} prompt{'s' * (left != 1)} left)")

    def _file(self, path: str) -> None:
        if path == "-":
            self.files.clear()
        elif path:
            self._add_file(path)
        for found in self.files:
            tokens = len(self.engine.tokenizer.encode(found.text)) if self.engine.tokenizer else 0
            share = tokens / self.engine.context_limit
            about = "" if getattr(self.engine, "counts_exactly", True) else "about "
            say(f"  {found.name}: {about}{tokens:,} tokens, {share:.0%} of the context")
        if not self.files:
            say("no file goes with the next prompt")

    def _add_file(self, path: str) -> None:
        found = Path(path.strip("'\"")).expanduser()
        try:
            self.files.append(answer.attachment(str(found), called=found.name))
        except MimoError as error:
            say(f"{error.message}\nhint: {error.hint}")
            self._offered = f"/file {path}"

    def _preset(self, name: str) -> None:
        if name:
            self.chat.preset = name
        for one in PRESETS.values():
            mark = "*" if one.name == self.chat.preset else " "
            say(f"{mark} {one.name:<10} {one.description}")

    def _system(self, text: str) -> None:
        if text:
            self.chat.system = "" if text == "-" else text
        say(f"system prompt: {self.chat.system or 'the model’s own'}")

    def _think(self, word: str) -> None:
        self.chat.thinking = not self.chat.thinking if word == "toggle" else word == "on"
        say(f"thinking {'on' if self.chat.thinking else 'off'}")

    def _save(self, name: str) -> None:
        try:
            path = Path(name.strip("'\"")).expanduser()
            form = {".md": "markdown", ".json": "json"}.get(path.suffix.lower())
            if form is None:
                raise UsageError(
                    "`/save` wants the name of a file that ends in .md or .json",
                    hint="`/save FILE.md` to read, `/save FILE.json` for programs",
                )
            if not self.chat.messages:
                raise UsageError("there is nothing to save yet", hint="ask something first")
            write_new(path, self.keeper.text(self.chat, form, self.engine.name))
        except MimoError as error:
            say(f"{error.message}\nhint: {error.hint}")
            self._offered = f"/save {name}" if name else ""
        else:
            say(f"written to {path}")

    def _stats(self, _: str) -> None:
        say(self.engine.description)
        if self.last is None:
            say("no answer yet")
            return
        for line in answer.figures(self.last.stats):
            for part in line.split(" | "):
                say(f"  {part}")


def _last_prompt(chat: Chat) -> tuple[int, Message] | None:
    """Where the last thing the user said is, and what it was."""
    for at in range(len(chat.messages) - 1, -1, -1):
        if chat.messages[at].role == "user":
            return at, chat.messages[at]
    return None


def write_new(path: Path, text: str) -> None:
    """Write a file that is not there yet; UsageError otherwise. What fails leaves no half file."""
    made = False
    try:
        with path.open("x", encoding="utf-8") as file:
            made = True
            file.write(text)
    except FileExistsError:
        raise UsageError(
            f"`{path}` is there already and was not touched", hint="give another name"
        ) from None
    except OSError as error:
        if made:
            path.unlink(missing_ok=True)
        raise UsageError(
            f"`{path}` cannot be written: {error.strerror}", hint="give a name in another folder"
        ) from error


def _escape(text: str) -> str:
    """A prompt as it has to be typed: one that looks like a command gets a second slash."""
    return f"/{text}" if parse(text) is not None or text.startswith("//") else text


def _short(text: str, width: int = 50) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 3] + "..."
