"""SQLite: one file, one connection, which also checkpoints its log: releases before 3.51.3 can corrupt it when two do.

Decides that the file is locked, so that a second coordinator on it fails at its start instead of later, and that what is committed survives
the loss of power. It must not know units of work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from sqlalchemy import URL, Connection, Engine, event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import ConnectionPoolEntry, NullPool

from potluck_coordinator.storage.bulk import run
from potluck_coordinator.storage.state import StateName

BUSY_TIMEOUT_MS: Final = 5_000
_PRAGMAS: Final = (
    f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}",
    "PRAGMA locking_mode = EXCLUSIVE",
    "PRAGMA journal_mode = WAL",
    "PRAGMA synchronous = FULL",  # in WAL mode anything less may forget acknowledged commits when the power fails
    "PRAGMA foreign_keys = ON",
    "PRAGMA recursive_triggers = ON",  # otherwise REPLACE would delete a posting past its trigger
)


class Sqlite:
    """The `Database` of a file, or of memory."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        event.listen(engine, "connect", _prepare)
        event.listen(engine, "begin", lambda connection: run(connection, "BEGIN IMMEDIATE"))

    @staticmethod
    def engine_arguments(url: URL) -> dict[str, Any]:
        del url
        return {"poolclass": NullPool}

    def connect(self, committed: Mapping[StateName, int]) -> Connection:
        """Once: the lock on the file lasts as long as the process, so that no other term can begin, and no older file come back."""
        del committed
        return self._engine.connect()

    def was_lost(self, error: BaseException) -> bool:
        """A file does not go away."""
        del error
        return False

    def sever(self) -> None:
        """A disk that does not answer cannot be left."""

    def on_statement(self, begins: Callable[[], None], ends: Callable[[], None]) -> None:
        """Nobody would end one."""

    def dispose(self) -> None:
        self._engine.dispose()


def _prepare(connection: DBAPIConnection, record: ConnectionPoolEntry) -> None:
    del record
    connection.isolation_level = None  # the driver must not begin transactions of its own
    cursor = connection.cursor()
    for pragma in _PRAGMAS:
        cursor.execute(pragma)
    cursor.close()
