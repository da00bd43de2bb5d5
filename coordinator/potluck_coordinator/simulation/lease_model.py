"""The modelled coordinator's eye on its nodes: sessions, leases, and attempts that stand still.

Decides nothing: who is suspect, whose session ends, whether the coordinator doubts itself and which attempts have stalled are the live
functions of `domain.nodes` and `domain.stall`. Heartbeats of nodes that are well are no events: a node says when it falls silent, and only
from then until it is heard of again is it looked at. It must not know requests.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Final

from potluck_coordinator.domain.nodes import (
    Doubt,
    Liveness,
    LivenessLimits,
    SignsOfLife,
    doubt_after,
    end_of_session,
    is_in_doubt,
    is_overdue,
    liveness,
)
from potluck_coordinator.domain.stall import Quiet, Stall, judge, prefill_seconds
from potluck_coordinator.simulation.agenda import Agenda
from potluck_coordinator.simulation.node_model import Node
from potluck_coordinator.simulation.policy import Attempt, Policy

WATCH_SECONDS: Final = 0.25
"""How often a silent node is looked at, as the gateway does."""


class Session:
    """One node's, from its hello to the end of its lease."""

    __slots__ = (
        "asked_at",
        "attempts",
        "busy_since",
        "epoch",
        "heard_at",
        "heartbeat_at",
        "link_lost_at",
        "node",
        "open",
        "suspect",
        "watched",
    )

    def __init__(self, node: Node, epoch: int, now: float) -> None:
        self.node = node
        self.epoch = epoch
        self.open = True
        self.suspect = False
        self.watched = False
        self.attempts: dict[int, Attempt] = {}
        self.heartbeat_at = now
        """While it is silent: when its last heartbeat came."""
        self.heard_at = now
        """The same of whatever it sent: one that answers sends tokens all the time."""
        self.asked_at: float | None = None
        self.busy_since: float | None = None
        self.link_lost_at: float | None = None

    @property
    def is_well(self) -> bool:
        """Nothing is the matter with it, as far as can be heard."""
        return self.node.silent_since is None and self.link_lost_at is None

    def signs(self, now: float) -> SignsOfLife:
        """Of a node that is well the last heartbeat is now, for none of its heartbeats is an event."""
        return SignsOfLife(now if self.is_well else self.heartbeat_at, self.busy_since)


class Watch:
    """Looks at silent nodes until they are heard of or gone.

    Args:
        agenda: the time.
        policy: is told who is suspect.
        limits: of leases.
        node_count: how many sessions are open.
        lose: ends an attempt that has stalled.
        close: ends a session.
    """

    def __init__(
        self,
        agenda: Agenda,
        policy: Policy,
        limits: LivenessLimits,
        node_count: Callable[[], int],
        lose: Callable[[Attempt], None],
        close: Callable[[Session], None],
    ) -> None:
        self._agenda = agenda
        self._policy = policy
        self._limits = limits
        self._node_count = node_count
        self._lose = lose
        self._close = close
        self._watched: dict[Session, None] = {}
        self._lost_at: deque[float] = deque()
        self._doubt: Doubt | None = None
        self.doubt_count = 0
        self.doubted_at = -math.inf
        """When it last doubted itself: nobody was evicted until then."""

    def begin(self, session: Session) -> None:
        """It has just fallen silent, or its link broke."""
        session.heartbeat_at = session.node.lease.heard_at
        session.heard_at = self._agenda.now if session.busy_since is not None else session.heartbeat_at
        session.asked_at = None
        if session.link_lost_at is not None:
            self._suspect(session, suspect=True)
        if not session.watched:
            session.watched = True
            self._watched[session] = None
            self._agenda.after(WATCH_SECONDS, self._look, session)

    def _look(self, session: Session) -> None:
        now = self._agenda.now
        if not session.open or session.is_well:
            session.watched = False
            self._watched.pop(session, None)
            if session.open:
                self._suspect(session, suspect=False)
            return
        signs = session.signs(now)
        if liveness(signs, now, self._limits) is not Liveness.FRESH:
            self._suspect(session, suspect=True)
        if self._policy.keeps_leases:
            self._judge_attempts(session, now)
            self._update_doubt(now)
            if is_in_doubt(self._doubt, now):
                self.doubted_at = now
            elif end_of_session(signs, session.link_lost_at, now, self._limits) is not None:
                session.watched = False
                self._watched.pop(session, None)
                self._lost_at.append(now)
                self._close(session)
                return
        self._agenda.after(WATCH_SECONDS, self._look, session)

    def _suspect(self, session: Session, *, suspect: bool) -> None:
        if session.suspect is not suspect:
            session.suspect = suspect
            self._policy.suspected(session.node.node_id, suspect=suspect)

    def _update_doubt(self, now: float) -> None:
        while self._lost_at and now - self._lost_at[0] > self._limits.lease_ttl_seconds:
            self._lost_at.popleft()
        overdue = sum(is_overdue(one.signs(now), one.link_lost_at, now, self._limits) for one in self._watched if not one.is_well)
        before = self._doubt
        self._doubt = doubt_after(before, overdue + len(self._lost_at), self._node_count() + len(self._lost_at), now)
        self.doubt_count += before is None and self._doubt is not None

    def _judge_attempts(self, session: Session, now: float) -> None:
        """A broken link's attempts wait for its grace; those of one that stands and says nothing are judged by the stall's rule."""
        if session.link_lost_at is not None:
            return
        unread = [attempt.prompt_tokens for attempt in session.attempts.values() if attempt.first_token_at is None]
        for attempt in tuple(session.attempts.values()):
            quiet = Quiet(
                attempt_seconds=now - max(attempt.began_at, session.heard_at),
                node_seconds=now - session.heard_at,
                asked_seconds=None if session.asked_at is None else now - session.asked_at,
                streams=True,
                begun=attempt.first_token_at is not None,
                gap_p99_seconds=None,
                round_trip_seconds=0.0,
                prefill_seconds=prefill_seconds(unread, None),
            )
            match judge(quiet, self._limits.heartbeat_busy_seconds):
                case Stall.ASK:
                    session.asked_at = now
                case Stall.NODE | Stall.ENGINE:
                    self._lose(attempt)
                case Stall.NONE:
                    pass
