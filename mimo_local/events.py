"""What the engine tells whoever asked: progress, tokens, figures, the end. Plain frozen data.

A `Stream` yields `Prefill* Token* Done | Failed`; loaders and converters call back with `Progress`.
Local engine and remote endpoint send the same events. Imports nothing but the errors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from mimo_local.errors import MimoError

FinishReason: TypeAlias = Literal["stop", "length", "cancelled", "context"]
"""Why an answer ended: a stop id or stop string, `max_tokens`, the user, or a full context."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Long work outside an answer: loading, converting, fetching, verifying."""

    stage: str
    """What is being done, in two or three words a user understands."""
    done: int
    total: int
    unit: str = "bytes"
    eta_s: float | None = None


@dataclass(frozen=True, slots=True)
class Prefill:
    """`done` of `total` prompt tokens have been processed; tokens found in the cache count."""

    done: int
    total: int
    tokens_per_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Token:
    """One token and the text it completes: empty while a UTF-8 character is unfinished."""

    id: int
    text: str
    logprob: float | None = None
    """Natural logarithm of the model's own probability, before any sampling filter; if asked."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest ids and their logprobs, likeliest first; if asked."""


@dataclass(frozen=True, slots=True)
class ExpertFigures:
    """Where the experts of a request came from, for models whose experts are not all in RAM."""

    wanted: int = 0
    """Experts asked for: distinct ones per layer and step, long prompts left out."""
    vram_hits: int = 0
    ram_hits: int = 0
    staged_hits: int = 0
    """Read ahead on a guess that came true."""
    misses: int = 0
    disk_bytes: int = 0
    prompt_disk_bytes: int = 0
    """Of these for long prompts."""
    wait_s: float = 0.0
    """Seconds spent waiting for the disk."""
    ram_bytes: int = 0
    """Memory of the RAM tier now."""
    vram_bytes: int = 0
    prefetching: bool = False
    note: str = ""

    @property
    def hit_rate(self) -> float:
        """Share of the wanted experts that had not to be waited for from the disk's start."""
        return 1 - self.misses / self.wanted if self.wanted else 0.0


@dataclass(frozen=True, slots=True)
class DraftFigures:
    """What drafting did for an answer, for models with MTP layers."""

    by_drafts: tuple[int, ...] = ()
    """Passes of the model, by the number of drafts they verified."""
    judged: tuple[int, ...] = ()
    """Drafts that were looked at, by step: those before them had been right."""
    accepted: tuple[int, ...] = ()
    seconds: float = 0.0
    """Of drafting and the model's passes."""
    plain_s: float = 0.0
    """Seconds a pass without drafts takes; 0 where none was made."""
    note: str = ""
    """Why it drafts as deep as it does."""

    @classmethod
    def none(cls, steps: int) -> DraftFigures:
        """Before the first pass."""
        return cls((0,) * (steps + 1), (0,) * steps, (0,) * steps)

    @property
    def passes(self) -> int:
        """Passes of the model."""
        return sum(self.by_drafts)

    @property
    def drafted(self) -> int:
        """Drafts that were verified."""
        return sum(n * count for n, count in enumerate(self.by_drafts))

    @property
    def tokens_per_pass(self) -> float:
        """Tokens a pass gave: the one it draws and the drafts that were right."""
        return 1 + sum(self.accepted) / self.passes if self.passes else 0.0

    def plus(self, drafts: int, judged: int, accepted: int, seconds: float) -> DraftFigures:
        """With one more pass."""
        return replace(
            self,
            by_drafts=_counted(self.by_drafts, drafts, drafts + 1),
            judged=_counted(self.judged, 0, judged),
            accepted=_counted(self.accepted, 0, accepted),
            seconds=self.seconds + seconds,
        )


def _counted(counts: tuple[int, ...], a: int, b: int) -> tuple[int, ...]:
    """One more in places a .. b."""
    return tuple(n + (a <= i < b) for i, n in enumerate(counts))


@dataclass(frozen=True, slots=True)
class Stats:
    """Figures of one request."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens that were already in the session's cache and were not processed again."""
    completion_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    context_used: int = 0
    context_limit: int = 0
    cache_bytes: int = 0
    """Bytes of this session's key/value cache."""
    experts: ExpertFigures | None = None
    """None where all experts lie in RAM."""
    draft: DraftFigures | None = None
    """None where nothing was drafted and nothing could be."""
    kernel: str = ""
    """`amx`, `avx512`, `avx_vnni`, `avx2`, `scalar`, or `reference (slow)`."""

    @property
    def prefill_tokens_per_s(self) -> float:
        """Processed (not cached) prompt tokens per second."""
        new = self.prompt_tokens - self.cached_tokens
        return new / self.prefill_s if self.prefill_s > 0 else 0.0

    @property
    def disk_bytes_per_token(self) -> float:
        """Bytes of experts read from disk per generated token; 0 where there is no disk tier."""
        steps = self.completion_tokens - 1
        if self.experts is None or steps < 1:
            return 0.0
        return (self.experts.disk_bytes - self.experts.prompt_disk_bytes) / steps

    @property
    def decode_tokens_per_s(self) -> float:
        """Generated tokens per second, the first token (part of prefill) left out."""
        steps = self.completion_tokens - 1
        return steps / self.decode_s if self.decode_s > 0 and steps > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Done:
    """The answer is complete."""

    reason: FinishReason
    stats: Stats


@dataclass(frozen=True, slots=True)
class Failed:
    """The request ended in an error; the session's ids and cache still agree."""

    error: MimoError


Event: TypeAlias = Prefill | Token | Done | Failed
