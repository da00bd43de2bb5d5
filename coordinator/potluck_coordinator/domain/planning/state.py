"""A plan in the making: which replicas there are, what each node has left, and how far each wish is met.

Decides what counts: which node serves, which replica is idle, ready or of no use. Everything is read from the view and the replicas, so
that it cannot disagree with itself. It must not know what follows from any of it.
"""

from __future__ import annotations

import hashlib
import weakref
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from potluck_coordinator.domain.catalogue import ServiceTier
from potluck_coordinator.domain.grouping.life import is_held
from potluck_coordinator.domain.grouping.words import GroupPhase
from potluck_coordinator.domain.planning.alike import AlikeNodes, Likeness
from potluck_coordinator.domain.planning.node_kinds import Room
from potluck_coordinator.domain.planning.sizing import Misfit
from potluck_coordinator.domain.planning.troubles import by_node
from potluck_coordinator.domain.planning.words import (
    ABSENCE_SECONDS_MAX,
    HERE_TO_STAY,
    IDLE_SECONDS,
    WAITING_SECONDS_MAX,
    Phase,
    Sizing,
)
from potluck_protocol.values import EngineState, EngineStatus, ModelId

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from potluck_coordinator.domain.catalogue import CatalogueEntry, Deployment
    from potluck_coordinator.domain.grouping.words import NodeRoom, Stage
    from potluck_coordinator.domain.planning.node_kinds import Free, NodeKind
    from potluck_coordinator.domain.planning.words import PlannedReplica, PlanningView, Trouble
    from potluck_protocol.values import NodeId, ReplicaId


_GROUP: Final = "group/"
_HOLDING: Final = frozenset(Phase) - {Phase.WAITING}
"""Phases in which a replica has its room."""


class Draft:
    """The replicas as the plan goes: `put` and `drop` change them, all else is read."""

    def __init__(self, view: PlanningView) -> None:
        self.view = view
        self.deployments: dict[ModelId, Deployment] = {
            deployment.model_id: deployment
            for deployment in sorted(view.deployments, key=lambda deployment: deployment.model_id)
            if self.is_servable(deployment.model_id)
        }
        self._statuses: dict[tuple[NodeId, ReplicaId], EngineStatus] = {
            (node_id, status.replica_id): status for node_id, node in view.nodes.items() for status in node.engines
        }
        self._stages: dict[NodeId, list[Stage]] = {}
        self._stopping_stages: dict[NodeId, list[Stage]] = {}
        self._groups: dict[ModelId, list[ReplicaId]] = {}
        for replica_id, group in sorted(view.groups.items()):
            self._groups.setdefault(model_of_group(replica_id), []).append(replica_id)
            taken = self._stopping_stages if group.phase is GroupPhase.BROKEN else self._stages
            for stage in group.stages:
                if is_held(group, stage.node_id, view.nodes, view.absent_since, view.now_seconds):
                    taken.setdefault(stage.node_id, []).append(stage)
        self.given_up: dict[ReplicaId, ModelId] = {}
        """The groups that are not needed any more, and for whose wish: their own, or one that needs their room."""
        self._promised_stages: dict[NodeId, list[Stage]] = {}
        self.promised: dict[NodeId, ReplicaId] = {}
        """The groups that room is kept for until they form."""
        self.hoped_rooms: dict[NodeId, NodeRoom] = {}
        """What nodes would have for a group that was looked for in vain, if those that would leave for it were gone."""
        self._node_ids = sorted(view.nodes)
        self._kinds = {node_id: view.sizer.kind_of(view.nodes[node_id]) for node_id in self._node_ids}
        self._able_counts: dict[ModelId, int] = {}
        self._questions: dict[ModelId, int] = {}
        self._fetched_bytes: dict[ModelId, int] = {}
        self.node_troubles = by_node(view.troubles)
        """Why nodes take no further replica of a model."""
        self._rooms: dict[tuple[NodeId, bool], Room] = {}
        self._touched: set[NodeId] = set(self._node_ids)
        # Not in a circle: what a plan held goes with its draft, without a collector that would have to look through all of it.
        own = weakref.proxy(self)
        self._alike = AlikeNodes(
            lambda *asked: own.sized_on_kind(*asked),  # noqa: PLW0108 - the bound method would hold it
            lambda model_id, node_id: (own.lacks_disk(model_id, node_id), draw(model_id, node_id)),
            lambda model_id, node_id: own.runs(model_id, node_id) or (node_id, model_id) in own.node_troubles,
        )
        self._replicas: dict[ReplicaId, PlannedReplica] = {}
        self._on_node: dict[NodeId, dict[ReplicaId, PlannedReplica]] = {node_id: {} for node_id in view.nodes}
        self._of_model: dict[ModelId, dict[ReplicaId, PlannedReplica]] = {}
        self._counting: dict[ModelId, dict[ReplicaId, PlannedReplica]] = {}
        self._seconds: dict[ReplicaId, set[ReplicaId]] = {}
        """By the replica whose place they are to take."""
        for _, replica in sorted(view.standing.items()):
            self.put(replica)

    @property
    def replicas(self) -> Mapping[ReplicaId, PlannedReplica]:
        return self._replicas

    def put(self, replica: PlannedReplica) -> None:
        """Adds a replica, or replaces the one of the same id, which has the same node and model."""
        self._replicas[replica.replica_id] = replica
        self._on_node.setdefault(replica.node_id, {})[replica.replica_id] = replica
        self._of_model.setdefault(replica.model_id, {})[replica.replica_id] = replica
        if replica.replaces is not None:
            self._seconds.setdefault(replica.replaces, set()).add(replica.replica_id)
        self._changed(replica)

    def drop(self, replica: PlannedReplica) -> None:
        """Takes a replica out; it may be out already."""
        if self._replicas.pop(replica.replica_id, None) is not None:
            del self._on_node[replica.node_id][replica.replica_id]
            del self._of_model[replica.model_id][replica.replica_id]
            self._changed(replica)

    def _changed(self, replica: PlannedReplica) -> None:
        """Forgets what was known of its node, and sees whether it counts, and those that are to take its place."""
        self._forget_room(replica.node_id)
        counting = self._counting.setdefault(replica.model_id, {})
        for replica_id in (replica.replica_id, *sorted(self._seconds.get(replica.replica_id, ()))):
            one = self._replicas.get(replica_id)
            if one is not None and self.counts(one):
                counting[replica_id] = one
            else:
                counting.pop(replica_id, None)

    def _forget_room(self, node_id: NodeId) -> None:
        if node_id in self._kinds:
            self._touched.add(node_id)
        self._rooms.pop((node_id, True), None)
        self._rooms.pop((node_id, False), None)

    # Nodes.

    def is_absent(self, node_id: NodeId) -> bool:
        """Whether the node does not serve now: new replicas go elsewhere."""
        return node_id in self.view.absent_since

    def is_given_up(self, node_id: NodeId) -> bool:
        """Whether it has been away for so long that its replicas are looked for elsewhere."""
        since = self.view.absent_since.get(node_id)
        return since is not None and self.view.now_seconds - since >= ABSENCE_SECONDS_MAX

    def room(self, node_id: NodeId, *, soon: bool) -> Room:
        """What is free on the node: now, or (`soon`) once those that are on their way out have left and those that wait have come."""
        room = self._rooms.get((node_id, soon))
        if room is None:
            leaving = () if soon else self._stopping_stages.get(node_id, ())
            room = self.room_beside_groups(node_id, HERE_TO_STAY if soon else _HOLDING)
            for stage in (*self._stages.get(node_id, ()), *self._promised_stages.get(node_id, ()), *leaving):
                taken_bytes = 0 if stage.card_uuids else stage.memory_bytes
                room = Room(room.card_uuids.difference(stage.card_uuids), room.memory_bytes - taken_bytes)
            self._rooms[node_id, soon] = room
        return room

    def room_beside_groups(self, node_id: NodeId, phases: Collection[Phase], besides: Collection[ReplicaId] = ()) -> Room:
        """What replicas in these phases leave of the node, those `besides` not counted; what groups hold counts as free."""
        room = self.whole_room(node_id)
        for replica in self._on_node[node_id].values():
            if replica.phase in phases and replica.replica_id not in besides:
                room = room.without(replica.sizing)
        return room

    def whole_room(self, node_id: NodeId) -> Room:
        """What the node has in all."""
        return self._kinds[node_id].whole_room

    def kind(self, node_id: NodeId) -> NodeKind:
        """What it is as far as sizes go."""
        return self._kinds[node_id]

    def alike(self) -> AlikeNodes:
        """The nodes by what they are now."""
        for node_id in sorted(self._touched):
            kind = self._kinds[node_id]
            soon, now = kind.free(self.room(node_id, soon=True)), kind.free(self.room(node_id, soon=False))
            self._alike.put(node_id, kind, Likeness(kind.number, self.is_absent(node_id), soon, now))
        self._touched.clear()
        return self._alike

    def runs(self, model_id: ModelId, node_id: NodeId) -> bool:
        """Whether a replica of the model is on the node, even one that leaves."""
        return self.count_on(model_id, node_id) > 0

    def count_on(self, model_id: ModelId, node_id: NodeId) -> int:
        """How many of them."""
        return sum(1 for replica in self._on_node[node_id].values() if replica.model_id == model_id)

    def has_groups(self, node_id: NodeId) -> bool:
        """Whether a shard group holds a part of the node, or is to have it."""
        return node_id in self._stages or node_id in self._promised_stages

    def stops_a_stage(self, node_id: NodeId) -> bool:
        """Whether the stage of a group that broke may still run there."""
        return node_id in self._stopping_stages

    def promise(self, replica_id: ReplicaId, stages: Sequence[Stage]) -> None:
        """Keeps the stages' room for a group that is to be."""
        for stage in stages:
            self.promised[stage.node_id] = replica_id
            self._promised_stages.setdefault(stage.node_id, []).append(stage)
            self._forget_room(stage.node_id)

    def on_node(self, node_id: NodeId) -> list[PlannedReplica]:
        return list(self._on_node[node_id].values())

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
        return self.view.troubles.get((replica.node_id, replica.model_id, replica.replica_id))

    def counts(self, replica: PlannedReplica) -> bool:
        """Whether its wish is met by it, now or soon. Where every node is to have one, each keeps its own, however long it is away."""
        waited_seconds = self.view.now_seconds - replica.since_seconds if replica.phase is Phase.WAITING else 0.0
        if replica.phase not in HERE_TO_STAY or waited_seconds >= WAITING_SECONDS_MAX or self.trouble(replica) or self._is_second(replica):
            return False
        deployment = self.deployments.get(replica.model_id)
        return (deployment is not None and deployment.replica_count is None) or not self.is_given_up(replica.node_id)

    def _is_second(self, replica: PlannedReplica) -> bool:
        """Whether it only comes to take the place of one that is still there."""
        if replica.replaces is None:
            return False
        if self.takes_a_groups_place(replica):
            return True
        old = self._replicas.get(replica.replaces)
        return old is not None and old.phase in HERE_TO_STAY

    def takes_a_groups_place(self, replica: PlannedReplica) -> bool:
        """Whether it comes to take the place of a group that stands."""
        return replica.replaces is not None and replica.replaces in self.view.groups and self._stands(replica.replaces)

    def idle_since(self, replica: PlannedReplica) -> float | None:
        """When it last did something, if that is so long ago that it may make room for others; None while it may not."""
        if self.is_answering(replica) or self.view.waiting_counts.get(replica.model_id, 0):
            return None
        last = max(replica.since_seconds, self.view.used_at.get(replica.replica_id, replica.since_seconds))
        return last if self.view.now_seconds - last >= IDLE_SECONDS else None

    def score(self, replica: PlannedReplica) -> float:
        """What it is worth where it is, as seen today."""
        shape, kind = replica.sizing.shape, self._kinds[replica.node_id]
        room = Room(frozenset(shape.card_uuids), 0 if shape.card_uuids else shape.memory_bytes)
        sized = self.sized_on_kind(replica.model_id, kind, kind.free(room))
        if isinstance(sized, Sizing) and sized.slot_count < replica.sizing.slot_count:
            # It may be on more cards than fewer slots would take.
            as_wide = self.sized_on_kind(replica.model_id, kind, kind.free(room), replica.sizing.slot_count)
            sized = as_wide if isinstance(as_wide, Sizing) else sized
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
        return list(self._counting.get(model_id, {}).values())

    def have_count(self, model_id: ModelId) -> int:
        """Replicas that meet the wish, groups among them, and those that are to be."""
        return len(self._counting.get(model_id, ())) + len(self.standing_groups(model_id)) + self.promised_count(model_id)

    def promised_count(self, model_id: ModelId) -> int:
        """How many groups of the model room is kept for."""
        return len({replica_id for replica_id in self.promised.values() if model_of_group(replica_id) == model_id})

    def groups_of(self, model_id: ModelId) -> list[ReplicaId]:
        return self._groups.get(model_id, [])

    def standing_groups(self, model_id: ModelId) -> list[ReplicaId]:
        """Those that meet the wish, now or soon; one on its way out meets it again where it is not given up anew."""
        return [replica_id for replica_id in self.groups_of(model_id) if self._stands(replica_id)]

    def give_up(self, replica_id: ReplicaId, model_id: ModelId) -> None:
        """A group is not needed any more, for the wish of a model: from now on it does not count."""
        self.given_up[replica_id] = model_id

    def _stands(self, replica_id: ReplicaId) -> bool:
        return self.view.groups[replica_id].phase is not GroupPhase.BROKEN and replica_id not in self.given_up

    def wanted_count(self, deployment: Deployment) -> int:
        """How many replicas the wish asks for; where it asks for all nodes, those that could run one."""
        if deployment.replica_count is not None:
            return deployment.replica_count
        if deployment.model_id not in self._able_counts:
            able = [node_id for node_id in self._node_ids if not self.obstacle(deployment.model_id, node_id)]
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
        trouble = self.node_troubles.get((node_id, model_id))
        return trouble.reason if trouble else self.misfit(model_id, node_id)

    def misfit(self, model_id: ModelId, node_id: NodeId) -> str:
        """Why the fit says so, whatever the node did with the model; empty if it does not."""
        kind = self._kinds[node_id]
        sized = self.sized_on_kind(model_id, kind, kind.free(kind.whole_room))
        return sized.reason if isinstance(sized, Misfit) else ""

    def refuses(self, model_id: ModelId, node_id: NodeId) -> bool:
        """Whether the node said that it will not have the model."""
        trouble = self.node_troubles.get((node_id, model_id))
        return trouble is not None and trouble.refused

    def sized_on_kind(self, model_id: ModelId, kind: NodeKind, free: Free, slot_count_least: int = 1) -> Sizing | Misfit:
        """How it would run in a room of any node of the kind with so many slots at the least, in the kind's words."""
        entry = self.view.catalogue[model_id]
        question = self._questions.get(model_id)
        if question is None:
            question = self._questions[model_id] = self.view.sizer.question(entry)
        return self.view.sizer.size_on_kind(entry, question, kind, free, slot_count_least)

    def sized(self, model_id: ModelId, node_id: NodeId, room: Room) -> Sizing | Misfit:
        """How it would run in a room of the node."""
        kind = self._kinds[node_id]
        sized = self.sized_on_kind(model_id, kind, kind.free(room))
        return kind.own(sized) if isinstance(sized, Sizing) else sized

    def lacks_disk(self, model_id: ModelId, node_id: NodeId) -> bool:
        """Whether the node's free disk is known and too small: it may drop old files, so that this only puts it behind others."""
        if model_id not in self._fetched_bytes:
            file = self.entry(model_id).file
            fetched = file is not None and file.source.startswith(("hf:", "wheel:"))
            self._fetched_bytes[model_id] = file.total_bytes if file is not None and fetched else 0
        return 0 < self.view.nodes[node_id].disk_free_bytes < self._fetched_bytes[model_id]

    def serving_nodes(self) -> Iterator[NodeId]:
        """Nodes that new replicas may go to, in an order that has nothing to do with them."""
        return (node_id for node_id in self._node_ids if not self.is_absent(node_id))


def tier_rank(deployment: Deployment) -> int:
    """Lower goes first."""
    return 0 if deployment.tier is ServiceTier.DEFAULT else 1


@lru_cache(maxsize=1 << 17)
def draw(model_id: ModelId, node_id: NodeId) -> bytes:
    """Breaks ties by rendezvous hashing: a node that comes or goes changes nobody else's place."""
    return hashlib.sha256(f"{model_id}\0{node_id}".encode()).digest()


def group_prefix(model_id: ModelId) -> str:
    """What the ids of a model's groups begin with; no node's id, which is a hash, looks like it."""
    return f"{_GROUP}{model_id}/"


def model_of_group(replica_id: ReplicaId) -> ModelId:
    return ModelId(replica_id.removeprefix(_GROUP).rpartition("/")[0])
