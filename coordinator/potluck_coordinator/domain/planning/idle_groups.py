"""Giving up an idle shard group for a wish that found no other room.

Decides which one, by the rules by which idle replicas make room (`displacing`): of a model that weighs less, or that nobody asks for while
requests wait for the wish; of several the one that is on its way out already, then the one unused longest. Only where one of its nodes
would hold a replica of the wish once the group is gone, and one group at a time: what its engines hold is free some seconds later, and the
next plans place the replica there. A request for the group's model that comes before keeps the group. Wishes for groups take none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from potluck_coordinator.domain.grouping.words import GroupPhase
from potluck_coordinator.domain.planning.displacing import Judge
from potluck_coordinator.domain.planning.node_kinds import Room
from potluck_coordinator.domain.planning.placing import site_on
from potluck_coordinator.domain.planning.state import model_of_group, tier_rank
from potluck_coordinator.domain.planning.words import IDLE_SECONDS

if TYPE_CHECKING:
    from potluck_coordinator.domain.catalogue import Deployment
    from potluck_coordinator.domain.grouping.words import ShardGroup, Stage
    from potluck_coordinator.domain.planning.state import Draft


def give_up_idle_group(draft: Draft, deployment: Deployment) -> None:
    """At most one in a plan for each wish."""
    if deployment.replica_count is None or deployment.model_id in draft.given_up.values():
        return
    judge = Judge(draft, deployment)
    options = [
        (group.leaving_since_seconds is None, judge.is_last(model_of_group(group.replica_id)), idle_since, group.replica_id)
        for group in draft.view.groups.values()
        if (idle_since := _idle_since(draft, group)) is not None and _may_yield(draft, deployment, group, judge)
    ]
    if options:
        draft.give_up(min(options)[-1], deployment.model_id)


def _idle_since(draft: Draft, group: ShardGroup) -> float | None:
    """As `Draft.idle_since` says of a replica."""
    view = draft.view
    if view.attempt_counts.get(group.replica_id, 0) or view.waiting_counts.get(model_of_group(group.replica_id), 0):
        return None
    last = max(group.since_seconds, view.used_at.get(group.replica_id, group.since_seconds))
    return last if view.now_seconds - last >= IDLE_SECONDS else None


def _may_yield(draft: Draft, deployment: Deployment, group: ShardGroup, judge: Judge) -> bool:
    model_id = model_of_group(group.replica_id)
    owner = draft.deployments.get(model_id)
    if owner is None or model_id == deployment.model_id or group.phase is not GroupPhase.READY:
        return False
    if tier_rank(owner) < tier_rank(deployment) or group.replica_id not in draft.standing_groups(model_id):
        return False
    return judge.may_lose_one(model_id) and any(_would_hold(draft, deployment, stage) for stage in group.stages)


def _would_hold(draft: Draft, deployment: Deployment, stage: Stage) -> bool:
    """Whether the stage's node takes a replica of the wish, once the stage is gone."""
    if stage.node_id not in draft.view.nodes or draft.is_absent(stage.node_id) or draft.obstacle(deployment.model_id, stage.node_id):
        return False
    room = draft.room(stage.node_id, soon=True)
    freed = Room(room.card_uuids | set(stage.card_uuids), room.memory_bytes + (0 if stage.card_uuids else stage.memory_bytes))
    return site_on(draft, deployment.model_id, stage.node_id, freed) is not None
