"""What planning is about: replicas that are wished of nodes, everything they are judged by, and the plan.

Decides nothing; these are the words that the rest of the package shares. They must not know how they are heard or kept.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from potluck_protocol.values import DesiredEngine, EngineShape, ModelFile, ModelId, NodeId, ReplicaId

if TYPE_CHECKING:
    from collections.abc import Mapping

    from potluck_coordinator.domain.catalogue import CatalogueEntry, Deployment
    from potluck_coordinator.domain.grouping.words import GroupNeed, NodeRoom, ShardGroup
    from potluck_coordinator.domain.node_view import NodeView
    from potluck_coordinator.domain.planning.sizing import Sizer

GAIN_MIN: Final = 1.2
"""A satisfied deployment's replica moves for no less: as many times faster must another node be."""
IDLE_SECONDS: Final = 300.0
"""A replica without a request for so long may make room for others; loading one takes minutes."""
ABSENCE_SECONDS_MAX: Final = 120.0
"""How long a node's replicas wait for it: it will be back, with the files on its disk."""
LEAVING_SECONDS_MAX: Final = 120.0
"""How long a replica that is on its way out may finish what it is answering."""
WAITING_SECONDS_MAX: Final = 600.0
"""How long a replica that waits for room counts: an engine that did not end by then, after `LEAVING_SECONDS_MAX`, may never end."""


class Phase(StrEnum):
    """Where a planned replica stands."""

    WAITING = "waiting"
    """For room that others are leaving; nothing is wished of the node yet."""
    WISHED = "wished"
    LEAVING = "leaving"
    """Still wished, for the answers that are under way; it gets no new requests."""
    STOPPING = "stopping"
    """No longer wished, and its room not free before its node says that the engine is gone."""


HERE_TO_STAY: Final = frozenset({Phase.WAITING, Phase.WISHED})


@dataclass(frozen=True, slots=True)
class Sizing:
    """How a replica runs on a node, and what it is worth there."""

    engine_kind: str
    shape: EngineShape
    slot_count: int
    context_length_tokens: int
    score: float
    """Predicted answer tokens a second, all slots at work: what nodes are compared by."""


@dataclass(frozen=True, slots=True)
class PlannedReplica:
    """One replica on one node. Seconds are of the directory's monotonic clock."""

    replica_id: ReplicaId
    node_id: NodeId
    model_id: ModelId
    sizing: Sizing
    made_for: str
    """What its entry was when it was sized (`sizing.demands_of`)."""
    phase: Phase
    since_seconds: float
    """When it entered the phase."""
    replaces: ReplicaId | None = None
    """Another replica of the model, on a slower node, that leaves once this one answers."""
    file: ModelFile | None = None
    """What was last wished of its node; None while it waits, and of a plan that was kept by a version which did not say."""


TroubleKey = tuple[NodeId, ModelId, ReplicaId]
"""Of two replicas of one model on a node's cards, one may answer while the other fails."""


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why a node will not run a replica, in its own words."""

    reason: str
    refused: bool
    """By its owner's limits; else the engine keeps failing there."""


@dataclass(frozen=True, slots=True)
class PlanningView:
    """Everything a plan is made from."""

    now_seconds: float
    deployments: tuple[Deployment, ...]
    catalogue: Mapping[ModelId, CatalogueEntry]
    nodes: Mapping[NodeId, NodeView]
    sizer: Sizer
    standing: Mapping[ReplicaId, PlannedReplica]
    """The replicas of the last plan."""
    absent_since: Mapping[NodeId, float] = field(default_factory=dict)
    """Nodes that do not serve now, because they are not connected, paused or about to stop, and since when."""
    troubles: Mapping[TroubleKey, Trouble] = field(default_factory=dict)
    attempt_counts: Mapping[ReplicaId, int] = field(default_factory=dict)
    """Requests that replicas are answering, by the gateway's count."""
    used_at: Mapping[ReplicaId, float] = field(default_factory=dict)
    """When replicas last answered."""
    waiting_counts: Mapping[ModelId, int] = field(default_factory=dict)
    """Requests that wait for a slot."""
    groups: Mapping[ReplicaId, ShardGroup] = field(default_factory=dict)
    """Replicas over several nodes, which are `grouping`'s to plan; what they hold is taken."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What should run where."""

    replicas: Mapping[ReplicaId, PlannedReplica]
    desired: Mapping[NodeId, tuple[DesiredEngine, ...]]
    """Of every node of the pool, in the order of the replica ids."""
    leaving: frozenset[ReplicaId]
    """Replicas that get no new requests."""
    needs: tuple[GroupNeed, ...]
    """Replicas that no single node of the pool can take: what `grouping.plan` is to be asked for, the most wanted first."""
    rooms: Mapping[NodeId, NodeRoom]
    """What nodes have left beside these replicas, what groups hold included; nothing where there are no needs."""
    promised: Mapping[NodeId, ReplicaId] = field(default_factory=dict)
    """Nodes of which room is kept for a group until it forms."""
    hoped_rooms: Mapping[NodeId, NodeRoom] = field(default_factory=dict)
    """What nodes would have for groups that were looked for in vain, if idle replicas left: what pairs are to be measured by."""
    refusals: Mapping[tuple[NodeId, ModelId], str] = field(default_factory=dict)
    """Nodes that refused a model, which are in none of its groups, with their reasons."""


def replica_id_of(node_id: NodeId, model_id: ModelId, ordinal: int = 0) -> ReplicaId:
    """The same replica keeps its id over restarts of either side. Several of one model on a node are numbered."""
    return ReplicaId(f"{node_id}/{model_id}" + (f"/{ordinal}" if ordinal else ""))
