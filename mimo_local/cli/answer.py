"""One answer to the terminal: text to stdout as it comes, thinking and notes to stderr.

The first Ctrl-C cancels the stream and keeps what there is (exit 130); the second one interrupts.
Called by `mimo chat`; knows the engine only through `models.open_engine` and its events.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimo_local import chat as chats
from mimo_local.chat import Attachment, Chat, Message, Piece, preset
from mimo_local.cli import models
from mimo_local.cli.status import Status, clean, colours, say
from mimo_local.errors import DocumentError, ExitCode, UsageError
from mimo_local.events import Done, DraftFigures, ExpertFigures, Failed, Prefill, Stats
from mimo_local.sampler import SamplingParams
from mimo_local.sizes import gb

if TYPE_CHECKING:
    from mimo_local.chat import Backend
    from mimo_local.cli.keep import Keeper
    from mimo_local.engine import Session
    from mimo_local.settings import Settings

DIM, PLAIN = "\x1b[2m", "\x1b[0m"


@dataclass(frozen=True, slots=True)
class Look:
    """How an answer is shown, and the texts that end it."""

    json: bool = False
    stats: bool = False
    plain: bool = False
    stop: tuple[str, ...] = ()


@dataclass(slots=True)
class Answer:
    """What came of one request."""

    text: str = ""
    thinking: str = ""
    reason: str = ""
    stats: Stats = field(default_factory=Stats)


# -- the question ----------------------------------------------------------------------------------


def question(prompt: str | None, files: Sequence[str]) -> Message | None:
    """Documents, then piped text and the prompt as one message; None if there is nothing."""
    attached = [attachment(name) for name in files]
    parts = []
    if "-" not in files and not sys.stdin.isatty():
        match piped(sys.stdin.buffer.read()):
            case Attachment() as document:
                attached.append(document)
            case text:
                parts.append(text)
    parts.append((prompt or "").strip())
    text = "\n\n".join(part for part in parts if part)
    if text or attached:
        return Message("user", text, attachments=tuple(attached))
    if prompt is not None or files:
        raise UsageError("the prompt is empty", hint='try `mimo chat "your question"`')
    return None


def piped(data: bytes) -> str | Attachment:
    """Piped text as it is; a PDF or the like through `documents`."""
    if b"\0" not in data and not data.startswith(b"%PDF"):
        with suppress(UnicodeDecodeError):
            return data.decode("utf-8-sig").strip()
    return attachment("-", data)


def attachment(name: str, data: bytes | None = None, *, called: str = "") -> Attachment:
    """A file (`-`: stdin) as a document; what could not be read of it is said on stderr.

    `called`: the name the model is told, else the one given.
    """
    from mimo_local import documents

    if name == "-":
        data = sys.stdin.buffer.read() if data is None else data
        found = documents.read(data, name="stdin")
    else:
        found = documents.read(Path(name), name=called or name)
    for warning in found.warnings:
        say(f"{found.name}: {warning}")
    text = found.whole  # every line with its indent: it may be a program
    if not text.strip():
        raise DocumentError(f"there is no text in {found.name}", hint="this tool does no OCR")
    return Attachment(found.name, text)


def overrides(settings: Settings) -> dict[str, Any]:
    """Sampling values the user set anywhere; they win over the preset's."""
    names = [f.name for f in fields(SamplingParams)]
    values = {name: getattr(settings, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def sampling(settings: Settings) -> SamplingParams:
    """The preset's values and the user's own on top; UsageError for an unknown preset."""
    return preset(settings.preset).params(**overrides(settings))


# -- the answer ------------------------------------------------------------------------------------


def once(settings: Settings, message: Message, look: Look, keeper: Keeper) -> int:
    """One question, one answer, the exit status."""
    params = sampling(settings)
    chat = keeper.chat or new_chat(settings)
    engine = models.open_backend(settings)
    try:
        chat.messages.append(message)
        keeper.prompt(chat)
        found = ask(engine, None, chat, params, look)
        if found.text or found.thinking:
            keeper.answer(chat, found.stats, engine.name)
        if look.json:
            print(json.dumps(as_dict(found, engine.name), ensure_ascii=False))
    finally:
        engine.close()
    return ExitCode.INTERRUPTED if found.reason == "cancelled" else ExitCode.OK


def lines(settings: Settings, look: Look, keeper: Keeper) -> int:
    """A chat without a window, until the end of input or `/exit`."""
    from mimo_local.cli.plain import PlainChat
    from mimo_local.cli.prompt import reader

    sampling(settings)  # a wrong preset is said before the model is loaded
    chat = keeper.chat or new_chat(settings)
    engine = models.open_backend(settings)
    try:
        source = reader(plain=look.plain, json=look.json, remember=keeper.prompts)
        say("type a message; /help lists keys and commands, Ctrl-D ends, Ctrl-C stops an answer")
        PlainChat(engine, settings, look, source, keeper, chat).run()
    finally:
        engine.close()
    return ExitCode.OK


def new_chat(settings: Settings, like: Chat | None = None) -> Chat:
    """An empty chat as the settings want it, or with the switches of another one."""
    if like is not None:
        return Chat(system=like.system, preset=like.preset, thinking=like.thinking)
    return Chat(system=settings.system or "", preset=settings.preset, thinking=settings.think)


def ask(
    engine: Backend, session: Session | None, chat: Chat, params: SamplingParams, look: Look
) -> Answer:
    """Stream the answer to the chat's last message; raises what the engine reports as failed."""
    reply = chats.ask(engine, session, chat, params, stop=look.stop)
    status, screen, found = Status(), _Screen(look), Answer()
    with on_interrupt(reply.cancel):
        for event in reply:
            match event:
                case Prefill():
                    if event.done < event.total:
                        status(event)
                case Piece():
                    status.clear()
                    screen.show(event)
                case Done():
                    found = Answer(reply.text, reply.reasoning, event.reason, event.stats)
                case Failed():
                    status.clear()
                    screen.end()
                    raise event.error
    status.clear()
    screen.end()
    for note in (*notes(found, look, params), *engine_notes(engine)):
        say(note)
    return found


def engine_notes(engine: Backend) -> list[str]:
    """What a server did that was not asked for."""
    from mimo_local.remote import Remote

    return engine.take_notes() if isinstance(engine, Remote) else []


@contextmanager
def on_interrupt(cancel: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C calls `cancel` once, after that it is an interrupt again."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def first(*_: object) -> None:
        signal.signal(signal.SIGINT, before)
        cancel()

    signal.signal(signal.SIGINT, first)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def notes(found: Answer, look: Look, params: SamplingParams) -> Iterator[str]:
    """Lines for stderr after the answer: why it ended early, and the figures if asked for."""
    match found.reason:
        case "length":
            yield f"stopped after {params.max_tokens} tokens: --max-tokens allows more"
        case "context":
            yield "stopped: the context is full"
    if look.stats:
        yield from figures(found.stats)


def figures(s: Stats) -> Iterator[str]:
    """What an answer took: speeds, counts, the experts and drafts where there are any."""
    yield (
        f"prompt {s.prompt_tokens} tokens ({s.cached_tokens} cached) "
        f"{s.prefill_tokens_per_s:.1f} t/s | answer {s.completion_tokens} tokens "
        f"{s.decode_tokens_per_s:.1f} t/s | context {s.context_used} of {s.context_limit} "
        f"| cache {s.cache_bytes / 1e6:.1f} MB | {s.kernel}"
    )
    if s.draft is not None:
        yield draft_line(s.draft)
    if s.experts is not None:
        yield expert_line(s, s.experts)


def draft_line(d: DraftFigures) -> str:
    """What drafting did: tokens a pass, drafts by how deep, how often they were right, why."""
    parts = [f"drafts {d.tokens_per_pass:.2f} tokens a pass"]
    if d.drafted:
        passes = (f"{n}: {count / d.passes:.0%}" for n, count in enumerate(d.by_drafts) if count)
        parts.append("passes by drafts " + ", ".join(passes))
        right = (f"{a / n:.0%}" for a, n in zip(d.accepted, d.judged, strict=True) if n)
        parts.append("right " + ", ".join(right))
    if d.note:
        parts.append(d.note)
    return " | ".join(parts)


def expert_line(s: Stats, e: ExpertFigures) -> str:
    """Where the experts came from: hits per tier, bytes from disk, memory of the tiers."""
    tiers = {"VRAM": e.vram_hits, "RAM": e.ram_hits, "read ahead": e.staged_hits, "disk": e.misses}
    shares = ", ".join(f"{name} {n / e.wanted:.0%}" for name, n in tiers.items() if n)
    parts = [f"experts {shares}" if shares else "experts"]
    if e.prompt_disk_bytes:
        parts.append(f"prompt {gb(e.prompt_disk_bytes)} from disk")
    parts.append(f"{gb(s.disk_bytes_per_token)} from disk a token")
    parts.append(f"waited {e.wait_s:.1f} s")
    parts.append(f"{gb(e.ram_bytes)} in RAM")
    if e.vram_bytes:
        parts.append(f"{gb(e.vram_bytes)} in VRAM")
    if e.note:
        parts.append(e.note)
    return " | ".join(parts)


def as_dict(found: Answer, model: str) -> dict[str, Any]:
    """The one document of --json."""
    speeds = {
        "prefill_tokens_per_s": found.stats.prefill_tokens_per_s,
        "decode_tokens_per_s": found.stats.decode_tokens_per_s,
    }
    return {
        "model": model,
        "answer": found.text,
        "thinking": found.thinking,
        "finish_reason": found.reason,
        "stats": asdict(found.stats) | speeds,
    }


class _Screen:
    """Writes pieces where they belong, and a line break between thinking and answer."""

    def __init__(self, look: Look) -> None:
        self._json = look.json
        self._dim = colours(sys.stderr) and not look.plain
        self._clean = {"thinking": sys.stderr.isatty(), "answer": sys.stdout.isatty()}
        self._last = ""
        self._open = ""  # the stream whose line is not ended yet

    def show(self, piece: Piece) -> None:
        """Add a piece to the terminal."""
        if self._json or not piece.text:
            return
        if self._open and self._open != piece.kind:
            self.end()
        thinking = piece.kind == "thinking"
        text = clean(piece.text) if self._clean[piece.kind] else piece.text
        text = f"{DIM}{text}{PLAIN}" if thinking and self._dim else text
        print(text, end="", file=sys.stderr if thinking else sys.stdout, flush=True)
        self._open, self._last = piece.kind, piece.text

    def end(self) -> None:
        """End the open line."""
        if self._open and not self._last.endswith("\n"):
            print(file=sys.stderr if self._open == "thinking" else sys.stdout, flush=True)
        self._open = ""
