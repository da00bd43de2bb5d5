"""How the default tier's promise was kept, as rows: one for each hour of unix time.

Decides nothing. It must not know what was promised.
"""

from __future__ import annotations

from collections.abc import Mapping

from sqlmodel import Session, col, delete, select

from potluck_coordinator.domain.tiers import MONTH_HOURS, PromiseCount
from potluck_coordinator.storage.tables import PromiseHourRow


class PromiseRepository:
    """The `promise_hour` table."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def add(self, hour: int, count: PromiseCount) -> None:
        """Adds to an hour, and forgets what is older than anybody asks for."""
        row = self._session.get(PromiseHourRow, hour)
        if row is None:
            row = PromiseHourRow(hour=hour, request_count=0, kept_count=0)
            self._session.exec(delete(PromiseHourRow).where(col(PromiseHourRow.hour) <= hour - MONTH_HOURS))
        row.request_count += count.count
        row.kept_count += count.kept_count
        self._session.add(row)
        self._session.flush()

    def hours(self) -> Mapping[int, PromiseCount]:
        """All that are kept."""
        rows = self._session.exec(select(PromiseHourRow).order_by(col(PromiseHourRow.hour)))
        return {row.hour: PromiseCount(row.request_count, row.kept_count) for row in rows}
