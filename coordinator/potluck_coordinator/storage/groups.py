"""Shard groups, as rows.

Decides only the form in which they are kept, so that a coordinator that starts again finds them where they were. It must not know what
follows from a group's phase.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from sqlmodel import Session, col, delete, select

from potluck_coordinator.domain.grouping.words import ShardGroup
from potluck_coordinator.storage.tables import ShardGroupRow
from potluck_protocol.values import ReplicaId


class GroupRepository:
    """The `shard_group` table."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def all(self) -> dict[ReplicaId, ShardGroup]:
        """The groups; their seconds are of a clock that has stopped."""
        rows = self._session.exec(select(ShardGroupRow).order_by(col(ShardGroupRow.replica_id)))
        return {ReplicaId(row.replica_id): msgspec.json.decode(row.shard_group, type=ShardGroup) for row in rows}

    def keep(self, groups: Mapping[ReplicaId, ShardGroup]) -> None:
        """Makes these the groups that there are."""
        self._session.exec(delete(ShardGroupRow).where(col(ShardGroupRow.replica_id).not_in(list(groups))))
        for replica_id, group in groups.items():
            self._session.merge(ShardGroupRow(replica_id=replica_id, shard_group=msgspec.json.encode(group).decode()))
        self._session.flush()
