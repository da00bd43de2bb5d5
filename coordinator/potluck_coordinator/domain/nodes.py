"""When a node counts as alive, suspect or gone, when one of its attempts is given up, and when the coordinator doubts itself instead.

Decides from the times of its signs of life, all taken on the coordinator's own monotonic clock. Where too many nodes fall silent within one
window, its own line is the likelier culprit, and nobody is evicted. It must not know links, frames or tables; `domain.stall` judges what
attempts say.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

MASS_SILENCE_SHARE: Final = 0.3
"""Of the nodes: homes fail one by one, and what they share, the coordinator and its line, takes nearly all of them."""
MASS_SILENCE_COUNT_MIN: Final = 3
"""One lost node, or the two of one home, are likelier than a lost uplink of the coordinator's, whatever share of the pool they are."""


DIAL_ROUND_TRIPS: Final = 4
"""TCP's, TLS', the call's, and its hello's."""
DIAL_ROUND_TRIP_SECONDS_MAX: Final = 0.25
"""A node says how far it is, and its clients wait for it."""
OVERDUE_BEATS: Final = 1.5
"""Of the period in which it beats. When the first of many that fell silent together is lost, all of them are this late."""
LEFT_SHARE_BUSY: Final = 0.5
"""Of a lease, that a node which answers has left at any time: its tokens would be dropped with it."""
LEFT_SHARE_IDLE: Final = 0.2
"""The same of one with nothing to lose: with beats every 5 s each second one is answered."""
DOUBT_SECONDS_MAX: Final = 600.0
"""As long as minutes stay without a verdict (`domain.uptime`)."""
RETURN_SECONDS: Final = 10.0
"""Agents dial again within five seconds of a line's return, and many at once take their turns."""


@dataclass(frozen=True, slots=True)
class Doubt:
    """The coordinator suspects itself."""

    since: float
    mass_at: float
    """When too many nodes were last overdue."""


class Liveness(StrEnum):
    """What a node's silence means."""

    FRESH = "fresh"
    SUSPECT = "suspect"
    """It keeps its lease and gets no new attempts; those of its own that stay silent for too long have failed."""
    LAPSED = "lapsed"
    """Its lease is gone; its attempts have failed."""


@dataclass(frozen=True, slots=True)
class LivenessLimits:
    """How long silence may last. Both sides of the link hold the same lease: whoever grants it and whoever stops when it ends."""

    lease_ttl_seconds: float = 15.0
    heartbeat_busy_seconds: float = 1.0
    heartbeat_idle_seconds: float = 5.0
    missed_heartbeats_suspect: int = 2
    silent_attempt_seconds: float = 8.0
    """An attempt on a suspect node that sent nothing for so long has failed, so that its client hears of it before the lease ends."""
    link_grace_seconds: float = 0.5
    """How long a broken link may take to come back before its session ends and its attempts fail. A killed agent's link breaks as a cut one
does, and its clients wait for so long. An agent that lives is back within 0.15 s of its line, and four round trips, which are added."""

    @property
    def suspect_beats(self) -> float:
        """After so many periods of silence a node is suspect: those missed, and half a beat's patience."""
        return self.missed_heartbeats_suspect + 0.5


@dataclass(frozen=True, slots=True)
class Granted:
    """What a node was told of its lease, as far as it may still act on it. Moments are monotonic seconds."""

    idle_seconds: float = 0.0
    """The period that it was told last to beat in while idle (`domain.beat_period`)."""
    former_idle_seconds: float = 0.0
    """The one before: it beats in that until it has read the other."""
    lease_seconds: float = 0.0
    until: float = -math.inf
    """The latest moment until which it may hold a lease, by anything that it was ever told."""
    renewed_at: float = -math.inf
    """When a heartbeat of this link was last answered: the first one always is."""

    def at_welcome(self, idle_seconds: float, lease_seconds: float, now: float) -> Granted:
        """A link begins, and says this first of all."""
        return Granted(idle_seconds, 0.0, lease_seconds, max(self.until, now + lease_seconds))

    def at_renewal(self, idle_seconds: float, lease_seconds: float, now: float) -> Granted:
        """The answer to a heartbeat says this."""
        return Granted(idle_seconds, self.idle_seconds, lease_seconds, max(self.until, now + lease_seconds), now)


@dataclass(frozen=True, slots=True)
class SignsOfLife:
    """Monotonic seconds of what was last heard of one node."""

    heartbeat_at: float
    busy_since: float | None
    """When it last went from idle to having attempts; from then on it owes a beat every `heartbeat_busy_seconds`."""
    granted: Granted = Granted()


def told_idle_seconds(granted: Granted, limits: LivenessLimits) -> float:
    """How often the node has to beat while it is idle, by the longer of its last two words."""
    return max(limits.heartbeat_idle_seconds, granted.idle_seconds, granted.former_idle_seconds)


def period_seconds(signs: SignsOfLife, limits: LivenessLimits) -> float:
    """How often the node has to beat now."""
    return limits.heartbeat_busy_seconds if signs.busy_since is not None else told_idle_seconds(signs.granted, limits)


def silence_seconds(signs: SignsOfLife, now: float) -> float:
    """How long the node has owed a sign of life. Going busy starts the count anew: an idle node may rightly have been silent."""
    return max(0.0, now - max(signs.heartbeat_at, signs.busy_since or signs.heartbeat_at))


def lease_ends_at(signs: SignsOfLife, limits: LivenessLimits) -> float:
    """When the lease is gone if the node stays silent, whatever it was doing. The node's own is by then."""
    return max(signs.heartbeat_at + max(limits.lease_ttl_seconds, signs.granted.lease_seconds), signs.granted.until)


def liveness(signs: SignsOfLife, now: float, limits: LivenessLimits) -> Liveness:
    """What the node's silence means at `now`."""
    if now >= lease_ends_at(signs, limits):
        return Liveness.LAPSED
    if silence_seconds(signs, now) > limits.suspect_beats * period_seconds(signs, limits):
        return Liveness.SUSPECT
    return Liveness.FRESH


def attempt_is_silent(signs: SignsOfLife, chunk_at: float, now: float, limits: LivenessLimits) -> bool:
    """Whether an attempt whose last chunk (or start) was at `chunk_at` is to be given up although the lease still stands."""
    return now - chunk_at >= limits.silent_attempt_seconds and liveness(signs, now, limits) is not Liveness.FRESH


def link_grace_seconds(round_trip_seconds: float, limits: LivenessLimits) -> float:
    """How long the broken link of a node so far away may be gone."""
    return limits.link_grace_seconds + DIAL_ROUND_TRIPS * min(round_trip_seconds, DIAL_ROUND_TRIP_SECONDS_MAX)


def link_grace_is_over(link_lost_at: float | None, now: float, limits: LivenessLimits, round_trip_seconds: float = 0.0) -> bool:
    """Whether a link that broke at `link_lost_at` (None: it stands) has been away for so long that its attempts have failed."""
    return link_lost_at is not None and now - link_lost_at >= link_grace_seconds(round_trip_seconds, limits)


def is_mass_silence(silent_count: int, node_count: int) -> bool:
    """Whether so many of the nodes fell silent together that the coordinator itself is the likelier culprit."""
    return silent_count >= MASS_SILENCE_COUNT_MIN and silent_count > MASS_SILENCE_SHARE * node_count


def is_overdue(signs: SignsOfLife, link_lost_at: float | None, now: float, limits: LivenessLimits) -> bool:
    """Whether the node should have been heard of by now, half a beat's patience included."""
    return link_lost_at is not None or silence_seconds(signs, now) > OVERDUE_BEATS * period_seconds(signs, limits)


def next_look_at(signs: SignsOfLife, link_lost_at: float | None, limits: LivenessLimits) -> float:
    """Before when nothing can be said of a node that the last look found well, whatever it does not say; -inf: look each time."""
    if signs.busy_since is not None or link_lost_at is not None:
        return -math.inf
    return signs.heartbeat_at + OVERDUE_BEATS * period_seconds(signs, limits)


def renewal_is_due(
    granted: Granted, lease_seconds: float, now: float, limits: LivenessLimits, *, is_busy: bool, counts_by_number: bool = True
) -> bool:
    """Whether a heartbeat is to be answered with a fresh lease: where too little would be left of the last one when the next beat comes.

    Args:
        granted: with the last answer.
        lease_seconds: what the answer would grant. A shorter lease than the last is told at once.
        now: when this heartbeat came.
        limits: the lease and its companions.
        is_busy: it has attempts.
        counts_by_number: the agent counts its lease from when it sent the heartbeat that was answered. An older one counts from the oldest
            that it has no answer for, and needs them sooner.
    """
    if lease_seconds < granted.lease_seconds:
        return True
    if not counts_by_number:
        return now - granted.renewed_at >= limits.lease_ttl_seconds * LEFT_SHARE_IDLE
    next_at = now + (limits.heartbeat_busy_seconds if is_busy else told_idle_seconds(granted, limits))
    left_min = limits.lease_ttl_seconds * LEFT_SHARE_BUSY if is_busy else granted.lease_seconds * LEFT_SHARE_IDLE
    return granted.renewed_at + granted.lease_seconds - next_at < left_min


def doubt_after(before: Doubt | None, overdue_count: int, node_count: int, now: float) -> Doubt | None:
    """Whether the coordinator suspects itself from now on; None: it does not.

    It does while too many nodes are overdue together, and for a while after, in which the last of them come back; after
    `DOUBT_SECONDS_MAX` their silence is what it looks like.

    Args:
        before: what it did so far.
        overdue_count: nodes that should have been heard of, and those that were lost within the last lease time.
        node_count: all of them, those lost included.
        now: monotonic seconds.
    """
    if is_mass_silence(overdue_count, node_count):
        return Doubt(before.since if before is not None else now, now)
    return before if before is not None and now - before.mass_at < RETURN_SECONDS else None


def is_in_doubt(doubt: Doubt | None, now: float) -> bool:
    """Whether nobody may be evicted now."""
    return doubt is not None and now - doubt.since < DOUBT_SECONDS_MAX


def end_of_session(
    signs: SignsOfLife, link_lost_at: float | None, now: float, limits: LivenessLimits, round_trip_seconds: float = 0.0
) -> str | None:
    """Why a node's session ends now, in a word; None: it does not."""
    if liveness(signs, now, limits) is Liveness.LAPSED:
        return "silence"
    return "link_lost" if link_grace_is_over(link_lost_at, now, limits, round_trip_seconds) else None
