"""What is asked of `grouping`: the replicas that no single node can take, and what every node has left for a stage.

Decides when a group is asked for: when no node that serves could run the model even if it were empty, and for as long as a group stands and
no single node took over. It must not know which nodes may be together.
"""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING, Final

from potluck_coordinator.domain.fit import engines as fit_engines
from potluck_coordinator.domain.fit.interconnect import ALONE
from potluck_coordinator.domain.fit.load import Load
from potluck_coordinator.domain.fit.memory import kv_wanted_bytes, stage_memory
from potluck_coordinator.domain.fit.shapes import Stage, tensor_parallel_divides
from potluck_coordinator.domain.fit.stage_speed import stage_speed
from potluck_coordinator.domain.grouping.words import GroupNeed, GroupPhase, NodeRoom
from potluck_coordinator.domain.planning.sizing import cards_of, hardware_of
from potluck_coordinator.domain.planning.state import group_prefix
from potluck_protocol.values import ReplicaId

if TYPE_CHECKING:
    from collections.abc import Mapping

    from potluck_coordinator.domain.catalogue import CatalogueEntry, Deployment
    from potluck_coordinator.domain.fit.architecture import ModelArchitecture
    from potluck_coordinator.domain.planning.state import Draft
    from potluck_protocol.values import NodeId

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


def node_rooms(draft: Draft) -> Mapping[NodeId, NodeRoom]:
    """What is free of every node beside engines that are whole; what groups hold counts as free, for it is theirs."""
    return {node_id: _node_room(draft, node_id) for node_id in sorted(draft.view.nodes)}


def _needs(draft: Draft, deployment: Deployment) -> list[GroupNeed]:
    entry = draft.entry(deployment.model_id)
    if deployment.replica_count is None or entry.architecture is None or GROUP_ENGINE not in entry.engine_kinds:
        return []
    missing_count = deployment.replica_count - len(draft.counting(deployment.model_id))
    known = draft.groups_of(deployment.model_id)
    standing = [replica_id for replica_id in known if draft.view.groups[replica_id].phase is not GroupPhase.BROKEN]
    # A group that stands is not given up for a node that could run the model, before a replica stands there.
    wanted = standing[: max(0, missing_count)]
    if not any(not draft.obstacle(deployment.model_id, node_id) for node_id in draft.serving_nodes()):
        names = (ReplicaId(f"{group_prefix(deployment.model_id)}{number}") for number in range(len(known) + max(0, missing_count)))
        wanted += [name for name in names if name not in wanted][: max(0, missing_count - len(wanted))]
    return [_need(draft, entry, replica_id) for replica_id in wanted]


def _need(draft: Draft, entry: CatalogueEntry, replica_id: ReplicaId) -> GroupNeed:
    architecture, file = entry.architecture, entry.file
    assert architecture is not None, "asked above"
    assert file is not None, "an entry without files is never planned"
    load = Load(_TRAITS, entry.context_length_tokens, 1)
    sizes = tuple(size for size in range(1, CARDS_MAX + 1) if tensor_parallel_divides(architecture, load.traits, size))
    # On cards a few blocks more than it takes there; one rule for both keeps a byte too few from stopping a start.
    kv_bytes = kv_wanted_bytes(architecture, load, on_processor=True)
    return GroupNeed(
        replica_id=replica_id,
        model=file,
        engine_kind=GROUP_ENGINE,
        slot_count=min(entry.slot_count, GROUP_SLOTS_MAX),
        context_length_tokens=entry.context_length_tokens,
        layer_count=architecture.layer_count,
        layer_bytes=int(architecture.layer_bytes),
        first_stage_bytes=int(architecture.embedding_bytes),
        last_stage_bytes=int(architecture.embedding_bytes),
        layer_kv_bytes=ceil(kv_bytes / architecture.layer_count),
        stage_overhead_bytes=_overhead_bytes(draft, architecture, load),
        quantization=entry.quantization,
        tensor_parallel_sizes=sizes,
    )


def _overhead_bytes(draft: Draft, architecture: ModelArchitecture, load: Load) -> int:
    """What the engine takes beside weights and cache, on the node where that is most."""
    offering = [node_id for node_id in draft.serving_nodes() if draft.view.nodes[node_id].inventory.group_offer is not None]
    stages = [_stage(draft, node_id) for node_id in offering]
    return max((stage_memory(architecture, stage, load).overhead_bytes for stage in stages), default=0)


def _node_room(draft: Draft, node_id: NodeId) -> NodeRoom:
    room = draft.room(node_id, soon=False, with_groups=False)
    stage = _stage(draft, node_id)
    if not stage.cards:
        return NodeRoom(max(0, room.memory_bytes), weight_bytes_per_second=stage_speed(stage, _TRAITS).bytes_per_second)
    hardware, uuids = hardware_of(draft.view.nodes[node_id], room, on_cards=True)
    usable_bytes = min((card.usable_bytes for card in hardware.cards), default=0)
    return NodeRoom(usable_bytes, uuids, stage_speed(stage, _TRAITS).bytes_per_second)


def _stage(draft: Draft, node_id: NodeId) -> Stage:
    """One card of the node, or the machine where it has none."""
    node = draft.view.nodes[node_id]
    hardware, _ = hardware_of(node, draft.whole_room(node_id), on_cards=bool(cards_of(node.inventory)))
    cards = hardware.cards[:1]
    return Stage(0, (0,) if cards else (), cards, ALONE, None if cards else hardware.processor)
