"""PostgreSQL: one session, which holds the lock that makes its coordinator the only one.

Decides that lock and writes stand and fall together: the advisory lock belongs to the session that writes, so whoever loses the session has
lost the lock, and takes it again before the next write. A coordinator that took the lock meanwhile has begun a later term, which is seen
then, even if it has ended since; so no two ever write by turns. Books that have lost what was committed, as after a failover to a standby
that was behind, are seen then, too, by counters that only grow. Also decides how soon a server that went silent is noticed: by the kernel
where it or the network is gone, by `Store`'s watch where its processes stand still. It must not know units of work.

A pooler that shares sessions by transaction (PgBouncer's `pool_mode = transaction`) would part lock and writes.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

import structlog
from sqlalchemy import URL, Connection, Engine, event, text
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DBAPIError, InterfaceError, InternalError, OperationalError
from sqlalchemy.pool import NullPool

from potluck_coordinator.storage.absence import DatabaseAwayError, FellBackError, ReplacedError
from potluck_coordinator.storage.state import StateName

CONNECT_SECONDS_MAX: Final = 3
LOCK_KEY: Final = int.from_bytes(b"potluck")
"""Of the advisory lock; it is of one database, so that each can hold one pool."""
LOCK_PATIENCE_SECONDS: Final = 5.0
"""At a start: the server may still be at the last statement of a coordinator that was killed."""
LOCK_PAUSE_SECONDS: Final = 0.1
ENCODING: Final = "UTF8"
VERSION_MIN: Final = 14

_CONNECT: Final = {
    "connect_timeout": CONNECT_SECONDS_MAX,
    "target_session_attrs": "read-write",  # of several hosts in the URL the one that is no standby
    # Our end notices a host that is gone: unsent data after 5 s, a silent line after 2 s and three more.
    "tcp_user_timeout": 5_000,
    "keepalives_idle": 2,
    "keepalives_interval": 1,
    "keepalives_count": 3,
}
_SESSION: Final = (
    # So does the server, and lets go of the lock, which another coordinator on another host may be waiting for.
    "SET tcp_keepalives_idle = 5",
    "SET tcp_keepalives_interval = 2",
    "SET tcp_keepalives_count = 3",
    "SET client_connection_check_interval = 2000",
    # One that has begun something and stands still keeps nothing locked for ever.
    "SET idle_in_transaction_session_timeout = 60000",
    "SET lock_timeout = 5000",
    "SET default_transaction_isolation = 'read committed'",
    # A plan that was made while a table was small would read all of it later on.
    "SET plan_cache_mode = force_custom_plan",
    # What is acknowledged is on the disk; a server that is set to wait for its standbys as well goes on doing so.
    "SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'",
)
_FACTS: Final = "SELECT current_setting('server_version_num')::int / 10000, current_setting('server_encoding'), current_setting('fsync')"
_LOCK: Final = text("SELECT pg_try_advisory_lock(:key)")
_COUNTERS: Final = text("SELECT name, value FROM coordinator_state WHERE name = ANY(:names)")
_HOLDER: Final = text(
    "SELECT application_name, host(client_addr), backend_start FROM pg_locks JOIN pg_stat_activity USING (pid)"
    " WHERE locktype = 'advisory' AND granted AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    " AND classid = :high AND objid = :low LIMIT 1"
)

_log = structlog.get_logger()


class Postgresql:
    """The `Database` of a server."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._has_connected = False
        self._line: socket.socket | None = None
        """The session's own, by a name of ours: whoever ends it never meets what else has got the driver's number meanwhile."""
        self._line_held = threading.Lock()
        # Before SQLAlchemy's own: at the first connection it asks the server this and that by itself.
        event.listen(engine, "connect", self._came, insert=True)
        event.listen(engine, "close", self._goes)

    @staticmethod
    def engine_arguments(url: URL) -> dict[str, Any]:
        """What the URL says itself wins."""
        named = {"application_name": f"potluck coordinator, process {os.getpid()} on {socket.gethostname()}"}
        return {"poolclass": NullPool, "connect_args": {name: value for name, value in (_CONNECT | named).items() if name not in url.query}}

    def connect(self, committed: Mapping[StateName, int]) -> Connection:
        """As `Database.connect`."""
        try:
            connection = self._engine.connect()
        except DBAPIError as error:
            self._goes()  # SQLAlchemy forgets without a word what it could not ask
            raise DatabaseAwayError(f"{self._place}: {self._words(error)}") from None
        try:
            self._prepare(connection, committed)
        except BaseException as error:
            connection.invalidate()
            connection.close()
            if isinstance(error, DBAPIError):
                raise DatabaseAwayError(f"{self._place}: {self._words(error)}") from None
            raise
        self._has_connected = True
        return connection

    def was_lost(self, error: BaseException) -> bool:
        """A server that failed once in this way is asked for a new session: that costs a moment, and leaves no doubt about the lock.

        One that takes no writes any more, as a standby or with a full disk, says so by an internal error.
        """
        failures = OperationalError, InterfaceError, InternalError
        return isinstance(error, failures) or (isinstance(error, DBAPIError) and error.connection_invalidated)

    def sever(self) -> None:
        """As `Database.sever`. The driver waits on the socket, which ends for both sides of it."""
        with self._line_held, contextlib.suppress(OSError):
            if self._line is not None:
                self._line.shutdown(socket.SHUT_RDWR)

    def on_statement(self, begins: Callable[[], None], ends: Callable[[], None]) -> None:
        """As `Database.on_statement`."""
        event.listen(self._engine, "connect", lambda *_: begins(), insert=True)
        event.listen(self._engine, "before_cursor_execute", lambda *_: begins())
        event.listen(self._engine, "after_cursor_execute", lambda *_: ends())

    def dispose(self) -> None:
        self._engine.dispose()
        self._goes()

    def _came(self, driver: DBAPIConnection, *_: object) -> None:
        """A server, or a pooler in front of it, has let us in. Whether it answers is another matter."""
        self._goes()
        with self._line_held:
            self._line = socket.socket(fileno=os.dup(driver.pgconn.socket))

    def _goes(self, *_: object) -> None:
        with self._line_held:
            line, self._line = self._line, None
            if line is not None:
                line.close()

    @property
    def _place(self) -> str:
        return f"The database {self._engine.url.set(password=None, query={}).render_as_string()} cannot be used"

    def _prepare(self, connection: Connection, committed: Mapping[StateName, int]) -> None:
        with connection.begin():
            version, encoding, fsync = connection.exec_driver_sql(_FACTS).one()
            if version < VERSION_MIN:
                raise DatabaseAwayError(f"{self._place}: its server is PostgreSQL {version}; {VERSION_MIN} or newer is needed.")
            if encoding != ENCODING:
                raise DatabaseAwayError(
                    f"{self._place}: it is encoded in {encoding}; make one with CREATE DATABASE … ENCODING '{ENCODING}' TEMPLATE template0."
                )
            for statement in _SESSION:
                connection.exec_driver_sql(statement)
        self._lock(connection, committed)
        if not self._has_connected and fsync != "on":
            _log.warning("database_forgets", meaning="its fsync is off: a crash of its machine loses what was acknowledged")

    def _lock(self, connection: Connection, committed: Mapping[StateName, int]) -> None:
        give_up_at = time.monotonic() + (0.0 if self._has_connected else LOCK_PATIENCE_SECONDS)
        while True:
            with connection.begin():
                is_ours = connection.execute(_LOCK, {"key": LOCK_KEY}).scalar()
                # After the lock: whoever had it meanwhile began its term before it did anything else.
                if committed:
                    _compare(connection, committed)
                if is_ours:
                    return
                if time.monotonic() >= give_up_at:
                    raise DatabaseAwayError(self._taken(connection))
            time.sleep(LOCK_PAUSE_SECONDS)

    def _taken(self, connection: Connection) -> str:
        holder = connection.execute(_HOLDER, {"high": LOCK_KEY >> 32, "low": LOCK_KEY & 0xFFFFFFFF}).first()
        who = (
            "" if holder is None else f" ({holder[0]}{f', from {holder[1]}' if holder[1] else ''}, since {holder[2]:%Y-%m-%d %H:%M:%S %Z})"
        )
        return (
            f"Another coordinator{who} has the database {self._engine.url.database}; stop it first, "
            "or give this one a database of its own with --database-url."
        )

    def _words(self, error: DBAPIError) -> str:
        """The server's or the driver's own; neither repeats a password, and should one ever do, it goes."""
        words = " ".join(str(error.orig).split())
        for secret in (self._engine.url.password, *(value for name, value in self._engine.url.query.items() if "password" in name)):
            if secret:
                words = words.replace(str(secret), "***")
        return words


def _compare(connection: Connection, committed: Mapping[StateName, int]) -> None:
    """Raises EndedError where the books are not those that this process wrote last."""
    found = {StateName(name): int(value) for name, value in connection.execute(_COUNTERS, {"names": list(committed)})}
    if any(found.get(name, 0) < number for name, number in committed.items()):
        _log.error("database_fell_back", committed={**committed}, found=found)
        raise FellBackError
    if found.get(StateName.COORDINATOR_TERM) != committed.get(StateName.COORDINATOR_TERM):
        raise ReplacedError
