"""Nodes' judged minutes, as rows: one for each node and hour of unix time.

Decides that an hour holds 60 minutes at most. It must not know how a minute was judged.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

from sqlalchemy import and_, case, func
from sqlmodel import Session, col, select

from potluck_coordinator.domain.survival import WEEK_HOURS, History
from potluck_coordinator.storage.bulk import Insertion
from potluck_coordinator.storage.tables import NodeUptimeHourRow
from potluck_protocol.values import NodeId

_ADD: Final = Insertion(
    "node_uptime_hour",
    {"node_id": "text", "hour": "bigint", "up_minutes": "integer", "down_minutes": "integer"},
    otherwise="""ON CONFLICT (node_id, hour) DO UPDATE
    SET up_minutes = node_uptime_hour.up_minutes + excluded.up_minutes, down_minutes = node_uptime_hour.down_minutes + excluded.down_minutes
    WHERE node_uptime_hour.up_minutes + node_uptime_hour.down_minutes + excluded.up_minutes + excluded.down_minutes <= 60""",
)


class UptimeRepository:
    """The `node_uptime_hour` table."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def add(self, hour: int, minutes: Mapping[NodeId, tuple[int, int]]) -> None:
        """Adds nodes' up and down minutes to an hour. More than fit into it, as after the clock was set back, are dropped: nobody's."""
        _ADD.run(self._session.connection(), [(node_id, hour, up, down) for node_id, (up, down) in minutes.items()])

    def totals(self, since_hour: int = 0) -> Mapping[NodeId, tuple[int, int]]:
        """Up and down minutes of every node with any, from that hour on."""
        row = NodeUptimeHourRow
        found = self._session.exec(
            select(row.node_id, func.sum(row.up_minutes), func.sum(row.down_minutes))
            .where(col(row.hour) >= since_hour)
            .group_by(col(row.node_id))
        )
        return {NodeId(node_id): (int(up), int(down)) for node_id, up, down in found}

    def histories(self, since_hour: int, week_hours: Collection[int]) -> Mapping[NodeId, tuple[History, History]]:
        """Every node's minutes from that hour on, and those of them in these hours of the week, with the hours that saw both kinds."""
        row = NodeUptimeHourRow
        is_mixed = case((and_(col(row.up_minutes) > 0, col(row.down_minutes) > 0), 1), else_=0)
        is_theirs = case(((col(row.hour) % WEEK_HOURS).in_(week_hours), 1), else_=0)
        counts = (col(row.up_minutes), col(row.down_minutes), is_mixed)
        found = self._session.execute(
            select(col(row.node_id), *(func.sum(count * share) for share in (1, is_theirs) for count in counts))
            .where(col(row.hour) >= since_hour)
            .group_by(col(row.node_id))
        )
        return {NodeId(node_id): (History(*map(int, sums[:3])), History(*map(int, sums[3:]))) for node_id, *sums in found}
