"""What a saved session's manifest says: its ids, and which files hold which rows.

One line with a checksum, then JSON. Knows no folder and no tensors; `session_store` keeps manifests
in files, `session_files` the rows they name.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

VERSION: Final = 1
"""Of manifests; those of another one are left alone until they are the longest unused."""
MAGIC: Final = "mimo-session"
State: TypeAlias = Literal["damaged", "foreign"]


@dataclass(frozen=True, slots=True)
class Piece:
    """One file of rows: positions `first` .. `last`, in the order of layers and their parts."""

    name: str
    first: int
    last: int
    nbytes: int
    crcs: tuple[int, ...]
    """crc32 of each tensor."""
    starts: dict[str, int] = field(default_factory=dict)
    """Of a restart point: first position per layer, and "draft"."""
    low: int = 0
    """Of a restart point: see `cache.Snapshot`."""


@dataclass(frozen=True, slots=True)
class Saved:
    """A manifest."""

    id: str
    model: str
    """What people call it."""
    fingerprint: str
    """Who can use the rows: model, weights, dtype, window, format."""
    ids: list[int] = field(repr=False)
    title: str
    rows: tuple[Piece, ...]
    points: tuple[Piece, ...]
    """Restart points, earliest first."""
    used: float = 0.0
    """When it was last saved or continued, in seconds since 1970."""

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """All files but the manifest."""
        return self.rows + self.points

    @property
    def nbytes(self) -> int:
        """Bytes of its pieces, shared or not."""
        return sum(piece.nbytes for piece in self.pieces)

    def usable_prefix(self, common: int) -> int:
        """How many of the first `common` ids, which are ours too, it can bring back."""
        return max((min(common, p.last) for p in self.points if common >= p.low), default=0)


def written(saved: Saved) -> bytes:
    """The manifest as a file's content."""
    data = json.dumps({"version": VERSION, **asdict(saved)}, separators=(",", ":")).encode()
    return f"{MAGIC} {zlib.crc32(data):08x}\n".encode() + data


def parsed(data: bytes, ident: str, when: float) -> Saved | State:
    """What a file of this content says, every claim checked that needs no other file."""
    head, _, body = data.partition(b"\n")
    if head != f"{MAGIC} {zlib.crc32(body):08x}".encode():
        return "damaged"
    try:
        return _checked(json.loads(body), ident, when)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "damaged"


def _checked(data: Any, ident: str, when: float) -> Saved | State:
    """A manifest that says what ours do; ValueError, KeyError or TypeError otherwise."""
    if data["version"] != VERSION:
        return "foreign"
    saved = Saved(
        id=ident,
        model=str(data["model"]),
        fingerprint=str(data["fingerprint"]),
        ids=[_count(i) for i in data["ids"]],
        title=str(data["title"]),
        rows=tuple(_piece(p, ".rows") for p in data["rows"]),
        points=tuple(_piece(p, ".point") for p in data["points"]),
        used=when,
    )
    n, reached = len(saved.ids), 0
    for piece in saved.rows:
        # A branch goes on before the end of a piece it shares: the next one starts inside that.
        if piece.first > reached:
            raise ValueError("rows are missing")
        reached = piece.last
    if reached < n or not saved.points or any(piece.last > n for piece in saved.points):
        raise ValueError("rows or restart points that do not fit the ids")
    return saved


def _piece(data: Any, suffix: str) -> Piece:
    name = str(data["name"])
    if Path(name).name != name or not name.endswith(suffix):
        raise ValueError("a name that is no file of this folder")
    piece = Piece(
        name,
        _count(data["first"]),
        _count(data["last"]),
        _count(data["nbytes"]),
        tuple(_count(c) for c in data["crcs"]),
        {str(k): _count(v) for k, v in data["starts"].items()},
        _count(data["low"]),
    )
    if piece.first >= piece.last:
        raise ValueError("an empty piece")
    return piece


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError("no number of things")
    return value
