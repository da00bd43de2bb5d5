"""Room for a group that no single node can take the place of.

Decides by the wish's turn: when it comes, the room of the nodes that would form the group is kept for it, and idle replicas leave them
by the same rules as for whole replicas. Nobody leaves for nodes that are not known to form one, nor while its engines failed and it pauses.
Of several ways to form it that with the least to give up is not looked for: first without anybody's room, then with all that may be taken.
It must not form the group, for what leaves has to be gone first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from potluck_coordinator.domain.grouping.forming import form
from potluck_coordinator.domain.grouping.life import pause_words
from potluck_coordinator.domain.grouping.plan import refusing
from potluck_coordinator.domain.grouping.returned import doubts
from potluck_coordinator.domain.planning.displacing import yielding
from potluck_coordinator.domain.planning.group_needs import node_rooms_of, refusals, unmet_needs
from potluck_coordinator.domain.planning.settling import stop
from potluck_coordinator.domain.planning.words import HERE_TO_STAY

if TYPE_CHECKING:
    from collections.abc import Sequence

    from potluck_coordinator.domain.catalogue import Deployment
    from potluck_coordinator.domain.grouping.words import GroupNeed, NodeRoom, Stage
    from potluck_coordinator.domain.planning.state import Draft
    from potluck_coordinator.domain.planning.words import PlannedReplica
    from potluck_protocol.values import ModelId, NodeId


def make_room_for_group(draft: Draft, deployment: Deployment) -> set[ModelId] | None:
    """Keeps room for the next of the wish's groups: the models that lost replicas to it; None where no group could be."""
    promised = set(draft.promised.values())
    for need in unmet_needs(draft, deployment):
        earlier = draft.view.groups.get(need.replica_id)
        if need.replica_id in promised or (earlier is not None and pause_words(earlier, draft.view.now_seconds)):
            continue
        stages, victims = _found(draft, deployment, need)
        if not stages:
            return None
        for victim in victims:
            stop(draft, victim)
        draft.promise(need.replica_id, stages)
        return {victim.model_id for victim in victims}
    return None


def _found(draft: Draft, deployment: Deployment, need: GroupNeed) -> tuple[tuple[Stage, ...], list[PlannedReplica]]:
    """The stages that could be, and who has to leave for them; none where there are none."""
    view = draft.view
    unsure = doubts(view.groups.values(), view.nodes, view.absent_since, view.now_seconds) | refusing(deployment.model_id, refusals(draft))
    rooms = _rooms(draft, ())
    if stages := form(need, view.nodes, rooms, unsure).stages:
        return stages, []
    if not (idle := yielding(draft, deployment, rooms)):
        return (), []
    rooms = _rooms(draft, idle)
    stages = form(need, view.nodes, rooms, unsure).stages
    if not stages:
        draft.hoped_rooms |= rooms
    return stages, [replica for replica in idle if any(_is_in_the_way(replica, stage) for stage in stages)]


def _rooms(draft: Draft, gone: Sequence[PlannedReplica]) -> dict[NodeId, NodeRoom]:
    """What nodes that are in no group have for one once those on their way out have left, and these too."""
    besides = {replica.replica_id for replica in gone}
    offering = [node_id for node_id in draft.serving_nodes() if draft.view.nodes[node_id].inventory.group_offer is not None]
    free = [node_id for node_id in offering if not draft.has_groups(node_id)]
    return node_rooms_of(draft, {node_id: draft.room_beside_groups(node_id, HERE_TO_STAY, besides) for node_id in free})


def _is_in_the_way(replica: PlannedReplica, stage: Stage) -> bool:
    cards = set(replica.sizing.shape.card_uuids)
    return replica.node_id == stage.node_id and (bool(cards & set(stage.card_uuids)) if stage.card_uuids else not cards)
