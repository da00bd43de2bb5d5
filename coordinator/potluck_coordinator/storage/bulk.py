"""Many rows in one statement, straight to the driver: what SQLAlchemy does around each statement costs more than the rows of a payment.

Decides how: SQLite runs one statement again for each row, inside this process, and takes keys as one JSON text; PostgreSQL gets columns,
and keys, as arrays, in one round trip, and its triggers see all rows at once. Statements are put together once; errors are SQLAlchemy's
own. It must not know whose rows they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.engine.interfaces import DBAPICursor, DBAPIModule
from sqlalchemy.exc import DBAPIError

Row = tuple[Any, ...]


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
        self._each = f"INSERT INTO {table} ({names}) VALUES ({', '.join('?' for _ in columns)}) {otherwise}"  # noqa: S608
        self._all = f"INSERT INTO {table} ({names}) SELECT * FROM {_arrays(columns)} {otherwise}"  # noqa: S608

    def run(self, connection: Connection, rows: Sequence[Row]) -> None:
        _write(connection, self._each, self._all, rows)


class Removal:
    """Rows of one table by their keys.

    Args:
        table: its name.
        key: its column, and the key's type on PostgreSQL.
    """

    def __init__(self, table: str, key: tuple[str, str]) -> None:
        name, kind = key
        self._each = f"DELETE FROM {table} WHERE {name} = ?"  # noqa: S608
        self._all = f"DELETE FROM {table} WHERE {name} = ANY(CAST(%s AS {kind}[]))"  # noqa: S608

    def run(self, connection: Connection, keys: Collection[str]) -> None:
        _write(connection, self._each, self._all, [(key,) for key in keys])


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
        self._all = (
            f"UPDATE {table} SET {changes} FROM {_arrays(given)} AS given({', '.join(given)})"  # noqa: S608
            f" WHERE {table}.{name} = given.{name} AND {only_where}"
        )
        numbers = {column: number for number, column in enumerate(given, start=1)}
        each = f"UPDATE {table} SET {changes} WHERE {name} = given.{name} AND {only_where}"  # noqa: S608
        self._each = re.sub(r"given\.(\w+)", lambda found: f"?{numbers[found[1]]}", each)

    def run(self, connection: Connection, rows: Sequence[Row]) -> int:
        """How many rows changed."""
        return _write(connection, self._each, self._all, rows)


def _arrays(columns: Mapping[str, str]) -> str:
    return f"unnest({', '.join(f'CAST(%s AS {kind}[])' for kind in columns.values())})"


def _write(connection: Connection, each: str, together: str, rows: Sequence[Row]) -> int:
    """How many rows that wrote."""
    if not rows:
        return 0
    if connection.dialect.name == "sqlite":
        return run(connection, each, rows, many=True).rowcount
    return run(connection, together, [list(column) for column in zip(*rows, strict=True)]).rowcount


def run(connection: Connection, statement: str, parameters: Sequence[Any] = (), *, many: bool = False) -> DBAPICursor:
    """One statement, or the same one for each of several parameters, as the driver takes them.

    It is in SQLAlchemy's transaction, whoever listens to SQLAlchemy's statements hears of it, and it fails as one of them.
    """
    cursor = connection.connection.cursor()
    heard = connection.dispatch
    heard.before_cursor_execute(connection, cursor, statement, parameters, None, many)
    try:
        (cursor.executemany if many else cursor.execute)(statement, parameters)
    except connection.dialect.loaded_dbapi.Error as error:
        raise _as_sqlalchemy_would(connection, error) from error
    heard.after_cursor_execute(connection, cursor, statement, parameters, None, many)
    return cursor


def _as_sqlalchemy_would(connection: Connection, error: DBAPIModule.Error) -> Exception:
    """The driver's error in SQLAlchemy's words, without statement and values. A connection that is gone counts as gone."""
    dialect = connection.dialect
    is_lost = dialect.is_disconnect(error, connection.connection, None)
    if is_lost:
        connection.invalidate(error)
    return DBAPIError.instance(None, None, error, dialect.loaded_dbapi.Error, connection_invalidated=is_lost, dialect=dialect)
