"""Which database a URL names, and the one connection to it.

Decides how a URL is read, that its password appears in no message, and what a caller is told of a database that is away. What each kind of
database needs of a connection is `sqlite` and `postgresql`. It must not know units of work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from sqlalchemy import URL, Connection, create_engine
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from potluck_coordinator.storage.postgresql import Postgresql
from potluck_coordinator.storage.sqlite import Sqlite
from potluck_coordinator.storage.state import StateName
from potluck_protocol.errors import ErrorCode, PotluckError


class Database(Protocol):
    """What `Store` needs of either kind."""

    def connect(self, committed: Mapping[StateName, int]) -> Connection:
        """A connection that may write, by itself.

        Args:
            committed: how far counters had come. With a term among them there is a connection only while no later one has begun.

        Raises:
            DatabaseAwayError: there is none now.
            EndedError: there will be none, for another coordinator has taken the database over, or it has lost what was committed.
        """
        ...

    def was_lost(self, error: BaseException) -> bool:
        """Whether the connection is not to be used any more after that error."""
        ...

    def sever(self) -> None:
        """Ends the connection on which another thread waits in vain, made or in the making, so that the wait ends, too."""
        ...

    def on_statement(self, begins: Callable[[], None], ends: Callable[[], None]) -> None:
        """Says what to call before each statement, and as soon as a server lets us in; and after each statement that did not fail."""
        ...

    def dispose(self) -> None: ...


def parse_url(url: str) -> URL:
    """The parts of a URL; raises PotluckError(INVALID_REQUEST) for what is none."""
    try:
        return make_url(url)
    except (ArgumentError, ValueError) as error:
        raise _unusable_url(error) from None


def open_database(url: str) -> Database:
    """The database of a URL, not connected yet; raises PotluckError(INVALID_REQUEST) for a URL that cannot be used."""
    parsed = parse_url(url)
    kinds: Mapping[str, type[Sqlite | Postgresql]] = {"sqlite": Sqlite, "postgresql": Postgresql}
    kind = kinds.get(parsed.get_backend_name())
    if kind is None or (kind is Postgresql and parsed.get_driver_name() != "psycopg"):
        raise _unusable_url(None)
    try:
        return kind(create_engine(parsed, **kind.engine_arguments(parsed)))
    except (ArgumentError, ModuleNotFoundError, ValueError) as error:
        raise _unusable_url(error) from None


def _unusable_url(error: Exception | None) -> PotluckError:
    """Without the URL's own text, for it may hold a password."""
    missing = f" {error.name} is not installed." if isinstance(error, ModuleNotFoundError) else ""
    text = f"The database URL cannot be used.{missing} It looks like sqlite:////folder/potluck.db or postgresql+psycopg://user@host/name."
    return PotluckError(ErrorCode.INVALID_REQUEST, text)
