"""The pool's named facts, as rows: its id and its counters.

Decides which facts there are, and that a counter gives no number twice. It must not know what is counted.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from sqlalchemy import bindparam
from sqlmodel import Session, col, select, update

from potluck_coordinator.storage.tables import CoordinatorStateRow

# Built once and run past the session, as in `holds`: counters are looked at often.
_GET: Final = select(CoordinatorStateRow.value).where(col(CoordinatorStateRow.name) == bindparam("fact"))


class StateName(StrEnum):
    """Every fact there is."""

    POOL_ID = "pool_id"
    GATEWAY_EPOCH = "gateway_epoch"
    DESIRED_REVISION = "desired_revision"
    SNAPSHOT_VERSION = "snapshot_version"
    GROUP_GENERATION = "group_generation"
    FIT_CORRECTIONS = "fit_corrections"
    COORDINATOR_TERM = "coordinator_term"
    """Which coordinator run has the database: each begins a new one."""


class StateRepository:
    """The `coordinator_state` table."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.advanced: dict[StateName, int] = {}
        """How far this unit of work has counted."""

    def get(self, name: StateName) -> str | None:
        value: str | None = self._session.connection().execute(_GET, {"fact": name}).scalar()
        return value

    def put(self, name: StateName, value: str) -> None:
        statement = update(CoordinatorStateRow).where(col(CoordinatorStateRow.name) == name).values(value=value)
        if self._session.exec(statement).rowcount == 0:
            self._session.add(CoordinatorStateRow(name=name, value=value))
            self._session.flush()

    def counter(self, name: StateName) -> int:
        """Where a counter stands; 0 before its first step."""
        return int(self.get(name) or 0)

    def advance(self, name: StateName) -> int:
        """Counts one up and returns the new number, which no earlier call had."""
        number = self.advanced[name] = self.counter(name) + 1
        self.put(name, str(number))
        return number
