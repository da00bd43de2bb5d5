"""What each node has to do with the groups of one model, in one line.

Decides which of several groups is spoken of: one that the node is in, before one that it was looked at for. It must not change anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from potluck_coordinator.domain.grouping.life import counted_bytes
from potluck_coordinator.domain.grouping.membership import node_refusal, trust_refusal
from potluck_coordinator.domain.grouping.shares import stage_weight
from potluck_coordinator.domain.grouping.words import GroupPhase

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from potluck_coordinator.domain.grouping.words import Formation, ShardGroup, Stage
    from potluck_coordinator.domain.node_view import NodeView
    from potluck_protocol.values import NodeId, ReplicaId


@dataclass(frozen=True, slots=True)
class GroupPart:
    """One node's part."""

    phase: GroupPhase | None
    """Of the group that the node is in; None: it is in none."""
    reason: str


def group_parts(
    replica_ids: Iterable[ReplicaId],
    groups: Mapping[ReplicaId, ShardGroup],
    formations: Mapping[ReplicaId, Formation],
    views: Mapping[NodeId, NodeView],
) -> dict[NodeId, GroupPart]:
    """Of every node of the pool, where one of these groups exists or was looked for."""
    ids = sorted(replica_ids, reverse=True)
    parts: dict[NodeId, GroupPart] = {}
    for group in (groups[replica_id] for replica_id in ids if replica_id in groups):
        if group.phase is not GroupPhase.BROKEN:
            parts |= {node_id: GroupPart(None, _outsider_words(group, view, views)) for node_id, view in views.items()}
    for formation in (formations[replica_id] for replica_id in ids if replica_id in formations):
        parts |= {node_id: GroupPart(None, reason) for node_id, reason in formation.rejections.items()}
    for group in (groups[replica_id] for replica_id in ids if replica_id in groups):
        for rank, stage in enumerate(group.stages):
            words = _stage_words(group, rank, formations.get(group.replica_id)) + _pay_words(group, stage, views)
            parts[stage.node_id] = GroupPart(group.phase, words)
    return parts


def _outsider_words(group: ShardGroup, view: NodeView, views: Mapping[NodeId, NodeView]) -> str:
    """Of a node that is not in a group that stands."""
    if refusal := node_refusal(view, group.need.engine_kind):
        return refusal
    members = [views[stage.node_id] for stage in group.stages if stage.node_id in views]
    apart = (trust_refusal(view, member) for member in members if not node_refusal(member, group.need.engine_kind))
    return next((refusal for refusal in apart if refusal), "it is not needed: a group of others stands")


def _pay_words(group: ShardGroup, stage: Stage, views: Mapping[NodeId, NodeView]) -> str:
    if group.phase is not GroupPhase.READY:
        return ""
    counted = counted_bytes(group, views).get(stage.node_id)
    source = "as planned" if counted is None else f"planned {stage.weight_bytes:,}, its engine counted {counted:,}"
    return f"; it is paid by {stage_weight(stage.weight_bytes, counted):,} bytes of weights ({source})"


def _stage_words(group: ShardGroup, rank: int, formation: Formation | None) -> str:
    if group.phase is GroupPhase.BROKEN:
        waiting = f"; {formation.reason}" if formation is not None and formation.reason else ""
        return f"its group broke: {group.reason}{waiting}"
    stage, count = group.stages[rank], len(group.stages)
    place = f"stage {rank + 1} of {count}, {stage.layer_count} of {group.need.layer_count} layers"
    leader = "which it leads" if rank == 0 else f"which node {group.stages[0].node_id} leads"
    doing = "serves" if group.phase is GroupPhase.READY else "starts"
    if group.leaving_since_seconds is not None:
        return f"is on its way out as {place}, in a group {leader}: it is not needed any more, and finishes what it is answering"
    anew = f"; formed anew after: {group.reason}" if group.phase is GroupPhase.FORMING and group.reason else ""
    return f"{doing} {place}, in a group {leader}{anew}"
