"""Saved chats: every message of every branch in one sqlite file, found again by full text.

`History.open(Paths.default().history_file)`; several processes may have it open. Knows messages,
no engine and no screen. Every failure is a HistoryError with a hint: a chat goes on without it.
"""

from mimo_local.history.store import History
from mimo_local.history.types import ChatInfo, Hit, Stored

__all__ = ["ChatInfo", "History", "Hit", "Stored"]
