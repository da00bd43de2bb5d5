"""Taking room from idle replicas for a wish that found none.

Decides who may take from whom, so that no two wishes take turns: the default tier from flex; a model that requests wait for from any that
nobody asks for, one replica at a time; else only who is met less, and stays met no better than the other. Those unused longest leave first.
What each node could give is remembered from one replica to the next, for that changes on a node or two only. It must not touch a replica
that somebody used lately, unless its own node will not run it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from potluck_coordinator.domain.grouping.words import GroupPhase
from potluck_coordinator.domain.planning.placing import put, site_on
from potluck_coordinator.domain.planning.settling import stop
from potluck_coordinator.domain.planning.state import draw, tier_rank
from potluck_coordinator.domain.planning.words import HERE_TO_STAY

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from potluck_coordinator.domain.catalogue import Deployment
    from potluck_coordinator.domain.planning.node_kinds import Room
    from potluck_coordinator.domain.planning.placing import Site
    from potluck_coordinator.domain.planning.state import Draft
    from potluck_coordinator.domain.planning.words import PlannedReplica
    from potluck_protocol.values import ModelId, NodeId


class Judge:
    """What a wish may take by its own and the others' shares; it remembers what it was asked."""

    def __init__(self, draft: Draft, deployment: Deployment) -> None:
        self._draft = draft
        self._deployment = deployment
        self._presses = _presses(draft, deployment)
        self._answers: dict[tuple[ModelId, int], tuple[bool, bool]] = {}

    def is_fair(self, victims: Sequence[PlannedReplica]) -> bool:
        """Whether all the models that lose replicas are still met better than this one is now, or weigh less."""
        return all(self._answer(model_id, count)[0] for model_id, count in self._losses(victims).items())

    def regret(self, victims: Sequence[PlannedReplica]) -> _Regret:
        """What is lost: a model's last replica, then what was used lately."""
        loses_last = any(self._answer(model_id, count)[1] for model_id, count in self._losses(victims).items())
        return loses_last, max(_last_use(self._draft, victim) for victim in victims), len(victims)

    def may_lose_one(self, model_id: ModelId) -> bool:
        """Whether a model may lose a replica, or a group, to the wish."""
        return self._answer(model_id, 1)[0]

    def is_last(self, model_id: ModelId) -> bool:
        """Whether the model has but one."""
        return self._answer(model_id, 1)[1]

    def would_say_the_same(self) -> bool:
        """Whether every answer that it gave still holds."""
        return self._presses == _presses(self._draft, self._deployment) and all(
            answer == self._judged(*asked) for asked, answer in self._answers.items()
        )

    def _losses(self, victims: Sequence[PlannedReplica]) -> Counter[ModelId]:
        return Counter(victim.model_id for victim in victims if self._draft.counts(victim))

    def _answer(self, model_id: ModelId, count: int) -> tuple[bool, bool]:
        if (model_id, count) not in self._answers:
            self._answers[model_id, count] = self._judged(model_id, count)
        return self._answers[model_id, count]

    def _judged(self, model_id: ModelId, count: int) -> tuple[bool, bool]:
        """Whether a model may lose so many replicas, and whether these are its last."""
        draft, owner = self._draft, self._draft.deployments[model_id]
        weighs_less = tier_rank(owner) > tier_rank(self._deployment) or self._presses
        is_fair = weighs_less or draft.share(owner, less=count) > draft.share(self._deployment)
        return is_fair, draft.have_count(model_id) == count


_Regret = tuple[bool, float, int]


@dataclass(frozen=True, slots=True)
class _Option:
    """What a wish could take on a node."""

    order: tuple[_Regret, tuple[bool, int, bool, bool, float, bytes]]
    """The least first."""
    victims: tuple[PlannedReplica, ...]
    site: Site


@dataclass(slots=True)
class _Looked:
    """What a wish found where."""

    judge: Judge
    options: dict[NodeId, tuple[Room, _Option | None]] = field(default_factory=dict)
    """With the node's room at that time: it is another object as soon as the node's replicas change."""


class Displacing:
    """One plan's; it remembers what was found, as far as it still holds."""

    def __init__(self, draft: Draft) -> None:
        self._draft = draft
        self._looked: dict[ModelId, _Looked] = {}

    def displace(self, deployment: Deployment) -> set[ModelId]:
        """Adds one replica in the place of idle ones; the models that lost some, none where it found nothing to take."""
        draft = self._draft
        looked = self._looked.get(deployment.model_id)
        if looked is None or not looked.judge.would_say_the_same():
            looked = self._looked[deployment.model_id] = _Looked(Judge(draft, deployment))
        found = (self._option(deployment, node_id, looked) for node_id in _yielding_nodes(draft, deployment, looked.judge))
        best = min((option for option in found if option is not None), key=lambda option: option.order, default=None)
        if best is None:
            return set()
        for victim in best.victims:
            stop(draft, victim)
        node_id = best.site.node_id
        # The victims may never have run, and be gone already.
        put(draft, deployment.model_id, site_on(draft, deployment.model_id, node_id, draft.room(node_id, soon=True)) or best.site)
        return {victim.model_id for victim in best.victims}

    def _option(self, deployment: Deployment, node_id: NodeId, looked: _Looked) -> _Option | None:
        room = self._draft.room(node_id, soon=True)
        known = looked.options.get(node_id)
        if known is not None and known[0] is room:
            return known[1]
        option = None if self._draft.obstacle(deployment.model_id, node_id) else _taking(self._draft, deployment, node_id, looked.judge)
        # Whether one counts that replaces another is told by that one's node.
        if all(replica.replaces is None for replica in self._draft.on_node(node_id)):
            looked.options[node_id] = (room, option)
        return option


def yielding(draft: Draft, deployment: Deployment, node_ids: Iterable[NodeId]) -> list[PlannedReplica]:
    """The idle replicas of these nodes that may all leave for the wish at once, those unused longest first."""
    judge = Judge(draft, deployment)
    candidates = [replica for node_id in node_ids for replica in draft.on_node(node_id) if _may_take(draft, deployment, replica)]
    candidates.sort(key=lambda replica: (_last_use(draft, replica), draw(replica.model_id, replica.node_id), replica.replica_id))
    chosen: dict[ModelId, list[PlannedReplica]] = {}
    for replica in candidates:
        before = chosen.setdefault(replica.model_id, [])
        if judge.is_fair([*before, replica]):
            before.append(replica)
    return [replica for replicas in chosen.values() for replica in replicas]


def _presses(draft: Draft, deployment: Deployment) -> bool:
    """Whether requests wait for it and none of its replicas is on its way to them: else one client could take all that is idle at once."""
    if not draft.is_waited_for(deployment) or draft.promised_count(deployment.model_id):
        return False
    if any(draft.view.groups[replica_id].phase is GroupPhase.FORMING for replica_id in draft.groups_of(deployment.model_id)):
        return False
    return all(draft.is_ready(replica) or draft.is_absent(replica.node_id) for replica in draft.counting(deployment.model_id))


def _yielding_nodes(draft: Draft, deployment: Deployment, judge: Judge) -> list[NodeId]:
    """The serving nodes with a replica that may be taken by itself: without one, no more of them may be taken together."""
    yielding: set[NodeId] = set()
    for model_id, owner in draft.deployments.items():
        counting = draft.counting(model_id)
        is_fair = bool(counting) and judge.is_fair(counting[:1])
        if is_fair and tier_rank(owner) >= tier_rank(deployment):
            yielding.update(replica.node_id for replica in counting)
        if len(counting) < len(draft.of_model(model_id)):
            yielding.update(replica.node_id for replica in draft.of_model(model_id) if not draft.counts(replica))
    return sorted(node_id for node_id in yielding if not draft.is_absent(node_id))


def _taking(draft: Draft, deployment: Deployment, node_id: NodeId, judge: Judge) -> _Option | None:
    """The fewest idle replicas of a node, those unused longest first, that make enough room."""
    candidates = [replica for replica in draft.on_node(node_id) if _may_take(draft, deployment, replica)]
    candidates.sort(key=lambda replica: (_last_use(draft, replica), draw(replica.model_id, node_id), replica.replica_id))
    room = draft.room(node_id, soon=True)
    chosen: list[PlannedReplica] = []
    for replica in candidates:
        if not judge.is_fair([*chosen, replica]):
            continue
        chosen.append(replica)
        room = room.with_room_of(replica.sizing)
        if (site := site_on(draft, deployment.model_id, node_id, room)) is None:
            continue
        for spared in chosen[:-1]:
            tighter = room.without(spared.sizing)
            if (without := site_on(draft, deployment.model_id, node_id, tighter)) is not None:
                chosen, room, site = [one for one in chosen if one is not spared], tighter, without
        if deployment.replica_count is None and site.replica_count:
            return None
        return _Option((judge.regret(chosen), site.rank(deployment.model_id, 0.0)), tuple(chosen), site)
    return None


def _may_take(draft: Draft, deployment: Deployment, replica: PlannedReplica) -> bool:
    if replica.phase not in HERE_TO_STAY or replica.model_id == deployment.model_id:
        return False
    if draft.trouble(replica):
        return True
    owner = draft.deployments[replica.model_id]
    return draft.idle_since(replica) is not None and tier_rank(owner) >= tier_rank(deployment)


def _last_use(draft: Draft, replica: PlannedReplica) -> float:
    """Of one in trouble: never."""
    idle_since = draft.idle_since(replica)
    return 0.0 if draft.trouble(replica) or idle_since is None else idle_since
