"""What becomes of the replicas that stand, before anything new is planned.

Decides which of them the facts have overtaken (their model or wish is gone, their node cannot hold them any more), and how a replica
leaves: first it gets no new requests, then its engine stops, and only when its node says that it is gone its room is free. It must not know
who wants that room.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from potluck_coordinator.domain.planning.sizing import demands_of
from potluck_coordinator.domain.planning.words import HERE_TO_STAY, LEAVING_SECONDS_MAX, Phase, PlannedReplica, Sizing

if TYPE_CHECKING:
    from potluck_coordinator.domain.planning.state import Draft


def settle(draft: Draft) -> None:
    """Brings every replica up to date with the facts."""
    for replica in list(draft.replicas.values()):
        if replica.node_id not in draft.view.nodes:
            draft.drop(replica)
        elif replica.phase is Phase.LEAVING and not draft.is_servable(replica.model_id):
            stop(draft, replica)
        elif replica.phase in HERE_TO_STAY:
            _settle_wished(draft, replica)
        else:
            let_go(draft, replica)
    for node_id in sorted({replica.node_id for replica in draft.replicas.values()}):
        _drop_what_does_not_fit_together(draft, draft.on_node(node_id))


def retire(draft: Draft, replica: PlannedReplica) -> None:
    """Sends a replica on its way out."""
    let_go(draft, replace(replica, phase=Phase.LEAVING, since_seconds=draft.view.now_seconds, replaces=None))


def stop(draft: Draft, replica: PlannedReplica) -> None:
    """Sends a replica out at once, whatever it is doing."""
    let_go(draft, replace(replica, phase=Phase.STOPPING, since_seconds=draft.view.now_seconds, replaces=None))


def let_go(draft: Draft, replica: PlannedReplica) -> None:
    """The next step of a replica on its way out."""
    waited_seconds = draft.view.now_seconds - replica.since_seconds
    if replica.phase is Phase.LEAVING and (not draft.is_answering(replica) or waited_seconds >= LEAVING_SECONDS_MAX):
        replica = replace(replica, phase=Phase.STOPPING, since_seconds=draft.view.now_seconds)
    if replica.phase is Phase.STOPPING and draft.status(replica) is None:
        draft.drop(replica)
    else:
        draft.put(replica)


def admit_waiting(draft: Draft) -> None:
    """Wishes what waited for room that is free by now."""
    for replica in sorted(draft.replicas.values(), key=lambda replica: (replica.since_seconds, replica.replica_id)):
        if replica.phase is Phase.WAITING and draft.room(replica.node_id, soon=False).holds(replica.sizing):
            draft.put(replace(replica, phase=Phase.WISHED, since_seconds=draft.view.now_seconds))


def _settle_wished(draft: Draft, replica: PlannedReplica) -> None:
    if not draft.is_servable(replica.model_id):
        # Its files are nobody's any more, so that it cannot even be wished for its last answers.
        stop(draft, replica)
        return
    deployment = draft.deployments.get(replica.model_id)
    is_vain = draft.is_absent(replica.node_id) or draft.refuses(replica.model_id, replica.node_id)
    if deployment is None or deployment.replica_count == 0 or (replica.phase is Phase.WAITING and is_vain):
        retire(draft, replica)
        return
    entry = draft.entry(replica.model_id)
    if replica.made_for == demands_of(entry):
        return
    # Its engine is started anew with what the entry says now, in the room that it has.
    room = draft.room(replica.node_id, soon=True).with_room_of(replica.sizing)
    sized = draft.sized(replica.model_id, replica.node_id, room)
    if isinstance(sized, Sizing):
        draft.put(replace(replica, sizing=sized, made_for=demands_of(entry)))
    else:
        retire(draft, replica)


def _drop_what_does_not_fit_together(draft: Draft, replicas: list[PlannedReplica]) -> None:
    """Where a node has less than it had, those that came last leave."""
    for replica in sorted(replicas, key=lambda replica: (-replica.since_seconds, replica.replica_id)):
        room = draft.room(replica.node_id, soon=True)
        missing_cards = not draft.whole_room(replica.node_id).card_uuids.issuperset(replica.sizing.shape.card_uuids)
        if replica.replica_id in draft.replicas and replica.phase in HERE_TO_STAY and (missing_cards or room.memory_bytes < 0):
            stop(draft, replica)
