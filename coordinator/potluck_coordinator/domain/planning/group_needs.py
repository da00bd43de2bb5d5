"""What is asked of `grouping`: the replicas that no single node can take, and what every node has left for a stage.

Decides when a group is asked for: when no node that serves, and does not refuse the model, could hold it even if it were empty, and for as
long as a group stands. A node whose engine fails could hold it all the same: a group would fail there too. It must not know which nodes
may be together.
"""

from __future__ import annotations

from dataclasses import replace
from math import ceil
from typing import TYPE_CHECKING, Final

from potluck_coordinator.domain.fit import engines as fit_engines
from potluck_coordinator.domain.fit.interconnect import ALONE
from potluck_coordinator.domain.fit.load import Load
from potluck_coordinator.domain.fit.memory import kv_wanted_bytes, stage_memory
from potluck_coordinator.domain.fit.shapes import Stage, tensor_parallel_divides
from potluck_coordinator.domain.fit.stage_speed import stage_speed
from potluck_coordinator.domain.grouping.words import GroupNeed, GroupPhase, NodeRoom
from potluck_coordinator.domain.planning.node_kinds import Room, hardware_of
from potluck_coordinator.domain.planning.state import group_prefix
from potluck_coordinator.domain.planning.words import Phase
from potluck_protocol.values import ReplicaId

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from potluck_coordinator.domain.catalogue import CatalogueEntry, Deployment
    from potluck_coordinator.domain.planning.node_kinds import NodeKind
    from potluck_coordinator.domain.planning.state import Draft
    from potluck_protocol.values import ModelId, NodeId

GROUP_ENGINE: Final = "vllm"
"""The only engine whose stages run on several nodes."""
GROUP_SLOTS_MAX: Final = 4
"""Every stage waits for the slowest line between them: more requests at a time make each of them crawl."""
CARDS_MAX: Final = 8
"""Of one node in one stage."""
_TRAITS: Final = fit_engines.traits_of(fit_engines.VLLM)


def group_needs(draft: Draft) -> tuple[GroupNeed, ...]:
    """The most wanted first."""
    return tuple(need for deployment in draft.by_urgency() for need in _needs(draft, deployment))


def unmet_needs(draft: Draft, deployment: Deployment) -> list[GroupNeed]:
    """Those of a wish without a group that stands or forms."""
    groups = draft.view.groups
    return [
        need for need in _needs(draft, deployment) if need.replica_id not in groups or groups[need.replica_id].phase is GroupPhase.BROKEN
    ]


def refusals(draft: Draft) -> dict[tuple[NodeId, ModelId], str]:
    """Who is in no group of a model, for its owner would not have it there, and in which words."""
    return {key: trouble.reason for key, trouble in draft.node_troubles.items() if trouble.refused}


def node_rooms(draft: Draft) -> Mapping[NodeId, NodeRoom]:
    """What is free of every node beside engines that are whole, come or go; what groups hold counts as free, for it is theirs."""
    return node_rooms_of(draft, {node_id: draft.room_beside_groups(node_id, frozenset(Phase)) for node_id in sorted(draft.view.nodes)})


def node_rooms_of(draft: Draft, rooms: Mapping[NodeId, Room]) -> dict[NodeId, NodeRoom]:
    """Rooms of nodes in the words of groups."""
    return {node_id: _node_room(draft, node_id, room) for node_id, room in rooms.items()}


def bytes_per_second_of_one(draft: Draft, node_id: NodeId, card_uuids: Sequence[str]) -> float:
    """How fast the slowest of these cards of a node reads weights; the machine's processors, where none is named or there."""
    kind = draft.kind(node_id)
    room = Room(frozenset(card_uuids), 0)
    key = ("speed", kind.number, kind.free(room))
    return draft.view.sizer.known(key, lambda: _slowest_bytes_per_second(kind, kind.in_places(room)))


def _needs(draft: Draft, deployment: Deployment) -> list[GroupNeed]:
    entry = draft.entry(deployment.model_id)
    if deployment.replica_count is None or entry.architecture is None or GROUP_ENGINE not in entry.engine_kinds:
        return []
    missing_count = deployment.replica_count - len(draft.counting(deployment.model_id))
    known = draft.groups_of(deployment.model_id)
    # A group that stands is kept until a node that has come to hold the model alone answers (`giving_way`).
    wanted = draft.standing_groups(deployment.model_id)[: max(0, missing_count)]
    willing = (node_id for node_id in draft.serving_nodes() if not draft.refuses(deployment.model_id, node_id))
    if all(draft.misfit(deployment.model_id, node_id) for node_id in willing):
        names = (ReplicaId(f"{group_prefix(deployment.model_id)}{number}") for number in range(len(known) + max(0, missing_count)))
        new = [name for name in names if name not in wanted and name not in draft.given_up]
        wanted += new[: max(0, missing_count - len(wanted))]
    if not wanted:
        return []
    try:
        need = _need(draft, entry)
    except (ArithmeticError, ValueError):
        # Figures that make no sense together: `sizing` says so on every node, and the others are planned.
        return []
    return [replace(need, replica_id=replica_id) for replica_id in wanted]


def _need(draft: Draft, entry: CatalogueEntry) -> GroupNeed:
    """What every group of the model needs; each has an id of its own."""
    offering = (node_id for node_id in draft.serving_nodes() if draft.view.nodes[node_id].inventory.group_offer is not None)
    kinds = {kind.number: kind for kind in map(draft.kind, offering)}
    sizer = draft.view.sizer
    key = ("need", sizer.question(entry), frozenset(kinds))
    return sizer.known(key, lambda: _need_on(entry, list(kinds.values())))


def _need_on(entry: CatalogueEntry, kinds: Sequence[NodeKind]) -> GroupNeed:
    architecture, file = entry.architecture, entry.file
    assert architecture is not None, "asked above"
    assert file is not None, "an entry without files is never planned"
    load = Load(_TRAITS, entry.context_length_tokens, 1)
    sizes = tuple(size for size in range(1, CARDS_MAX + 1) if tensor_parallel_divides(architecture, load.traits, size))
    # On cards a few blocks more than it takes there; one rule for both keeps a byte too few from stopping a start.
    kv_bytes = kv_wanted_bytes(architecture, load, on_processor=True)
    return GroupNeed(
        replica_id=ReplicaId(group_prefix(entry.model_id)),
        model=file,
        engine_kind=GROUP_ENGINE,
        slot_count=min(entry.slot_count, GROUP_SLOTS_MAX),
        context_length_tokens=entry.context_length_tokens,
        layer_count=architecture.layer_count,
        layer_bytes=int(architecture.layer_bytes),
        first_stage_bytes=int(architecture.embedding_bytes),
        last_stage_bytes=int(architecture.embedding_bytes),
        table_copy_bytes=int(architecture.embedding_bytes) if load.traits.packs_tables_on_processor else 0,
        layer_kv_bytes=ceil(kv_bytes / architecture.layer_count),
        # What the engine takes beside weights and cache, on the node where that is most.
        stage_overhead_bytes=max(
            (stage_memory(architecture, one, load).overhead_bytes for kind in kinds for one in _ones(kind)), default=0
        ),
        quantization=entry.quantization,
        tensor_parallel_sizes=sizes,
    )


def _node_room(draft: Draft, node_id: NodeId, room: Room) -> NodeRoom:
    """The same of all nodes of a kind with the same free, but for the names of the cards."""
    kind = draft.kind(node_id)
    found = draft.view.sizer.known(("room", kind.number, kind.free(room)), lambda: _room_of_kind(kind, kind.in_places(room)))
    return replace(found, card_uuids=tuple(kind.card_uuids[int(place)] for place in found.card_uuids)) if found.card_uuids else found


def _room_of_kind(kind: NodeKind, room: Room) -> NodeRoom:
    if not kind.card_uuids:
        return NodeRoom(max(0, room.memory_bytes), weight_bytes_per_second=_slowest_bytes_per_second(kind, room))
    # As small, and as slow, as the least of its free cards: any of them may be the stage's.
    hardware, places = hardware_of(kind.model, room, on_cards=True)
    usable_bytes = min((card.usable_bytes for card in hardware.cards), default=0)
    return NodeRoom(usable_bytes, places, _slowest_bytes_per_second(kind, room))


def _slowest_bytes_per_second(kind: NodeKind, room: Room) -> float:
    """Of the room's cards, in the kind's words, the slowest one; of the machine, where it has none."""
    return min(stage_speed(one, _TRAITS).bytes_per_second for one in _ones(kind, room))


def _ones(kind: NodeKind, room: Room | None = None) -> list[Stage]:
    """Each card of the room, or of the whole node, as a stage by itself; the machine, where there is none."""
    hardware, _ = hardware_of(kind.model, room or kind.in_places(kind.whole_room), on_cards=True)
    return [Stage(0, (0,), (card,), ALONE) for card in hardware.cards] or [Stage(0, (), (), ALONE, hardware.processor)]
