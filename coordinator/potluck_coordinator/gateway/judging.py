"""The look at every node and its attempts, a few times a second: who is suspect, whose session ends, which attempts are given up.

Carries out what `domain.nodes` and `domain.stall` decide: asks quiet nodes for a heartbeat, fails attempts that have stalled while another
replica could go on with them, and keeps everybody while the coordinator doubts itself. Time in which this process itself stood still is
nobody's silence. It must not know how sessions end or requests are placed: `links` says whether there is somewhere else to go.
"""

from __future__ import annotations

import asyncio
import heapq
import math
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Final

import structlog

from potluck_coordinator.domain import stall
from potluck_coordinator.domain.nodes import (
    Doubt,
    Liveness,
    attempt_is_silent,
    doubt_after,
    end_of_session,
    is_in_doubt,
    is_overdue,
    link_grace_is_over,
    liveness,
    next_look_at,
)
from potluck_coordinator.domain.stall import Stall
from potluck_protocol.errors import ErrorCode, PotluckError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from potluck_coordinator.domain.nodes import LivenessLimits
    from potluck_coordinator.domain.placement import ReplicaView
    from potluck_coordinator.gateway.inference_request import InferenceRequest
    from potluck_coordinator.gateway.node_session import NodeSession
    from potluck_coordinator.gateway.relay import Relay
    from potluck_coordinator.gateway.suspicions import Suspicions
    from potluck_protocol.values import AttemptId, ModelId, NodeId, ReplicaId

_log = structlog.get_logger()

LOOK_SECONDS: Final = 0.25
"""Between two looks, where this process gets to run."""
LOOK_PAUSE_SECONDS: Final = 0.02
"""Between two looks at least, that come in between; while in doubt, when nobody is evicted, they keep to the others' pace."""
ABSENCE_SECONDS_MIN: Final = 2.0
"""A look that comes so late says that this process could not run."""
ATTEMPT_ABSENCE_SECONDS_MIN: Final = 0.5
"""The same, for the shorter times that are counted for attempts."""
TIMER_SECONDS: Final = 0.002
"""By so much a loop's timers may come early."""
HEARD_SECONDS: Final = 3.0
"""While in doubt: whoever was heard within this time is surely there; everybody else was asked."""


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """What other replicas could do for a request."""

    can_take: bool
    has_room: bool
    """At once."""


class Judging:
    """One gateway's judgement.

    Args:
        limits: the lease and its companions.
        elsewhere: what replicas of other nodes than these could do for a request.
        suspicions: hears of each attempt that is given up.
        changed: called with each node that placement is to see otherwise.
        look: called for a look in between, when what a node was asked for is overdue: its clients wait.
    """

    def __init__(
        self,
        limits: LivenessLimits,
        elsewhere: Callable[[InferenceRequest, frozenset[NodeId]], Elsewhere],
        suspicions: Suspicions,
        changed: Callable[[NodeId], None],
        look: Callable[[], None],
    ) -> None:
        self._look_now = look
        self._wanted_at: list[float] = []
        """When looks in between are wanted, as a heap."""
        self._looked_at = -math.inf
        self._timer: asyncio.TimerHandle | None = None
        """For the first of them."""
        self._limits = limits
        self._elsewhere = elsewhere
        self._suspicions = suspicions
        self._changed = changed
        self._doubt: Doubt | None = None
        self._lost_at: dict[NodeId, float] = {}
        """Nodes whose sessions ended without a goodbye, lately."""
        self._served_models: frozenset[ModelId] = frozenset()
        """While in doubt: those with a replica on a node that is surely there."""
        self._cautious = False
        """Some replica got less than it could take at the last look."""
        self.drained: frozenset[ReplicaId] = frozenset()
        """By the directory's word."""
        self.in_doubt = False
        """The coordinator suspects itself: nobody is evicted, and no failure is held against a node."""

    def lost(self, node_id: NodeId, now: float) -> None:
        """A session ended without a goodbye."""
        self._lost_at[node_id] = now

    def look(self, sessions: Mapping[NodeId, NodeSession], now: float) -> list[tuple[NodeSession, str]]:
        """Judges everyone who may have changed by the clock; the sessions that end now, each with its reason."""
        while self._wanted_at and self._wanted_at[0] <= now:
            heapq.heappop(self._wanted_at)
        self._looked_at = now
        due = self._weigh(sessions, now)
        self._open_unrivalled(sessions.values())
        ending = []
        for session in due:
            reason = end_of_session(session.signs, session.link_lost_at, now, self._limits, session.round_trip_seconds)
            if reason is not None and not self.in_doubt:
                ending.append((session, reason))
                continue
            if session.judge(now, self._limits):
                self._changed(session.node_id)
            self._look_at_attempts(session, now)
            is_well = not session.suspect and session.asked_seconds(now) is None
            session.look_at = next_look_at(session.signs, session.link_lost_at, self._limits) if is_well else now
        return ending

    def forgive(self, sessions: Collection[NodeSession], absence_seconds: float, now: float) -> None:
        """This process did not look for so long: what the nodes sent meanwhile is still to be read.

        For attempts the time between two looks is not forgiven: in a process that is always a little late nothing would ever stall.
        """
        if absence_seconds > ATTEMPT_ABSENCE_SECONDS_MIN:
            for session in sessions:
                session.excuse_attempts(absence_seconds - LOOK_SECONDS, now)
        if absence_seconds > ABSENCE_SECONDS_MIN:
            _log.warning("gateway_stood_still", seconds=round(absence_seconds, 1))
            for session in sessions:
                session.excuse(absence_seconds, now)

    def _weigh(self, sessions: Mapping[NodeId, NodeSession], now: float) -> Collection[NodeSession]:
        """Whether so many are silent together that the coordinator doubts itself; everybody is then asked, and the last view holds.

        Who is to be looked at: all while it does, and otherwise those that are at work, or may have fallen silent.
        """
        window_seconds = self._limits.lease_ttl_seconds
        self._lost_at = {node_id: at for node_id, at in self._lost_at.items() if now - at < window_seconds and node_id not in sessions}
        due = [session for session in sessions.values() if session.look_at <= now]
        overdue_count = len(self._lost_at) + sum(self._is_overdue(session, now) for session in due)
        self._doubt = doubt_after(self._doubt, overdue_count, len(sessions) + len(self._lost_at), now)
        was_in_doubt, self.in_doubt = self.in_doubt, is_in_doubt(self._doubt, now)
        if was_in_doubt is not self.in_doubt:
            name = "coordinator_doubts_itself" if self.in_doubt else "coordinator_trusts_itself_again"
            _log.warning(name, overdue_count=overdue_count, node_count=len(sessions))
        self._served_models = frozenset()
        if not self.in_doubt:
            if was_in_doubt:
                for session in sessions.values():
                    self._vouch(session, frozenset())
            return due
        for session in sessions.values():
            session.ask_for_beat(now)
        heard = [session for session in sessions.values() if now - session.heard_at < HEARD_SECONDS and session.outbox is not None]
        self._served_models = frozenset(chain.from_iterable(session.models(ready_only=True) for session in heard))
        for session in sessions.values():
            self._vouch(session, session.models() - self._served_models)
        return tuple(sessions.values())

    def _open_unrivalled(self, sessions: Collection[NodeSession]) -> None:
        """One request at a time, or none, is a caution for pools in which somebody else answers meanwhile."""
        restricted = self._suspicions.half_open | self.drained
        if not restricted and not self._cautious:
            return
        views = [(session, view) for session in sessions for view in session.replica_views()]
        served = frozenset(view.model_id for _, view in views if _is_trusted(view) and view.replica_id not in restricted)
        self._cautious = bool(restricted)
        for session, view in views:
            unrivalled = session.unrivalled_models - {view.model_id}
            if view.replica_id in restricted and view.model_id not in served:
                unrivalled |= {view.model_id}
            if session.unrivalled_models != unrivalled:
                session.unrivalled_models = unrivalled
                self._changed(session.node_id)

    def _vouch(self, session: NodeSession, model_ids: frozenset[ModelId]) -> None:
        if session.vouched_models != model_ids:
            session.vouched_models = model_ids
            self._changed(session.node_id)

    def _is_overdue(self, session: NodeSession, now: float) -> bool:
        asked_seconds = session.asked_seconds(now)
        return (asked_seconds is not None and asked_seconds >= stall.ANSWER_SECONDS) or is_overdue(
            session.signs, session.link_lost_at, now, self._limits
        )

    def _look_at_attempts(self, session: NodeSession, now: float) -> None:
        for attempt_id, relay in tuple(session.attempts.items()):
            if relay.over or relay.ended_by_node:
                continue
            if relay.held_up:
                # Its client does not read; the node may have no room to send more.
                relay.last_chunk_at = now
            elif now - relay.last_chunk_at >= stall.GAP_SECONDS_MIN:
                self._look_at(session, attempt_id, relay, now)
        session.fade_gaps()

    def _look_at(self, session: NodeSession, attempt_id: AttemptId, relay: Relay, now: float) -> None:
        """One attempt that has given nothing for a while."""
        if self._is_past_hope(session, relay, now):
            self._give_up(session, attempt_id, relay, "The node that was answering fell silent.")
            return
        if session.outbox is None:
            # Within its grace, or in doubt.
            is_lost = link_grace_is_over(session.link_lost_at, now, self._limits, session.round_trip_seconds)
            if is_lost and self._can_go(session, attempt_id).can_take:
                self._give_up(session, attempt_id, relay, "The link to the node that was answering broke.")
            return
        match stall.judge(session.quiet(attempt_id, now), self._limits.heartbeat_busy_seconds):
            case Stall.ASK:
                session.ask_for_beat(now)
                self.look_in(stall.ANSWER_SECONDS + session.round_trip_seconds, now)
            case Stall.NODE if self._can_go(session, attempt_id).can_take:
                self._give_up(session, attempt_id, relay, "The node that was answering fell silent.")
            case Stall.ENGINE if self._can_go(session, attempt_id).has_room:
                self._give_up(session, attempt_id, relay, "The engine that was answering gave no more tokens.")

    def look_in(self, seconds: float, now: float) -> None:
        """Has a look in between, not at the next one: clients wait for it.

        Looks keep a pause between them. Thousands of links may break at once, and each look goes through all nodes.
        """
        heapq.heappush(self._wanted_at, now + seconds)
        if self._timer is not None and self._wanted_at[0] < now + seconds:
            return
        self._set_timer(now)

    def _set_timer(self, now: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        pause_seconds = LOOK_SECONDS if self.in_doubt else LOOK_PAUSE_SECONDS
        at = max(self._wanted_at[0], self._looked_at + pause_seconds)
        self._timer = asyncio.get_running_loop().call_later(max(0.0, at - now) + TIMER_SECONDS, self._look_in_between)

    def _look_in_between(self) -> None:
        self._timer = None
        self._look_now()
        if self._wanted_at and self._timer is None:
            self._set_timer(self._looked_at)

    def _is_past_hope(self, session: NodeSession, relay: Relay, now: float) -> bool:
        """Whether nothing can come of it any more, whether or not it could go on elsewhere. In doubt until the node fences itself."""
        if self.in_doubt:
            return liveness(session.signs, now, self._limits) is Liveness.LAPSED
        return attempt_is_silent(session.signs, relay.last_chunk_at, now, self._limits)

    def _can_go(self, session: NodeSession, attempt_id: AttemptId) -> Elsewhere:
        request = session.requests[attempt_id]
        if self.in_doubt:
            is_served = request.model_id in self._served_models
            return Elsewhere(is_served, is_served)
        return self._elsewhere(request, session.tried(attempt_id) | {session.node_id})

    def _give_up(self, session: NodeSession, attempt_id: AttemptId, relay: Relay, words: str) -> None:
        _log.warning("attempt_stalled", node_id=session.node_id, attempt_id=attempt_id, meaning=words)
        if not self.in_doubt:
            self._suspicions.failed(session.replica_of(attempt_id))
            self._changed(session.node_id)
        relay.fail(PotluckError(ErrorCode.NODE_LOST, words))


def _is_trusted(view: ReplicaView) -> bool:
    return view.ready and view.link_up and not (view.node_suspect or view.node_paused or view.leaving)
