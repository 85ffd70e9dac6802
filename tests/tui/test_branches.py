"""Branches, and the keys of the messages."""

from __future__ import annotations

import pytest
from fakes import FakeEngine
from stage import LARGE, SMALL, chunks, staged

from mimo_local.errors import ContextOverflowError
from tui.messages import Wish
from tui.widgets.answer import Answer, Thinking
from tui.widgets.flow import Block
from tui.widgets.spoken import Spoken
from tui.widgets.transcript import UserMessage

SIZES = pytest.mark.parametrize("size", [SMALL, LARGE], ids=["80x24", "120x40"])
CODE = "Two ways:\n\n```python\nx = 1\n```\n\nor\n\n```sh\nls\n```\n"


def texts(stage) -> list[str]:
    return [s.text for s in stage.transcript.spoken]


@SIZES
async def test_another_answer_keeps_the_old_one_a_key_away(size) -> None:
    engine = FakeEngine(["first"], ["second"], ["third"])
    async with staged(engine, size=size) as stage:
        await stage.ask("go")
        await stage.pilot.press("alt+up")
        for n in (2, 3):
            await stage.pilot.press("r")
            await stage.until(lambda n=n: f"‹ {n}/{n} ›" in stage.text())
            await stage.idle()
        assert texts(stage) == ["go", "third"]
        assert len({r.prompt for r in engine.requests}) == 1, "the same question each time"
        await stage.pilot.press("left")
        await stage.until(lambda: texts(stage) == ["go", "second"])
        await stage.pilot.press("left")
        await stage.until(lambda: texts(stage) == ["go", "first"])
        assert "‹ 1/3 ›" in stage.text()
        await stage.pilot.press("left")  # no further
        await stage.pilot.press("right", "right")
        await stage.until(lambda: texts(stage) == ["go", "third"])
        assert [m.content for m in stage.screen.chat.messages] == ["go", "third"]


async def test_an_earlier_question_is_edited_as_a_branch() -> None:
    engine = FakeEngine(["a1"], ["a2"], ["b1"])
    async with staged(engine) as stage:
        await stage.ask("one")
        await stage.ask("two")
        await stage.type("half a draft")
        await stage.pilot.press("alt+up", "k", "k", "k")
        assert stage.app.focused is stage.transcript.spoken[0]
        await stage.pilot.press("e")
        assert stage.screen.prompt.text == "one"
        assert "new branch" in stage.text()
        await stage.pilot.press(*" anew", "enter")
        await stage.until(lambda: "b1" in stage.text())
        await stage.idle()
        assert texts(stage) == ["one anew", "b1"]
        assert "You  ‹ 2/2 ›" in stage.text()
        assert stage.screen.prompt.text == "half a draft"
        assert engine.requests[2].prompt.count("one") == 1
        stage.transcript.spoken[0].focus()
        await stage.pilot.press("left")
        await stage.until(lambda: texts(stage) == ["one", "a1", "two", "a2"])


async def test_an_edit_can_be_left_with_the_draft_as_it_was() -> None:
    async with staged(FakeEngine(["a"])) as stage:
        await stage.ask("question")
        await stage.type("draft")
        await stage.pilot.press("alt+up", "e")
        await stage.type("changed my mind")
        await stage.pilot.press("escape")
        assert stage.screen.prompt.text == "draft"
        assert stage.screen.turns.editing is None
        assert "new branch" not in stage.text()
        await stage.pilot.press("enter")
        await stage.until(lambda: len(texts(stage)) == 4)
        assert texts(stage)[2] == "draft"


async def test_a_branch_at_an_earlier_turn_gives_way_and_comes_back() -> None:
    engine = FakeEngine(["a1"], ["a2"], ["a1 again"])
    async with staged(engine) as stage:
        await stage.ask("one")
        await stage.ask("two")
        stage.transcript.spoken[1].focus()
        await stage.pilot.press("r")
        await stage.until(lambda: texts(stage) == ["one", "a1 again"])
        await stage.idle()
        assert "two" not in engine.requests[2].prompt
        stage.transcript.spoken[1].focus()
        await stage.pilot.press("h")
        await stage.until(lambda: texts(stage) == ["one", "a1", "two", "a2"])


async def test_stopping_before_the_first_word_returns_to_the_old_answer() -> None:
    engine = FakeEngine(["old"])
    async with staged(engine) as stage:
        await stage.ask("go")
        engine.queue(hold=True)
        await stage.send("/regen")
        await stage.until(lambda: texts(stage) == ["go", ""])
        await stage.pilot.press("escape")
        await stage.idle()
        assert texts(stage) == ["go", "old"]
        assert stage.screen.prompt.text == ""
        assert "‹" not in stage.text()


async def test_a_failing_second_answer_leaves_the_first() -> None:
    engine = FakeEngine(["old"])
    async with staged(engine) as stage:
        await stage.ask("go")
        engine.queue(error=ContextOverflowError("too long", hint="cut it"))
        await stage.send("/regen")
        await stage.until(lambda: "No answer" in stage.text())
        assert texts(stage) == ["go", "old"]
        assert stage.screen.prompt.text == ""


async def test_keys_copy_messages_and_their_code_in_turn() -> None:
    async with staged(FakeEngine(chunks(CODE))) as stage:
        await stage.ask("how?")
        await stage.pilot.press("alt+up", "y")
        assert stage.app.clipboard == CODE
        found = []
        for _ in range(3):
            await stage.pilot.press("c")
            found.append(stage.app.clipboard)
        assert found == ["x = 1\n", "ls\n", "x = 1\n"]
        assert "Code block 1 of 2 copied" in stage.text()
        await stage.pilot.press("k", "y")
        assert stage.app.clipboard == "how?"
        assert "c Copy code" not in stage.text().splitlines()[-1]


async def test_j_and_k_walk_the_messages_and_end_at_the_prompt() -> None:
    engine = FakeEngine(["a1"], ["a2"])
    async with staged(engine) as stage:
        await stage.ask("one")
        await stage.ask("two")
        seen = []
        for key in ("alt+up", "k", "alt+up", "k", "k", "j", "alt+down", "j", "j"):
            await stage.pilot.press(key)
            focused = stage.app.focused
            seen.append(focused.text if isinstance(focused, Spoken) else "prompt")
        assert seen == ["a2", "two", "a1", "one", "one", "a1", "two", "a2", "prompt"]


async def test_enter_on_an_answer_opens_its_thinking() -> None:
    async with staged(FakeEngine(chunks("<think>deep thoughts</think>x"))) as stage:
        await stage.ask("go")
        await stage.pilot.press("alt+up", "enter")
        await stage.until(lambda: "deep thoughts" in stage.text())
        await stage.pilot.press("enter")
        await stage.until(lambda: "deep thoughts" not in stage.text())


async def test_clicks_do_what_keys_do() -> None:
    engine = FakeEngine(["first"], ["second"])
    async with staged(engine) as stage:
        await stage.ask("go")
        await stage.send("/regen")
        await stage.until(lambda: "‹ 2/2 ›" in stage.text())
        await stage.idle()
        lines = stage.text().splitlines()
        row = next(n for n, line in enumerate(lines) if "‹ 2/2 ›" in line)
        await stage.pilot.click(offset=(lines[row].index("‹"), row))
        await stage.until(lambda: texts(stage) == ["go", "first"])
        answer = stage.screen.query_one(Answer)
        await stage.pilot.click(answer)
        assert stage.app.focused is answer


async def test_text_of_an_answer_can_be_selected_and_copied() -> None:
    async with staged(FakeEngine(chunks("# Head\n\n- **one** thing\n- two\n"))) as stage:
        await stage.ask("go")
        answer = stage.screen.query_one(Answer)
        first, last = answer.query(Block).first().region, answer.query(Block).last().region
        await stage.pilot.mouse_down(offset=(first.x, first.y))
        await stage.pilot.hover(offset=(last.x + 3, last.y))
        await stage.pilot.hover(offset=(last.x + 4, last.y))
        await stage.pilot.mouse_up(offset=(last.x + 4, last.y))
        selected = stage.screen.get_selected_text()
        assert selected is not None
        assert selected.splitlines()[0] == "Head"
        assert "• on" in selected
        assert "**" not in selected
        await stage.pilot.press("ctrl+c")
        assert stage.app.clipboard == selected


async def test_thinking_of_another_branch_keeps_its_figures() -> None:
    engine = FakeEngine(chunks("<think>deep</think>one"), ["two"])
    async with staged(engine) as stage:
        await stage.ask("go")
        title = stage.screen.query_one(Thinking).title
        await stage.send("/regen")
        await stage.until(lambda: "‹ 2/2 ›" in stage.text())
        await stage.idle()
        await stage.pilot.press("alt+up", "left")
        await stage.until(lambda: stage.screen.query(Thinking))
        assert stage.screen.query_one(Thinking).title == title


async def test_branch_keys_wait_while_an_answer_runs() -> None:
    engine = FakeEngine(["first"])
    async with staged(engine) as stage:
        await stage.ask("go")
        engine.queue("second", hold=True)
        await stage.send("/regen")
        await stage.until(lambda: "second" in stage.text())
        key = stage.transcript.spoken[1].key
        for what in ("previous", "edit", "regenerate"):
            stage.screen.post_message(Wish(key, what))
        await stage.pilot.pause()
        assert texts(stage) == ["go", "second"]
        assert stage.screen.prompt.text == ""
        assert len(engine.requests) == 2
        await stage.pilot.press("escape")
        await stage.idle()
        assert "stopped" in stage.text()


async def test_edit_by_command_takes_the_last_question() -> None:
    async with staged(FakeEngine(["a"])) as stage:
        await stage.send("/edit")
        await stage.until(lambda: "no prompt to edit" in stage.text())
        await stage.ask("question")
        await stage.send("/edit")
        await stage.until(lambda: stage.screen.prompt.text == "question")
        assert stage.screen.query_one(UserMessage).text == "question"


async def test_only_the_end_of_a_very_long_chat_is_shown_at_first() -> None:
    from mimo_local.chat import Message
    from tui.conversation import Conversation

    chat = Conversation()
    for n in range(50):
        node = chat.answer(chat.say(f"question {n}"))
        node.message = Message("assistant", f"answer {n}")
    async with staged(FakeEngine(["the newest"])) as stage:
        await stage.screen.turns.begin(chat)
        assert texts(stage)[0] == "question 30"
        await stage.ask("one more")
        assert len(stage.screen.chat.messages) == 102
        stage.transcript.scroll_home(animate=False)
        await stage.until(lambda: "60 earlier messages" in stage.text())
        stage.transcript.children[0].focus()
        await stage.pilot.press("enter")
        await stage.until(lambda: texts(stage)[0] == "question 10")
        assert texts(stage)[-1] == "the newest"
