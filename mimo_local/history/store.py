"""The saved chats: adding, changing, choosing branches, listing, finding, removing.

One connection per History, usable from any one thread at a time; writes are short transactions, so
several processes share a file. Called by cli, tui and plain chat.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mimo_local.chat import Message
from mimo_local.errors import HistoryError
from mimo_local.events import Stats
from mimo_local.history import export, importing, schema, words
from mimo_local.history.rows import INFO, STORED, clean, columns, figures, info, insert, stored
from mimo_local.history.types import ChatInfo, Hit, Stored

TITLE_WEIGHT = 8.0
"""A word in a title counts as much as eight in a message."""


NEWEST = 2000
"""Messages that are ranked, of those that match: for a word that stands in nearly every message,
ranking 20,000 takes 20 ms, and the user is still typing."""
_SCORED = f"SELECT rowid, bm25(search, {TITLE_WEIGHT}, 1.0) AS score FROM search"
_SEARCH = f"""
SELECT rowid FROM (
    SELECT * FROM ({_SCORED} WHERE search MATCH ?1 AND rowid < 0)
    UNION ALL
    SELECT * FROM ({_SCORED} WHERE search MATCH ?1 AND rowid > 0 ORDER BY rowid DESC LIMIT {NEWEST})
) ORDER BY score, abs(rowid) DESC LIMIT ?2"""


class History:
    """Saved chats in one file. Every method raises HistoryError, and only that."""

    def __init__(self, path: Path, db: sqlite3.Connection) -> None:
        self.path = path
        self._db = db
        self._lock = threading.RLock()

    @classmethod
    def open(cls, path: Path) -> History:
        """The history in this file, made or brought up to date if need be."""
        return cls(path, schema.connect(path))

    def close(self) -> None:
        """Close the file; closing again does nothing."""
        with self._lock, suppress(sqlite3.Error):
            self._db.close()

    def __enter__(self) -> History:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- writing -----------------------------------------------------------------------------------

    def new_chat(
        self,
        *,
        system: str = "",
        preset: str = "chat",
        thinking: bool = False,
        model: str = "",
        title: str = "",
    ) -> int:
        """Begin a chat; without a title it gets one from its first user message."""
        now = time.time()
        with self._write() as db:
            done = db.execute(
                "INSERT INTO chats(created, updated, thinking, preset, model, title, system)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                (now, now, thinking, *map(clean, (preset, model, words.plain(title), system))),
            )
            return int(done.lastrowid or 0)

    def add(
        self,
        chat: int,
        message: Message,
        *,
        parent: int | None,
        stats: Stats | None = None,
        model: str = "",
    ) -> int:
        """Save a message below `parent` (None: at the root); the active branch now ends with it."""
        now = time.time()
        with self._write() as db:
            self._one(db, "SELECT id FROM chats WHERE id = ?", chat, f"chat {chat}")
            if parent is not None:
                (owner,) = self._one(
                    db, "SELECT chat FROM messages WHERE id = ?", parent, f"message {parent}"
                )
                if owner != chat:
                    raise HistoryError(
                        f"message {parent} belongs to chat {owner}, not to chat {chat}",
                        hint="a message can only follow one of its own chat",
                    )
            return insert(db, chat, message, parent, figures(stats), model, now)

    def update(self, message_id: int, message: Message, stats: Stats | None = None) -> None:
        """Replace a message, as while its answer is streaming; without `stats` those there stay."""
        new = None if stats is None else json.dumps(figures(stats))
        with self._write() as db:
            (chat,) = self._one(
                db,
                "UPDATE messages SET role = ?, stats = coalesce(?, stats), tool_call_id = ?,"
                " tool_calls = ?, files = ?, content = ?, reasoning = ?, attachments = ?"
                " WHERE id = ? RETURNING chat",
                (message.role, new, *columns(message), message_id),
                f"message {message_id}",
            )
            db.execute("UPDATE chats SET updated = ? WHERE id = ?", (time.time(), chat))

    def choose(self, message_id: int) -> None:
        """Make the branch through this message active, down to its most recently used leaf."""
        with self._write() as db:
            (chat,) = self._one(
                db, "SELECT chat FROM messages WHERE id = ?", message_id, f"message {message_id}"
            )
            (leaf,) = db.execute(
                "WITH RECURSIVE below(id, used) AS ("
                " SELECT id, used FROM messages WHERE id = ?"
                " UNION ALL SELECT m.id, m.used FROM messages m JOIN below b ON m.parent = b.id)"
                " SELECT id FROM below"
                " WHERE NOT EXISTS (SELECT 1 FROM messages m WHERE m.parent = below.id)"
                " ORDER BY used DESC, id DESC LIMIT 1",
                (message_id,),
            ).fetchone()
            (turn,) = db.execute(
                "UPDATE chats SET turn = turn + 1, leaf = ? WHERE id = ? RETURNING turn",
                (leaf, chat),
            ).fetchone()
            db.execute("UPDATE messages SET used = ? WHERE id = ?", (turn, leaf))

    def rename(self, chat: int, title: str) -> None:
        """Give a chat another title."""
        line = words.plain(clean(title))
        if not line:
            raise HistoryError("the title is empty", hint="give the chat a name")
        with self._write() as db:
            sql = "UPDATE chats SET title = ? WHERE id = ? RETURNING id"
            self._one(db, sql, (line, chat), f"chat {chat}")

    def set_options(
        self,
        chat: int,
        system: str | None = None,
        preset: str | None = None,
        thinking: bool | None = None,
    ) -> None:
        """Change how a chat is to be continued; None leaves a value as it is."""
        with self._write() as db:
            self._one(
                db,
                "UPDATE chats SET system = coalesce(?, system), preset = coalesce(?, preset),"
                " thinking = coalesce(?, thinking) WHERE id = ? RETURNING id",
                (
                    None if system is None else clean(system),
                    None if preset is None else clean(preset),
                    thinking,
                    chat,
                ),
                f"chat {chat}",
            )

    def remove(self, chat: int) -> None:
        """Delete a chat with all its branches; nothing of it stays in the file."""
        with self._write() as db:
            self._one(db, "DELETE FROM chats WHERE id = ? RETURNING id", chat, f"chat {chat}")
            # The index otherwise keeps removed words until it is next rewritten.
            db.execute("INSERT INTO search(search) VALUES ('optimize')")
        with self._lock, suppress(sqlite3.Error):  # a reader in another process may delay this
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def import_chats(self, data: Any) -> list[int]:
        """Save chats from parsed JSON: all of them or, with a HistoryError, none.

        Understood: what `export_json` gives, one or a list; a list of OpenAI messages or an object
        with `messages`; the conversations.json of a ChatGPT export.
        """
        found = importing.chats(data)
        with self._write() as db:
            return [self._import(db, chat) for chat in found]

    def _import(self, db: sqlite3.Connection, chat: importing.Imported) -> int:
        options = (chat.preset, chat.model, words.plain(clean(chat.title)), chat.system)
        done = db.execute(
            "INSERT INTO chats(created, updated, thinking, preset, model, title, system)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            (chat.created, chat.updated, chat.thinking, *map(clean, options)),
        )
        new, ids = int(done.lastrowid or 0), list[int]()
        for entry in chat.messages:
            parent = None if entry.parent is None else ids[entry.parent]
            ids.append(
                insert(db, new, entry.message, parent, entry.stats, entry.model, entry.created)
            )
        leaf = ids[chat.leaf] if ids else None
        db.execute(
            "UPDATE chats SET turn = turn + 1, leaf = ?1, updated = ?2,"
            " model = iif(?3 = '', model, ?3) WHERE id = ?4",
            (leaf, chat.updated, clean(chat.model), new),
        )
        db.execute(
            "UPDATE messages SET used = (SELECT turn FROM chats WHERE id = ?) WHERE id = ?",
            (new, leaf),
        )
        return new

    # -- reading -----------------------------------------------------------------------------------

    def chats(self, limit: int = 100, offset: int = 0) -> list[ChatInfo]:
        """Chats, those changed last first."""
        with self._read() as db:
            sql = f"{INFO} ORDER BY c.updated DESC, c.id DESC LIMIT ? OFFSET ?"
            return [info(row) for row in db.execute(sql, (limit, offset))]

    def chat(self, chat: int) -> ChatInfo:
        """One chat."""
        with self._read() as db:
            return info(self._one(db, f"{INFO} WHERE c.id = ?", chat, f"chat {chat}"))

    def last(self) -> ChatInfo | None:
        """The chat that was changed last."""
        return next(iter(self.chats(1)), None)

    def messages(self, chat: int) -> list[Stored]:
        """The active branch, first message first."""
        with self._read() as db:
            self._one(db, "SELECT id FROM chats WHERE id = ?", chat, f"chat {chat}")
            rows = db.execute(
                "WITH RECURSIVE branch(id, parent, n) AS ("
                " SELECT m.id, m.parent, 0 FROM messages m"
                " WHERE m.id = (SELECT leaf FROM chats WHERE id = ?)"
                " UNION ALL SELECT m.id, m.parent, n + 1"
                " FROM messages m JOIN branch b ON m.id = b.parent)"
                f"{STORED} JOIN branch b ON b.id = m.id ORDER BY b.n DESC",
                (chat,),
            )
            return [stored(row) for row in rows]

    def all_messages(self, chat: int) -> list[Stored]:
        """Every message of every branch; a parent comes before its children."""
        with self._read() as db:
            self._one(db, "SELECT id FROM chats WHERE id = ?", chat, f"chat {chat}")
            rows = db.execute(f"{STORED} WHERE m.chat = ? ORDER BY m.id", (chat,))
            return [stored(row) for row in rows]

    def siblings(self, message_id: int) -> list[int]:
        """Messages at the same place in the tree, oldest first, this one included."""
        with self._read() as db:
            row = self._one(
                db,
                "SELECT chat, parent FROM messages WHERE id = ?",
                message_id,
                f"message {message_id}",
            )
            sql = "SELECT id FROM messages WHERE chat = ? AND parent IS ? ORDER BY id"
            return [int(found) for (found,) in db.execute(sql, row)]

    def search(self, text: str, limit: int = 50) -> list[Hit]:
        """Titles and messages of all branches with all these words, best first.

        The last word may be a beginning. Text is only text: there is no query syntax.
        """
        text = clean(text)
        query, wanted = words.match(text), words.pattern(text)
        if not text.strip():
            return []
        with self._snapshot() as db:
            if query:
                rows = db.execute(_SEARCH, (query, limit)).fetchall()
            else:  # nothing but punctuation: not in the index
                rows = db.execute(
                    "SELECT -id FROM chats WHERE instr(title, ?1) UNION ALL"
                    " SELECT id FROM messages WHERE instr(content, ?1) LIMIT ?2",
                    (text.strip(), limit),
                ).fetchall()
            infos: dict[int, ChatInfo] = {}
            return [self._hit(db, int(row), wanted, infos) for (row,) in rows]

    def _hit(
        self, db: sqlite3.Connection, row: int, wanted: Any, infos: dict[int, ChatInfo]
    ) -> Hit:
        """The hit of a row of the index: a message, or with a negative number a title."""
        chat, text = -row, ""
        if row > 0:
            sql = "SELECT chat, content || char(10) || files FROM messages WHERE id = ?"
            chat, text = db.execute(sql, (row,)).fetchone()
        if chat not in infos:
            infos[chat] = info(db.execute(f"{INFO} WHERE c.id = ?", (chat,)).fetchone())
        snippet = words.snippet(text or infos[chat].title, wanted)
        return Hit(infos[chat], row if row > 0 else None, snippet)

    def export_markdown(self, chat: int) -> str:
        """The active branch for people."""
        with self._snapshot():
            return export.markdown(self.chat(chat), self.messages(chat))

    def export_json(self, chat: int) -> dict[str, Any]:
        """Everything of a chat, all branches; `import_chats` reads it."""
        with self._snapshot():
            branch = self.messages(chat)
            leaf = branch[-1].id if branch else None
            return export.document(self.chat(chat), self.all_messages(chat), leaf)

    # -- below -------------------------------------------------------------------------------------

    @contextmanager
    def _read(self) -> Iterator[sqlite3.Connection]:
        with self._lock, schema.guarded(self.path):
            yield self._db

    @contextmanager
    def _snapshot(self) -> Iterator[sqlite3.Connection]:
        """Several readings of one state, whatever another process writes meanwhile."""
        with self._read() as db:
            db.execute("BEGIN")
            try:
                yield db
            finally:
                with suppress(sqlite3.Error):
                    db.execute("ROLLBACK")

    @contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        """A transaction: all of it or nothing, also after Ctrl-C."""
        with self._lock, schema.guarded(self.path):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")
                raise

    @staticmethod
    def _one(db: sqlite3.Connection, sql: str, values: Any, what: str) -> Any:
        """The only row; HistoryError if there is none."""
        values = values if isinstance(values, tuple) else (values,)
        rows = db.execute(sql, values).fetchall()
        if not rows:
            raise HistoryError(f"there is no {what}", hint="`mimo history list` shows the chats")
        return rows[0]
