from __future__ import annotations

import threading
import time

import pytest
from fakes import FakeEngine
from stage import LARGE, SMALL, Gated, SlowReader, chunks, staged

from mimo_local.errors import ContextOverflowError, PackError
from mimo_local.events import ExpertFigures, Progress
from tui.bridge import ChatDefaults
from tui.screens.help import HelpScreen
from tui.widgets.answer import Answer, Thinking
from tui.widgets.flow import Block
from tui.widgets.loading import LoadPanel
from tui.widgets.status import StatusLine
from tui.widgets.tiers import TierMeters
from tui.widgets.transcript import UserMessage

SIZES = pytest.mark.parametrize("size", [SMALL, LARGE], ids=["80x24", "120x40"])
LONG = "\n\n".join(f"Paragraph {i} of a long answer." for i in range(60))


# ---- asking ------------------------------------------------------------------------------------


@SIZES
async def test_a_question_is_answered(size) -> None:
    engine = FakeEngine(chunks("Hello **you**.\n\n- one\n- two"))
    async with staged(engine, size=size) as stage:
        await stage.ask("Who is there?")
        glass = stage.text()
        assert "Who is there?" in glass
        assert "Hello you." in glass  # rendered, not `**you**`
        assert "• one" in glass
        assert "tok/s" in glass
        assert "a fake engine that plays" in glass
        assert "context" in glass
        assert stage.screen.prompt.text == ""
        assert [m.role for m in stage.screen.chat.messages] == ["user", "assistant"]
        assert stage.screen.chat.messages[1].content == "Hello **you**.\n\n- one\n- two"


async def test_text_appears_while_it_is_generated() -> None:
    engine = FakeEngine()
    engine.queue("First ", "words ", hold=True)
    async with staged(engine) as stage:
        await stage.send("go")
        await stage.until(lambda: "First words" in stage.text())
        assert stage.screen.state == "answering"
        assert "answering · 2 tokens" in stage.text()
        await stage.pilot.press("escape")
        await stage.idle()


async def test_the_next_turn_carries_the_first() -> None:
    engine = FakeEngine(["first answer"], ["second answer"])
    async with staged(engine) as stage:
        await stage.ask("one")
        await stage.ask("two")
        assert "first answer" in engine.requests[1].prompt


async def test_streamed_and_finished_look_the_same() -> None:
    text = (
        "# Head\n\nA *b* `c`\n\n```python\nprint(1)\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\nend"
    )
    engine = FakeEngine(chunks(text, 3))
    async with staged(engine, size=LARGE) as stage:
        await stage.ask("go")
        streamed = [str(b.render()) for b in stage.screen.query_one(Answer).query(Block)]
        whole = Answer(0, text)
        await stage.transcript.mount(whole)
        await stage.pilot.pause()
        assert streamed == [str(b.render()) for b in whole.query(Block)]
        assert len(streamed) == 5


# ---- stopping ----------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["escape", "ctrl+c"])
async def test_a_stopped_answer_is_kept_and_marked(key: str) -> None:
    engine = FakeEngine()
    engine.queue("Half an answer", hold=True)
    async with staged(engine) as stage:
        await stage.send("go")
        await stage.until(lambda: "Half an answer" in stage.text())
        await stage.pilot.press(key)
        await stage.idle()
        assert "Half an answer" in stage.text()
        assert "stopped · 1 token" in stage.text()
        assert stage.screen.chat.messages[-1].content == "Half an answer"


async def test_reading_a_long_prompt_shows_progress_and_can_be_stopped() -> None:
    async with staged(SlowReader()) as stage:
        await stage.send("a long document")
        await stage.until(
            lambda: "reading the prompt · 90% of 10,000 tokens · 10 s left" in stage.text()
        )
        await stage.pilot.press("escape")
        await stage.idle()
        # Nothing was said: the turn is undone and the words are where they were typed.
        assert stage.screen.prompt.text == "a long document"
        assert stage.screen.chat.messages == []
        assert not stage.screen.query(UserMessage)


async def test_ctrl_c_at_rest_says_how_to_quit_and_ctrl_q_does() -> None:
    async with staged(FakeEngine()) as stage:
        await stage.pilot.press("ctrl+c")
        await stage.until(lambda: "Ctrl+Q quits" in stage.text())
        assert stage.app.is_running
        await stage.pilot.press("ctrl+q")
        await stage.pilot.pause()
        assert stage.app.return_code == 0


# ---- failing -----------------------------------------------------------------------------------


@SIZES
async def test_an_error_shows_its_hint_and_gives_the_prompt_back(size) -> None:
    engine = FakeEngine()
    engine.queue(error=ContextOverflowError("9 tokens too many [b]", hint="use `--context 8192`"))
    async with staged(engine, size=size) as stage:
        await stage.ask("line one\nline two")
        assert "9 tokens too many [b]" in stage.text()
        assert "--context 8192" in stage.text()
        assert stage.screen.prompt.text == "line one\nline two"
        assert stage.screen.chat.messages == []
        assert stage.screen.query_one(StatusLine).used == 0  # as if it had not been asked
        await stage.pilot.press("enter")  # the second try works, and says it once
        await stage.until(lambda: stage.screen.chat.messages[1:])
        assert [m.content for m in stage.screen.chat.messages] == [
            "line one\nline two",
            "fake answer",
        ]
        assert len(stage.screen.query(UserMessage)) == 1


async def test_an_error_keeps_what_was_answered_and_what_was_typed_meanwhile() -> None:
    engine = Gated()
    engine.queue("some ", "words ", "came", error=PackError("bad block", hint="`mimo verify`"))
    async with staged(engine) as stage:
        await stage.send("question")
        await stage.until(lambda: "some words came" in stage.text())
        await stage.type("draft")
        engine.gate.set()
        await stage.idle()
        assert "some words came" in stage.text()
        assert "broken off" in stage.text()
        assert "question" in stage.text(), "it stays where it was asked"
        assert stage.screen.prompt.text == "draft"


async def test_an_unexpected_exception_is_shown_not_swallowed() -> None:
    engine = FakeEngine()
    async with staged(engine) as stage:
        engine.tokenizer.render_chat = None  # type: ignore[method-assign]
        await stage.ask("hello")
        assert "TypeError" in stage.text()
        assert stage.screen.prompt.text == "hello"


# ---- loading -----------------------------------------------------------------------------------


async def test_loading_is_visible_and_a_prompt_can_be_sent_ahead() -> None:
    gate, engine = threading.Event(), FakeEngine(["early answer"])

    def factory(on_event):
        on_event(Progress("building the demo model", 250_000_000, 1_000_000_000, eta_s=42))
        gate.wait(10)
        return engine

    async with staged(engine, ready=False, factory=factory) as stage:
        await stage.until(lambda: "building the demo model" in stage.text())
        assert "0.2 / 1.0 GB · 25% · 42 s left" in stage.text()
        await stage.send("sent early")
        await stage.until(lambda: "will be sent" in stage.text())
        assert engine.requests == []
        gate.set()
        await stage.until(lambda: "early answer" in stage.text())
        assert not stage.screen.query(LoadPanel)


async def test_a_prompt_sent_ahead_can_be_held_back() -> None:
    gate, engine = threading.Event(), FakeEngine()

    def factory(on_event):
        gate.wait(10)
        return engine

    async with staged(engine, ready=False, factory=factory) as stage:
        await stage.send("sent early")
        await stage.pilot.press("escape")
        gate.set()
        await stage.idle()
        assert engine.requests == []
        assert stage.screen.prompt.text == "sent early"


async def test_a_failed_load_shows_the_hint_and_sets_the_exit_status() -> None:
    def factory(on_event):
        raise PackError("pack.json is of format 9", hint="update the tool")

    async with staged(FakeEngine(), ready=False, factory=factory) as stage:
        await stage.type("precious words")
        await stage.until(lambda: stage.screen.state == "failed")
        assert "pack.json is of format 9" in stage.text()
        assert "update the tool" in stage.text()
        await stage.pilot.press("enter")
        await stage.pilot.pause()
        assert stage.screen.prompt.text == "precious words"
        await stage.pilot.press("ctrl+q")
        await stage.pilot.pause()
        assert stage.app.return_code == PackError.exit_code


async def test_quitting_while_loading_is_immediate() -> None:
    gate = threading.Event()

    def factory(on_event):
        gate.wait(30)
        return FakeEngine()

    async with staged(FakeEngine(), ready=False, factory=factory) as stage:
        await stage.until(lambda: stage.screen.query(LoadPanel))
        started = time.monotonic()
        await stage.pilot.press("ctrl+q")
        await stage.pilot.pause()
        assert stage.app.return_code == 0
        assert time.monotonic() - started < 2
        gate.set()


async def test_the_window_lives_while_the_loader_reports_without_end(monkeypatch) -> None:
    stop, shown, reported = threading.Event(), [], []
    show = LoadPanel.show
    monkeypatch.setattr(LoadPanel, "show", lambda self, p: (shown.append(p), show(self, p))[1])

    def factory(on_event):
        while not stop.is_set():
            reported.append(1)
            on_event(Progress("opening", len(reported), 0, "files"))
            time.sleep(0.001)
        return FakeEngine()

    started = time.monotonic()
    async with staged(FakeEngine(), ready=False, factory=factory) as stage:
        try:
            await stage.until(lambda: "opening" in stage.text())
            await stage.pilot.press(*"alive")
            assert stage.screen.prompt.text == "alive"
        finally:
            stop.set()
    assert len(shown) <= 20 * (time.monotonic() - started) + 2
    assert len(shown) < len(reported) / 2


# ---- foreign text ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "[bold red]not bold[/bold red] [/] [link=https://x]",
        "**stars** `ticks` # hash <b>tag</b> [a](b)",
        "[@click=app.quit]quit[/]",
        "\\[escaped] {braces} $primary",
    ],
)
async def test_what_the_user_wrote_is_shown_verbatim(text: str) -> None:
    engine = FakeEngine(["ok"])
    async with staged(engine, size=LARGE) as stage:
        await stage.ask(text)
        assert text in stage.text()
        assert text in engine.requests[0].prompt


async def test_control_characters_never_reach_the_terminal() -> None:
    evil = "a\x1b]52;c;SEVMTE8=\x07b"
    async with staged(FakeEngine([f"answer {evil}"], [f"<think>{evil}</think>x"])) as stage:
        await stage.ask(f"prompt {evil}")
        await stage.ask("again")
        glass = stage.text()
        assert "\x1b" not in glass
        assert "\x07" not in glass
        assert "answer a␛]52;c;SEVMTE8=␇b" in glass


async def test_html_and_markup_of_an_answer_stay_visible() -> None:
    answer = "A <b>tag</b> and [bold]markup[/bold].\n\n<div>block</div>"
    async with staged(FakeEngine([answer])) as stage:
        await stage.ask("go")
        assert "<b>tag</b> and [bold]markup[/bold]" in stage.text()
        assert "<div>block</div>" in stage.text()


# ---- thinking ----------------------------------------------------------------------------------


async def test_thinking_is_folded_counted_and_kept_apart() -> None:
    engine = FakeEngine(chunks("<think>\nsecret thoughts\n</think>\n\nThe answer."))
    async with staged(engine) as stage:
        await stage.ask("go")
        glass = stage.text()
        assert "Thought for" in glass
        assert "tokens" in glass
        assert "secret thoughts" not in glass
        assert "The answer." in glass
        message = stage.screen.chat.messages[-1]
        assert message.content == "The answer."
        assert "secret thoughts" in message.reasoning
        await stage.pilot.press("shift+tab", "enter")  # by keyboard: to the title, open it
        await stage.until(lambda: "secret thoughts" in stage.text())


async def test_open_thinking_streams() -> None:
    engine = FakeEngine(delay_s=0.01)
    engine.queue("<think>", "first ", "thought ", hold=True)
    async with staged(engine) as stage:
        await stage.send("go")
        await stage.until(lambda: stage.screen.query(Thinking))
        stage.screen.query_one(Thinking).collapsed = False
        await stage.until(lambda: "first thought" in stage.text())
        assert "Thinking…" in stage.text()
        await stage.pilot.press("escape")
        await stage.idle()


async def test_long_thinking_is_all_there() -> None:
    lines = [f"thought number {i}" for i in range(400)]
    engine = FakeEngine(chunks("<think>" + "\n".join(lines) + "</think>done", 97))
    async with staged(engine) as stage:
        await stage.ask("go")
        thinking = stage.screen.query_one(Thinking)
        thinking.collapsed = False
        await stage.until(lambda: thinking.query("Static"))
        await stage.pilot.pause(0.1)
        shown = "\n".join(str(s.render()) for s in thinking.query(".thinking-body Static"))
        assert shown.split("\n") == lines


# ---- scrolling and size ------------------------------------------------------------------------


async def test_the_end_is_followed_until_the_user_scrolls_up() -> None:
    engine = Gated(chunks(LONG, 40), at=20)
    async with staged(engine) as stage:
        await stage.send("go")
        await stage.until(lambda: stage.transcript.max_scroll_y > 20)
        assert stage.transcript.following
        await stage.pilot.press("pageup")
        await stage.pilot.pause(0.05)
        position, height = stage.transcript.scroll_y, stage.transcript.max_scroll_y
        engine.gate.set()
        await stage.until(lambda: stage.transcript.max_scroll_y > height + 10)
        assert stage.transcript.scroll_y == position
        assert "more below: Ctrl+End" in stage.text()
        await stage.idle()
        await stage.pilot.pause(0.1)
        assert stage.transcript.scroll_y == position  # the last rendering does not move it either
        await stage.pilot.press("ctrl+end")
        await stage.until(lambda: stage.transcript.following)
        assert "Paragraph 59" in stage.text()
        assert "more below" not in stage.text()


async def test_resizing_while_streaming_loses_nothing() -> None:
    engine = FakeEngine(delay_s=0.005)
    engine.queue(*chunks(LONG, 50))
    async with staged(engine) as stage:
        await stage.send("go")
        for size in ((40, 12), (120, 40), (20, 8), (80, 24)):
            await stage.pilot.resize_terminal(*size)
            await stage.pilot.pause(0.05)
        await stage.idle()
        assert stage.screen.chat.messages[-1].content == LONG
        assert stage.transcript.following
        assert "Paragraph 59" in stage.text()


# ---- commands and keys -------------------------------------------------------------------------


async def test_commands_change_what_is_asked() -> None:
    engine = FakeEngine(["a"], ["b"])
    async with staged(engine) as stage:
        for command in ("/preset math", "/system Be brief.", "/think on"):
            await stage.send(command)
            await stage.until(lambda: not stage.screen.prompt.text)
        assert "math · thinks first" in stage.text()
        await stage.ask("go")
        request = engine.requests[0]
        assert request.params.temperature == 0.4
        assert "Be brief." in request.prompt
        assert not request.prompt.endswith("</think>")
        await stage.send("/system -")
        await stage.until(lambda: not stage.screen.prompt.text)
        await stage.ask("go")
        assert "Be brief." not in engine.requests[1].prompt


async def test_clear_starts_anew() -> None:
    engine = FakeEngine(["one"], ["two"])
    async with staged(engine) as stage:
        await stage.ask("first question")
        await stage.send("/clear")
        await stage.until(lambda: not stage.screen.query(Answer))
        assert "context 0" in stage.text()
        await stage.ask("second question")
        assert "first question" not in engine.requests[1].prompt


async def test_regen_shows_the_new_answer() -> None:
    engine = FakeEngine(["old answer"], ["new answer"])
    async with staged(engine, defaults=ChatDefaults(overrides={"seed": 3})) as stage:
        await stage.ask("go")
        await stage.send("/regen")
        await stage.until(lambda: "new answer" in stage.text())
        await stage.idle()
        assert "old answer" not in stage.text()
        assert [m.content for m in stage.screen.chat.messages] == ["go", "new answer"]
        assert engine.requests[0].prompt == engine.requests[1].prompt
        assert [r.params.seed for r in engine.requests] == [3, 4]


async def test_commands_that_would_disturb_a_running_answer_wait() -> None:
    engine = FakeEngine()
    engine.queue("words", hold=True)
    async with staged(engine) as stage:
        await stage.send("go")
        await stage.until(lambda: "words" in stage.text())
        for command in ("/clear", "/regen", "another question"):
            await stage.send(command)
            await stage.pilot.pause()
        assert len(stage.screen.query(Answer)) == 1
        assert stage.screen.prompt.text == "another question"
        assert len(engine.requests) == 1
        await stage.pilot.press("escape")
        await stage.idle()


async def test_stats_help_and_unknown_commands() -> None:
    engine = FakeEngine(["a"])
    async with staged(engine) as stage:
        await stage.send("/stats")
        await stage.until(lambda: "nothing measured" in stage.text())
        await stage.ask("go")
        await stage.send("/stats")
        await stage.until(lambda: "from cache" in stage.text())
        assert "kernel    fake" in stage.text()
        await stage.send("/preset")
        await stage.until(lambda: "summarize" in stage.text())
        await stage.send("/hepl")
        await stage.until(lambda: "did you mean `/help`" in stage.text())
        assert stage.screen.prompt.text == "/hepl"
        await stage.send("/help")
        await stage.until(lambda: isinstance(stage.app.screen, HelpScreen))
        assert "Ctrl+Q" in stage.text()
        await stage.pilot.press("escape")
        await stage.until(lambda: stage.app.screen is stage.screen)
        await stage.pilot.press("f1")
        await stage.until(lambda: isinstance(stage.app.screen, HelpScreen))
        await stage.pilot.press("f1")
        await stage.until(lambda: stage.app.screen is stage.screen)


async def test_exit_quits() -> None:
    async with staged(FakeEngine()) as stage:
        await stage.send("/exit")
        await stage.pilot.pause()
        assert stage.app.return_code == 0


async def test_a_slash_suggests_and_tab_completes() -> None:
    async with staged(FakeEngine()) as stage:
        await stage.pilot.press("/")
        await stage.until(lambda: "keys and commands" in stage.text())
        await stage.pilot.press("p", "tab")
        assert stage.screen.prompt.text == "/preset "
        await stage.until(lambda: "/preset code" in stage.text())
        await stage.pilot.press("m", "tab")
        assert stage.screen.prompt.text == "/preset math"


async def test_the_palette_offers_the_commands() -> None:
    engine = FakeEngine(["a"])
    async with staged(engine) as stage:
        await stage.ask("go")
        await stage.pilot.press("ctrl+p")
        await stage.pilot.pause()
        await stage.pilot.press(*"preset code")
        await stage.until(lambda: "Preset code" in stage.text())
        await stage.pilot.press("enter")
        await stage.until(lambda: stage.screen.chat.preset == "code")


async def test_y_copies_the_answer_but_only_outside_the_prompt() -> None:
    async with staged(FakeEngine(["**the** answer"])) as stage:
        await stage.ask("go")
        await stage.pilot.press("y")
        assert stage.screen.prompt.text == "y"
        stage.transcript.focus()
        await stage.pilot.press("y")
        assert stage.app.clipboard == "**the** answer"
        stage.app.copy_to_clipboard("")
        await stage.pilot.press("ctrl+y")
        assert stage.app.clipboard == "**the** answer"


async def test_notes_and_errors_take_no_markup() -> None:
    async with staged(FakeEngine()) as stage:
        await stage.send("/system [red]x[/red]")
        await stage.until(lambda: not stage.screen.prompt.text)
        await stage.send("/system")
        await stage.until(lambda: "[red]x[/red]" in stage.text())


@pytest.mark.parametrize("theme", ["ansi-dark", "ansi-light", "textual-light", "nord"])
async def test_every_theme_shows_everything(theme: str) -> None:
    engine = FakeEngine(chunks("<think>t</think>**bold** `code`\n\n```python\nx = 1\n```"))
    async with staged(engine) as stage:
        if theme not in stage.app.available_themes:
            pytest.fail(f"{theme} is not among {sorted(stage.app.available_themes)}")
        stage.app.theme = theme
        await stage.ask("go")
        for words in ("You", "Thought for", "bold code", "x = 1", "tok/s", "context"):
            assert words in stage.text()


async def test_without_colour_the_words_carry_the_meaning(monkeypatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    engine = FakeEngine()
    engine.queue(error=PackError("bad pack", hint="verify it"))
    async with staged(engine) as stage:
        assert stage.app.no_color
        await stage.ask("go")
        assert "No answer" in stage.text()
        assert "→ verify it" in stage.text()


def test_no_name_of_ours_shadows_one_of_textual() -> None:
    """A private method that overrides Textual's by accident hangs the app without a word."""
    import tui.app
    import tui.screens.chat
    import tui.screens.help
    from tui.widgets import answer, hints, loading, prompt, status, transcript

    meant = {"_on_key"}
    modules = (
        *(tui.app, tui.screens.chat, tui.screens.help),
        *(answer, hints, loading, prompt, status, transcript),
    )
    for module in modules:
        for cls in vars(module).values():
            if not (isinstance(cls, type) and cls.__module__ == module.__name__):
                continue
            made_by_textual = {n for n in vars(cls) if n in vars(type("X", cls.__bases__, {}))}
            ours = {n for n in vars(cls) if n.startswith("_") and not n.startswith("__")}
            theirs = {
                n
                for base in cls.__mro__
                if base.__module__.startswith("textual")
                for n in vars(base)
            }
            assert ours & theirs - made_by_textual <= meant, (cls, ours & theirs)


async def test_several_turns_stay_in_order() -> None:
    """Messages are handled in the order posted, whatever the pace."""
    engine = FakeEngine()
    async with staged(engine) as stage:
        for i in range(3):
            await stage.ask(f"question {i}")
        roles = [m.role for m in stage.screen.chat.messages]
        assert roles == ["user", "assistant"] * 3
        assert len(stage.screen.query(Answer)) == len(stage.screen.query(UserMessage)) == 3


# ---- where experts come from ---------------------------------------------------------------------


FIGURES = ExpertFigures(
    wanted=200, vram_hits=20, ram_hits=110, staged_hits=10, misses=60,
    disk_bytes=3_000_000_000, ram_bytes=12_000_000_000, vram_bytes=4_000_000_000,
)  # fmt: skip


@SIZES
async def test_meters_of_the_tiers_run_with_the_answer(size) -> None:
    engine = Gated(["a", " b", " c"], at=3)
    async with staged(engine, size=size) as stage:
        meters = stage.screen.query_one(TierMeters)
        assert not meters.display, "nothing asked yet"
        engine.experts = FIGURES
        await stage.send("go")
        await stage.until(lambda: "ahead 5%" in stage.text())
        assert stage.screen.state == "answering"
        line = next(text for text in stage.text().splitlines() if "held" in text)
        assert "VRAM 10% · RAM 55% · ahead 5% · disk 30%" in line
        assert line.endswith("16.0 GB held")
        assert ("██▓▓▓▓▓▓▓▓▒░░░░░" in line) == (size == LARGE)
        engine.gate.set()
        await stage.idle()
        assert "disk 30% · 1.5 GB a token" in stage.text(), "two tokens after the first"


async def test_a_model_in_ram_has_no_meters() -> None:
    engine = Gated(["a", " b", " c"], at=3)
    async with staged(engine) as stage:
        await stage.send("go")
        await stage.until(lambda: "answering" in stage.text())
        assert not stage.screen.query_one(TierMeters).display
        assert "held" not in stage.text()
        engine.gate.set()
        await stage.idle()
        assert not stage.screen.query_one(TierMeters).display
