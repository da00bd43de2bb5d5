"""Groups that give their nodes back because one node does.

Decides when a model that a group serves, or is to serve, goes to a single node that has come, or become free, since the group was formed:
where the whole model fits there without anybody's leaving, for as many answers at a time as the group is planned for, and an answer's
tokens would take no more than `GAIN_MIN` times as long. In the place of a group that does not answer, fewer at a time will do. The node
starts beside the group, and only when it answers the group is given up, which then finishes its answers. So no client loses anything, and
a node that fails to start costs nothing but its own time. Of several groups that go which are the least loss. It must not know how a group
ends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from potluck_coordinator.domain.grouping.words import GroupPhase
from potluck_coordinator.domain.planning.group_needs import bytes_per_second_of_one
from potluck_coordinator.domain.planning.placing import best_site, put, sites
from potluck_coordinator.domain.planning.words import GAIN_MIN

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from potluck_coordinator.domain.catalogue import Deployment
    from potluck_coordinator.domain.grouping.words import ShardGroup
    from potluck_coordinator.domain.planning.placing import Site
    from potluck_coordinator.domain.planning.state import Draft
    from potluck_coordinator.domain.planning.words import PlannedReplica
    from potluck_protocol.values import NodeId, ReplicaId


def bring_one_node(draft: Draft, deployment: Deployment) -> None:
    """Begins at most one such change: of a satisfied wish, with all that is there at rest."""
    model_id = deployment.model_id
    at_rest = all(draft.is_ready(replica) and draft.counts(replica) for replica in draft.of_model(model_id))
    if deployment.replica_count is None or not at_rest or draft.is_short(deployment):
        return
    groups = [draft.view.groups[replica_id] for replica_id in draft.standing_groups(model_id)]
    # One that lost a node for good breaks with the next step.
    whole = [group for group in groups if all(stage.node_id in draft.view.nodes for stage in group.stages)]
    # First what does not answer yet, then what answers slowly.
    for group in sorted(whole, key=lambda one: (one.phase is GroupPhase.READY, -group_seconds(draft, one), one.replica_id)):
        for slot_count in slot_counts_asked(group):
            room = sites(draft, deployment, slot_count_least=slot_count)
            # Who has to wait for others, or to drop their files, may be long in coming.
            best = best_site(model_id, (site for site in room if site.is_flawless and is_fast_enough(draft, group, site)))
            if best is not None:
                put(draft, model_id, best, replaces=group.replica_id)
                return


def slot_counts_asked(group: ShardGroup) -> tuple[int, ...]:
    """How many slots a node is to have that starts in the group's place; what is asked for first comes first."""
    # Fewer than wished would be a loss to a satisfied deployment, however idle it is now: the next rush finds the group gone.
    return (group.need.slot_count,) if group.phase is GroupPhase.READY else (group.need.slot_count, 1)


def outdoes_a_group(draft: Draft, replica: PlannedReplica) -> bool:
    """Whether one that answers now may take the place of a group of its model: of one that does not answer, or has no more slots."""
    groups = [draft.view.groups[replica_id] for replica_id in draft.standing_groups(replica.model_id)]
    lost = _lost_groups(draft, groups)
    return any(
        group.phase is not GroupPhase.READY or group.replica_id in lost or group.need.slot_count <= replica.sizing.slot_count
        for group in groups
    )


def give_up_groups(draft: Draft, deployment: Deployment, outdone: Collection[ReplicaId]) -> None:
    """Of too many replicas groups go first, as far as others are there in their place, and answer in the place of one that answers.

    Args:
        draft: where they are given up.
        deployment: a wish for so many replicas.
        outdone: the groups in whose place a node came to answer.
    """
    model_id, wanted_count = deployment.model_id, deployment.replica_count
    if wanted_count is None or draft.have_count(model_id) <= wanted_count:
        return
    groups = [draft.view.groups[replica_id] for replica_id in draft.standing_groups(model_id)]
    lost = _lost_groups(draft, groups)
    answering = {group.replica_id for group in groups if group.phase is GroupPhase.READY} - lost
    whole_count = sum(1 for replica in draft.counting(model_id) if draft.is_ready(replica))

    def dispensability(group: ShardGroup) -> tuple[bool, bool, bool, bool, float, ReplicaId]:
        """What is lost goes first, then what does not answer yet, what is on its way out, what a node came for, and what is slowest."""
        one = group.replica_id
        seconds = 0.0 if one in lost else group_seconds(draft, group)
        return one not in lost, one in answering, group.leaving_since_seconds is None, one not in outdone, -seconds, one

    # Those that answer come last: when their turn comes, all that is left answers.
    excess_count = max(0, whole_count + len(groups) - wanted_count)
    for group in sorted(groups, key=dispensability)[:excess_count]:
        draft.give_up(group.replica_id, model_id)


def _lost_groups(draft: Draft, groups: Sequence[ShardGroup]) -> set[ReplicaId]:
    """Those with a member that is away, which break with the next step; where everybody is, the coordinator was, and nobody is judged."""
    here = set(draft.serving_nodes()) or set(draft.view.nodes)
    return {group.replica_id for group in groups if not here.issuperset(stage.node_id for stage in group.stages)}


def is_fast_enough(draft: Draft, group: ShardGroup, site: Site) -> bool:
    """Whether the node alone reads the weights for a token nearly as fast as the group's nodes, one after the other, do."""
    weight_bytes = sum(stage.weight_bytes for stage in group.stages)
    shape = draft.kind(site.node_id).own(site.sizing).shape
    alone_seconds = weight_bytes / _bytes_per_second(draft, site.node_id, shape.card_uuids, shape.tensor_parallel_size)
    return alone_seconds <= GAIN_MIN * group_seconds(draft, group)


def group_seconds(draft: Draft, group: ShardGroup) -> float:
    """For the weights of one token; the way between the nodes is left out, which is to the group's favour."""
    return sum(
        stage.weight_bytes / _bytes_per_second(draft, stage.node_id, stage.card_uuids, len(stage.card_uuids)) for stage in group.stages
    )


def _bytes_per_second(draft: Draft, node_id: NodeId, card_uuids: Sequence[str], parallel_count: int) -> float:
    """Of these cards of a node, of which so many read at a time and wait for the slowest."""
    return bytes_per_second_of_one(draft, node_id, card_uuids) * max(1, parallel_count)
