"""What keys with quotas used, as rows: one for each key and day of unix time.

Decides nothing. It must not know what a key may use.
"""

from __future__ import annotations

from collections.abc import Mapping

from sqlmodel import Session, col, delete, select

from potluck_coordinator.domain.quotas import KeyDay
from potluck_coordinator.storage.tables import KeyDayRow
from potluck_protocol.values import KeyPrefix


class KeyDayRepository:
    """The `key_day` table."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def add(self, key_prefix: KeyPrefix, day: int, more: KeyDay) -> None:
        """Adds to a key's day; the first of a day forgets the key's earlier ones, which nobody asks for."""
        row = self._session.get(KeyDayRow, (key_prefix, day))
        if row is None:
            row = KeyDayRow(key_prefix=key_prefix, day=day, request_count=0, token_count=0.0, spend=0)
            self._session.exec(delete(KeyDayRow).where(col(KeyDayRow.key_prefix) == key_prefix, col(KeyDayRow.day) < day))
        row.request_count += more.request_count
        row.token_count += more.token_count
        row.spend += more.spend_micro_credits
        self._session.add(row)
        self._session.flush()

    def get(self, key_prefix: KeyPrefix, day: int) -> KeyDay:
        """A key's use of that day, so far."""
        row = self._session.get(KeyDayRow, (key_prefix, day))
        return KeyDay() if row is None else KeyDay(row.request_count, row.token_count, row.spend)

    def of(self, day: int) -> Mapping[tuple[KeyPrefix, int], KeyDay]:
        """Every key's use of that day."""
        rows = self._session.exec(select(KeyDayRow).where(col(KeyDayRow.day) == day))
        return {(KeyPrefix(row.key_prefix), day): KeyDay(row.request_count, row.token_count, row.spend) for row in rows}
