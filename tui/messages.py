"""What the parts of the screen tell each other: frozen facts and the messages that carry them.

Knows only the events and errors of the engine, never the engine itself. Posted by widgets, the
bridge and the keeper; the chat screen handles all of them, one after another, in the order posted.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from textual.message import Message

from mimo_local.errors import MimoError
from mimo_local.events import (
    DraftFigures,
    ExpertFigures,
    FinishReason,
    Prefill,
    Progress,
    Stats,
)


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the title bar and `/stats` say about the model."""

    name: str
    description: str
    kernel: str
    """`amx`, `avx512`, `avx_vnni`, `avx2`, `scalar`, or `reference (slow)`."""
    context_limit: int
    where: str = "Everything stays on this machine."
    """What becomes of what is typed."""


@dataclass(frozen=True, slots=True)
class Problem:
    """An error as a person reads it."""

    message: str
    hint: str
    exit_code: int = 1

    @classmethod
    def of(cls, error: BaseException) -> Problem:
        """Our own errors speak for themselves; anything else is a bug and says so."""
        if isinstance(error, MimoError):
            return cls(error.message, error.hint, int(error.exit_code))
        text = str(error) or "no message"
        return cls(
            f"{type(error).__name__}: {text}",
            "this is a bug in the tool: please report it with the output of `mimo doctor`",
        )


@dataclass(frozen=True, slots=True)
class TextPiece:
    """Text of one kind, joined from one or more tokens."""

    kind: Literal["thinking", "answer"]
    text: str


@dataclass(frozen=True, slots=True)
class Pace:
    """How far the running answer is: tokens by kind and the rate since the first one."""

    tokens: int = 0
    thinking_tokens: int = 0
    thinking_s: float = 0.0
    tokens_per_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Machine:
    """Memory in bytes: of this process, of the machine, of its GPU (0 where there is none)."""

    process: int
    used: int
    total: int
    vram_used: int = 0
    vram_total: int = 0


@dataclass(frozen=True, slots=True)
class ChatRow:
    """One line of the chat list; `snippet` and `message` where a search found it."""

    chat: int
    title: str
    changed: float
    """Seconds since 1970."""
    messages: int
    snippet: str = ""
    """Each match stands between \\x02 and \\x03."""
    message: int | None = None


@dataclass(frozen=True, slots=True)
class FileInfo:
    """A document attached to the prompt being written."""

    ticket: int
    """Told apart by it: the same file may be attached twice."""
    name: str
    tokens: int | None = None
    """None before it is counted, which takes a model."""
    text: str | None = None
    """None while it is being read."""
    note: str = ""
    """What could not be read of it."""


@dataclass(frozen=True, slots=True)
class Place:
    """Which of its branches a message is: `number` of `count`, from 1."""

    number: int
    count: int


# ---- from widgets --------------------------------------------------------------------------------


@dataclass
class Submitted(Message):
    """The user pressed Enter on this text."""

    text: str


@dataclass
class Wish(Message):
    """What the user wants done with a message of the transcript."""

    key: int
    what: Literal["edit", "regenerate", "next", "previous", "up", "down", "earlier"]


@dataclass
class Searching(Message):
    """The user typed in the search field of the chat list."""

    text: str


@dataclass
class ListWish(Message):
    """What the user wants done with a chat of the list; without a row: with none of them."""

    what: Literal["open", "new", "rename", "delete", "export", "import", "close"]
    row: ChatRow | None = None


@dataclass
class Detached(Message):
    """The user took a document off the prompt."""

    ticket: int


@dataclass
class Attach(Message):
    """The user completed the path of a file in the prompt."""

    path: Path


# ---- from the bridge -----------------------------------------------------------------------------


@dataclass
class Loading(Message):
    """The engine is being made: fetching, converting, opening."""

    progress: Progress


@dataclass
class Ready(Message):
    """The engine answers from now on."""

    model: ModelInfo


@dataclass
class LoadFailed(Message):
    """There will be no engine."""

    problem: Problem


@dataclass
class Queued(Message):
    """The engine is busy with others; asked again until it takes this one."""


@dataclass
class Attached(Message):
    """A document was read, or counted: this replaces what its ticket said before."""

    file: FileInfo


@dataclass
class AttachFailed(Message):
    """A document could not be read."""

    ticket: int
    problem: Problem


@dataclass
class MachineNow(Message):
    """Memory in use, every two seconds if it changed."""

    machine: Machine


@dataclass
class Reading(Message):
    """The prompt is being processed."""

    prefill: Prefill


@dataclass
class AnswerDelta(Message):
    """New text of the running answer."""

    pieces: tuple[TextPiece, ...]
    pace: Pace


@dataclass
class Noted(Message):
    """Something a server did that was not asked for."""

    text: str


@dataclass
class Tiers(Message):
    """Where the running answer's experts came from so far; only if some lie on disk."""

    experts: ExpertFigures
    disk_bytes_per_token: float
    disk_bytes_per_s: float = 0.0


@dataclass
class Drafts(Message):
    """What drafting did for the running answer so far; only where somebody drafts."""

    figures: DraftFigures


@dataclass
class AnswerDone(Message):
    """The answer is complete, or was stopped; all its text came before."""

    reason: FinishReason
    stats: Stats
    pace: Pace


@dataclass
class AnswerFailed(Message):
    """The answer ended in an error; what came before stays true."""

    problem: Problem


# ---- from the keeper -----------------------------------------------------------------------------


@dataclass
class Found(Message):
    """Chats for the list: all, or those in which `text` was found."""

    text: str
    rows: tuple[ChatRow, ...]


@dataclass
class Kept(Message):
    """Something was done with saved chats: what, in words; the list has to be read again."""

    what: str
    chat: int | None = None
    """The chat it was done to."""


@dataclass
class Titled(Message):
    """A chat was saved for the first time, or renamed."""

    chat: int
    title: str


@dataclass
class KeepFailed(Message):
    """Saving failed (`saving`; said once until it works again), or what was asked for did."""

    problem: Problem
    saving: bool = False
