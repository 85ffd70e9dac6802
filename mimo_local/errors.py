"""The one error tree. Every error a user can meet carries a hint that names the next step.

MimoError
├── UsageError           2    wrong arguments, an unknown preset, an empty prompt
│   └── ContextOverflowError  the prompt does not fit the context
├── ModelFilesError      3    what is on disk cannot be used
│   ├── ConfigError           config.json: unknown model type, missing or impossible key
│   ├── CheckpointError       source shards: missing, short, corrupt, NaN scales
│   ├── PackError             the pack: incomplete, newer format, wrong checksum
│   └── TokenizerError        tokenizer or chat template: missing, raises, leaves its sandbox
├── NotEnoughMemoryError 4    RAM or VRAM, with the number missing
├── NativeError          5    the kernel library: wrong arguments, broken build
├── DiskSpaceError       1    the target file system is too small or full
├── DocumentError        1    a document that cannot be read
├── TraceError           1    a routing trace that cannot be read
├── HistoryError         1    saved chats that cannot be read or written
├── RemoteError          1    a server that cannot be reached, refuses, or breaks off
├── DownloadError        1    a package or a file that cannot be fetched
├── BusyError            1    more requests wait for the engine than it lets wait
└── CancelledError     130    the user stopped it

Knows no other module. The CLI turns `exit_code` into the exit status, everyone else just raises.
"""

from __future__ import annotations

from enum import IntEnum
from typing import ClassVar


class ExitCode(IntEnum):
    """Exit status of every `mimo` command."""

    OK = 0
    FAILED = 1
    USAGE = 2
    MODEL_FILES = 3
    MEMORY = 4
    NATIVE = 5
    INTERRUPTED = 130


class MimoError(Exception):
    """Base of all errors meant for people: what is wrong with which value, and what to do next."""

    exit_code: ClassVar[ExitCode] = ExitCode.FAILED

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message


class UsageError(MimoError):
    """The command or call cannot mean what was typed."""

    exit_code = ExitCode.USAGE


class ContextOverflowError(UsageError):
    """The prompt has more tokens than the context allows; nothing is ever cut silently."""


class ModelFilesError(MimoError):
    """Something in the model's folder cannot be used."""

    exit_code = ExitCode.MODEL_FILES


class ConfigError(ModelFilesError):
    """config.json lacks a key, names an unknown model type, or contradicts itself."""


class CheckpointError(ModelFilesError):
    """A source checkpoint is missing files, truncated, or holds impossible values."""


class PackError(ModelFilesError):
    """A pack is incomplete, of a newer format, or does not match its checksums."""


class TokenizerError(ModelFilesError):
    """The tokenizer files or the chat template cannot be used."""


class NotEnoughMemoryError(MimoError):
    """The plan does not fit the memory there is; the message says by how much."""

    exit_code = ExitCode.MEMORY


class NativeError(MimoError):
    """The kernel library refused its arguments or cannot be loaded."""

    exit_code = ExitCode.NATIVE


class DiskSpaceError(MimoError):
    """The target file system has too little room, or filled up while writing."""


class DocumentError(MimoError):
    """A document cannot be read; the message says which part and why."""


class TraceError(MimoError):
    """A file is no routing trace, or a damaged one."""


class HistoryError(MimoError):
    """Saved chats cannot be opened, read or written; a chat goes on without them."""


class RemoteError(MimoError):
    """A server that was asked to answer cannot be reached, refuses, or breaks off."""


class DownloadError(MimoError):
    """Something could not be fetched, or what came does not match its checksum."""


class BusyError(MimoError):
    """Too many requests are waiting already; asking again later may succeed."""


class CancelledError(MimoError):
    """The user stopped the work; what was made so far is kept."""

    exit_code = ExitCode.INTERRUPTED


def as_mimo_error(error: BaseException) -> MimoError:
    """The error itself, or an unexpected one in our terms with the original as its cause."""
    if isinstance(error, MimoError):
        return error
    # torch reports a failed allocation as a RuntimeError with one of these texts.
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        wrapped: MimoError = NotEnoughMemoryError(
            "the memory ran out while answering", hint="use a smaller --context or a smaller format"
        )
    elif isinstance(error, RuntimeError) and "out of memory" in str(error).lower():
        wrapped = NotEnoughMemoryError(
            "the GPU's memory ran out while answering",
            hint="close what else uses the GPU, give the model less of it with `--vram`, or use a "
            "smaller --context",
        )
    else:
        wrapped = MimoError(
            f"the engine failed: {type(error).__name__}: {error}",
            hint="ask again; if it happens twice, report it with the output of `mimo doctor`",
        )
    wrapped.__cause__ = error
    return wrapped
