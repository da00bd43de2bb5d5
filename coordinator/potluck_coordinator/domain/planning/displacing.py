"""Taking room from idle replicas for a wish that found none.

Decides who may take from whom, so that no two wishes take turns: the default tier from flex; a model that requests wait for from any that
nobody asks for, one replica at a time; else only who is met less, and stays met no better than the other. Those unused longest leave first.
It must not touch a replica that somebody used lately, unless its own node will not run it.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from potluck_coordinator.domain.grouping.words import GroupPhase
from potluck_coordinator.domain.planning.placing import put, site_on
from potluck_coordinator.domain.planning.settling import stop
from potluck_coordinator.domain.planning.state import draw, tier_rank
from potluck_coordinator.domain.planning.words import HERE_TO_STAY

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from potluck_coordinator.domain.catalogue import Deployment
    from potluck_coordinator.domain.planning.placing import Site
    from potluck_coordinator.domain.planning.state import Draft
    from potluck_coordinator.domain.planning.words import PlannedReplica
    from potluck_protocol.values import ModelId, NodeId


def displace(draft: Draft, deployment: Deployment) -> set[ModelId]:
    """Adds one replica in the place of idle ones; the models that lost some, none where it found nothing to take."""
    presses = _presses(draft, deployment)
    options = [
        (_regret(draft, victims), site.rank(deployment.model_id, 0.0), victims, site)
        for node_id in _yielding_nodes(draft, deployment, presses=presses)
        if not draft.obstacle(deployment.model_id, node_id)
        for victims, site in _taking(draft, deployment, node_id, presses=presses)
    ]
    if not options:
        return set()
    _, _, victims, site = min(options, key=lambda option: option[:2])
    for victim in victims:
        stop(draft, victim)
    # The victims may never have run, and be gone already.
    put(draft, deployment.model_id, site_on(draft, deployment.model_id, site.node_id, draft.room(site.node_id, soon=True)) or site)
    return {victim.model_id for victim in victims}


def yielding(draft: Draft, deployment: Deployment, node_ids: Iterable[NodeId]) -> list[PlannedReplica]:
    """The idle replicas of these nodes that may all leave for the wish at once, those unused longest first."""
    presses = _presses(draft, deployment)
    candidates = [replica for node_id in node_ids for replica in draft.on_node(node_id) if _may_take(draft, deployment, replica)]
    candidates.sort(key=lambda replica: (_last_use(draft, replica), draw(replica.model_id, replica.node_id), replica.replica_id))
    chosen: dict[ModelId, list[PlannedReplica]] = {}
    for replica in candidates:
        before = chosen.setdefault(replica.model_id, [])
        if _is_fair(draft, deployment, [*before, replica], presses=presses):
            before.append(replica)
    return [replica for replicas in chosen.values() for replica in replicas]


def _presses(draft: Draft, deployment: Deployment) -> bool:
    """Whether requests wait for it and none of its replicas is on its way to them: else one client could take all that is idle at once."""
    if not draft.is_waited_for(deployment) or draft.promised_count(deployment.model_id):
        return False
    if any(draft.view.groups[replica_id].phase is GroupPhase.FORMING for replica_id in draft.groups_of(deployment.model_id)):
        return False
    return all(draft.is_ready(replica) or draft.is_absent(replica.node_id) for replica in draft.counting(deployment.model_id))


def _yielding_nodes(draft: Draft, deployment: Deployment, *, presses: bool) -> list[NodeId]:
    """The serving nodes with a replica that may be taken by itself: without one, no more of them may be taken together."""
    yielding: set[NodeId] = set()
    for model_id, owner in draft.deployments.items():
        counting = draft.counting(model_id)
        is_fair = bool(counting) and _is_fair(draft, deployment, counting[:1], presses=presses)
        if is_fair and tier_rank(owner) >= tier_rank(deployment):
            yielding.update(replica.node_id for replica in counting)
        if len(counting) < len(draft.of_model(model_id)):
            yielding.update(replica.node_id for replica in draft.of_model(model_id) if not draft.counts(replica))
    return sorted(node_id for node_id in yielding if not draft.is_absent(node_id))


def _taking(draft: Draft, deployment: Deployment, node_id: NodeId, *, presses: bool) -> list[tuple[tuple[PlannedReplica, ...], Site]]:
    """The fewest idle replicas of a node, those unused longest first, that make enough room; at most one answer."""
    candidates = [replica for replica in draft.on_node(node_id) if _may_take(draft, deployment, replica)]
    candidates.sort(key=lambda replica: (_last_use(draft, replica), draw(replica.model_id, node_id), replica.replica_id))
    room = draft.room(node_id, soon=True)
    chosen: list[PlannedReplica] = []
    for replica in candidates:
        if not _is_fair(draft, deployment, [*chosen, replica], presses=presses):
            continue
        chosen.append(replica)
        room = room.with_room_of(replica.sizing)
        if (site := site_on(draft, deployment.model_id, node_id, room)) is None:
            continue
        for spared in chosen[:-1]:
            tighter = room.without(spared.sizing)
            if (without := site_on(draft, deployment.model_id, node_id, tighter)) is not None:
                chosen, room, site = [one for one in chosen if one is not spared], tighter, without
        everywhere = deployment.replica_count is None
        return [] if everywhere and site.replica_count else [(tuple(chosen), site)]
    return []


def _may_take(draft: Draft, deployment: Deployment, replica: PlannedReplica) -> bool:
    if replica.phase not in HERE_TO_STAY or replica.model_id == deployment.model_id:
        return False
    if draft.trouble(replica):
        return True
    owner = draft.deployments[replica.model_id]
    return draft.idle_since(replica) is not None and tier_rank(owner) >= tier_rank(deployment)


def _is_fair(draft: Draft, deployment: Deployment, victims: Sequence[PlannedReplica], *, presses: bool) -> bool:
    """Whether all the models that lose replicas are still met better than this one is now, or weigh less."""
    losses = Counter(victim.model_id for victim in victims if draft.counts(victim))
    for model_id, count in losses.items():
        owner = draft.deployments[model_id]
        if tier_rank(owner) > tier_rank(deployment) or presses:
            continue
        if draft.share(owner, less=count) <= draft.share(deployment):
            return False
    return True


def _regret(draft: Draft, victims: Sequence[PlannedReplica]) -> tuple[bool, float, int]:
    """What is lost: a model's last replica, then what was used lately."""
    losses = Counter(victim.model_id for victim in victims if draft.counts(victim))
    loses_last = any(draft.have_count(model_id) == count for model_id, count in losses.items())
    return loses_last, max(_last_use(draft, victim) for victim in victims), len(victims)


def _last_use(draft: Draft, replica: PlannedReplica) -> float:
    """Of one in trouble: never."""
    idle_since = draft.idle_since(replica)
    return 0.0 if draft.trouble(replica) or idle_since is None else idle_since
