"""The agent's half of the lease: how long it may serve, when a heartbeat is due, and how long to wait before the next dial.

Decides from values and a given `now`; seconds are monotonic ones. It must not know frames, channels or clocks: `link` reads the clock,
feeds what happened, and carries out what is decided.

The lease counts from the moment the sign of life that was answered last was *sent*, the coordinator's from the moment the last one arrived.
So the agent stops no later than the coordinator gives it up.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

QUICK_DIAL_COUNT: Final = 10
QUICK_DIAL_SECONDS: Final = 0.1
"""A line that was cut is mostly back at once, and the coordinator keeps a broken link's answers for less than a second: so the first dials
come within that time, each after the last one's end."""
RECONNECT_DELAY_FIRST_SECONDS: Final = 0.5
RECONNECT_DELAY_MAX_SECONDS: Final = 5.0
TOLD_SECONDS_MAX: Final = 30.0
"""However long a coordinator wants it to wait."""
KNOCK_AFTER_FAILURES: Final = 2
ASK_AFTER_DIALS: Final = 3
"""In vain, beyond the quick ones."""
USEFUL_SECONDS: Final = 0.3
"""A connection that lived shorter was of no use: far nodes' welcomes take nearly as long."""
RIDE_SECONDS: Final = 0.2
"""Tokens that came within this time are followed by others soon."""
STABLE_SECONDS: Final = 5.0
"""A connection that lived this long proves that dialling works, however often it failed before."""


class Phase(StrEnum):
    """What the agent may do."""

    CONNECTING = "connecting"
    """No lease yet in this life, or the link is down while the lease still runs."""
    SERVING = "serving"
    FENCED = "fenced"
    """The lease lapsed: nothing of the old epoch goes on."""


@dataclass(frozen=True, slots=True)
class Session:
    """Everything the lease rule needs to know."""

    phase: Phase = Phase.CONNECTING
    epoch: int = 0
    lease_ends_at_seconds: float | None = None
    lease_seconds: float = 0.0
    """How long the last one that was granted lasts."""
    unanswered: tuple[tuple[int, float], ...] = ()
    """The number of each heartbeat without an answer, and when it was sent; the oldest first. Those older than a lease are left out."""
    last_beat_at_seconds: float = 0.0
    heartbeat_busy_seconds: float = 1.0
    heartbeat_idle_seconds: float = 5.0
    failure_count: int = 0
    """Dials in a row that led to no connection worth the name: no welcome, or one lost again at once."""


def after_welcome(
    session: Session, *, epoch: int, lease_ttl_ms: int, heartbeat_busy_ms: int, heartbeat_idle_ms: int, hello_sent_at_seconds: float
) -> Session:
    """The coordinator took us in: a fresh lease, counted from our hello."""
    return replace(
        session,
        phase=Phase.SERVING,
        epoch=epoch,
        lease_ends_at_seconds=hello_sent_at_seconds + lease_ttl_ms / 1000,
        lease_seconds=lease_ttl_ms / 1000,
        unanswered=(),
        last_beat_at_seconds=hello_sent_at_seconds,
        heartbeat_busy_seconds=heartbeat_busy_ms / 1000,
        heartbeat_idle_seconds=heartbeat_idle_ms / 1000,
    )


def after_beat(session: Session, number: int, now_seconds: float) -> Session:
    """A heartbeat with this number was handed to the link."""
    oldest_at = now_seconds - session.lease_seconds
    kept = tuple(beat for beat in session.unanswered if beat[1] > oldest_at)
    return replace(session, last_beat_at_seconds=now_seconds, unanswered=(*kept, (number, now_seconds)))


def after_renewal(session: Session, *, epoch: int, lease_ttl_ms: int, heartbeat_idle_ms: int = 0, number: int = 0) -> Session:
    """The coordinator answered a heartbeat. A renewal of another epoch, or one that answers nothing, changes nothing.

    Args:
        session: of the agent.
        epoch: whose lease it is.
        lease_ttl_ms: counted from when the heartbeat was sent; the last word holds, also where it ends sooner.
        heartbeat_idle_ms: how often to beat while idle; 0: as before.
        number: of the newest heartbeat that it answers; 0: not said, so that it may be no more than the oldest.
    """
    answered = [sent_at for sent_number, sent_at in session.unanswered if sent_number <= number or not number]
    if epoch != session.epoch or not answered or session.lease_ends_at_seconds is None:
        return session
    ends_at = answered[-1] + lease_ttl_ms / 1000 if number else max(session.lease_ends_at_seconds, answered[0] + lease_ttl_ms / 1000)
    return replace(
        session,
        lease_ends_at_seconds=ends_at,
        lease_seconds=lease_ttl_ms / 1000,
        unanswered=session.unanswered[len(answered) :],
        heartbeat_idle_seconds=heartbeat_idle_ms / 1000 if heartbeat_idle_ms > 0 else session.heartbeat_idle_seconds,
    )


def after_loss(session: Session, *, lived_seconds: float) -> Session:
    """The link is down. The lease runs on: what is in flight may still be resumed.

    A connection makes good as many failures as quick dials fit into its life: a line that is cut once a second is dialled quickly each
    time, and one that breaks as soon as it is made ever more slowly.
    """
    made_good_count = int(lived_seconds / QUICK_DIAL_SECONDS) if lived_seconds >= USEFUL_SECONDS else 0
    failure_count = 0 if lived_seconds >= STABLE_SECONDS else max(0, session.failure_count - made_good_count) + 1
    phase = Phase.CONNECTING if session.phase is Phase.SERVING else session.phase
    return replace(session, phase=phase, unanswered=(), failure_count=failure_count)


def after_failed_dial(session: Session) -> Session:
    """A dial ended without a welcome."""
    return replace(session, failure_count=session.failure_count + 1)


def after_lapse(session: Session) -> Session:
    """The lease is gone: fenced until the next welcome."""
    return replace(session, phase=Phase.FENCED, lease_ends_at_seconds=None, unanswered=())


def may_order(session: Session, epoch: int) -> bool:
    """Whether a frame that was sent under this epoch (0: it does not say) is to be carried out: not one of another, nor any once fenced."""
    return session.phase is not Phase.FENCED and epoch in {0, session.epoch}


def lease_lapsed(session: Session, now_seconds: float) -> bool:
    """Whether a lease was held and has run out."""
    return session.lease_ends_at_seconds is not None and now_seconds >= session.lease_ends_at_seconds


def lease_left_seconds(session: Session, now_seconds: float) -> float:
    """How long the node may go on serving; 0 without a lease."""
    if session.lease_ends_at_seconds is None:
        return 0.0
    return max(0.0, session.lease_ends_at_seconds - now_seconds)


def beat_due(session: Session, *, busy: bool, now_seconds: float) -> bool:
    """Whether the next heartbeat should leave now."""
    if session.phase is not Phase.SERVING:
        return False
    period_seconds = session.heartbeat_busy_seconds if busy else session.heartbeat_idle_seconds
    return now_seconds - session.last_beat_at_seconds >= period_seconds


def beat_may_ride(*, waiting: bool, tokens_sent_at_seconds: float, now_seconds: float) -> bool:
    """Whether a heartbeat that is due goes with the next tokens instead of in a frame of its own.

    Args:
        waiting: it waited once already, since the last look; then it waits no longer.
        tokens_sent_at_seconds: when the last frame with tokens left.
        now_seconds: monotonic seconds.
    """
    return not waiting and now_seconds - tokens_sent_at_seconds <= RIDE_SECONDS


def reconnect_delay_seconds(failure_count: int, jitter: float, told_seconds: float = 0.0) -> float:
    """How long to wait before the next dial: nothing up to the first failure, then little, then full jitter under a ceiling that doubles.

    Args:
        failure_count: see `Session.failure_count`.
        jitter: a random number from 0 to 1.
        told_seconds: when the coordinator wants this node to come again, at the earliest; 0: it has not said so.
    """
    if told_seconds > 0:
        return min(told_seconds, TOLD_SECONDS_MAX) * (1 + jitter)
    if failure_count <= 1:
        return 0.0
    if failure_count <= QUICK_DIAL_COUNT:
        return QUICK_DIAL_SECONDS * (0.5 + jitter / 2)
    # The exponent is bounded because an agent may fail to reach its coordinator for months.
    ceiling_seconds = min(RECONNECT_DELAY_MAX_SECONDS, RECONNECT_DELAY_FIRST_SECONDS * 2.0 ** min(failure_count - QUICK_DIAL_COUNT - 1, 8))
    return ceiling_seconds * jitter


def should_knock(failure_count: int) -> bool:
    """Whether the next dial first looks whether anything listens: after one in vain, and not for a line that was only cut."""
    return failure_count >= KNOCK_AFTER_FAILURES


def should_ask_the_way(failure_count: int) -> bool:
    """Whether the coordinator's HTTP port is to be asked where its ports are: not by the quick dials, for the answer takes its time."""
    return failure_count > QUICK_DIAL_COUNT and (failure_count - QUICK_DIAL_COUNT) % ASK_AFTER_DIALS == 0
