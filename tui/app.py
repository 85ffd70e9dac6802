"""The terminal app: opens its window at once, then loads the engine behind it.

`run(settings, defaults)` is what `mimo chat` calls; `MimoApp(engine_factory, defaults)` is the same
with any engine, which is how the tests drive it. Imports no torch: the engine comes in the load.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from textual.app import App, SystemCommand
from textual.binding import Binding, BindingType
from textual.screen import Screen
from textual.theme import Theme

from mimo_local.settings import Paths, Settings
from tui.bridge import ChatDefaults, EngineFactory
from tui.keeper import OpenHistory
from tui.screens.chat import ChatScreen
from tui.widgets.prompt import Prompt

if TYPE_CHECKING:
    from mimo_local.chat import Backend
    from mimo_local.events import Progress
    from mimo_local.history import History

__all__ = ["ChatDefaults", "MimoApp", "run"]

DEMO = "Demo model: SmolLM2-135M in MiMo-V2's architecture, not MiMo itself."

THEME = Theme(
    name="mimo",
    primary="#ff8f4c",
    secondary="#7aa2c8",
    accent="#ff8f4c",
    warning="#e5c07b",
    error="#e06c75",
    success="#8fbf7f",
    foreground="#dcdcd6",
    background="#15161a",
    surface="#1d1f25",
    panel="#282b33",
    dark=True,
)


class MimoApp(App[None]):
    """A chat with one local model."""

    TITLE = "mimo"
    CSS_PATH = "app.tcss"
    ENABLE_COMMAND_PALETTE = True
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+q", "quit", "Quit", priority=True),
        Binding("ctrl+c", "interrupt", "Stop", show=False, priority=True),
    ]

    def __init__(
        self,
        engine_factory: EngineFactory,
        defaults: ChatDefaults | None = None,
        *,
        open_history: OpenHistory | None = None,
        save: bool = True,
        theme_file: Path | None = None,
    ) -> None:
        """`open_history`: the saved chats; `save`: whether those of this window are added.

        `theme_file` remembers the theme chosen in the palette.
        """
        super().__init__()
        self.register_theme(THEME)
        self._theme_file: Path | None = None
        if "TEXTUAL_THEME" not in os.environ:
            chosen = _read_line(theme_file)
            self.theme = chosen if chosen in self.available_themes else THEME.name
        self._theme_file = theme_file
        self.chat_screen = ChatScreen(
            engine_factory, defaults or ChatDefaults(), open_history, save
        )

    def watch_theme(self, theme: str) -> None:
        """Remember it; a folder that cannot be written costs no more than the memory."""
        if self._theme_file is not None and self.is_running:
            try:
                self._theme_file.parent.mkdir(parents=True, exist_ok=True)
                self._theme_file.write_text(f"{theme}\n", encoding="utf-8")
            except OSError as error:
                self.notify(f"the theme is not remembered: {error.strerror or error}", markup=False)

    def on_mount(self) -> None:
        """Show the chat at once; the load starts when its screen is there."""
        self.push_screen(self.chat_screen)

    def close(self) -> None:
        """Save and stop; call it when the window is gone, it may take some seconds."""
        self.chat_screen.close()

    async def action_quit(self) -> None:
        """Leave at once; what runs behind is stopped in `close`."""
        self.exit(return_code=self.chat_screen.exit_code)

    def action_interrupt(self) -> None:
        """Ctrl+C: stop the answer, else copy a selection, else say how to quit."""
        screen = self.chat_screen
        if screen.state == "answering":
            screen.action_stop()
        elif isinstance(self.focused, Prompt) and self.focused.selected_text:
            self.focused.action_copy()
        elif text := self.screen.get_selected_text():
            self.copy_to_clipboard(text)
            self.notify("Copied", markup=False)
        else:
            self.notify("Ctrl+Q quits", markup=False)

    def get_system_commands(self, screen: Screen[object]) -> Iterable[SystemCommand]:
        """The palette: our commands before Textual's own."""
        if screen is self.chat_screen:
            yield from self.chat_screen.commands.palette()
        yield from super().get_system_commands(screen)


def _read_line(path: Path | None) -> str:
    """What a file of one line says; nothing where it cannot be read."""
    try:
        return "" if path is None else path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def calm_memory() -> None:
    """Let the garbage collector look at new objects only.

    Torch and Textual leave some 500,000 objects that live as long as the window; going through all
    of them stopped it for up to 0.3 s, once a second while an answer streamed.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


def run(settings: Settings, chat_defaults: ChatDefaults | None = None) -> int:
    """Open the window, load the model behind it, chat; the exit status.

    Without `settings.model`: the first finished pack, else the demo, built before the user's eyes.
    """
    start = chat_defaults or ChatDefaults()

    def load(on_event: Callable[[Progress], None]) -> Backend:
        engine = _open(settings, on_event, app.chat_screen)
        calm_memory()
        return engine

    def history() -> History:
        from mimo_local.history import History

        return History.open(Paths.default().history_file)

    # A saved chat that was asked for is read even where this one is not to be kept.
    wanted = settings.history or start.chat_id is not None
    app = MimoApp(
        load,
        start,
        open_history=history if wanted else None,
        save=settings.history,
        theme_file=Paths.default().data_dir / "theme",
    )
    try:
        app.run()
    finally:
        app.close()
    return app.return_code or 0


def _open(settings: Settings, on_event: Callable[[Progress], None], screen: ChatScreen) -> Backend:
    if settings.remote:
        from mimo_local.remote import Remote

        return Remote.open(settings, on_event)
    # Costs 2-3 s of torch: paid in the loading thread, the window is there already.
    from mimo_local.demo import demo_folder, demo_pack
    from mimo_local.engine import Engine

    model = settings.model or Paths.default().first_pack() or demo_pack(on_progress=on_event)
    if model.resolve().is_relative_to(demo_folder().resolve()):
        screen.about = DEMO
    return Engine.load(replace(settings, model=model), on_event)
