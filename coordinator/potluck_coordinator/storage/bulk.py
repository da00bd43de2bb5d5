"""Many rows in one statement, straight to the driver: what SQLAlchemy does around each statement costs more than the rows of a payment.

Decides how: SQLite gets rows as `VALUES`, some dozens in one statement, and keys as one JSON text; PostgreSQL gets columns, and keys, as
arrays, in one round trip, and its triggers see all rows at once. Statements are put together once; errors are SQLAlchemy's own. It must
not know whose rows they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import chain
from typing import Any, Final

from sqlalchemy import Connection
from sqlalchemy.engine.interfaces import DBAPICursor, DBAPIModule
from sqlalchemy.exc import DBAPIError

Row = tuple[Any, ...]

_ROW_COUNTS: Final = (64, 16, 4, 1)
"""How many rows a statement on SQLite may have: it begins, and evaluates what its checks compare with, once for all of them."""


class Selection:
    """Rows by their keys, in the keys' order.

    Args:
        columns: of each row.
        tables: with their joins.
        key: the column, and the key's type on PostgreSQL.
        locked: the table whose rows nobody else can change before the transaction ends; SQLite has one writer anyway.
    """

    def __init__(self, columns: str, tables: str, key: tuple[str, str], locked: str) -> None:
        name, kind = key
        select = f"SELECT {columns} FROM {tables} WHERE {name}"  # noqa: S608
        self._sqlite = f"{select} IN (SELECT value FROM json_each(?)) ORDER BY {name}"  # noqa: S608
        self._postgresql = f"{select} = ANY(CAST(%s AS {kind}[])) ORDER BY {name} FOR UPDATE OF {locked}"

    def run(self, connection: Connection, keys: Collection[str]) -> Sequence[Row]:
        if not keys:
            return []
        if connection.dialect.name == "sqlite":
            return run(connection, self._sqlite, (json.dumps(list(keys)),)).fetchall()
        return run(connection, self._postgresql, (list(keys),)).fetchall()


class Insertion:
    """Rows for one table.

    Args:
        table: its name.
        columns: their types on PostgreSQL, by name; rows have them in this order.
        otherwise: what becomes of a row whose key is there, as `ON CONFLICT …`; nothing else may then be there twice.
    """

    def __init__(self, table: str, columns: Mapping[str, str], otherwise: str = "") -> None:
        names = ", ".join(columns)
        self._sqlite = _for_row_counts(len(columns), lambda values: f"INSERT INTO {table} ({names}) {values} {otherwise}")
        self._all = f"INSERT INTO {table} ({names}) SELECT * FROM {_arrays(columns)} {otherwise}"  # noqa: S608

    def run(self, connection: Connection, rows: Sequence[Row]) -> None:
        _write(connection, self._sqlite, self._all, rows)


class Removal:
    """Rows of one table by their keys.

    Args:
        table: its name.
        key: its column, and the key's type on PostgreSQL.
    """

    def __init__(self, table: str, key: tuple[str, str]) -> None:
        name, kind = key
        self._sqlite = _for_row_counts(1, lambda values: f"DELETE FROM {table} WHERE {name} IN ({values})")  # noqa: S608
        self._all = f"DELETE FROM {table} WHERE {name} = ANY(CAST(%s AS {kind}[]))"  # noqa: S608

    def run(self, connection: Connection, keys: Collection[str]) -> None:
        _write(connection, self._sqlite, self._all, [(key,) for key in keys])


class Change:
    """New values for the rows of one table that have these keys.

    Args:
        table: its name.
        key: its column, and the key's type on PostgreSQL.
        columns: the types of what is given for each row, by name; rows have the key first, then these in this order.
        values: what columns become, in terms of the table's and of `given.NAME`.
        only_where: which rows change, of those that have the keys.
    """

    def __init__(
        self, table: str, key: tuple[str, str], columns: Mapping[str, str], values: Mapping[str, str], only_where: str = "TRUE"
    ) -> None:
        name, key_type = key
        given = {name: key_type, **columns}
        changes = ", ".join(f"{column} = {value}" for column, value in values.items())

        def statement(rows: str) -> str:
            return f"UPDATE {table} SET {changes} FROM {rows} WHERE {table}.{name} = given.{name} AND {only_where}"  # noqa: S608

        self._all = statement(f"{_arrays(given)} AS given({', '.join(given)})")
        # SQLite calls the columns of VALUES by their numbers.
        numbers = {column: number for number, column in enumerate(given, start=1)}
        self._sqlite = _for_row_counts(
            len(given),
            lambda values: re.sub(r"given\.(\w+)", lambda found: f"given.column{numbers[found[1]]}", statement(f"({values}) AS given")),
        )

    def run(self, connection: Connection, rows: Sequence[Row]) -> int:
        """How many rows changed."""
        return _write(connection, self._sqlite, self._all, rows)


def _arrays(columns: Mapping[str, str]) -> str:
    return f"unnest({', '.join(f'CAST(%s AS {kind}[])' for kind in columns.values())})"


def _for_row_counts(column_count: int, statement: Callable[[str], str]) -> Mapping[int, str]:
    """SQLite's statement over `VALUES …`, for each of `_ROW_COUNTS`."""
    row = f"({', '.join('?' * column_count)})"
    return {row_count: statement(f"VALUES {', '.join([row] * row_count)}") for row_count in _ROW_COUNTS}


def _write(connection: Connection, by_row_count: Mapping[int, str], together: str, rows: Sequence[Row]) -> int:
    """How many rows that wrote."""
    if not rows:
        return 0
    if connection.dialect.name != "sqlite":
        return run(connection, together, [list(column) for column in zip(*rows, strict=True)]).rowcount
    written_count = done_count = 0
    for row_count, statement in by_row_count.items():
        while len(rows) - done_count >= row_count:
            parameters = list(chain.from_iterable(rows[done_count : done_count + row_count]))
            written_count += run(connection, statement, parameters).rowcount
            done_count += row_count
    return written_count


def run(connection: Connection, statement: str, parameters: Sequence[Any] = ()) -> DBAPICursor:
    """One statement, as the driver takes it.

    It is in SQLAlchemy's transaction, whoever listens to SQLAlchemy's statements hears of it, and it fails as one of them.
    """
    cursor = connection.connection.cursor()
    heard = connection.dispatch
    heard.before_cursor_execute(connection, cursor, statement, parameters, None, False)
    try:
        cursor.execute(statement, parameters)
    except connection.dialect.loaded_dbapi.Error as error:
        raise _as_sqlalchemy_would(connection, error) from error
    heard.after_cursor_execute(connection, cursor, statement, parameters, None, False)
    return cursor


def _as_sqlalchemy_would(connection: Connection, error: DBAPIModule.Error) -> Exception:
    """The driver's error in SQLAlchemy's words, without statement and values. A connection that is gone counts as gone."""
    dialect = connection.dialect
    is_lost = dialect.is_disconnect(error, connection.connection, None)
    if is_lost:
        connection.invalidate(error)
    return DBAPIError.instance(None, None, error, dialect.loaded_dbapi.Error, connection_invalidated=is_lost, dialect=dialect)
