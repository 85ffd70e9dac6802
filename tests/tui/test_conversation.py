from __future__ import annotations

import itertools
from datetime import date

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mimo_local.chat import Attachment, Message
from tui.conversation import Conversation, Node
from tui.messages import Place


def said(chat: Conversation) -> list[str]:
    return [node.message.content for node in chat.path]


def turn(chat: Conversation, question: str, answer: str) -> tuple[Node, Node]:
    asked = chat.say(question)
    reply = chat.answer(asked)
    reply.message = Message("assistant", answer)
    return asked, reply


def test_another_answer_is_a_branch_and_both_can_be_shown() -> None:
    chat = Conversation()
    asked, first = turn(chat, "q", "one")
    second = chat.answer(asked)
    second.message = Message("assistant", "two")
    assert said(chat) == ["q", "two"]
    assert chat.place(second) == Place(2, 2)
    assert chat.step(second, 1) is None
    assert chat.step(second, -1) is first
    assert said(chat) == ["q", "one"]
    assert chat.chat().messages == [Message("user", "q"), Message("assistant", "one")]


def test_a_branch_remembers_where_it_was_left() -> None:
    chat = Conversation()
    asked, _ = turn(chat, "q", "a")
    deeper, _ = turn(chat, "deeper", "b")
    edited = chat.edit(asked, "q, edited", (Attachment("f", "text"),))
    assert said(chat) == ["q, edited"]
    assert edited.message.attachments == (Attachment("f", "text"),)
    assert chat.step(edited, -1) is asked
    assert said(chat) == ["q", "a", "deeper", "b"]
    assert chat.question_of(deeper.children[0]) is deeper


def test_a_dropped_turn_leaves_the_branch_before_it() -> None:
    chat = Conversation()
    asked, first = turn(chat, "q", "one")
    again = chat.answer(asked)
    chat.drop(again)
    assert said(chat) == ["q", "one"]
    assert chat.node(again.key) is None
    assert chat.place(first) == Place(1, 1)
    chat.drop(first)
    chat.drop(asked)
    assert chat.path == []
    assert chat.leaf is None


def test_what_the_engine_is_asked_alternates() -> None:
    """After a failure a question may stand there without an answer."""
    chat = Conversation(system="s", preset="math", thinking=True)
    chat.began = date(2026, 1, 2)
    chat.say("no answer came")
    asked = chat.say("second try")
    room = chat.answer(asked)
    now = chat.chat(asked)
    assert [m.content for m in now.messages] == ["second try"]
    assert (now.system, now.preset, now.thinking) == ("s", "math", True)
    assert now.began == date(2026, 1, 2)
    assert chat.chat(room).messages[-1].role == "user", "an empty answer is none"


def test_a_saved_tree_comes_back() -> None:
    chat = Conversation()
    chat.restore(10, None, Message("user", "q"), {})
    chat.restore(11, 10, Message("assistant", "one"), {"completion_tokens": 7, "of_tomorrow": 1})
    other = chat.restore(12, 10, Message("assistant", "two"), {})
    found = chat.find(11)
    assert found is not None
    assert found.stats is not None
    assert found.stats.completion_tokens == 7
    assert chat.leaf is other
    chat.show(found)
    assert said(chat) == ["q", "one"]


class Tree(RuleBasedStateMachine):
    """Whatever is done, the path is one way from the top to a leaf, and nothing said is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.chat = Conversation()
        self.alive: list[Node] = []

    def pick(self, n: int) -> Node:
        path = self.chat.path
        return path[n % len(path)]

    @rule(text=st.text(min_size=1, max_size=3))
    def say(self, text: str) -> None:
        self.alive.append(self.chat.say(text))

    @precondition(lambda self: self.chat.path)
    @rule(n=st.integers(0, 9))
    def answer(self, n: int) -> None:
        question = self.chat.question_of(self.pick(n))
        assert question is not None
        node = self.chat.answer(question)
        node.message = Message("assistant", "a")
        self.alive.append(node)

    @precondition(lambda self: self.chat.path)
    @rule(n=st.integers(0, 9))
    def edit(self, n: int) -> None:
        question = self.chat.question_of(self.pick(n))
        assert question is not None
        self.alive.append(self.chat.edit(question, "edited"))

    @precondition(lambda self: self.chat.path)
    @rule(n=st.integers(0, 9), by=st.sampled_from([-1, 1]))
    def step(self, n: int, by: int) -> None:
        node = self.pick(n)
        other = self.chat.step(node, by)
        if other is not None:
            assert other in self.chat.path
            assert node not in self.chat.path

    @precondition(lambda self: self.alive)
    @rule(n=st.integers(0, 9))
    def show(self, n: int) -> None:
        node = self.alive[n % len(self.alive)]
        self.chat.show(node)
        assert node in self.chat.path

    @precondition(lambda self: self.chat.leaf)
    @rule()
    def drop(self) -> None:
        leaf = self.chat.leaf
        assert leaf is not None
        self.chat.drop(leaf)
        self.alive.remove(leaf)

    @invariant()
    def one_way_down(self) -> None:
        path = self.chat.path
        for above, below in itertools.pairwise(path):
            assert below.parent is above
        assert not path or not path[-1].children
        assert all(self.chat.node(node.key) is node for node in self.alive)
        roles = [m.role for m in self.chat.chat().messages]
        assert all(a != b or a == "assistant" for a, b in itertools.pairwise(roles))


Tree.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestTree = Tree.TestCase
