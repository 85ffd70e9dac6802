"""Routing traces: which experts a model chose for every token, as one safetensors file.

Written while a model runs (`tracing`), by appending: memory holds a chunk, and the file appears
whole or not at all. Read by `replay`. Knows arrays and bytes; no model, no torch, no policies.

The file holds `ids` (N, L, K), and with guesses `guesses` (N, L - 1, G): uint8 up to 256 experts,
else int16. N tokens in the order they were processed, L mixture layers in the model's order. Its
metadata: `mimo`, JSON of `format`, `facts` and `texts`, and `checksum`, a BLAKE2b over that JSON
and the tensors' bytes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from mimo_local.errors import DiskSpaceError, TraceError, UsageError

FORMAT: Final = "mimo-routing-1"
_HINT: Final = "make a new one with `mimo trace`"
_COPY: Final = 1 << 20  # bytes copied at a time when the file is put together


@dataclass(frozen=True, slots=True)
class Facts:
    """What was traced: numbers a replay needs, and names for people."""

    model: str
    layers: tuple[int, ...]
    """Indices of the mixture layers, ascending."""
    n_experts: int
    k: int
    expert_nbytes: int
    """Bytes of one expert as stored."""
    config: str = ""
    """Fingerprint of the model's config: traces of different models are not mixed up."""
    n_guesses: int = 0
    """G, best first: what a predictor said about layer i + 1 while layer i was about to run."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of ids and guesses."""
        return np.dtype(np.uint8 if self.n_experts <= 256 else np.int16)


@dataclass(frozen=True, slots=True)
class Text:
    """One sequence: `prompt` tokens were read, then `answer` tokens of the model's own."""

    source: str
    prompt: int = 0
    answer: int = 0

    @property
    def tokens(self) -> int:
        """Both."""
        return self.prompt + self.answer


@dataclass(frozen=True, slots=True, eq=False)
class RoutingTrace:
    """A trace in memory."""

    facts: Facts
    texts: tuple[Text, ...]
    ids: npt.NDArray[Any]
    """(N, L, K)."""
    guesses: npt.NDArray[Any] | None = None
    """(N, L - 1, G): entry i is about layer i + 1."""

    @property
    def tokens(self) -> int:
        """N."""
        return len(self.ids)

    @property
    def is_answer(self) -> npt.NDArray[np.bool_]:
        """(N,): whether the token was the model's own."""
        counts = [n for text in self.texts for n in (text.prompt, text.answer)]
        return np.repeat(np.tile([False, True], len(self.texts)), counts)

    def only_answers(self) -> RoutingTrace:
        """The model's own tokens; UsageError if there are none."""
        mask = self.is_answer
        if not mask.any():
            raise UsageError(
                "this trace holds no answers", hint="trace some with `mimo trace --generate N`"
            )
        texts = tuple(replace(text, prompt=0) for text in self.texts if text.answer)
        guesses = None if self.guesses is None else self.guesses[mask]
        return RoutingTrace(self.facts, texts, self.ids[mask], guesses)

    def write(self, path: Path) -> None:
        """As a `TraceWriter` would have."""
        with TraceWriter(path, self.facts) as out:
            start = 0
            for text in self.texts:
                out.begin(text.source)
                for n, answer in ((text.prompt, False), (text.answer, True)):
                    rows = slice(start, start + n)
                    guesses = None if self.guesses is None else self.guesses[rows]
                    out.append(self.ids[rows], guesses, answer=answer)
                    start += n

    @classmethod
    def read(cls, path: Path) -> RoutingTrace:
        """A finished file, every claim checked; TraceError."""
        try:
            with safe_open(path, framework="np") as file:
                meta = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as e:
            raise TraceError(f"`{path}` cannot be read as a routing trace: {e}", hint=_HINT) from e
        facts, texts = _parse(path, meta)
        ids, guesses = tensors.get("ids"), tensors.get("guesses")
        given = [array for array in (ids, guesses) if array is not None]
        if meta.get("checksum") != _digest(meta["mimo"], *(_sum(a.tobytes()) for a in given)):
            raise TraceError(f"`{path}` is damaged: its checksum does not match", hint=_HINT)
        n = sum(text.tokens for text in texts)
        if not _fits(ids, (n, len(facts.layers), facts.k), facts) or not _fits(
            guesses, _guess_shape(facts, n), facts
        ):
            raise TraceError(f"`{path}` holds what does not fit its own description", hint=_HINT)
        assert ids is not None
        return cls(facts, texts, ids, guesses)


class TraceWriter:
    """Appends to a trace file that gets its name when the `with` block ends without an error.

    With no token appended no file is made. UsageError where it cannot be written, DiskSpaceError.
    """

    def __init__(self, path: Path, facts: Facts) -> None:
        self.path, self.facts = path, facts
        self._texts: list[Text] = []
        with _writing(path):
            # Without a name: a process that dies leaves nothing behind.
            self._spools = [_Spool(path.parent) for _ in range(2 if facts.n_guesses else 1)]

    @property
    def tokens(self) -> int:
        """Appended so far."""
        return sum(text.tokens for text in self._texts)

    def begin(self, source: str) -> None:
        """A new sequence; `source` says where its text is from."""
        self._texts.append(Text(source))

    def append(
        self, ids: npt.NDArray[Any], guesses: npt.NDArray[Any] | None = None, *, answer: bool
    ) -> None:
        """ids (T, L, K), guesses (T, L - 1, G) of the next T tokens of the sequence begun last."""
        facts, n = self.facts, len(ids)
        given = [(ids, (n, len(facts.layers), facts.k)), (guesses, _guess_shape(facts, n))]
        for array, shape in given:
            if (None if array is None else array.shape) != shape:
                raise ValueError(f"expected {shape}, got {None if array is None else array.shape}")
            if array is not None and n and not 0 <= array.min() <= array.max() < facts.n_experts:
                raise ValueError(f"an id is outside 0 .. {facts.n_experts - 1}")
        text = self._texts[-1]
        prompt, own = (0, n) if answer else (n, 0)
        with _writing(self.path):
            for spool, array in zip(self._spools, (ids, guesses), strict=False):
                assert array is not None
                spool.write(np.ascontiguousarray(array, facts.dtype))
        self._texts[-1] = Text(text.source, text.prompt + prompt, text.answer + own)

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if kind is None and self.tokens:
                self._finish()
        finally:
            for spool in self._spools:
                spool.file.close()

    def _finish(self) -> None:
        facts, n = self.facts, self.tokens
        texts = [asdict(text) for text in self._texts if text.tokens]
        described = json.dumps({"format": FORMAT, "facts": asdict(facts), "texts": texts})
        sums = [spool.sum.digest() for spool in self._spools]
        header: dict[str, Any] = {
            "__metadata__": {"mimo": described, "checksum": _digest(described, *sums)}
        }
        shapes = ((n, len(facts.layers), facts.k), _guess_shape(facts, n))
        at = 0
        for name, shape, spool in zip(("ids", "guesses"), shapes, self._spools, strict=False):
            end = at + spool.nbytes
            dtype = "U8" if facts.dtype == np.uint8 else "I16"
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (at, end)}
            at = end
        raw = json.dumps(header).encode()
        raw += b" " * (-len(raw) % 8)
        part = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        with _writing(self.path):
            try:
                with part.open("wb") as out:
                    out.write(len(raw).to_bytes(8, "little") + raw)
                    for spool in self._spools:
                        spool.copy_to(out)
                    out.flush()
                    os.fsync(out.fileno())
                part.replace(self.path)
            finally:
                with suppress(OSError):
                    part.unlink(missing_ok=True)


class _Spool:
    """Bytes on their way into the file: their number is known only at the end."""

    def __init__(self, folder: Path) -> None:
        self.file: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self.sum = hashlib.blake2b(digest_size=16)
        self.nbytes = 0

    def write(self, array: npt.NDArray[Any]) -> None:
        data = array.tobytes()
        self.file.write(data)
        self.sum.update(data)
        self.nbytes += len(data)

    def copy_to(self, out: IO[bytes]) -> None:
        self.file.seek(0)
        while piece := self.file.read(_COPY):
            out.write(piece)


def _sum(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _digest(described: str, *sums: bytes) -> str:
    return hashlib.blake2b(described.encode() + b"".join(sums), digest_size=16).hexdigest()


def _guess_shape(facts: Facts, n: int) -> tuple[int, ...] | None:
    return (n, len(facts.layers) - 1, facts.n_guesses) if facts.n_guesses else None


def _fits(array: npt.NDArray[Any] | None, shape: tuple[int, ...] | None, facts: Facts) -> bool:
    """A checksum is no proof of intent: shape, dtype and every id."""
    if array is None or shape is None:
        return array is None and shape is None
    if array.shape != shape or array.dtype != facts.dtype:
        return False
    return not array.size or bool(0 <= array.min() <= array.max() < facts.n_experts)


def _parse(path: Path, meta: dict[str, str]) -> tuple[Facts, tuple[Text, ...]]:
    foreign = TraceError(f"`{path}` is not a routing trace of this version ({FORMAT})", hint=_HINT)
    try:
        found = json.loads(meta.get("mimo", "0"))
        if found["format"] != FORMAT:
            raise foreign
        facts = Facts(**found["facts"])
        facts = replace(facts, layers=tuple(map(int, facts.layers)))
        texts = tuple(Text(**text) for text in found["texts"])
        counts = [n for text in texts for n in (text.prompt, text.answer)]
        sizes = (facts.n_experts, facts.k, facts.expert_nbytes, facts.n_guesses, *counts)
        if not all(isinstance(n, int) and 0 <= n < 1 << 48 for n in sizes):
            raise foreign
        if not 0 < facts.k <= facts.n_experts < 1 << 15 or not facts.layers:
            raise foreign
    except (KeyError, TypeError, ValueError) as e:
        raise foreign from e
    return facts, texts


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        full = e.errno in (errno.ENOSPC, errno.EDQUOT)
        error = DiskSpaceError if full else UsageError
        raise error(f"cannot write `{path}`: {e.strerror}", hint="choose another place") from e
