"""The replicas of all connected nodes, those that are alike together: a request looks at a few kinds, and not at a thousand nodes.

Decides nothing: `domain.placement` says what is alike, and chooses. It must not know sessions: `links` says what a node's replicas are now.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from potluck_coordinator.domain.placement import Cohort, likeness

if TYPE_CHECKING:
    from collections.abc import Iterable

    from potluck_coordinator.domain.placement import ReplicaView
    from potluck_protocol.values import ModelId, NodeId, ReplicaId

_Kinds: TypeAlias = "dict[tuple[object, ...], dict[tuple[NodeId, ReplicaId], ReplicaView]]"


class Roster:
    """Every replica of one gateway's nodes, by model and likeness."""

    def __init__(self) -> None:
        self._replicas: dict[NodeId, dict[ReplicaId, ReplicaView]] = {}
        self._kinds: dict[ModelId, _Kinds] = {}

    def cohorts(self, model_id: ModelId) -> tuple[Cohort, ...]:
        """The model's, for use before the next `enter`."""
        return tuple(Cohort(replicas.values()) for replicas in self._kinds.get(model_id, {}).values())

    def enter(self, node_id: NodeId, replicas: Iterable[ReplicaView]) -> None:
        """The replicas that a node has now, instead of those that it had; of a node that is gone, none."""
        known = self._replicas.pop(node_id, {})
        now = {replica.replica_id: replica for replica in replicas}
        if now:
            self._replicas[node_id] = now
        if now == known:
            return
        for replica in known.values():
            kinds, kind = self._kinds[replica.model_id], likeness(replica)
            del kinds[kind][node_id, replica.replica_id]
            if not kinds[kind]:
                del kinds[kind]
            if not kinds:
                del self._kinds[replica.model_id]
        for replica in now.values():
            self._kinds.setdefault(replica.model_id, {}).setdefault(likeness(replica), {})[node_id, replica.replica_id] = replica
