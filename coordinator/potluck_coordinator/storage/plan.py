"""The plan, as rows: which replica is wished of which node, and what nodes showed of the fit's predictions.

Decides only the form in which it is kept, so that a directory that starts anew disturbs none. It must not know what follows from a phase.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec
from sqlmodel import Session, col, select

from potluck_coordinator.domain.fit.corrections import NOTHING_LEARNED, Corrections
from potluck_coordinator.domain.planning.words import PlannedReplica
from potluck_coordinator.storage.bulk import Insertion, Removal
from potluck_coordinator.storage.state import StateName, StateRepository
from potluck_coordinator.storage.tables import PlannedReplicaRow
from potluck_protocol.values import ReplicaId

_REMOVE: Final = Removal("planned_replica", ("replica_id", "text"))
_ADD: Final = Insertion("planned_replica", {"replica_id": "text", "node_id": "text", "plan": "text"})


class PlanRepository:
    """The `planned_replica` table."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def all(self) -> dict[ReplicaId, PlannedReplica]:
        """The replicas of the last plan; their seconds are of a clock that has stopped."""
        rows = self._session.exec(select(PlannedReplicaRow).order_by(col(PlannedReplicaRow.replica_id)))
        return {ReplicaId(row.replica_id): msgspec.json.decode(row.plan, type=PlannedReplica) for row in rows}

    def corrections(self) -> Corrections:
        """What was learned; nothing where that was written by a version that kept it otherwise."""
        text = StateRepository(self._session).get(StateName.FIT_CORRECTIONS)
        try:
            return NOTHING_LEARNED if text is None else msgspec.json.decode(text, type=Corrections)
        except msgspec.DecodeError:
            return NOTHING_LEARNED

    def keep_corrections(self, corrections: Corrections) -> None:
        StateRepository(self._session).put(StateName.FIT_CORRECTIONS, msgspec.json.encode(corrections).decode())

    def keep(self, before: Mapping[ReplicaId, PlannedReplica], replicas: Mapping[ReplicaId, PlannedReplica]) -> None:
        """Makes these the replicas that there are, where those were; writes only what differs."""
        connection = self._session.connection()
        new = [replica for replica_id, replica in replicas.items() if before.get(replica_id) != replica]
        _REMOVE.run(connection, [*(before.keys() - replicas.keys()), *(replica.replica_id for replica in new)])
        _ADD.run(connection, [(one.replica_id, one.node_id, msgspec.json.encode(one).decode()) for one in new])
