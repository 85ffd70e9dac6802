"""The saved chats on the screen: the list, opening, renaming, deleting, export and import.

Asks the user where it must (delete, a file that exists) and the keeper for everything else. Called
by the chat screen.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tui.keeper import Opened
from tui.messages import ChatRow, Found, KeepFailed, Kept, ListWish, Titled
from tui.screens.dialogs import AskScreen, ConfirmScreen
from tui.widgets.chats import ChatList, ChatSearch
from tui.widgets.figures import plain

if TYPE_CHECKING:
    from tui.screens.chat import ChatScreen


def file_name(title: str) -> str:
    """A file name a title suggests."""
    words = re.findall(r"[^\W_]+", title)[:8]
    return ("-".join(words).lower() or "chat")[:60] + ".md"


class Library:
    """What the user does with saved chats."""

    def __init__(self, screen: ChatScreen) -> None:
        self._screen = screen

    @property
    def _list(self) -> ChatList:
        return self._screen.query_one(ChatList)

    def toggle(self) -> None:
        """Open the list with the cursor in its search field, or close it."""
        if not self._screen.keeper.on:
            self._screen.notify("Chats are not saved: this was started so", markup=False)
            return
        if self._list.display:
            self.close()
            return
        self._list.display = True
        self._screen.add_class("listing")
        self.refresh()
        self._screen.set_focus(self._screen.query_one(ChatSearch))

    def close(self) -> None:
        """Back to the prompt."""
        self._list.display = False
        self._screen.remove_class("listing")
        self._screen.set_focus(self._screen.prompt)

    def refresh(self) -> None:
        """Read the list anew, if it is open."""
        if self._list.display:
            self._screen.keeper.find(self._list.search)

    # ---- what the keeper says ------------------------------------------------------------------

    def found(self, message: Found) -> None:
        """Rows for the list."""
        self._list.show(message.rows, message.text, self._screen.turns.chat.saved)

    async def opened(self, message: Opened) -> None:
        """A chat was read."""
        screen = self._screen
        if screen.busy("open another chat"):
            return
        if screen.has_class("-narrow") or message.message is not None:
            self.close()
        await screen.turns.open(message)
        screen.show_chat()
        unanswered = (leaf := screen.turns.chat.leaf) is not None and leaf.role == "user"
        screen.say("no answer yet: /regen asks for one" if unanswered else "chat opened")
        if message.message is None and not self._list.display:
            screen.set_focus(screen.prompt)
        self.refresh()

    async def kept(self, message: Kept) -> None:
        """Something was done; a deleted chat leaves the screen as well."""
        screen = self._screen
        if message.what == "Deleted" and message.chat == screen.turns.chat.saved:
            await screen.fresh_chat()
        screen.notify(plain(message.what), markup=False)
        self.refresh()

    def titled(self, message: Titled) -> None:
        """The title in the bar."""
        chat = self._screen.turns.chat
        if chat.saved == message.chat:
            chat.title = message.title
            self._screen.show_chat()
        self.refresh()

    def failed(self, message: KeepFailed) -> None:
        """Say it; the chat goes on."""
        title = "This chat is not being saved" if message.saving else "That did not work"
        self._screen.notify(
            f"{plain(message.problem.message)}\n→ {plain(message.problem.hint)}",
            title=title,
            severity="warning" if message.saving else "error",
            timeout=12,
            markup=False,
        )

    # ---- what the user wants -------------------------------------------------------------------

    async def wish(self, wish: ListWish) -> None:
        """By a key in the list."""
        row, screen = wish.row, self._screen
        match wish.what:
            case "close":
                self.close()
            case "import":
                self.import_file()
            case "new":
                await screen.clear_chat()
            case "open" if row is not None:
                if not screen.busy("open another chat"):
                    screen.keeper.open(row.chat, row.message)
            case "rename" if row is not None:
                self.rename(row.chat, row.title)
            case "delete" if row is not None:
                self._delete(row)
            case "export" if row is not None:
                self.export(row.chat, row.title)

    def rename(self, chat: int | None = None, title: str = "", new: str = "") -> None:
        """Ask for another title, unless it is given; without a chat for the one on the screen."""
        chat, title = self._chosen(chat, title)
        if chat is None:
            return
        if new:
            self._screen.keeper.rename(chat, new)
            return

        def answer(text: str | None) -> None:
            if text:
                self._screen.keeper.rename(chat, text)

        self._screen.app.push_screen(AskScreen("Rename", title), answer)

    def _delete(self, row: ChatRow) -> None:
        if row.chat == self._screen.turns.chat.saved and self._screen.busy("delete this chat"):
            return

        def answer(yes: bool | None) -> None:
            if yes:
                self._screen.keeper.remove(row.chat)

        question = f"Delete “{row.title}” with all its branches? There is no way back."
        self._screen.app.push_screen(ConfirmScreen(question, "Delete"), answer)

    def export(self, chat: int | None = None, title: str = "", to: str = "") -> None:
        """Ask where to, unless it is given; a file that exists is replaced only if confirmed."""
        chat, title = self._chosen(chat, title)
        if chat is None:
            return
        if to:
            self._export(chat, to)
        else:
            hint = "Markdown, or with .json everything with all branches"
            ask = AskScreen("Export to", file_name(title), hint=hint, check=_no_folder)
            self._screen.app.push_screen(ask, partial(self._export, chat))

    def _export(self, chat: int, name: str | None) -> None:
        if not name:
            return
        path = Path(name).expanduser()

        def answer(yes: bool | None) -> None:
            if yes:
                self._screen.keeper.export(chat, path, replace=True)

        if path.exists():
            question = f"{path} exists. Replace it?"
            self._screen.app.push_screen(ConfirmScreen(question, "Replace"), answer)
        else:
            self._screen.keeper.export(chat, path)

    def import_file(self, name: str = "") -> None:
        """Ask for a JSON file, unless it is given."""

        def answer(name: str | None) -> None:
            if name:
                self._screen.keeper.import_file(Path(name).expanduser())

        if name:
            answer(name)
            return
        hint = "JSON: an export of this tool, OpenAI messages, or a ChatGPT export"
        self._screen.app.push_screen(AskScreen("Import chats from", hint=hint), answer)

    def _chosen(self, chat: int | None, title: str) -> tuple[int | None, str]:
        if chat is not None:
            return chat, title
        shown = self._screen.turns.chat
        if shown.saved is None:
            self._screen.notify("This chat is not saved yet", markup=False)
        return shown.saved, shown.title


def _no_folder(name: str) -> str:
    path = Path(name).expanduser()
    if path.is_dir():
        return f"{path} is a folder: add a file name"
    return "" if path.parent.is_dir() else f"there is no folder {path.parent}"
