"""What the parts of the screen tell each other: frozen facts and the messages that carry them.

Knows only the events and errors of the engine, never the engine itself. The bridge posts everything
but `Submitted`; the chat screen handles all of them, one after another, in the order posted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from textual.message import Message

from mimo_local.errors import MimoError
from mimo_local.events import ExpertFigures, FinishReason, Prefill, Progress, Stats


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the title bar and `/stats` say about the model."""

    name: str
    description: str
    kernel: str
    """`amx`, `avx512`, `avx_vnni`, `avx2`, `scalar`, or `reference (slow)`."""
    context_limit: int


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


@dataclass
class Submitted(Message):
    """The user pressed Enter on this text."""

    text: str


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
class Reading(Message):
    """The prompt is being processed."""

    prefill: Prefill


@dataclass
class AnswerDelta(Message):
    """New text of the running answer."""

    pieces: tuple[TextPiece, ...]
    pace: Pace


@dataclass
class Tiers(Message):
    """Where the running answer's experts came from so far; only if some lie on disk."""

    experts: ExpertFigures
    disk_bytes_per_token: float


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
