"""Small questions over the chat: yes or no, one line of text, a file, the settings of a chat.

Each is dismissed with the answer, or None if the user thought better of it. They know neither the
chat nor where the answer goes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import (
    Button,
    Checkbox,
    DirectoryTree,
    Input,
    RadioButton,
    RadioSet,
    Static,
    TextArea,
)

from mimo_local.chat import PRESETS
from tui.widgets.figures import plain


class ConfirmScreen(ModalScreen[bool]):
    """One question; y or Enter on the button does it, n or Esc does not."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,n", "answer(False)", "No", key_display="Esc"),
        Binding("y", "answer(True)", "Yes"),
        Binding("left,up", "app.focus_previous", "", show=False),
        Binding("right,down", "app.focus_next", "", show=False),
    ]

    def __init__(self, question: str, yes: str) -> None:
        super().__init__()
        self._question, self._yes = question, yes

    def compose(self) -> ComposeResult:
        """The question and two buttons; the harmless one has the focus."""
        with Vertical(classes="dialog") as box:
            box.border_subtitle = "y: yes · n, Esc: no"
            yield Static(Content(plain(self._question)))
            with Horizontal(classes="buttons"):
                yield Button(self._yes, variant="error", id="yes")
                yield Button("Cancel", id="no")

    def on_mount(self) -> None:
        """Enter alone must not delete anything."""
        self.query_one("#no").focus()

    @on(Button.Pressed)
    def _pressed(self, event: Button.Pressed) -> None:
        self.dismiss(event.button.id == "yes")

    def action_answer(self, yes: bool) -> None:
        """By key."""
        self.dismiss(yes)


class AskScreen(ModalScreen[str | None]):
    """One line of text; `check` says what is wrong with it, or nothing."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "dismiss", "Cancel")]

    def __init__(
        self,
        title: str,
        value: str = "",
        *,
        hint: str = "",
        check: Callable[[str], str] = lambda _: "",
    ) -> None:
        super().__init__()
        self._title, self._value, self._hint, self._check = title, value, hint, check

    def compose(self) -> ComposeResult:
        """The field, and below it what is wrong."""
        with Vertical(classes="dialog") as box:
            box.border_title = self._title
            box.border_subtitle = "Enter: ok · Esc: cancel"
            yield Input(self._value)
            yield Static(self._hint, classes="said", markup=False)

    @on(Input.Submitted)
    def _submitted(self, event: Input.Submitted) -> None:
        text = event.value.strip()
        wrong = "type something, or Esc" if not text else self._check(text)
        if wrong:
            self.query_one(".said", Static).update(plain(wrong))
        else:
            self.dismiss(text)


class FileTree(DirectoryTree):
    """Folders and files, hidden ones left out; Backspace goes up."""

    ICON_NODE = "▸ "
    ICON_NODE_EXPANDED = "▾ "
    ICON_FILE = "  "
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("backspace", "up", "Folder above"),
    ]

    def filter_paths(self, paths: Iterable[Path]) -> Iterable[Path]:
        """What a person put there."""
        return [path for path in paths if not path.name.startswith(".")]

    def action_up(self) -> None:
        """Begin one folder higher."""
        self.path = Path(self.path).absolute().parent


class AttachScreen(ModalScreen[Path | None]):
    """Choose a file from the tree, or type its path."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "dismiss", "Cancel")]

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def compose(self) -> ComposeResult:
        """The tree has the focus, the field is one Tab away."""
        with Vertical(classes="dialog tall") as box:
            box.border_title = "Attach a document"
            box.border_subtitle = "Enter: attach · Backspace: folder above · Esc: cancel"
            yield FileTree(self._folder)
            yield Input(placeholder="or type a path: PDF, Markdown, HTML, text")
            yield Static("", classes="said", markup=False)

    @on(DirectoryTree.FileSelected)
    def _selected(self, event: DirectoryTree.FileSelected) -> None:
        event.stop()
        self.dismiss(event.path)

    @on(Input.Submitted)
    def _submitted(self, event: Input.Submitted) -> None:
        path = Path(event.value.strip()).expanduser()
        path = path if path.is_absolute() else Path(self.query_one(FileTree).path) / path
        if event.value.strip() and path.is_file():
            self.dismiss(path)
        else:
            self.query_one(".said", Static).update(plain(f"there is no file {path}"))


@dataclass(frozen=True, slots=True)
class ChatSettings:
    """How a chat is to be continued."""

    preset: str
    thinking: bool
    system: str


class Mark(RadioButton):
    """Chosen and not chosen differ without colour too."""

    @property
    def BUTTON_INNER(self) -> str:  # type: ignore[override]
        """The sign between the brackets."""
        return "●" if self.value else "○"


class Tick(Checkbox):
    """On and off differ without colour too."""

    @property
    def BUTTON_INNER(self) -> str:  # type: ignore[override]
        """The sign between the brackets."""
        return "X" if self.value else " "


class SettingsScreen(ModalScreen[ChatSettings | None]):
    """Preset, thinking and system prompt of this chat."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+s", "save", "Save"),
        Binding("escape", "dismiss", "Cancel"),
    ]

    def __init__(self, settings: ChatSettings) -> None:
        super().__init__()
        self._settings = settings

    def compose(self) -> ComposeResult:
        """Top to bottom."""
        now = self._settings
        with VerticalScroll(classes="dialog", can_focus=False) as box:
            box.border_title = "This chat"
            box.border_subtitle = "Ctrl+S: save · Esc: cancel"
            yield Static("Preset", classes="heading")
            with RadioSet():
                for name, preset in PRESETS.items():
                    yield Mark(f"{name.ljust(10)} {preset.description}", name == now.preset)
            yield Tick("think before answering", now.thinking)
            yield Static("System prompt, empty: the model's own", classes="heading")
            yield TextArea(now.system, id="system")

    def action_save(self) -> None:
        """Take what is set."""
        pressed = self.query_one(RadioSet).pressed_index
        name = list(PRESETS)[pressed] if pressed >= 0 else self._settings.preset
        thinking = self.query_one(Tick).value
        self.dismiss(ChatSettings(name, thinking, self.query_one("#system", TextArea).text.strip()))
