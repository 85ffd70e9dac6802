"""The history's file: opening, tables by version, and sqlite's errors as ours.

`connect` gives a ready connection. A new version of the tables is one more entry in MIGRATIONS;
files of older versions are brought up to date when they are opened, newer ones are refused.
Knows no message; called by store.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from mimo_local.errors import HistoryError
from mimo_local.history.words import spaced

APPLICATION_ID: Final = 0x6D696D6F  # "mimo", in the file's header: `file history.db` shows it
OLDEST = (3, 35, 0)
"""RETURNING."""
BUSY_S = 5.0
"""How long to wait for another process that is writing; its transactions take milliseconds."""

# The tree is `parent`; a chat's active branch ends at `leaf`. `turn` counts what is added or
# chosen in a chat, so `used` tells which leaf below a message was the last one. Long columns come
# last: sqlite does not read the pages of a document to count messages. `parent` does not cascade:
# a chat's messages go with the chat, and sqlite cascades no deeper than 1000 rows.
# `search` indexes `spaced` text (see words) and keeps no copy of it: rows of messages have the
# message's id, rows of titles the negative id of the chat. The triggers keep both in step.
_VERSION_1: Final = """
CREATE TABLE chats (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    created REAL NOT NULL,
    updated REAL NOT NULL,
    thinking INTEGER NOT NULL,
    preset TEXT NOT NULL,
    model TEXT NOT NULL,
    title TEXT NOT NULL,
    turn INTEGER NOT NULL DEFAULT 0,
    leaf INTEGER REFERENCES messages(id) ON DELETE SET NULL,
    system TEXT NOT NULL
);
CREATE INDEX chats_by_update ON chats(updated);
CREATE TABLE messages (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    chat INTEGER NOT NULL REFERENCES chats(id) ON DELETE CASCADE,
    parent INTEGER REFERENCES messages(id) DEFERRABLE INITIALLY DEFERRED,
    used INTEGER NOT NULL,
    created REAL NOT NULL,
    role TEXT NOT NULL CHECK (role IN ('system', 'user', 'assistant', 'tool')),
    model TEXT NOT NULL,
    stats TEXT NOT NULL,
    tool_call_id TEXT NOT NULL,
    tool_calls TEXT NOT NULL,
    files TEXT NOT NULL,
    content TEXT NOT NULL,
    reasoning TEXT NOT NULL,
    attachments TEXT NOT NULL
);
CREATE INDEX messages_by_place ON messages(chat, parent);
CREATE INDEX messages_by_parent ON messages(parent);
CREATE INDEX chats_by_leaf ON chats(leaf);
CREATE VIEW search_rows(id, title, body) AS
    SELECT id, '', spaced(content || char(10) || files) FROM messages
    UNION ALL SELECT -id, spaced(title), '' FROM chats;
CREATE VIRTUAL TABLE search USING fts5(
    title, body, content='search_rows', content_rowid='id',
    tokenize='unicode61 remove_diacritics 2', prefix='1 2 3'
);
CREATE TRIGGER message_in AFTER INSERT ON messages BEGIN
    INSERT INTO search(rowid, title, body)
        VALUES (new.id, '', spaced(new.content || char(10) || new.files));
END;
CREATE TRIGGER message_out AFTER DELETE ON messages BEGIN
    INSERT INTO search(search, rowid, title, body)
        VALUES ('delete', old.id, '', spaced(old.content || char(10) || old.files));
END;
CREATE TRIGGER message_new AFTER UPDATE OF content, files ON messages BEGIN
    INSERT INTO search(search, rowid, title, body)
        VALUES ('delete', old.id, '', spaced(old.content || char(10) || old.files));
    INSERT INTO search(rowid, title, body)
        VALUES (new.id, '', spaced(new.content || char(10) || new.files));
END;
CREATE TRIGGER chat_in AFTER INSERT ON chats BEGIN
    INSERT INTO search(rowid, title, body) VALUES (-new.id, spaced(new.title), '');
END;
CREATE TRIGGER chat_out AFTER DELETE ON chats BEGIN
    INSERT INTO search(search, rowid, title, body)
        VALUES ('delete', -old.id, spaced(old.title), '');
END;
CREATE TRIGGER chat_new AFTER UPDATE OF title ON chats BEGIN
    INSERT INTO search(search, rowid, title, body)
        VALUES ('delete', -old.id, spaced(old.title), '');
    INSERT INTO search(rowid, title, body) VALUES (-new.id, spaced(new.title), '');
END;
"""

MIGRATIONS: tuple[str, ...] = (_VERSION_1,)
"""SQL that makes version n + 1 out of version n; version 0 is an empty file."""


def connect(path: Path) -> sqlite3.Connection:
    """An open connection to a history of today's version, made or migrated if need be."""
    if sqlite3.sqlite_version_info < OLDEST:
        raise HistoryError(
            f"this Python's sqlite is {sqlite3.sqlite_version}; saved chats need 3.35",
            hint="use a newer Python: they bring their own sqlite",
        )
    with guarded(path):
        _make(path)
        db = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
        try:
            db.create_function("spaced", 1, spaced, deterministic=True)
            db.execute("PRAGMA foreign_keys = ON")
            db.execute("PRAGMA trusted_schema = ON")  # the triggers call `spaced`
            db.execute("PRAGMA secure_delete = ON")  # what was removed is not left in the file
            _write_ahead(db)
            db.execute("PRAGMA synchronous = NORMAL")
            _migrate(db, path)
        except BaseException:
            db.close()
            raise
    return db


def _make(path: Path) -> None:
    """An empty file only its owner may read. An existing one is not touched: closing any other
    descriptor of a database drops the locks this process holds on it."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))


def _write_ahead(db: sqlite3.Connection) -> None:
    """Readers and one writer at once. sqlite does not wait by itself where two processes switch a
    new file at the same time; where a file system knows no WAL it stays with the old journal."""
    give_up = time.monotonic() + BUSY_S
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL").fetchone()
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > give_up:
                raise
            time.sleep(0.01)


def _migrate(db: sqlite3.Connection, path: Path) -> None:
    if _version(db, path) == len(MIGRATIONS):
        return
    db.execute("BEGIN IMMEDIATE")
    try:
        # Again, now that no other process can be at it.
        for number in range(_version(db, path), len(MIGRATIONS)):
            for statement in _statements(MIGRATIONS[number]):
                db.execute(statement)
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        db.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):
            db.execute("ROLLBACK")
        raise


def _statements(script: str) -> Iterator[str]:
    """The statements of a script one by one: `executescript` would commit in between."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def _version(db: sqlite3.Connection, path: Path) -> int:
    version = int(db.execute("PRAGMA user_version").fetchone()[0])
    (owner,) = db.execute("PRAGMA application_id").fetchone()
    (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if owner != APPLICATION_ID and (tables or version):
        raise HistoryError(
            f"{path} is a database of something else", hint=f"move it away: {_AWAY.format(path)}"
        )
    if version > len(MIGRATIONS):
        raise HistoryError(
            f"{path} was written by a newer release "
            f"(format {version}, this one knows {len(MIGRATIONS)})",
            hint="update mimo-local, or move the file away to begin a new history",
        )
    return version


@contextmanager
def guarded(path: Path) -> Iterator[None]:
    """Errors of sqlite and of the file system as HistoryError."""
    try:
        yield
    except sqlite3.Error as error:
        raise _translated(error, path) from error
    except OSError as error:
        raise HistoryError(
            f"saved chats cannot be kept in {path}: {error.strerror or error}",
            hint=f"check the folder {path.parent} and its permissions, or set MIMO_HOME",
        ) from error
    except OverflowError as error:  # an id no database can have
        raise HistoryError(
            "there is no chat or message of this number", hint="`mimo history list` shows them"
        ) from error


_AWAY: Final = "`mv {0} {0}.old`, then a new history is begun"


def _translated(error: sqlite3.Error, path: Path) -> HistoryError:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the low byte: without the details
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return HistoryError(
            f"{path} is in use: another program has been writing to it for {BUSY_S:.0f} s",
            hint="close the other program, or try again",
        )
    if code == sqlite3.SQLITE_FULL:
        return HistoryError(
            f"the disk is full: {path} could not be written",
            hint="free some space; what was saved before is unharmed",
        )
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return HistoryError(
            f"{path} is damaged ({error})",
            hint=f"move it away: {_AWAY.format(path)}; "
            f"`sqlite3 {path}.old .recover` may save what is in it",
        )
    if code in (
        *(sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN),
        *(sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH, sqlite3.SQLITE_IOERR),
    ):
        return HistoryError(
            f"{path} cannot be opened or written ({error})",
            hint=f"check the permissions and the disk of {path.parent}, or set MIMO_HOME",
        )
    if "no such module: fts5" in str(error):
        return HistoryError(
            f"this Python's sqlite {sqlite3.sqlite_version} has no full-text search (FTS5)",
            hint="use a Python whose sqlite3 was built with FTS5, as nearly all are",
        )
    if "closed" in str(error):
        return HistoryError("the history is closed", hint="open it again")
    return HistoryError(
        f"the history {path} failed: {error}", hint=f"if this comes again: {_AWAY.format(path)}"
    )
