"""When a group is ready, when it is broken, and when it may be formed anew.

Decides from what its members' nodes report: one member lost, in whatever way, is the whole group lost, at once. A broken group is nobody's
wish any more, so that its other members stop and are free; the next generation begins when none of the old one can be left, for members of
different generations must never meet. It must not know who will be in the next one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, Final

from potluck_coordinator.domain.grouping.membership import node_refusal, trust_refusal
from potluck_coordinator.domain.grouping.words import Blame, GroupPhase, ShardGroup
from potluck_protocol.values import EngineState, FailureKind

if TYPE_CHECKING:
    from collections.abc import Mapping

    from potluck_coordinator.domain.grouping.words import GroupNeed, Stage
    from potluck_coordinator.domain.node_view import NodeView
    from potluck_protocol.values import EngineStatus, NodeId

ADOPTED_SECONDS_MAX: Final = 20.0
"""How long a member may take to come back to a directory that has just started and has not seen it yet."""
RELEASE_SECONDS: Final = 30.0
"""After so long without a link an agent has ended its stage by itself: its lease is over, and group engines end with it. A member's is
15 s, but one that was idle until it became a member may hold one of 24.1 s until its next heartbeat (`domain.beat_period`)."""
BLAME_SECONDS: Final = 5.0
"""How long after a break its cause may still show: a lost link is known a second later than the engine that misses its peer."""
LEAVING_SECONDS_MIN: Final = 2.0
"""How long a group that is not needed any more may still be asked: gateways hear of it in a moment, and tell of new answers each second."""
LEAVING_SECONDS_MAX: Final = 120.0
"""How long it may finish what it is answering; whole replicas have as long."""
STEADY_SECONDS: Final = 60.0
"""A group that was ready so long was sound: what broke it then says nothing about the next one."""
PAUSE_FIRST_SECONDS: Final = 10.0
PAUSE_LAST_SECONDS: Final = 600.0
FAILURE_CHARACTERS_MAX: Final = 200

_BLAMES: Final = {
    FailureKind.GROUP_BROKEN: Blame.PEER_MISSED,
    # What no other stage's end does to an engine.
    FailureKind.KILLED: Blame.ENGINE_KILLED,
    FailureKind.OUT_OF_MEMORY: Blame.ENGINE_KILLED,
    FailureKind.HUNG: Blame.ENGINE_KILLED,
}
_LIFELESS: Final = frozenset({EngineState.BACKING_OFF, EngineState.REFUSED})
"""Nothing of the engine runs."""
_ENGINE_BLAMES: Final = frozenset({Blame.PEER_MISSED, Blame.ENGINE_FAILED, Blame.ENGINE_KILLED})


@dataclass(frozen=True, slots=True)
class _Fault:
    blame: Blame = Blame.NONE
    node_id: NodeId | None = None
    reason: str = ""


def begin(
    need: GroupNeed,
    stages: tuple[Stage, ...],
    *,
    generation: int,
    earlier: ShardGroup | None,
    views: Mapping[NodeId, NodeView],
    now: float,
) -> ShardGroup:
    """A group in its first or next generation, higher than any before."""
    return ShardGroup(
        need=need,
        generation=generation,
        stages=stages,
        phase=GroupPhase.FORMING,
        since_seconds=now,
        epochs={stage.node_id: views[stage.node_id].epoch for stage in stages},
        reason=earlier.reason if earlier is not None else "",
        lost_node_id=earlier.lost_node_id if earlier is not None else None,
        failure_count=earlier.failure_count if earlier is not None else 0,
    )


def adopted(group: ShardGroup, now: float) -> ShardGroup:
    """A group of an earlier run of the directory: its members are expected back, in new sessions."""
    leaving_since_seconds = None if group.leaving_since_seconds is None else now
    return replace(group, since_seconds=now, epochs={}, ready_node_ids=frozenset(), leaving_since_seconds=leaving_since_seconds)


def advance(group: ShardGroup, views: Mapping[NodeId, NodeView], now: float) -> ShardGroup:
    """The group after what its nodes say now."""
    fault = _gravest_fault(group, views, now)
    if group.phase is GroupPhase.BROKEN:
        late = now - group.since_seconds > BLAME_SECONDS
        return group if late or fault.blame <= group.blame else _blaming(group, fault)
    if fault.blame is not Blame.NONE:
        return _broken(group, fault, now)
    connected = {stage.node_id: view.epoch for stage in group.stages if (view := views.get(stage.node_id)) is not None and view.connected}
    standing = frozenset(stage.node_id for stage in group.stages if _stands(group, views.get(stage.node_id)))
    whole = len(standing) == len(group.stages)
    became_ready = whole and group.phase is GroupPhase.FORMING
    return replace(
        group,
        phase=GroupPhase.READY if whole else group.phase,
        since_seconds=now if became_ready else group.since_seconds,
        epochs={**connected, **group.epochs},
        ready_node_ids=group.ready_node_ids | standing,
    )


def leaving(group: ShardGroup, now: float) -> ShardGroup:
    """A group that nobody needs any more, on its way out."""
    return group if group.leaving_since_seconds is not None else replace(group, leaving_since_seconds=now)


def may_finish(group: ShardGroup, attempt_count: int, now: float) -> bool:
    """Whether a group that leaves goes on: it answers, or may be asked by a gateway that has not heard of it yet; within bounds."""
    if group.phase is not GroupPhase.READY or group.leaving_since_seconds is None:
        return False
    waited_seconds = now - group.leaving_since_seconds
    return waited_seconds < (LEAVING_SECONDS_MAX if attempt_count else LEAVING_SECONDS_MIN)


def withdrawn(group: ShardGroup, reason: str, now: float) -> ShardGroup:
    """A group that nobody wants any more, or that something better takes the place of."""
    return group if group.phase is GroupPhase.BROKEN else _broken(group, _Fault(Blame.NONE, None, reason), now)


def is_held(group: ShardGroup, node_id: NodeId, views: Mapping[NodeId, NodeView], absent_since: Mapping[NodeId, float], now: float) -> bool:
    """Whether a member of a group, a broken one too, may still have its stage: its memory is not free, and its port not another's."""
    if group.phase is not GroupPhase.BROKEN:
        return True
    view = views.get(node_id)
    if view is not None and view.connected:
        return any(status.replica_id == group.replica_id and status.state not in _LIFELESS for status in view.engines)
    return now - max(group.since_seconds, absent_since.get(node_id, group.since_seconds)) < RELEASE_SECONDS


def waiting_for(group: ShardGroup, views: Mapping[NodeId, NodeView], absent_since: Mapping[NodeId, float], now: float) -> str:
    """Why a broken group may not be formed anew yet; empty when it may."""
    for stage in group.stages:
        if is_held(group, stage.node_id, views, absent_since, now):
            view = views.get(stage.node_id)
            is_here = view is not None and view.connected
            return f"node {stage.node_id} " + ("is still stopping its stage" if is_here else "is away and may still run its stage")
    return pause_words(group, now)


def pause_words(group: ShardGroup, now: float) -> str:
    """Why a broken group is not formed anew yet though nothing of it is left; empty when it may be."""
    pause_seconds = (
        0.0 if group.failure_count < 2 else min(PAUSE_LAST_SECONDS, PAUSE_FIRST_SECONDS * 2.0 ** min(group.failure_count - 2, 16))
    )
    if group.phase is GroupPhase.BROKEN and now - group.since_seconds < pause_seconds:
        return f"its engines failed {group.failure_count} times in a row, and it is tried again after {pause_seconds:.0f} s"
    return ""


def counted_bytes(group: ShardGroup, views: Mapping[NodeId, NodeView]) -> dict[NodeId, int]:
    """The weights that the members' engines of this generation have loaded, of those that counted them."""
    statuses = {node_id: _status(group, views[node_id]) for node_id in (stage.node_id for stage in group.stages) if node_id in views}
    return {node_id: status.weight_bytes for node_id, status in statuses.items() if status is not None and status.weight_bytes is not None}


def _gravest_fault(group: ShardGroup, views: Mapping[NodeId, NodeView], now: float) -> _Fault:
    faults = [_stage_fault(group, stage, views.get(stage.node_id), now) for stage in group.stages]
    gravest = max(faults, key=lambda fault: fault.blame)
    if gravest.blame is not Blame.NONE:
        return gravest
    pairs = combinations(group.stages, 2)
    return next(
        (fault for first, second in pairs if (fault := _trust_fault(views.get(first.node_id), views.get(second.node_id)))), _Fault()
    )


def _stage_fault(group: ShardGroup, stage: Stage, view: NodeView | None, now: float) -> _Fault:
    if absence := _absence(group, stage, view, now):
        return _Fault(Blame.NODE_GONE, stage.node_id, f"member {stage.node_id} is lost: {absence}")
    status = None if view is None else _status(group, view)
    if status is not None and status.state in _LIFELESS:
        # The first line says what happened; an engine's last words follow it.
        words = (status.failure.strip().splitlines() or ["it gave no reason"])[0][:FAILURE_CHARACTERS_MAX]
        blame = Blame.ENGINE_FAILED if status.failure_kind is None else _BLAMES.get(status.failure_kind, Blame.ENGINE_FAILED)
        return _Fault(blame, stage.node_id, f"the engine of member {stage.node_id} failed: {words}")
    was_ready = stage.node_id in group.ready_node_ids and group.phase is not GroupPhase.BROKEN
    if was_ready and view is not None and view.connected and (status is None or status.state is not EngineState.READY):
        return _Fault(Blame.ENGINE_FAILED, stage.node_id, f"the engine of member {stage.node_id} is no longer there")
    return _Fault()


def _absence(group: ShardGroup, stage: Stage, view: NodeView | None, now: float) -> str:
    """Why the node can be no member any more, whatever its engine does."""
    if view is None:
        return "it is no longer in the pool"
    known_epoch = group.epochs.get(stage.node_id)
    if not view.connected and known_epoch is None and now - group.since_seconds < ADOPTED_SECONDS_MAX:
        return ""
    if refusal := node_refusal(view, group.need.engine_kind):
        return refusal
    if known_epoch is not None and view.epoch != known_epoch:
        return "its agent began anew"
    offer = view.inventory.group_offer
    if offer is None or (offer.address, offer.port) != (stage.address, stage.port):
        return "its owner gave it another group address"
    return ""


def _trust_fault(first: NodeView | None, second: NodeView | None) -> _Fault | None:
    # Who is away says nothing about trust.
    if first is None or second is None or not (first.connected and second.connected):
        return None
    refusal = trust_refusal(first, second)
    return _Fault(Blame.NODE_GONE, first.node_id, f"member {first.node_id} is lost: {refusal}") if refusal else None


def _status(group: ShardGroup, view: NodeView) -> EngineStatus | None:
    """What the node says of its stage of this generation."""
    for status in view.engines:
        if (status.replica_id, status.group_generation) == (group.replica_id, group.generation):
            return status
    return None


def _stands(group: ShardGroup, view: NodeView | None) -> bool:
    status = None if view is None or not view.connected else _status(group, view)
    return status is not None and status.state is EngineState.READY


def _broken(group: ShardGroup, fault: _Fault, now: float) -> ShardGroup:
    was_steady = group.phase is GroupPhase.READY and now - group.since_seconds >= STEADY_SECONDS
    failure_count = 0 if was_steady else group.failure_count
    group = replace(
        group,
        phase=GroupPhase.BROKEN,
        since_seconds=now,
        ready_node_ids=frozenset(),
        failure_count=failure_count,
        leaving_since_seconds=None,
    )
    return _blaming(group, fault)


def _blaming(group: ShardGroup, fault: _Fault) -> ShardGroup:
    # A lost node is no failure of the engine's, even where the engine that missed it spoke first.
    counted = (fault.blame in _ENGINE_BLAMES) - (group.blame in _ENGINE_BLAMES)
    return replace(group, reason=fault.reason, lost_node_id=fault.node_id, blame=fault.blame, failure_count=group.failure_count + counted)
