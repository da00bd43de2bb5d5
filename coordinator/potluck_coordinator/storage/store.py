"""One database, one writer.

Decides that a single thread with a single connection runs every unit of work, each whole or not at all, and that units which wait together
share one commit. Nothing is acknowledged before its commit. Where the database goes away, what waits fails at once, and each later unit is
one more try to reach it; whether a commit that was under way took effect is then not known, so that only what may be repeated is repeated,
by whoever sent it. It must not know what a unit does.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, Final, TypeVar

import structlog
from sqlalchemy import Connection
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, ProgrammingError

from potluck_coordinator.storage.absence import DatabaseAwayError, EndedError, FellBackError, ReplacedError
from potluck_coordinator.storage.database import open_database
from potluck_coordinator.storage.state import StateName
from potluck_coordinator.storage.unit_of_work import UnitOfWork
from potluck_protocol.errors import ErrorCode, PotluckError

T = TypeVar("T")

GROUP_COMMIT_COUNT_MAX: Final = 256
WAITING_COUNT_MAX: Final = 8192
"""Units that may wait; more are refused, for whoever sends them is not being slowed down by anything else."""
RECONNECT_PAUSE_SECONDS: Final = 0.25
"""Between two tries to reach a database that is away; units in between fail without one."""
SILENCE_SECONDS_MAX: Final = 5.0
"""How long a statement or a commit may take. A server that stands still keeps its connections open, and says nothing on them."""
LONG_SECONDS_MAX: Final = 900.0
"""The same for a migration, which may write all of the books anew."""
WATCH_SECONDS: Final = 0.5
OWN_ERRORS: Final = (IntegrityError, DataError, ProgrammingError)
"""What a unit is refused for by itself; any other of the database's errors ends the whole transaction."""

_log = structlog.get_logger()


class Store:
    """The database behind one directory.

    Args:
        url: SQLAlchemy's, such as `sqlite:////folder/potluck.db`; `sqlite://` lives in memory and dies with the store.
    """

    def __init__(self, url: str) -> None:
        self._database = open_database(url)
        self._connection: Connection | None = None
        self._committed: dict[StateName, int] = {}
        """How far counters had come with the last commit. Books that say less have lost something."""
        self._tried_at = 0.0
        self._lost_at: float | None = None
        self._back_at = time.monotonic()
        self._away_reason = ""
        self._given_up_for: type[EndedError] | None = None
        self._seconds_max = SILENCE_SECONDS_MAX
        self._silent_after: float | None = None
        """When the statement or commit under way has taken too long, or what a new connection begins with."""
        self._waiting: queue.Queue[_Unit | None] = queue.Queue(WAITING_COUNT_MAX)
        self._closing = threading.Lock()
        self._closed = False
        self._ended = threading.Event()
        self._database.on_statement(self._statement_begins, self._statement_ends)
        self._thread = threading.Thread(target=self._write, name="potluck-store", daemon=True)
        self._thread.start()
        threading.Thread(target=self._watch, name="potluck-store-watch", daemon=True).start()

    def migrate(self) -> None:
        """Brings the schema up to date.

        Raises:
            PotluckError: COORDINATOR_UNAVAILABLE where the database is away or another process has it; INTERNAL_ERROR where a newer Potluck
                wrote it.
        """
        try:
            self._submit(_Unit(UnitOfWork.migrate, LONG_SECONDS_MAX)).result()
        except DatabaseAwayError as error:
            raise PotluckError(ErrorCode.COORDINATOR_UNAVAILABLE, error.reason) from None

    def begin_term(self, term: int | None) -> int:
        """Makes this store the only one that may write, until another begins a later term; the term.

        Args:
            term: what this run of the coordinator began already, or None to begin one.

        Raises:
            PotluckError: COORDINATOR_UNAVAILABLE where a later one has begun or the books know nothing of this one (`EndedError`), or the
                database is away.
        """

        def begin(work: UnitOfWork) -> int:
            if term is None:
                return work.state.advance(StateName.COORDINATOR_TERM)
            begun = work.state.counter(StateName.COORDINATOR_TERM)
            if begun != term:
                raise ReplacedError if begun > term else FellBackError
            return term

        begun: int = self._submit(_Unit(begin)).result()
        self._committed[StateName.COORDINATOR_TERM] = begun
        return begun

    def check(self) -> None:
        """Raises EndedError once another coordinator has begun a term, or the books came back older: this store never writes again."""
        if self._given_up_for is not None:
            raise self._given_up_for

    @property
    def there_seconds(self) -> float:
        """How long the database has not been away, as far as is known: a process that is young may have been started in an absence."""
        return 0.0 if self._lost_at is not None else time.monotonic() - self._back_at

    async def run(self, work: Callable[[UnitOfWork], T], seconds_max: float | None = None) -> T:
        """Runs `work` in one transaction and returns its result once that is committed; whatever it raises undoes all of it.

        Args:
            work: what to do.
            seconds_max: how long a statement may take before the database is held to be away, if not `SILENCE_SECONDS_MAX`.

        Raises:
            PotluckError: COORDINATOR_UNAVAILABLE where the database is away. It may then have been committed, all of it, or not.
        """
        future: Future[T] = self._submit(_Unit(work, seconds_max))
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
            self._ended.set()
            self._drop(lost=False)
            self._database.dispose()

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
            connection = self._connected()
            with connection.begin() as transaction:
                for unit in group:
                    self._seconds_max = unit.seconds_max
                    unit.run(connection, is_alone=len(group) == 1)
                self._seconds_max = SILENCE_SECONDS_MAX
                self._statement_begins()  # the commit
                if len(group) == 1 and group[0].has_failed and transaction.is_active:
                    transaction.rollback()
        except BaseException as error:  # noqa: BLE001 - whatever it is, every waiting caller must hear of it
            self._note_failure(error, len(group))
            for unit in group:
                unit.future.set_exception(_public(error))
            return
        finally:
            self._silent_after = None
        for unit in group:
            self._committed.update(unit.advanced)
            unit.answer()

    def _connected(self) -> Connection:
        """The connection, made anew if it was lost.

        Raises:
            DatabaseAwayError: it cannot be had now.
            EndedError: it never will be.
        """
        self.check()
        if self._connection is not None:
            return self._connection
        if time.monotonic() - self._tried_at < RECONNECT_PAUSE_SECONDS:
            raise DatabaseAwayError(self._away_reason)
        self._seconds_max = SILENCE_SECONDS_MAX  # a unit that was broken off may have had more
        try:
            self._connection = self._database.connect(self._committed)
        finally:
            self._tried_at = time.monotonic()
            self._silent_after = None
        if self._lost_at is not None:
            self._back_at = time.monotonic()
            _log.info("database_back", away_seconds=round(self._back_at - self._lost_at, 1))
            self._lost_at = None
        return self._connection

    def _note_failure(self, error: BaseException, unit_count: int) -> None:
        if isinstance(error, EndedError):
            self._given_up_for = type(error)
        elif isinstance(error, DatabaseAwayError) or self._database.was_lost(error):
            self._away_reason = error.reason if isinstance(error, DatabaseAwayError) else _words(error)
            if self._lost_at is None:
                self._lost_at = time.monotonic()
                _log.error("database_away", reason=self._away_reason, unit_count=unit_count)
            self._drop(lost=True)
        else:
            _log.error("store_commit_failed", unit_count=unit_count, error_type=type(error).__name__, cause=_words(error))
            if self._connection is not None:
                # SQLite leaves a transaction open whose commit it refuses.
                self._connection.connection.rollback()

    def _drop(self, *, lost: bool) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        with contextlib.suppress(DBAPIError):
            if lost:
                connection.invalidate()
            connection.close()

    def _statement_begins(self) -> None:
        self._silent_after = time.monotonic() + self._seconds_max

    def _statement_ends(self) -> None:
        if self._connection is not None:  # while one is made, commits follow of which nobody tells us
            self._silent_after = None

    def _watch(self) -> None:
        """Until the store is closed: a connection on which a statement takes too long is ended, so that the writer goes on without it."""
        while not self._ended.wait(WATCH_SECONDS):
            silent_after = self._silent_after
            if silent_after is None or time.monotonic() < silent_after:
                continue
            self._silent_after = None
            _log.error("database_silent")
            self._database.sever()


class _Unit:
    """One piece of work, its result, and whoever waits for it."""

    def __init__(self, work: Callable[[UnitOfWork], Any], seconds_max: float | None = None) -> None:
        self.future: Future[Any] = Future()
        self.seconds_max = SILENCE_SECONDS_MAX if seconds_max is None else seconds_max
        self.advanced: Mapping[StateName, int] = {}
        """The counters that it moved, once it is done."""
        self._work = work
        self._result: Any = None
        self._error: Exception | None = None

    @property
    def has_failed(self) -> bool:
        return self._error is not None

    def run(self, connection: Connection, *, is_alone: bool) -> None:
        """Runs the work inside its own savepoint, so that its failure undoes nothing of its neighbours'; one without any needs none."""
        try:
            with contextlib.nullcontext() if is_alone else connection.begin_nested(), UnitOfWork(connection) as work:
                self._result = self._work(work)
            self.advanced = work.advanced
        except Exception as error:
            if isinstance(error, DBAPIError) and not isinstance(error, OWN_ERRORS):
                raise  # a full disk or a lost server ends the whole transaction, not this savepoint alone
            self._error = error

    def answer(self) -> None:
        if self._error is not None:
            self.future.set_exception(self._error)
        else:
            self.future.set_result(self._result)


def _public(error: BaseException) -> BaseException:
    """What one of those who waited is told; an error of its own for each, since raising one leaves its marks on it."""
    if isinstance(error, EndedError):
        return type(error)()
    if isinstance(error, DatabaseAwayError):
        return DatabaseAwayError(error.reason)
    if not isinstance(error, DBAPIError) or isinstance(error, OWN_ERRORS):
        return error
    if "locked" in str(error.orig):
        return PotluckError(
            ErrorCode.COORDINATOR_UNAVAILABLE,
            "Another process has this coordinator's database open; stop it, or give this coordinator a data folder of its own.",
        )
    return DatabaseAwayError(_words(error), had_begun=True)


def _words(error: BaseException) -> str:
    """The driver's own, in one line; a statement and its values are no part of them."""
    return " ".join(str(getattr(error, "orig", None) or "").split())
