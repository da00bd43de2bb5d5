"""What a shard group is made of and what it becomes: the need, the room on a node, the stages, and the group's life.

Decides nothing; these are the words that the rest of the package shares. They must not know how they are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum

from potluck_coordinator.domain.payees import PayeeShare
from potluck_protocol.card_facts import NOTHING_KNOWN, CardFacts
from potluck_protocol.values import AccountId, DesiredEngine, ModelFile, NodeId, ReplicaId


@dataclass(frozen=True, slots=True)
class GroupNeed:
    """One replica that no single node can take, and what its stages have to hold. All bytes are those of every card of a stage together."""

    replica_id: ReplicaId
    """Also the group's id: it stays over all generations."""
    model: ModelFile
    engine_kind: str
    slot_count: int
    context_length_tokens: int
    layer_count: int
    layer_bytes: int
    """Weights of one layer."""
    first_stage_bytes: int
    """Weights that only the first stage loads: the embeddings."""
    last_stage_bytes: int
    """Weights that only the last stage loads: the head, even where the model ties it to the embeddings."""
    layer_kv_bytes: int
    """Keys and values of one layer, for the tokens that the replica is to hold."""
    stage_overhead_bytes: int
    """What an engine takes beside weights and cache, on every stage."""
    table_copy_bytes: int = 0
    """That an engine without cards keeps of the table at either end a second time: memory, but no weights that anybody is paid for."""
    quantization: str = ""
    tensor_parallel_sizes: tuple[int, ...] = (1,)
    """How many cards of one node may share a stage; every stage of a group has the same number."""

    def is_served_by(self, other: GroupNeed) -> bool:
        """Whether a group that was formed for the other need answers as this one asks. What either thinks of memory does not matter."""
        mine, yours = ((need.model, need.engine_kind, need.slot_count, need.context_length_tokens) for need in (self, other))
        return mine == yours


@dataclass(frozen=True, slots=True)
class NodeRoom:
    """What a node has left for a stage."""

    memory_bytes: int
    """Of the machine, for an engine without cards; else of each of its cards."""
    card_uuids: tuple[str, ...] = ()
    """Free cards, the ones to take first in front."""
    weight_bytes_per_second: float = 1e10
    """How fast one card, or the machine without cards, reads weights: what bounds the tokens of one stream."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One node's part; its rank is its place in the group's tuple of stages, and rank 0 leads."""

    node_id: NodeId
    owner_account_id: AccountId
    address: str
    port: int
    layer_count: int
    weight_bytes: int
    """Of the layers and ends it loads, as the plan knows them."""
    kv_cache_bytes: int
    memory_bytes: int
    """Of each card, or of the machine, that the stage may take in all."""
    card_uuids: tuple[str, ...] = ()
    card_facts: CardFacts = NOTHING_KNOWN
    site: str = ""
    """The owners' word for where the node is; empty in groups that were kept before it was."""


class GroupPhase(StrEnum):
    """Where a group stands."""

    FORMING = "forming"
    READY = "ready"
    """A token has come through all stages."""
    BROKEN = "broken"
    """Nothing is wished of it: its nodes stop and are free, and it waits until it can be formed anew."""


class Blame(IntEnum):
    """How surely a fault is the cause and not the consequence of another: the greater one is told."""

    NONE = 0
    PEER_MISSED = 1
    """An engine that ended because another stage was gone."""
    ENGINE_FAILED = 2
    """For a reason of its own, or so it seemed."""
    ENGINE_KILLED = 3
    NODE_GONE = 4


@dataclass(frozen=True, slots=True)
class ShardGroup:
    """One group in one of its generations. Seconds are of the directory's monotonic clock."""

    need: GroupNeed
    """As it was when the group was formed."""
    generation: int
    stages: tuple[Stage, ...]
    phase: GroupPhase
    since_seconds: float
    """When it entered the phase."""
    epochs: Mapping[NodeId, int] = field(default_factory=dict)
    """The session in which each member was seen in this generation; another one means that its agent began anew."""
    ready_node_ids: frozenset[NodeId] = frozenset()
    """Members whose engine of this generation stood once."""
    reason: str = ""
    """What broke it, or the generation before, in words for people; empty where nothing ever did."""
    lost_node_id: NodeId | None = None
    """The member that broke it, or the generation before."""
    blame: Blame = Blame.NONE
    """Of a broken one."""
    failure_count: int = 0
    """Generations in a row that an engine's early failure broke."""
    leaving_since_seconds: float | None = None
    """Since when nobody needs it any more: it finishes what it is answering, and gets no new requests. None: it is needed."""

    @property
    def replica_id(self) -> ReplicaId:
        return self.need.replica_id


@dataclass(frozen=True, slots=True)
class Formation:
    """The stages chosen for a need, or why there are none, and what ruled out each node that is not among them."""

    stages: tuple[Stage, ...]
    reason: str
    rejections: Mapping[NodeId, str]


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """What follows for everyone."""

    groups: Mapping[ReplicaId, ShardGroup]
    """To be handed back at the next call, and kept over restarts."""
    desired: Mapping[NodeId, tuple[DesiredEngine, ...]]
    """The stages wished of each node; a node without any is not named."""
    pairs: tuple[tuple[NodeId, NodeId], ...]
    """Nodes that should measure each other; the first one dials."""
    payees: Mapping[ReplicaId, tuple[PayeeShare, ...]]
    """Who earns what a group answers, by stage share."""
    formations: Mapping[ReplicaId, Formation]
    """Of the needs without a group that stands or is being formed, and of those formed in this call; for `explain`."""
    leaving: frozenset[ReplicaId] = frozenset()
    """Groups that get no new requests."""
