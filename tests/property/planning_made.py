"""What `planning_churn` plans: the models, and a plan as everyone around the planner sees it.

Decides what of a plan is compared with another. It must not know which changes are allowed.
"""

from __future__ import annotations

from dataclasses import dataclass

from potluck_coordinator.domain.fit.architecture import ModelArchitecture
from potluck_coordinator.domain.grouping.words import GroupPhase, ShardGroup
from potluck_coordinator.domain.planning.words import Phase, PlannedReplica
from potluck_protocol.values import DesiredEngine, ModelFile, ModelId, NodeId, ReplicaId
from tests.property.planning_boxes import GIB
from tests.support.planning import AWQ, card_entry, machine_entry

WIDE = ModelArchitecture("wide", 50, 12_288, 96, 8, 128, 40_960, 128_256, 8192, quantization=AWQ)
"""More than any one box has."""

ENTRIES = (
    card_entry("8b"),
    card_entry("32b"),
    card_entry("70b"),
    machine_entry("tiny"),
    machine_entry("small", 3 * GIB),
    machine_entry("middling", 7 * GIB),
    card_entry("8b", model_id="8b-gguf", engine_kinds=("llamacpp",), slot_count=2),
    card_entry(
        "70b",
        model_id="wide",
        architecture=WIDE,
        slot_count=2,
        file=ModelFile(ModelId("wide"), f"hf:org/wide@{'a' * 40}", "model.safetensors", "0" * 64, int(WIDE.weight_bytes)),
    ),
)
CATALOGUE = {entry.model_id: entry for entry in ENTRIES}


@dataclass(frozen=True)
class Made:
    """A plan, as everyone around it sees it."""

    replicas: dict[ReplicaId, PlannedReplica]
    desired: dict[NodeId, tuple[DesiredEngine, ...]]
    leaving: frozenset[ReplicaId]
    groups: dict[ReplicaId, ShardGroup]


def ready_groups(made: Made) -> dict[ReplicaId, ModelId]:
    """Those that answer, by their models."""
    return {replica_id: group.need.model.model_id for replica_id, group in made.groups.items() if group.phase is GroupPhase.READY}


def places(made: Made) -> set[tuple[ModelId, NodeId]]:
    """Where which models are, or are to be."""
    here = (Phase.WAITING, Phase.WISHED)
    return {(replica.model_id, replica.node_id) for replica in made.replicas.values() if replica.phase in here}


def shapes(made: Made) -> frozenset[tuple[str, ...]]:
    """The same with cards, and the members of groups."""
    here = (Phase.WAITING, Phase.WISHED)
    whole = {(one.model_id, one.node_id, *one.sizing.shape.card_uuids) for one in made.replicas.values() if one.phase in here}
    groups = [group for group in made.groups.values() if group.phase is not GroupPhase.BROKEN]
    return frozenset(whole | {(group.replica_id, *(stage.node_id for stage in group.stages)) for group in groups})


def outline(made: Made) -> tuple[object, ...]:
    """All that must not change for the pool to rest."""
    phases = {replica_id: replica.phase for replica_id, replica in made.replicas.items()}
    return phases, {replica_id: (group.phase, group.generation) for replica_id, group in made.groups.items()}, made.desired


def difference(one: Made, other: Made) -> str:
    """In words."""
    changed = {key for key in one.replicas.keys() | other.replicas.keys() if one.replicas.get(key) != other.replicas.get(key)}
    words = [f"{one.replicas.get(key)} -> {other.replicas.get(key)}" for key in sorted(changed)]
    keys = {key for key in one.groups.keys() | other.groups.keys() if one.groups.get(key) != other.groups.get(key)}
    return "; ".join([*words, *(f"{one.groups.get(key)} -> {other.groups.get(key)}" for key in sorted(keys))])
