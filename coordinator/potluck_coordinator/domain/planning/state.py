"""A plan in the making: which replicas there are, what each node has left, and how far each wish is met.

Decides what counts: which node serves, which replica is idle, ready or of no use. Everything is read from the view and the replicas, so
that it cannot disagree with itself. It must not know what follows from any of it.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from potluck_coordinator.domain.catalogue import ServiceTier
from potluck_coordinator.domain.grouping.words import GroupPhase
from potluck_coordinator.domain.planning.sizing import Misfit, Room, whole_room
from potluck_coordinator.domain.planning.words import (
    ABSENCE_SECONDS_MAX,
    HERE_TO_STAY,
    IDLE_SECONDS,
    Phase,
    Sizing,
)
from potluck_protocol.values import EngineState, EngineStatus

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from potluck_coordinator.domain.catalogue import CatalogueEntry, Deployment
    from potluck_coordinator.domain.grouping.words import Stage
    from potluck_coordinator.domain.planning.words import PlannedReplica, PlanningView, Trouble
    from potluck_protocol.values import ModelId, NodeId, ReplicaId


class Draft:
    """The replicas as the plan goes: `put` and `drop` change them, all else is read."""

    def __init__(self, view: PlanningView) -> None:
        self.view = view
        self._replicas: dict[ReplicaId, PlannedReplica] = {}
        self._on_node: dict[NodeId, dict[ReplicaId, PlannedReplica]] = {node_id: {} for node_id in view.nodes}
        self._of_model: dict[ModelId, dict[ReplicaId, PlannedReplica]] = {}
        for _, replica in sorted(view.standing.items()):
            self.put(replica)
        self.deployments: dict[ModelId, Deployment] = {
            deployment.model_id: deployment
            for deployment in sorted(view.deployments, key=lambda deployment: deployment.model_id)
            if self.is_servable(deployment.model_id)
        }
        self._statuses: dict[tuple[NodeId, ReplicaId], EngineStatus] = {
            (node_id, status.replica_id): status for node_id, node in view.nodes.items() for status in node.engines
        }
        self._stages: dict[NodeId, list[Stage]] = {}
        for group in view.groups.values():
            for stage in group.stages if group.phase is not GroupPhase.BROKEN else ():
                self._stages.setdefault(stage.node_id, []).append(stage)
        self._able_counts: dict[ModelId, int] = {}
        self._kinds = {node_id: view.sizer.kind_of(node) for node_id, node in view.nodes.items()}
        self._whole = {node_id: whole_room(node.inventory) for node_id, node in view.nodes.items()}

    @property
    def replicas(self) -> Mapping[ReplicaId, PlannedReplica]:
        return self._replicas

    def put(self, replica: PlannedReplica) -> None:
        """Adds a replica, or replaces the one of the same id, which has the same node and model."""
        self._replicas[replica.replica_id] = replica
        self._on_node.setdefault(replica.node_id, {})[replica.replica_id] = replica
        self._of_model.setdefault(replica.model_id, {})[replica.replica_id] = replica

    def drop(self, replica: PlannedReplica) -> None:
        """Takes a replica out; it may be out already."""
        if self._replicas.pop(replica.replica_id, None) is not None:
            del self._on_node[replica.node_id][replica.replica_id]
            del self._of_model[replica.model_id][replica.replica_id]

    # Nodes.

    def is_absent(self, node_id: NodeId) -> bool:
        """Whether the node does not serve now: new replicas go elsewhere."""
        return node_id in self.view.absent_since

    def is_given_up(self, node_id: NodeId) -> bool:
        """Whether it has been away for so long that its replicas are looked for elsewhere."""
        since = self.view.absent_since.get(node_id)
        return since is not None and self.view.now_seconds - since >= ABSENCE_SECONDS_MAX

    def room(self, node_id: NodeId, *, soon: bool, with_groups: bool = True) -> Room:
        """What is free on the node: now, or (`soon`) once those that are on their way out have left and those that wait have come.

        Without groups, what they hold counts as free.
        """
        taking = HERE_TO_STAY if soon else frozenset(Phase) - {Phase.WAITING}
        room = self._without_groups(node_id) if with_groups else self.whole_room(node_id)
        for replica in self.on_node(node_id):
            if replica.phase in taking:
                room = room.without(replica.sizing)
        return room

    def whole_room(self, node_id: NodeId) -> Room:
        """What the node has in all."""
        return self._whole[node_id]

    def on_node(self, node_id: NodeId) -> list[PlannedReplica]:
        return list(self._on_node[node_id].values())

    def _without_groups(self, node_id: NodeId) -> Room:
        room = self.whole_room(node_id)
        for stage in self._stages.get(node_id, ()):
            taken_bytes = 0 if stage.card_uuids else stage.memory_bytes
            room = Room(room.card_uuids.difference(stage.card_uuids), room.memory_bytes - taken_bytes)
        return room

    # Replicas.

    def status(self, replica: PlannedReplica) -> EngineStatus | None:
        """What its node says of it; None where it says nothing, or is not connected."""
        return self._statuses.get((replica.node_id, replica.replica_id))

    def is_ready(self, replica: PlannedReplica) -> bool:
        status = self.status(replica)
        return replica.phase is Phase.WISHED and status is not None and status.state is EngineState.READY

    def is_answering(self, replica: PlannedReplica) -> bool:
        return self.view.attempt_counts.get(replica.replica_id, 0) > 0

    def trouble(self, replica: PlannedReplica) -> Trouble | None:
        """Why its node will not run it."""
        return self.view.troubles.get((replica.node_id, replica.model_id))

    def counts(self, replica: PlannedReplica) -> bool:
        """Whether its wish is met by it, now or soon. Where every node is to have one, each keeps its own, however long it is away."""
        if replica.phase not in HERE_TO_STAY or self.trouble(replica) or self._is_second(replica):
            return False
        deployment = self.deployments.get(replica.model_id)
        return (deployment is not None and deployment.replica_count is None) or not self.is_given_up(replica.node_id)

    def _is_second(self, replica: PlannedReplica) -> bool:
        """Whether it only comes to take the place of one that is still there."""
        old = self._replicas.get(replica.replaces) if replica.replaces is not None else None
        return old is not None and old.phase in HERE_TO_STAY

    def idle_since(self, replica: PlannedReplica) -> float | None:
        """When it last did something, if that is so long ago that it may make room for others; None while it may not."""
        if self.is_answering(replica) or self.view.waiting_counts.get(replica.model_id, 0):
            return None
        last = max(replica.since_seconds, self.view.used_at.get(replica.replica_id, replica.since_seconds))
        return last if self.view.now_seconds - last >= IDLE_SECONDS else None

    def score(self, replica: PlannedReplica) -> float:
        """What it is worth where it is, as seen today."""
        sized = self.sized(replica.model_id, replica.node_id, Room(frozenset(), 0).with_room_of(replica.sizing))
        return sized.score if isinstance(sized, Sizing) else replica.sizing.score

    # Wishes.

    def by_urgency(self) -> list[Deployment]:
        """The default tier first, then what requests wait for, then what is met least.

        Of equals one everywhere comes after one somewhere, and small models, which find room in more places, after large ones.
        """
        return sorted(self.deployments.values(), key=self.urgency)

    def urgency(self, deployment: Deployment) -> tuple[int, bool, float, bool, int, str]:
        """Lower comes first."""
        file = self.entry(deployment.model_id).file
        size_bytes = file.total_bytes if file is not None else 0
        everywhere, waits = deployment.replica_count is None, self.is_waited_for(deployment)
        return tier_rank(deployment), not waits, self.share(deployment), everywhere, -size_bytes, deployment.model_id

    def is_servable(self, model_id: ModelId) -> bool:
        """Whether the catalogue still says what the model's files are."""
        return model_id in self.view.catalogue and self.view.catalogue[model_id].file is not None

    def entry(self, model_id: ModelId) -> CatalogueEntry:
        return self.view.catalogue[model_id]

    def of_model(self, model_id: ModelId) -> list[PlannedReplica]:
        return list(self._of_model.get(model_id, {}).values())

    def counting(self, model_id: ModelId) -> list[PlannedReplica]:
        return [replica for replica in self.of_model(model_id) if self.counts(replica)]

    def have_count(self, model_id: ModelId) -> int:
        """Replicas that meet the wish, groups among them."""
        groups = sum(1 for replica_id in self.groups_of(model_id) if self.view.groups[replica_id].phase is not GroupPhase.BROKEN)
        return len(self.counting(model_id)) + groups

    def groups_of(self, model_id: ModelId) -> list[ReplicaId]:
        return [replica_id for replica_id in sorted(self.view.groups) if replica_id.startswith(group_prefix(model_id))]

    def wanted_count(self, deployment: Deployment) -> int:
        """How many replicas the wish asks for; where it asks for all nodes, those that could run one."""
        if deployment.replica_count is not None:
            return deployment.replica_count
        if deployment.model_id not in self._able_counts:
            able = [node_id for node_id in self.view.nodes if not self.obstacle(deployment.model_id, node_id)]
            self._able_counts[deployment.model_id] = len(able)
        return self._able_counts[deployment.model_id]

    def share(self, deployment: Deployment, less: int = 0) -> float:
        """How far a wish is met, or would be with so many replicas less."""
        return (self.have_count(deployment.model_id) - less) / max(1, self.wanted_count(deployment))

    def is_short(self, deployment: Deployment) -> bool:
        return self.have_count(deployment.model_id) < self.wanted_count(deployment)

    def is_waited_for(self, deployment: Deployment) -> bool:
        return self.view.waiting_counts.get(deployment.model_id, 0) > 0

    # Models on nodes.

    def obstacle(self, model_id: ModelId, node_id: NodeId) -> str:
        """Why the node could not run the model even if it were free and connected; empty if it could."""
        if trouble := self.view.troubles.get((node_id, model_id)):
            return trouble.reason
        sized = self.sized(model_id, node_id, self.whole_room(node_id))
        return sized.reason if isinstance(sized, Misfit) else ""

    def sized(self, model_id: ModelId, node_id: NodeId, room: Room) -> Sizing | Misfit:
        return self.view.sizer.size(self.entry(model_id), self.view.nodes[node_id], self._kinds[node_id], room)

    def lacks_disk(self, model_id: ModelId, node_id: NodeId) -> bool:
        """Whether the node's free disk is known and too small: it may drop old files, so that this only puts it behind others."""
        file, free_bytes = self.entry(model_id).file, self.view.nodes[node_id].disk_free_bytes
        fetched = file is not None and file.source.startswith(("hf:", "wheel:"))
        return file is not None and fetched and 0 < free_bytes < file.total_bytes

    def serving_nodes(self) -> Iterator[NodeId]:
        """Nodes that new replicas may go to, in an order that has nothing to do with them."""
        return (node_id for node_id in sorted(self.view.nodes) if not self.is_absent(node_id))


def tier_rank(deployment: Deployment) -> int:
    """Lower goes first."""
    return 0 if deployment.tier is ServiceTier.DEFAULT else 1


def draw(model_id: ModelId, node_id: NodeId) -> bytes:
    """Breaks ties by rendezvous hashing: a node that comes or goes changes nobody else's place."""
    return hashlib.sha256(f"{model_id}\0{node_id}".encode()).digest()


def group_prefix(model_id: ModelId) -> str:
    """What the ids of a model's groups begin with; no node's id, which is a hash, looks like it."""
    return f"group/{model_id}/"
