"""Many rows in one statement.

Decides how: SQLite runs one statement again for each row, inside this process; PostgreSQL gets columns as arrays, in one round trip, and
its triggers see all rows at once. It must not know whose rows they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection

Row = dict[str, Any]


class Insertion:
    """Rows for one table.

    Args:
        table: its name.
        columns: their types on PostgreSQL, by name.
        otherwise: what becomes of a row whose key is there, as `ON CONFLICT …`; nothing else may then be there twice.
    """

    def __init__(self, table: str, columns: Mapping[str, str], otherwise: str = "") -> None:
        self._columns = tuple(columns)
        names = ", ".join(columns)
        self._each = f"INSERT INTO {table} ({names}) VALUES ({', '.join(f':{name}' for name in columns)}) {otherwise}"  # noqa: S608
        self._all = f"INSERT INTO {table} ({names}) SELECT * FROM {_arrays(columns)} {otherwise}"  # noqa: S608

    def run(self, connection: Connection, rows: Sequence[Row]) -> None:
        if rows:
            _run(connection, self._each, self._all, self._columns, rows)


class Removal:
    """Rows of one table by their keys.

    Args:
        table: its name.
        key: its column, and the key's type on PostgreSQL.
    """

    def __init__(self, table: str, key: tuple[str, str]) -> None:
        self._key, kind = key
        self._each = f"DELETE FROM {table} WHERE {self._key} = :{self._key}"  # noqa: S608
        self._all = f"DELETE FROM {table} WHERE {self._key} = ANY(CAST(%({self._key})s AS {kind}[]))"  # noqa: S608

    def run(self, connection: Connection, keys: Sequence[str]) -> None:
        if keys:
            _run(connection, self._each, self._all, (self._key,), [{self._key: key} for key in keys])


class Change:
    """New values for the rows of one table that have these keys.

    Args:
        table: its name.
        key: its column, and the key's type on PostgreSQL.
        columns: the types of what is given for each row, by name.
        values: what columns become, in terms of the table's and of `given.NAME`.
        only_where: which rows change, of those that have the keys.
    """

    def __init__(
        self, table: str, key: tuple[str, str], columns: Mapping[str, str], values: Mapping[str, str], only_where: str = "TRUE"
    ) -> None:
        name, key_type = key
        given = {name: key_type, **columns}
        self._columns = tuple(given)
        changes = ", ".join(f"{column} = {value}" for column, value in values.items())
        self._all = (
            f"UPDATE {table} SET {changes} FROM {_arrays(given)} AS given({', '.join(given)})"  # noqa: S608
            f" WHERE {table}.{name} = given.{name} AND {only_where}"
        )
        self._each = f"UPDATE {table} SET {changes} WHERE {name} = given.{name} AND {only_where}".replace("given.", ":")  # noqa: S608

    def run(self, connection: Connection, rows: Sequence[Row]) -> int:
        """How many rows changed."""
        return _run(connection, self._each, self._all, self._columns, rows) if rows else 0


def _arrays(columns: Mapping[str, str]) -> str:
    return f"unnest({', '.join(f'CAST(%({name})s AS {kind}[])' for name, kind in columns.items())})"


def _run(connection: Connection, each: str, together: str, columns: Sequence[str], rows: Sequence[Row]) -> int:
    # Straight to the driver: what SQLAlchemy does for each row would cost more than the row.
    if connection.dialect.name == "sqlite":
        return connection.exec_driver_sql(each, list(rows)).rowcount
    return connection.exec_driver_sql(together, {name: [row[name] for row in rows] for name in columns}).rowcount
