"""The part of a replica's view that was measured or learned, for `replica_view` to put into it.

Decides how far a node's word is taken: what it says of its cache counts where its requests share one, and what others run is asked only of
engines that their owners use, too. Of the slots that a replica offers, `domain.pace` says how many are taken. It must not know sessions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple, TypedDict

from potluck_coordinator.domain.catalogue import ATTACH_KIND
from potluck_coordinator.domain.pace import slots_in_pace
from potluck_coordinator.domain.placement import ROUND_TRIP_SECONDS_GUESS

if TYPE_CHECKING:
    from potluck_coordinator.domain.speeds import Speeds
    from potluck_coordinator.gateway.measures import Measures
    from potluck_protocol.line import LineMeasurement
    from potluck_protocol.values import EngineStatus

ROUND_TRIP_SECONDS_MAX: Final = 2.0
"""What a node may say of its own line; a longer way says nothing more."""
KV_CAPACITY_TOKENS_MAX: Final = 2**31
_KEEPS_WHAT_IS_IDLE: Final = "llamacpp"
"""Its slots' caches count while they are idle, too; each has one of its own, so nothing is short for it."""


class MeasuredFacts(TypedDict):
    """Those fields of a `ReplicaView`."""

    slot_count: int
    withheld_slot_count: int
    kv_capacity_tokens: int
    kv_used_tokens: int
    committed_tokens: float
    dispatched_tokens: float
    prefill_backlog_tokens: float
    prefill_since_seconds: float
    foreign_waiting_count: int
    foreign_running_count: int
    speeds: Speeds
    round_trip_seconds: float


class Offered(NamedTuple):
    """What `replica_view` knows of it."""

    slot_count: int
    """By wish and word."""
    in_flight_count: int
    weight: float
    """Of its speeds."""
    heard_at_seconds: float
    """When its node last spoke."""


def measured(status: EngineStatus, measures: Measures, line: LineMeasurement | None, offered: Offered) -> MeasuredFacts:
    """Everything of the replica that was measured.

    Args:
        status: its newest word.
        measures: of this gateway.
        line: as its node measured it.
        offered: the rest.
    """
    kv_capacity_tokens = _kv_capacity_tokens(status, offered.slot_count)
    load = measures.load(status.replica_id, offered.heard_at_seconds)
    speeds = measures.hear(status.replica_id, status, kv_capacity_tokens)
    slot_count = slots_in_pace(offered.slot_count, speeds, offered.weight, measures.token_seconds_max)
    counts_only_work = status.engine_kind != _KEEPS_WHAT_IS_IDLE
    is_owners_too = status.engine_kind == ATTACH_KIND
    return MeasuredFacts(
        slot_count=slot_count,
        withheld_slot_count=offered.slot_count - slot_count,
        kv_capacity_tokens=kv_capacity_tokens,
        kv_used_tokens=min(status.kv_used_tokens or 0, kv_capacity_tokens) if counts_only_work else 0,
        committed_tokens=load.committed_tokens,
        dispatched_tokens=load.dispatched_tokens,
        prefill_backlog_tokens=load.prefill_backlog_tokens,
        prefill_since_seconds=load.prefill_since_seconds,
        foreign_waiting_count=(status.waiting_count or 0) if is_owners_too else 0,
        foreign_running_count=max(0, status.running_count - offered.in_flight_count) if is_owners_too else 0,
        speeds=speeds,
        round_trip_seconds=_round_trip_seconds(line),
    )


def _round_trip_seconds(line: LineMeasurement | None) -> float:
    if line is None or line.round_trip_microseconds is None:
        return ROUND_TRIP_SECONDS_GUESS
    return min(max(0.0, line.round_trip_microseconds / 1e6), ROUND_TRIP_SECONDS_MAX)


def _kv_capacity_tokens(status: EngineStatus, slot_count: int) -> int:
    if status.kv_capacity_tokens is not None and status.kv_capacity_tokens > 0:
        return min(status.kv_capacity_tokens, KV_CAPACITY_TOKENS_MAX)
    return max(0, slot_count * status.context_length_tokens)
