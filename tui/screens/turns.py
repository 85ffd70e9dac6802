"""The turns of the chat: shows the conversation in the transcript and runs one answer at a time.

Between the tree (`Conversation`), the bridge that answers and the keeper that saves; the chat
screen hands over what the user and the bridge say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING

from mimo_local.chat import Attachment, Message
from mimo_local.events import Stats
from tui.conversation import Conversation, Node
from tui.keeper import Opened
from tui.messages import AnswerDelta, AnswerDone, Pace, Problem
from tui.widgets.answer import Answer
from tui.widgets.figures import answer_foot, answering_line, saved_foot
from tui.widgets.spoken import Spoken
from tui.widgets.transcript import Earlier, ErrorBox, UserMessage

if TYPE_CHECKING:
    from tui.screens.chat import ChatScreen

SAVE_S = 0.5
"""From new text of a growing answer to its save: what a sudden end may lose."""
SHOWN = 40
"""Messages of a long chat that are shown at first: each one costs some milliseconds."""


@dataclass
class Running:
    """The answer being made."""

    question: Node
    answer: Node
    widget: Answer
    new_question: bool
    """It goes back to the prompt if there will be no answer."""
    prompt_tokens: int = 0
    save_due: bool = False
    """A timer runs that will save what there is of it."""


class Turns:
    """The conversation on the screen."""

    def __init__(self, screen: ChatScreen, chat: Conversation) -> None:
        self._screen = screen
        self.chat = chat
        self.running: Running | None = None
        self.editing: Node | None = None
        """The earlier question being written anew."""
        self.stats: Stats | None = None
        """Of the last answer of this session."""
        self._draft = ""
        self._taken_back: Node | None = None
        self._first = 0
        """Messages of the branch above the first one shown."""

    # ---- asking --------------------------------------------------------------------------------

    async def send(self, text: str, attachments: Sequence[Attachment] = ()) -> None:
        """Ask this, at the end or in place of the question being edited."""
        chat, keeper, edited = self.chat, self._screen.keeper, self.editing
        if edited is not None:
            question, draft = chat.edit(edited, text, attachments), self._draft
            self.end_edit()
            self._screen.prompt.put(draft)
        else:
            question = chat.say(text, attachments)
        old, self._taken_back = self._taken_back, None
        if old is not None and old.parent is question.parent:
            keeper.replaces(question, old)
        keeper.save(chat, question)
        await self.answer(question, new=True)

    async def answer(self, question: Node, *, new: bool = False) -> None:
        """Have a question answered, once more if it was already."""
        node = self.chat.answer(question)
        self.chat.show(node)
        on_a_message = isinstance(self._screen.focused, Spoken)
        await self.show()
        widget = self._widget(node)
        assert isinstance(widget, Answer)
        if on_a_message:
            self._screen.set_focus(widget, scroll_visible=False)
        self.running = Running(question, node, widget, new)
        screen = self._screen
        screen.transcript.follow()
        screen.enter("answering", "reading the prompt")
        if screen.bridge is not None:
            attempt = self.chat.place(node).number - 1
            screen.bridge.ask(self.chat.chat(question), attempt=attempt)

    async def regenerate(self, node: Node | None = None) -> bool:
        """Answer a question again, the last one without a `node`; False if there is none."""
        at = node or self.chat.leaf
        question = self.chat.question_of(at) if at is not None else None
        if question is None:
            return False
        await self.answer(question)
        return True

    # ---- an answer comes -----------------------------------------------------------------------

    async def delta(self, message: AnswerDelta) -> None:
        """More text."""
        run = self.running
        if run is None:
            return
        await run.widget.add(message.pieces, message.pace)
        self._take_text(run)
        if not run.save_due:
            run.save_due = True
            self._screen.set_timer(SAVE_S, self._save_growing)
        self._screen.say(answering_line(message.pace))
        self._screen.used(run.prompt_tokens + message.pace.tokens)

    async def done(self, message: AnswerDone) -> None:
        """The answer is complete, or was stopped."""
        run, stats = self.running, message.stats
        if run is None:
            return
        self._take_text(run)
        if message.reason == "cancelled" and not run.widget.text and not run.widget.reasoning:
            await self._take_back(run, "stopped before the first word")
            return
        self.running = None
        self.stats = run.answer.stats = stats
        run.answer.foot = answer_foot(message.reason, stats, message.pace)
        await run.widget.finish(run.answer.foot, message.pace)
        run.answer.thought = run.widget.thought_title
        self._screen.keeper.save(self.chat, run.answer, self._screen.model_name)
        self._screen.used(stats.context_used or run.prompt_tokens)
        self._screen.enter("idle", "stopped" if message.reason == "cancelled" else "ready")

    async def failed(self, problem: Problem) -> None:
        """There will be no more of it: words already there stay, else the question goes back."""
        run = self.running
        if run is None:
            return
        self._take_text(run)
        if run.widget.text or run.widget.reasoning:
            self.running = None
            run.answer.foot = "broken off · r answers again"
            await run.widget.finish(run.answer.foot, Pace())
            self._screen.keeper.save(self.chat, run.answer, self._screen.model_name)
            self._screen.enter("idle", "broken off")
        else:
            await self._take_back(run, "the prompt is back below")
        await self._screen.transcript.say(ErrorBox("No answer", problem))

    def _save_growing(self) -> None:
        run = self.running
        if run is not None:
            run.save_due = False
            self._screen.keeper.save(self.chat, run.answer, self._screen.model_name)

    def leave(self) -> None:
        """The window closes: what there is of an answer is saved."""
        run = self.running
        if run is not None and (run.widget.text or run.widget.reasoning):
            self._take_text(run)
            self._screen.keeper.save(self.chat, run.answer, self._screen.model_name)

    def _take_text(self, run: Running) -> None:
        run.answer.message = Message("assistant", run.widget.text, run.widget.reasoning)

    async def _take_back(self, run: Running, status: str) -> None:
        """Undo the turn: a new question returns to where it was typed."""
        self.running = None
        screen, question = self._screen, run.question
        self.chat.drop(run.answer)
        if run.new_question:
            siblings = self.chat.place(question).count > 1
            self.chat.drop(question)
            if not siblings:
                self._taken_back = question
            screen.prompt.put_back(question.message.content)
            screen.files.put_back(question.message.attachments)
        leaf = self.chat.leaf
        if leaf is not None:
            screen.keeper.choose(leaf)
        await self.show()
        self._show_used()
        screen.enter("idle", status)

    # ---- branches ------------------------------------------------------------------------------

    def edit(self, node: Node) -> bool:
        """Put the question of a node in the prompt, to be asked as a branch of its own."""
        question = self.chat.question_of(node)
        if question is None:
            return False
        prompt = self._screen.prompt
        if self.editing is None:
            self._draft = prompt.text
        self.editing = question
        prompt.put(question.message.content)
        prompt.edits(True)
        self._screen.files.replace(question.message.attachments)
        self._screen.set_focus(prompt)
        return True

    def end_edit(self, *, restore: bool = False) -> None:
        """No question is being edited any more; `restore`: the text before it comes back."""
        if self.editing is None:
            return
        self.editing = None
        self._screen.prompt.edits(False)
        if restore:
            self._screen.files.replace(())
            self._screen.prompt.put(self._draft)
        self._draft = ""

    async def step(self, node: Node, by: int) -> None:
        """Show the next or previous branch at this message."""
        other = self.chat.step(node, by)
        if other is None:
            return
        self._screen.keeper.choose(other)
        await self.show()
        self._show_used()
        place = self.chat.place(other)
        self._screen.say(f"branch {place.number} of {place.count}")
        if (widget := self._widget(other)) is not None:
            self._screen.set_focus(widget)

    # ---- the chat as a whole -------------------------------------------------------------------

    async def begin(self, chat: Conversation) -> None:
        """Show another chat, from its end."""
        self.end_edit(restore=True)
        self.chat, self.running, self.stats = chat, None, None
        self._taken_back = None
        path = chat.path
        self._first = max(0, len(path) - SHOWN)
        await self._screen.transcript.clear()
        await self.show()
        self._show_used()
        self._screen.transcript.follow()

    async def open(self, opened: Opened) -> None:
        """Show a saved chat; at the message asked for."""
        info = opened.info
        chat = Conversation(system=info.system, preset=info.preset, thinking=info.thinking)
        chat.saved, chat.title = info.id, info.title
        chat.began = date.fromtimestamp(info.created)
        for stored in opened.messages:
            chat.restore(stored.id, stored.parent, stored.message, stored.stats)
        wanted = opened.message if opened.message is not None else (opened.branch or (0,))[-1]
        for saved in (*opened.branch[-1:], wanted):
            if (node := chat.find(saved)) is not None:
                chat.show(node)
        await self.begin(chat)
        if opened.message is not None and (node := chat.find(opened.message)) is not None:
            if node in chat.path[: self._first]:
                await self.earlier(chat.path.index(node))
            if (widget := self._widget(node)) is not None:
                self._screen.set_focus(widget)

    async def earlier(self, first: int | None = None) -> None:
        """Show more of the beginning."""
        self._first = max(0, self._first - SHOWN if first is None else first)
        await self._screen.transcript.clear()
        await self.show()
        self._screen.transcript.scroll_home(animate=False)

    async def show(self) -> None:
        """Make the transcript show the branch: what it shares with what is there stays."""
        transcript = self._screen.transcript
        path = self.chat.path
        self._first = min(self._first, len(path))
        if self._first and not transcript.query(Earlier):
            await transcript.mount(Earlier(self._first))
        path, spoken, same = path[self._first :], transcript.spoken, 0
        while same < min(len(path), len(spoken)) and spoken[same].key == path[same].key:
            same += 1
        with self._screen.app.batch_update():
            await transcript.keep(same)
            if path[same:]:
                await transcript.mount(*map(_made, path[same:]))
        for widget, node in zip(transcript.spoken, path, strict=True):
            widget.show_place(self.chat.place(node))

    def _show_used(self) -> None:
        """Of the context: what the last complete answer of this branch had used."""
        stats = (n.stats for n in reversed(self.chat.path) if n.stats is not None)
        last = next(stats, None)
        self._screen.used(last.context_used if last is not None else 0)

    def _widget(self, node: Node) -> Spoken | None:
        return next((w for w in self._screen.transcript.spoken if w.key == node.key), None)


def _made(node: Node) -> Spoken:
    message = node.message
    if node.role == "user":
        files = [(a.name, len(a.text)) for a in message.attachments]
        return UserMessage(node.key, message.content, files)
    foot = node.foot or (saved_foot(node.stats) if node.stats else "")
    return Answer(node.key, message.content, message.reasoning, foot, node.thought)
