"""One replica as placement sees it: what was wished of it, as far as its node says that it is there, and what is held against it.

Decides how many of its slots are left. What was measured comes from `measured_view`. It must not know why anybody asks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from potluck_coordinator.domain.catalogue import ATTACH_KIND
from potluck_coordinator.domain.placement import ReplicaView, slots_beside_owner
from potluck_coordinator.domain.suspicion import Standing
from potluck_coordinator.gateway.measured_view import Offered, measured
from potluck_protocol.values import EngineState, NodeState

if TYPE_CHECKING:
    from potluck_coordinator.gateway.node_session import NodeSession
    from potluck_protocol.values import DesiredEngine, EngineStatus

ATTEMPTS_PER_NODE_MAX: Final = 1024
"""Over all its replicas, whatever slots they have; beyond it they count as busy, and requests wait."""


def is_serving(status: EngineStatus | None) -> bool:
    """Whether requests may run on it, by what the node said of it last."""
    return status is not None and status.state is EngineState.READY and status.slot_count > 0


def view_of(session: NodeSession, wish: DesiredEngine, status: EngineStatus | None) -> ReplicaView:
    """The replica of a node's session; `status` is what the node said of it last, None where it does not run."""
    in_flight_count = session.attempts_by_replica.get(wish.replica_id, 0)
    # A node at its bound of attempts has no slot left, whatever its replicas offer.
    room_count = in_flight_count + ATTEMPTS_PER_NODE_MAX - len(session.attempts)
    standing = Standing.TRUSTED if session.suspicions is None else session.suspicions.standing(wish.replica_id)
    is_unrivalled = wish.model.model_id in session.unrivalled_models
    half_open = standing is Standing.HALF_OPEN and not is_unrivalled
    room_count = min(room_count, 1) if half_open else room_count
    if wish.engine_kind == ATTACH_KIND and status is not None:
        room_count = slots_beside_owner(room_count, in_flight_count, status.waiting_count)
    slot_count = min(status.slot_count, wish.slot_count, room_count) if status is not None else 0
    weight, facts = session.word.slow.get(wish.replica_id, 1.0), dict[str, Any](slot_count=slot_count)
    if session.measures is not None and status is not None:
        offered = Offered(slot_count, in_flight_count, weight, session.heartbeat_at)
        facts.update(measured(status, session.measures, session.machine.line, offered))
    return ReplicaView(
        replica_id=wish.replica_id,
        node_id=session.node_id,
        model_id=wish.model.model_id,
        ready=is_serving(status),
        in_flight_count=in_flight_count,
        node_paused=session.state is not NodeState.SERVING,
        node_suspect=standing is Standing.SUSPECTED or (session.suspect and wish.model.model_id not in session.vouched_models),
        link_up=session.outbox is not None and not session.outbox.closed,
        endpoints=status.endpoints if status is not None else (),
        leaving=session.is_leaving or wish.replica_id in session.word.leaving,
        context_length_tokens=max(0, min(status.context_length_tokens, wish.context_length_tokens)) if status is not None else 0,
        owner_account_id=session.owner_account_id,
        is_trusted=wish.replica_id in session.word.trusted,
        engine_kind=wish.engine_kind,
        losses_per_second=session.losses_per_second,
        half_open=half_open,
        drained="" if is_unrivalled else session.word.drained.get(wish.replica_id, ""),
        weight=weight,
        heard_at_seconds=session.heartbeat_at,
        **facts,
    )
