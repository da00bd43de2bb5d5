"""From needs, nodes and groups as they are to groups as they should be, and what that asks of every node.

Decides when a group is formed, and which nodes are to measure each other: those that an unmet need could take, and no others, for a
measurement opens a port and costs a second of the line. `forming` chooses, `life` judges. It must not know how any of it is sent or kept.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from itertools import combinations
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from potluck_coordinator.domain.grouping import life
from potluck_coordinator.domain.grouping.forming import by_site, form, possible_members
from potluck_coordinator.domain.grouping.membership import trust_refusal
from potluck_coordinator.domain.grouping.returned import doubts
from potluck_coordinator.domain.grouping.shares import payee_shares
from potluck_coordinator.domain.grouping.words import Formation, GroupPhase, GroupPlan
from potluck_protocol.values import DesiredEngine, EngineShape, GroupPlace

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from potluck_coordinator.domain.grouping.words import GroupNeed, NodeRoom, ShardGroup, Stage
    from potluck_coordinator.domain.node_view import NodeView
    from potluck_protocol.values import ModelId, NodeId, ReplicaId

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
    absent_since: Mapping[NodeId, float] = MappingProxyType({}),
    promised: Mapping[NodeId, ReplicaId] = MappingProxyType({}),
    hoped_rooms: Mapping[NodeId, NodeRoom] = MappingProxyType({}),
    refusals: Mapping[tuple[NodeId, ModelId], str] = MappingProxyType({}),
    attempt_counts: Mapping[ReplicaId, int] = MappingProxyType({}),
) -> GroupPlan:
    """The next step of every group.

    Args:
        needs: the replicas that are to be groups, the most wanted first; a group without a need finishes its answers and is withdrawn.
        views: every node of the pool.
        rooms: what nodes have left beside engines that are whole; what the groups of `before` hold is to be in it.
        before: the groups of the last call.
        next_generation: gives a number that no group of the pool ever had.
        now: monotonic seconds.
        absent_since: when nodes that are away went; of one that is not named, at the latest when its group broke.
        promised: nodes that are kept for one of the needs.
        hoped_rooms: what nodes would have, if others left: what pairs are measured by.
        refusals: nodes that will not have a model, and why: they are in no group of it.
        attempt_counts: what each group is answering.
    """
    pool = _Pool(views, absent_since, promised, now)
    groups = _carried_on(before, {need.replica_id: need for need in needs}, pool, attempt_counts)
    unsure = doubts(groups.values(), views, absent_since, now)
    formations: dict[ReplicaId, Formation] = {}
    unmet: list[GroupNeed] = []
    for need in needs:
        earlier = groups.get(need.replica_id)
        if earlier is not None and earlier.phase is not GroupPhase.BROKEN:
            continue
        waiting = "" if earlier is None else life.waiting_for(earlier, views, absent_since, now)
        formation = form(need, views, pool.left(rooms, groups, {need.replica_id}), {**unsure, **refusing(need.model.model_id, refusals)})
        formations[need.replica_id] = formation if not waiting else Formation((), waiting, formation.rejections)
        if formation.stages and not waiting:
            number = next_generation()
            groups[need.replica_id] = life.begin(need, formation.stages, generation=number, earlier=earlier, views=views, now=now)
        else:
            unmet.append(need)
    return GroupPlan(
        groups=groups,
        desired=_desired(groups),
        pairs=wanted_pairs(unmet, views, pool.left({**rooms, **hoped_rooms}, groups, {need.replica_id for need in unmet}), refusals),
        payees={
            replica_id: payee_shares(group.stages, life.counted_bytes(group, views))
            for replica_id, group in groups.items()
            if group.phase is not GroupPhase.BROKEN
        },
        formations=formations,
        leaving=frozenset(replica_id for replica_id, group in groups.items() if group.leaving_since_seconds is not None),
    )


def _carried_on(
    before: Mapping[ReplicaId, ShardGroup], wanted: Mapping[ReplicaId, GroupNeed], pool: _Pool, attempt_counts: Mapping[ReplicaId, int]
) -> dict[ReplicaId, ShardGroup]:
    """What became of the groups that there were; those that are gone, and that nobody wants, left out."""
    views, now = pool.views, pool.now
    groups: dict[ReplicaId, ShardGroup] = {}
    # Where nobody is connected, the coordinator itself is the one that was away: it judges nobody.
    is_blind = not any(view.connected for view in views.values())
    for replica_id, group in before.items():
        needed = replica_id in wanted and wanted[replica_id].is_served_by(group.need)
        going_on = replace(group, leaving_since_seconds=None) if needed else life.leaving(group, now)
        if needed or life.may_finish(going_on, attempt_counts.get(replica_id, 0), now):
            groups[replica_id] = going_on if is_blind else life.advance(going_on, views, now)
            continue
        withdrawn = life.withdrawn(group, "something else is asked for now", now)
        # Remembered until it is gone, in case somebody asks again.
        if replica_id in wanted or life.waiting_for(withdrawn, views, pool.absent_since, now):
            groups[replica_id] = withdrawn
    return groups


def refusing(model_id: ModelId, refusals: Mapping[tuple[NodeId, ModelId], str]) -> dict[NodeId, str]:
    """The nodes that are to be in no group of the model, with why."""
    return {node_id: f"it refused the model: {reason}" for (node_id, refused_id), reason in refusals.items() if refused_id == model_id}


def wanted_pairs(
    unmet: Sequence[GroupNeed],
    views: Mapping[NodeId, NodeView],
    rooms: Mapping[NodeId, NodeRoom],
    refusals: Collection[tuple[NodeId, ModelId]] = (),
) -> tuple[tuple[NodeId, NodeId], ...]:
    """The pairs to measure for these needs, the dialling node first; none twice, and no node in more than `PEERS_PER_NODE_MAX`."""
    pairs: set[tuple[NodeId, NodeId]] = set()
    counts: Counter[NodeId] = Counter()
    for need in unmet:
        # The largest first: they are the likeliest to be chosen.
        able = [view for view in possible_members(need, views, rooms) if (view.node_id, need.model.model_id) not in refusals]
        able.sort(key=lambda view: (-rooms[view.node_id].memory_bytes, view.node_id))
        for pair in (pair for views in by_site(able).values() for pair in combinations(views, 2)):
            first, second = sorted(view.node_id for view in pair)
            if (first, second) in pairs or max(counts[first], counts[second]) >= PEERS_PER_NODE_MAX or trust_refusal(*pair):
                continue
            pairs.add((first, second))
            counts.update((first, second))
    return tuple(sorted(pairs))


@dataclass(frozen=True, slots=True)
class _Pool:
    """The nodes, since when those are away that are, and for which groups some are kept."""

    views: Mapping[NodeId, NodeView]
    absent_since: Mapping[NodeId, float]
    promised: Mapping[NodeId, ReplicaId]
    now: float

    def left(
        self, rooms: Mapping[NodeId, NodeRoom], groups: Mapping[ReplicaId, ShardGroup], asking: Collection[ReplicaId]
    ) -> dict[NodeId, NodeRoom]:
        """What nodes have that are in no group, nor still stop a stage of one; but what is kept for those that ask, or they stop."""
        taken = {
            stage.node_id
            for replica_id, group in groups.items()
            if group.phase is not GroupPhase.BROKEN or replica_id not in asking
            for stage in group.stages
            if life.is_held(group, stage.node_id, self.views, self.absent_since, self.now)
        }
        taken |= {node_id for node_id, replica_id in self.promised.items() if replica_id not in asking}
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
            card_facts=stage.card_facts,
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
