"""Which minutes a node was up, down, or not known about.

Decides from how much of each minute a fresh lease covered, as the coordinator saw it. A minute that the coordinator did not watch from its
first second to its last gets no verdict. One in which too many nodes fell silent together is UNKNOWN for these; after ten such minutes in a
row they are DOWN, unless every node is silent. It must not know heartbeats, links or tables, and it never asks a node.

Times are "steady" milliseconds: the wall clock at the process's start plus monotonic time since, so that they never go back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from potluck_coordinator.domain.nodes import is_mass_silence
from potluck_protocol.values import NodeId

MINUTE_MS: Final = 60_000
UP_SECONDS_MIN: Final = 50.0
"""Of a minute: ten heartbeats of twelve."""
START_GRACE_MS: Final = 60_000
"""The coordinator's first minute, in which nodes are still finding their way back."""
REPORT_DELAY_MS: Final = 15_000
"""How long after its end a minute is judged, so that the last report about it has come."""
REPORT_GAP_MS: Final = 10_000
"""So long without a report, nobody watched: more than that is missing from a minute, and its verdict would be a guess."""
MASS_SILENCE_MINUTES_MAX: Final = 10
"""After so long a silence it is taken for what it looks like, unless every node is silent."""


class Verdict(StrEnum):
    """What one minute was for one node."""

    UP = "up"
    DOWN = "down"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Coverage:
    """A stretch of time in which a node's lease was fresh."""

    node_id: NodeId
    covered_seconds: float
    until_ms: int


@dataclass(frozen=True, slots=True)
class JudgedMinute:
    """One minute (of unix time) and its verdict for every node that was enrolled for all of it."""

    minute: int
    verdicts: Mapping[NodeId, Verdict]


@dataclass(frozen=True, slots=True)
class UptimeState:
    """What is not yet judged, and what the last judgement must be compared with."""

    next_minute: int
    """The first minute, of unix time, that is still to be judged."""
    covered_seconds: Mapping[int, Mapping[NodeId, float]] = field(default_factory=lambda: MappingProxyType({}))
    up_before: frozenset[NodeId] = frozenset()
    """Nodes that were up in the last minute that was not in doubt."""
    doubted_minutes: int = 0


def start(now_ms: int) -> UptimeState:
    """The state of a coordinator, or its gateway, that starts at `now_ms`: it judges from the first whole minute after its grace."""
    return UptimeState(next_minute=-(-(now_ms + START_GRACE_MS) // MINUTE_MS))


def went_unwatched(last_report_ms: int, now_ms: int) -> bool:
    """Whether this process, or the gateway's, stood still since the last report: then judging starts anew, as after a restart."""
    return now_ms - last_report_ms > REPORT_GAP_MS


def record(state: UptimeState, coverages: Iterable[Coverage]) -> UptimeState:
    """Adds what reports cover. Stretches of one node add up to at most the minute; one about a judged minute comes too late."""
    minutes: dict[int, dict[NodeId, float]] = {minute: dict(covered) for minute, covered in state.covered_seconds.items()}
    for coverage in coverages:
        for minute, seconds in split_by_minute(coverage.until_ms, coverage.covered_seconds, state.next_minute):
            covered = minutes.setdefault(minute, {})
            covered[coverage.node_id] = min(60.0, covered.get(coverage.node_id, 0.0) + seconds)
    return replace(state, covered_seconds=minutes)


def split_by_minute(end_ms: int, covered_seconds: float, first_minute: int) -> tuple[tuple[int, float], ...]:
    """The stretch that ends at `end_ms`, cut at full minutes, oldest first; what lies before `first_minute` is dropped."""
    begin_ms = max(end_ms - covered_seconds * 1000, first_minute * MINUTE_MS)
    pieces: list[tuple[int, float]] = []
    while begin_ms < end_ms:
        minute = int(begin_ms // MINUTE_MS)
        piece_end_ms = min(end_ms, (minute + 1) * MINUTE_MS)
        pieces.append((minute, (piece_end_ms - begin_ms) / 1000))
        begin_ms = piece_end_ms
    return tuple(pieces)


def close_minutes(state: UptimeState, enrolled_at_ms: Mapping[NodeId, int], now_ms: int) -> tuple[UptimeState, tuple[JudgedMinute, ...]]:
    """Judges every minute that ended long enough ago.

    Args:
        state: as `record` left it.
        enrolled_at_ms: the nodes that should serve, and since when; a minute in which one enrolled does not count for it.
        now_ms: steady time of the gateway's last report. While no gateway reports, nobody watches, and nothing is judged.
    """
    judged: list[JudgedMinute] = []
    while (state.next_minute + 1) * MINUTE_MS + REPORT_DELAY_MS <= now_ms:
        minute = state.next_minute
        expected = frozenset(node_id for node_id, since_ms in enrolled_at_ms.items() if since_ms <= minute * MINUTE_MS)
        covered = state.covered_seconds.get(minute, {})
        up = frozenset(node_id for node_id in expected if covered.get(node_id, 0.0) >= UP_SECONDS_MIN)
        doubted = _is_doubtful(state, expected, up)
        silent_verdict = Verdict.UNKNOWN if doubted else Verdict.DOWN
        judged.append(JudgedMinute(minute, {node_id: Verdict.UP if node_id in up else silent_verdict for node_id in expected}))
        state = UptimeState(
            next_minute=minute + 1,
            covered_seconds={later: seconds for later, seconds in state.covered_seconds.items() if later > minute},
            up_before=state.up_before if doubted else up,
            doubted_minutes=state.doubted_minutes + 1 if doubted else 0,
        )
    return state, tuple(judged)


def _is_doubtful(state: UptimeState, expected: frozenset[NodeId], up: frozenset[NodeId]) -> bool:
    reference = state.up_before & expected
    lost = reference - up
    if not is_mass_silence(len(lost), len(reference)):
        return False
    return not up or state.doubted_minutes < MASS_SILENCE_MINUTES_MAX


def unknown_minutes(enrolled_at_ms: int, until_ms: int, up_minutes: int, down_minutes: int) -> int:
    """Whole minutes since enrolment with no verdict against or for the node: nobody was watching, or the watcher was in doubt."""
    return max(0, (until_ms - enrolled_at_ms) // MINUTE_MS - up_minutes - down_minutes)
