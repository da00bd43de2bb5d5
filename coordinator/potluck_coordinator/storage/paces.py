"""How fast replicas were each day, as rows: one for each node, model and day of unix time.

Decides nothing. It must not know what is slow.
"""

from __future__ import annotations

from collections.abc import Mapping

from sqlmodel import Session, col, delete, select

from potluck_coordinator.storage.tables import ReplicaPaceRow
from potluck_protocol.values import ModelId, NodeId


class PaceRepository:
    """The `replica_pace` table."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def put(self, node_id: NodeId, model_id: ModelId, day: int, tokens_per_second: float) -> None:
        """The median of a day, instead of what was known of it."""
        self._session.merge(ReplicaPaceRow(node_id=node_id, model_id=model_id, day=day, tokens_per_second=tokens_per_second))
        self._session.flush()

    def since(self, day: int) -> Mapping[tuple[NodeId, ModelId], Mapping[int, float]]:
        """Every replica's days, from that one on."""
        row = ReplicaPaceRow
        found: dict[tuple[NodeId, ModelId], dict[int, float]] = {}
        for one in self._session.exec(select(row).where(col(row.day) >= day)):
            found.setdefault((NodeId(one.node_id), ModelId(one.model_id)), {})[one.day] = one.tokens_per_second
        return found

    def forget_before(self, day: int) -> None:
        """Removes what is older."""
        self._session.exec(delete(ReplicaPaceRow).where(col(ReplicaPaceRow.day) < day))
