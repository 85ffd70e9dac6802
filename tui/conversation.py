"""One chat as a tree: every answer and every edited question stays, one branch is shown.

Bookkeeping without a screen, an engine or a file: what the user does changes the tree, the
chat screen shows `path`, the bridge answers `chat()`, the keeper saves nodes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import date

from mimo_local.chat import Attachment, Chat, Message
from mimo_local.events import Stats
from tui.messages import Place


@dataclass(eq=False, slots=True)
class Node:
    """A message and what follows it."""

    key: int
    message: Message
    parent: Node | None
    children: list[Node] = field(default_factory=list)
    chosen: int = -1
    """Which child the shown branch goes through."""
    saved: int | None = None
    """Its id in the history; set by the keeper alone."""
    stats: Stats | None = None
    """Of a complete answer."""
    foot: str = ""
    """What its line of figures says in this session."""
    thought: str = ""
    """What the title of its thinking says in this session."""

    @property
    def role(self) -> str:
        """Who said it."""
        return self.message.role


class Conversation:
    """A chat being held: the tree, the way through it, and how it is to be continued."""

    def __init__(self, *, system: str = "", preset: str = "chat", thinking: bool = False) -> None:
        self.system, self.preset, self.thinking = system, preset, thinking
        self.began = date.today()
        """The day the model is told, for as long as the chat lasts."""
        self.title = ""
        self.saved: int | None = None
        """Its id in the history; set by the keeper alone."""
        self._keys = itertools.count(1)
        self._root = Node(0, Message("system", ""), None)
        self._nodes: dict[int, Node] = {}

    @property
    def path(self) -> list[Node]:
        """The shown branch, first message first."""
        return list(self._down(self._root))

    @property
    def leaf(self) -> Node | None:
        """The last message of the shown branch."""
        path = self.path
        return path[-1] if path else None

    def node(self, key: int) -> Node | None:
        """The node of this key, if it is still there."""
        return self._nodes.get(key)

    def chat(self, until: Node | None = None) -> Chat:
        """The shown branch up to a node for the engine: a copy, nobody else writes in it.

        Templates want turns to alternate: a question without an answer (a failure, a window closed
        early) is left out before the next one, and so is an answer without a word.
        """
        said: list[Message] = []
        for node in self.path:
            if said and said[-1].role == node.role == "user":
                said.pop()
            if node.message.text or node.message.tool_calls:
                said.append(node.message)
            if node is until:
                break
        return Chat(said, self.system, self.preset, self.thinking, began=self.began)

    def say(self, text: str, attachments: Sequence[Attachment] = ()) -> Node:
        """A question at the end of the shown branch."""
        return self._add(
            self.leaf or self._root, Message("user", text, attachments=tuple(attachments))
        )

    def edit(self, node: Node, text: str, attachments: Sequence[Attachment] = ()) -> Node:
        """The same question in other words, as a branch of its own."""
        assert node.parent is not None
        return self._add(node.parent, Message("user", text, attachments=tuple(attachments)))

    def answer(self, question: Node) -> Node:
        """Room for one more answer to this question."""
        return self._add(question, Message("assistant", ""))

    def question_of(self, node: Node) -> Node | None:
        """The question a node is, or answers."""
        while node.role != "user" and node.parent is not None:
            node = node.parent
        return node if node.role == "user" else None

    def drop(self, node: Node) -> None:
        """As if it had not been said; the sibling before it is shown again."""
        parent = node.parent
        assert parent is not None
        at = parent.children.index(node)
        parent.children.remove(node)
        if parent.chosen >= at:
            parent.chosen = max(parent.chosen - 1, 0) if parent.children else -1
        self._nodes.pop(node.key, None)

    def place(self, node: Node) -> Place:
        """Which of its siblings it is."""
        siblings = node.parent.children if node.parent else [node]
        return Place(siblings.index(node) + 1, len(siblings))

    def step(self, node: Node, by: int) -> Node | None:
        """Show the next or previous sibling instead; None where there is none."""
        assert node.parent is not None
        siblings = node.parent.children
        at = siblings.index(node) + by
        if not 0 <= at < len(siblings):
            return None
        node.parent.chosen = at
        return siblings[at]

    def show(self, node: Node) -> None:
        """Show the branch this node is on."""
        while node.parent is not None:
            node.parent.chosen = node.parent.children.index(node)
            node = node.parent

    def find(self, saved: int) -> Node | None:
        """The node with this id in the history."""
        return next((n for n in self._nodes.values() if n.saved == saved), None)

    def restore(self, saved: int, parent: int | None, message: Message, stats: object) -> Node:
        """A message from the history; parents come before their children."""
        above = self._root if parent is None else self.find(parent)
        node = self._add(above or self._root, message)
        node.saved = saved
        if isinstance(stats, Mapping) and stats:
            names = {f.name for f in fields(Stats)}
            node.stats = Stats(**{k: v for k, v in stats.items() if k in names})
        return node

    def _add(self, parent: Node, message: Message) -> Node:
        node = Node(next(self._keys), message, parent)
        parent.children.append(node)
        parent.chosen = len(parent.children) - 1
        self._nodes[node.key] = node
        return node

    def _down(self, node: Node) -> Iterator[Node]:
        while node.children:
            node = node.children[node.chosen]
            yield node
