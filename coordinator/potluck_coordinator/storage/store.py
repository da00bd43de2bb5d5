"""One database, one writer.

Decides that a single thread with a single connection runs every unit of work, each whole or not at all, and that units which wait together
share one commit. Nothing is acknowledged before its commit. It must not know what a unit does.

The one connection is also the one that checkpoints SQLite's log: releases before 3.51.3 can corrupt it when two do. It locks SQLite's file,
so that a second coordinator on the same database fails at its start instead of later.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Final, TypeVar

import structlog
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, OperationalError
from sqlalchemy.pool import ConnectionPoolEntry, StaticPool
from sqlmodel import Session

from potluck_coordinator.storage.schema import migrate
from potluck_coordinator.storage.unit_of_work import UnitOfWork
from potluck_protocol.errors import ErrorCode, PotluckError

T = TypeVar("T")

GROUP_COMMIT_COUNT_MAX: Final = 256
WAITING_COUNT_MAX: Final = 8192
"""Units that may wait; more are refused, for whoever sends them is not being slowed down by anything else."""
SQLITE_BUSY_TIMEOUT_MS: Final = 5_000
_SQLITE_PRAGMAS: Final = (
    f"PRAGMA busy_timeout = {SQLITE_BUSY_TIMEOUT_MS}",
    "PRAGMA locking_mode = EXCLUSIVE",
    "PRAGMA journal_mode = WAL",
    "PRAGMA synchronous = FULL",  # in WAL mode anything less may forget acknowledged commits when the power fails
    "PRAGMA foreign_keys = ON",
    "PRAGMA recursive_triggers = ON",  # otherwise REPLACE would delete a posting past its trigger
)

_log = structlog.get_logger()


class Store:
    """The database behind one directory.

    Args:
        url: SQLAlchemy's, such as `sqlite:////folder/potluck.db`; `sqlite://` lives in memory and dies with the store.
    """

    def __init__(self, url: str) -> None:
        self._engine = _engine(url)
        self._waiting: queue.Queue[_Unit | None] = queue.Queue(WAITING_COUNT_MAX)
        self._closing = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._write, name="potluck-store", daemon=True)
        self._thread.start()

    def migrate(self) -> None:
        """Brings the schema up to date.

        Raises:
            PotluckError: COORDINATOR_UNAVAILABLE where another process has the database; INTERNAL_ERROR where a newer Potluck wrote it.
        """
        self._submit(_Unit(migrate)).result()

    async def run(self, work: Callable[[UnitOfWork], T]) -> T:
        """Runs `work` in one transaction and returns its result once that is committed; whatever it raises undoes all of it."""
        future: Future[T] = self._submit(_Unit(lambda connection: _with_session(connection, work)))
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Finishes what waits, checkpoints and lets go of the database; later units are refused."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
            self._waiting.put(None)
        self._thread.join()

    def _submit(self, unit: _Unit) -> Future[Any]:
        with self._closing:
            if self._closed:
                raise PotluckError(ErrorCode.COORDINATOR_UNAVAILABLE, "The coordinator is stopping.")
            try:
                self._waiting.put_nowait(unit)
            except queue.Full:
                raise PotluckError(ErrorCode.COORDINATOR_UNAVAILABLE, "The coordinator's database is too far behind; try later.") from None
        return unit.future

    def _write(self) -> None:
        try:
            while True:
                group, last = self._next_group()
                self._commit_group(group)
                if last:
                    return
        finally:
            self._engine.dispose()

    def _next_group(self) -> tuple[list[_Unit], bool]:
        """Everything that waits, at least one; the flag tells that the store closes after it."""
        group: list[_Unit] = []
        while len(group) < GROUP_COMMIT_COUNT_MAX:
            try:
                unit = self._waiting.get(block=not group)
            except queue.Empty:
                break
            if unit is None:
                return group, True
            if unit.future.set_running_or_notify_cancel():
                group.append(unit)
        return group, False

    def _commit_group(self, group: list[_Unit]) -> None:
        if not group:
            return
        try:
            with self._engine.connect() as connection, connection.begin():
                for unit in group:
                    unit.run(connection)
        except BaseException as error:  # noqa: BLE001 - whatever it is, every waiting caller must hear of it
            _log.error("store_commit_failed", unit_count=len(group), error_type=type(error).__name__, cause=str(getattr(error, "orig", "")))
            for unit in group:
                unit.future.set_exception(_public(error))
            return
        for unit in group:
            unit.answer()


class _Unit:
    """One piece of work, its result, and whoever waits for it."""

    def __init__(self, work: Callable[[Connection], Any]) -> None:
        self.future: Future[Any] = Future()
        self._work = work
        self._result: Any = None
        self._error: Exception | None = None

    def run(self, connection: Connection) -> None:
        """Runs the work inside its own savepoint, so that its failure undoes nothing of its neighbours'."""
        try:
            with connection.begin_nested():
                self._result = self._work(connection)
        except Exception as error:
            if isinstance(error, DBAPIError) and not isinstance(error, IntegrityError):
                raise  # a full disk or a lost server ends the whole transaction, not this savepoint alone
            self._error = error

    def answer(self) -> None:
        if self._error is not None:
            self.future.set_exception(self._error)
        else:
            self.future.set_result(self._result)


def _with_session(connection: Connection, work: Callable[[UnitOfWork], T]) -> T:
    # populate_existing: triggers and bulk updates change rows behind the session's back
    with Session(connection, join_transaction_mode="rollback_only", execution_options={"populate_existing": True}) as session:
        result = work(UnitOfWork(session))
        session.flush()
        return result


def _public(error: BaseException) -> BaseException:
    if not isinstance(error, OperationalError):
        return error
    if "locked" in str(error.orig):
        return PotluckError(
            ErrorCode.COORDINATOR_UNAVAILABLE,
            "Another process has this coordinator's database open; stop it, or give this coordinator a data folder of its own.",
        )
    return PotluckError(
        ErrorCode.COORDINATOR_UNAVAILABLE, "The coordinator's database takes no writes now: its disk may be full or its server away."
    )


def unusable_url(error: Exception) -> PotluckError:
    """What to say of a database URL that SQLAlchemy would not have; without the URL's own text, for it may hold a password."""
    missing = f" {error.name} is not installed." if isinstance(error, ModuleNotFoundError) else ""
    text = f"The database URL cannot be used.{missing} It looks like sqlite:////folder/potluck.db or postgresql+psycopg://user@host/name."
    return PotluckError(ErrorCode.INVALID_REQUEST, text)


def _engine(url: str) -> Engine:
    try:
        engine = create_engine(url, poolclass=StaticPool)
    except (ArgumentError, ModuleNotFoundError, ValueError) as error:
        raise unusable_url(error) from None
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    return engine


def _prepare_sqlite(connection: DBAPIConnection, record: ConnectionPoolEntry) -> None:
    del record
    connection.isolation_level = None  # the driver must not begin transactions of its own
    cursor = connection.cursor()
    for pragma in _SQLITE_PRAGMAS:
        cursor.execute(pragma)
    cursor.close()
