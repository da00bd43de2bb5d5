"""The part of a replica's view that was measured or learned, put together for `domain.placement`.

Decides how far a node's word is taken: what it says of its cache counts where its requests share one, and what others run is asked only of
engines that their owners use, too. It must not know sessions; `node_session` says what they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from potluck_coordinator.domain.catalogue import ATTACH_KIND
from potluck_coordinator.domain.placement import ROUND_TRIP_SECONDS_GUESS

if TYPE_CHECKING:
    from potluck_coordinator.gateway.measures import Measures
    from potluck_protocol.line import LineMeasurement
    from potluck_protocol.values import EngineStatus

ROUND_TRIP_SECONDS_MAX: Final = 2.0
"""What a node may say of its own line; a longer way says nothing more."""
KV_CAPACITY_TOKENS_MAX: Final = 2**31
_KEEPS_WHAT_IS_IDLE: Final = "llamacpp"
"""Its slots' caches count while they are idle, too; each has one of its own, so nothing is short for it."""


def measured(  # noqa: PLR0917 - one call
    measures: Measures, status: EngineStatus, line: LineMeasurement | None, heard_at: float, slot_count: int, in_flight_count: int
) -> dict[str, Any]:
    """Fields of a `ReplicaView`.

    Args:
        measures: of this gateway.
        status: the replica's newest word.
        line: as its node measured it.
        heard_at: when the node last said anything of its engines.
        slot_count: as the view has it.
        in_flight_count: the same.
    """
    kv_capacity_tokens = _kv_capacity_tokens(status, slot_count)
    load = measures.load(status.replica_id, heard_at)
    fields: dict[str, Any] = {
        "kv_capacity_tokens": kv_capacity_tokens,
        "committed_tokens": load.committed_tokens,
        "dispatched_tokens": load.dispatched_tokens,
        "prefill_backlog_tokens": load.prefill_backlog_tokens,
        "prefill_since_seconds": load.prefill_since_seconds,
        "speeds": measures.hear(status.replica_id, status, kv_capacity_tokens),
        "heard_at_seconds": heard_at,
    }
    if status.engine_kind != _KEEPS_WHAT_IS_IDLE:
        fields["kv_used_tokens"] = max(0, min(status.kv_used_tokens or 0, kv_capacity_tokens))
    if status.engine_kind == ATTACH_KIND:
        fields["foreign_waiting_count"] = max(0, status.waiting_count or 0)
        fields["foreign_running_count"] = max(0, status.running_count - in_flight_count)
    microseconds = None if line is None else line.round_trip_microseconds
    seconds = ROUND_TRIP_SECONDS_GUESS if microseconds is None else microseconds / 1e6
    fields["round_trip_seconds"] = min(max(0.0, seconds), ROUND_TRIP_SECONDS_MAX)
    return fields


def _kv_capacity_tokens(status: EngineStatus, slot_count: int) -> int:
    if status.kv_capacity_tokens is not None and status.kv_capacity_tokens > 0:
        return min(status.kv_capacity_tokens, KV_CAPACITY_TOKENS_MAX)
    return max(0, slot_count * status.context_length_tokens)
