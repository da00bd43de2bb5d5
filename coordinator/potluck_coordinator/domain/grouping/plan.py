"""From needs, nodes and groups as they are to groups as they should be, and what that asks of every node.

Decides when a group is formed, and which nodes are to measure each other: those that an unmet need could take, and no others, for a
measurement opens a port and costs a second of the line. `forming` chooses, `life` judges. It must not know how any of it is sent or kept.
"""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from typing import TYPE_CHECKING, Final

from potluck_coordinator.domain.grouping import life
from potluck_coordinator.domain.grouping.forming import form, possible_members
from potluck_coordinator.domain.grouping.membership import trust_refusal
from potluck_coordinator.domain.grouping.shares import payee_shares
from potluck_coordinator.domain.grouping.words import Formation, GroupPhase, GroupPlan
from potluck_protocol.values import DesiredEngine, EngineShape, GroupPlace

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from potluck_coordinator.domain.grouping.words import GroupNeed, NodeRoom, ShardGroup, Stage
    from potluck_coordinator.domain.node_view import NodeView
    from potluck_protocol.values import NodeId, ReplicaId

PEERS_PER_NODE_MAX: Final = 8
"""How many others one node measures at a time."""


def plan_groups(
    needs: Sequence[GroupNeed],
    views: Mapping[NodeId, NodeView],
    rooms: Mapping[NodeId, NodeRoom],
    before: Mapping[ReplicaId, ShardGroup],
    *,
    next_generation: Callable[[], int],
    now: float,
) -> GroupPlan:
    """The next step of every group.

    Args:
        needs: the replicas that are to be groups, the most wanted first; a group without a need is withdrawn.
        views: every node of the pool.
        rooms: what nodes have left beside engines that are whole; what the groups of `before` hold is to be in it.
        before: the groups of the last call.
        next_generation: gives a number that no group of the pool ever had.
        now: monotonic seconds.
    """
    groups: dict[ReplicaId, ShardGroup] = {}
    formations: dict[ReplicaId, Formation] = {}
    unmet: list[GroupNeed] = []
    wanted = {need.replica_id: need for need in needs}
    # Where nobody is connected, the coordinator itself is the one that was away: it judges nobody.
    is_blind = not any(view.connected for view in views.values())
    for replica_id, group in before.items():
        if replica_id in wanted and wanted[replica_id].is_served_by(group.need):
            groups[replica_id] = group if is_blind else life.advance(group, views, now)
            continue
        withdrawn = life.withdrawn(group, "something else is asked for now", now)
        # Remembered until it is gone, in case somebody asks again.
        if replica_id in wanted or life.waiting_for(withdrawn, views, now):
            groups[replica_id] = withdrawn
    left = _left(rooms, groups)
    for need in needs:
        earlier = groups.get(need.replica_id)
        if earlier is not None and earlier.phase is not GroupPhase.BROKEN:
            continue
        waiting = "" if earlier is None else life.waiting_for(earlier, views, now)
        formation = form(need, views, left)
        formations[need.replica_id] = formation if not waiting else Formation((), waiting, formation.rejections)
        if formation.stages and not waiting:
            groups[need.replica_id] = life.begin(
                need, formation.stages, generation=next_generation(), earlier=earlier, views=views, now=now
            )
            left = _left(rooms, groups)
        else:
            unmet.append(need)
    return GroupPlan(
        groups=groups,
        desired=_desired(groups),
        pairs=wanted_pairs(unmet, views, left),
        payees={
            replica_id: payee_shares(group.stages, life.taken_bytes(group, views))
            for replica_id, group in groups.items()
            if group.phase is not GroupPhase.BROKEN
        },
        formations=formations,
    )


def wanted_pairs(
    unmet: Sequence[GroupNeed], views: Mapping[NodeId, NodeView], rooms: Mapping[NodeId, NodeRoom]
) -> tuple[tuple[NodeId, NodeId], ...]:
    """The pairs to measure for these needs, the dialling node first; none twice, and no node in more than `PEERS_PER_NODE_MAX`."""
    pairs: set[tuple[NodeId, NodeId]] = set()
    counts: Counter[NodeId] = Counter()
    for need in unmet:
        # The largest first: they are the likeliest to be chosen.
        able = sorted(possible_members(need, views, rooms), key=lambda view: (-rooms[view.node_id].memory_bytes, view.node_id))
        for pair in combinations(able, 2):
            first, second = sorted(view.node_id for view in pair)
            if (first, second) in pairs or max(counts[first], counts[second]) >= PEERS_PER_NODE_MAX or trust_refusal(*pair):
                continue
            pairs.add((first, second))
            counts.update((first, second))
    return tuple(sorted(pairs))


def _left(rooms: Mapping[NodeId, NodeRoom], groups: Mapping[ReplicaId, ShardGroup]) -> dict[NodeId, NodeRoom]:
    taken = {stage.node_id for group in groups.values() if group.phase is not GroupPhase.BROKEN for stage in group.stages}
    return {node_id: room for node_id, room in rooms.items() if node_id not in taken}


def _desired(groups: Mapping[ReplicaId, ShardGroup]) -> dict[NodeId, tuple[DesiredEngine, ...]]:
    desired: dict[NodeId, tuple[DesiredEngine, ...]] = {}
    for _, group in sorted(groups.items()):
        if group.phase is GroupPhase.BROKEN:
            continue
        for rank, stage in enumerate(group.stages):
            engine = _desired_engine(group, rank, stage)
            desired[stage.node_id] = (*desired.get(stage.node_id, ()), engine)
    return desired


def _desired_engine(group: ShardGroup, rank: int, stage: Stage) -> DesiredEngine:
    need, leader = group.need, group.stages[0]
    return DesiredEngine(
        replica_id=need.replica_id,
        model=need.model,
        engine_kind=need.engine_kind,
        slot_count=need.slot_count,
        context_length_tokens=need.context_length_tokens,
        shape=EngineShape(
            card_uuids=stage.card_uuids,
            tensor_parallel_size=max(1, len(stage.card_uuids)),
            quantization=need.quantization,
            # On cards the cache takes what is left of them.
            kv_cache_bytes=0 if stage.card_uuids else stage.kv_cache_bytes,
            memory_bytes=stage.memory_bytes,
        ),
        group=GroupPlace(
            group_id=need.replica_id,
            generation=group.generation,
            rank=rank,
            leader_address=leader.address,
            leader_port=leader.port,
            address=stage.address,
            layer_counts=tuple(member.layer_count for member in group.stages),
        ),
    )
