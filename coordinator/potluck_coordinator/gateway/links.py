"""Every node that is connected to this gateway, one `node_session` each.

Decides whether a hello begins a session or goes on with one, by the agent's session id. `domain.nodes` says which sessions end by silence
or a lost link; a goodbye, a newer agent, and a revocation end them too. The directory grants each session its epoch
(`desks.NodeDesk.open_session`), and with it the node's first wish; later ones, and revocations, come with snapshots.
It must not know requests: who waits for a slot is told through `on_change`, what was running hears of its end through its relay.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import structlog

from potluck_coordinator.domain.nodes import attempt_is_silent, lapsed_nodes, link_grace_is_over
from potluck_coordinator.gateway.node_session import NodeSession
from potluck_coordinator.gateway.outbox import Outbox
from potluck_protocol.culprits import Culprits
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import GoodbyeReason, NodeId, Welcome
from potluck_protocol.version import PROTOCOL_VERSION

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from potluck_coordinator.desks import DirectoryPort, PoolSnapshot
    from potluck_coordinator.domain.nodes import LivenessLimits
    from potluck_coordinator.domain.placement import ReplicaView
    from potluck_protocol.clock import Clock
    from potluck_protocol.values import AttemptId, DesiredState, Hello, ModelId, ReplicaId

_log = structlog.get_logger()

ABSENCE_SECONDS_MIN: Final = 2.0
"""Ticks are a quarter of a second apart; one that comes so late says that this process could not run."""


class Links:
    """The connected nodes.

    Args:
        directory: grants epochs, hears of ends and of uptime.
        limits: the lease and its companions.
        clock: whose monotonic seconds leases are counted in.
        on_change: called whenever a replica may have become usable.
    """

    def __init__(self, directory: DirectoryPort, limits: LivenessLimits, clock: Clock, on_change: Callable[[], None]) -> None:
        self._directory = directory
        self._limits = limits
        self._clock = clock
        self._on_change = on_change
        self.culprits = Culprits(clock.monotonic_seconds)
        """Which requests engines of these nodes died of."""
        self._sessions: dict[NodeId, NodeSession] = {}
        self._opening: dict[NodeId, asyncio.Lock] = {}
        self._outcasts: Mapping[NodeId, str] = {}
        self._leaving: frozenset[ReplicaId] = frozenset()
        self._desired: Mapping[NodeId, DesiredState] = {}
        self._closings: set[asyncio.Task[bool]] = set()
        self._ticked_at = clock.monotonic_seconds()

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def sessions(self) -> tuple[NodeSession, ...]:
        """Everyone who is in."""
        return tuple(self._sessions.values())

    @property
    def outcasts(self) -> Mapping[NodeId, str]:
        """Whom the link port turns away, and why."""
        return self._outcasts

    @property
    def lease_ttl_ms(self) -> int:
        """What each renewal grants."""
        return int(self._limits.lease_ttl_seconds * 1000)

    def node_changed(self) -> None:
        """A node's word may have made a replica usable."""
        self._on_change()

    def session(self, node_id: NodeId) -> NodeSession | None:
        """The node's session, if it has one."""
        return self._sessions.get(node_id)

    def engine_died(self, session: NodeSession, attempt_id: AttemptId) -> None:
        """A node says that an attempt's engine died while it worked on it."""
        present = session.present_at_death(attempt_id)
        if present:
            _log.warning("engine_died", node_id=session.node_id, replica_id=present[0].replica_id, attempts_lost=len(present))
            self.culprits.died(self.culprits.fingerprint(start.endpoint, start.body) for start in present)

    def kills_engines(self, session: NodeSession, attempt_id: AttemptId) -> bool:
        """Whether the attempt's request is known to."""
        start = session.start_of(attempt_id)
        return start is not None and self.culprits.is_refused(self.culprits.fingerprint(start.endpoint, start.body))

    def replicas(self, model_id: ModelId) -> Iterator[ReplicaView]:
        """Every replica of the model on a connected node."""
        for session in self._sessions.values():
            yield from session.replica_views(model_id)

    async def connect(self, hello: Hello) -> tuple[NodeSession, Outbox, Welcome]:
        """Begins the node's session, or goes on with it over a new link.

        Raises:
            PotluckError: INVALID_CERTIFICATE from the directory for a node that may not serve.
        """
        async with self._opening.setdefault(hello.node_id, asyncio.Lock()):
            session = self._sessions.get(hello.node_id)
            if session is not None and session.session_id != hello.session_id:
                # The agent was started anew: what ran in the old process is lost, whatever its lease says.
                self.close(session, None, GoodbyeReason.REPLACED)
                session = None
            if session is None:
                grant = await self._directory.nodes.open_session(hello)
                if hello.node_id in self._outcasts:
                    # The snapshot that says so came while the directory's answer was on its way.
                    raise PotluckError(ErrorCode.INVALID_CERTIFICATE)
                session = self._sessions[hello.node_id] = NodeSession(hello, grant, self._clock.monotonic_seconds())
                session.wish(self._desired.get(hello.node_id, grant.desired))  # it may have come in that time, too
                session.leaving = self._leaving
                _log.info("node_connected", node_id=hello.node_id, epoch=session.epoch, agent_version=hello.agent_version)
            elif session.outbox is not None:
                session.outbox.close(GoodbyeReason.REPLACED, "A newer link of this node took over.")
            outbox = Outbox()
            session.connect(hello, outbox, self._clock.monotonic_seconds())
        session.restart_missing(frozenset(hello.in_flight))
        self._on_change()
        return session, outbox, self._welcome(session)

    def disconnect(self, session: NodeSession, outbox: Outbox, goodbye: GoodbyeReason | None) -> asyncio.Task[bool] | None:
        """A link has ended; without a goodbye the session waits out its grace.

        With one: whether the directory knows of it; None where the session was over already.
        """
        if session.outbox is not outbox or self._sessions.get(session.node_id) is not session:
            return None
        session.outbox, session.link_lost_at = None, self._clock.monotonic_seconds()
        return None if goodbye is None else self.close(session, goodbye)

    def close(
        self, session: NodeSession, goodbye: GoodbyeReason | None, farewell: GoodbyeReason | None = None, words: str = ""
    ) -> asyncio.Task[bool]:
        """Ends a session and every attempt in it; whether the directory knows. A node that still listens is told `farewell`, and why."""
        if self._sessions.get(session.node_id) is session:
            del self._sessions[session.node_id]
        if farewell is not None and session.outbox is not None:
            session.outbox.close(farewell, words)
        session.outbox = None
        session.fail_attempts(PotluckError(ErrorCode.NODE_LOST))
        _log.info("node_gone", node_id=session.node_id, epoch=session.epoch, goodbye=goodbye, attempts_lost=len(session.attempts))
        task = asyncio.ensure_future(self._tell_directory(session, goodbye))
        self._closings.add(task)
        task.add_done_callback(self._closings.discard)
        return task

    def tick(self) -> None:
        """Judges every node by the clock: called a few times a second."""
        now = self._clock.monotonic_seconds()
        self._forgive_own_absence(now)
        lapsed = lapsed_nodes(((session.node_id, session.signs) for session in self._sessions.values()), now, self._limits)
        for session in self.sessions:
            if session.node_id in lapsed or link_grace_is_over(session.link_lost_at, now, self._limits):
                reason = "silence" if session.node_id in lapsed else "link_lost"
                _log.warning("session_ended", node_id=session.node_id, reason=reason, silence_seconds=round(now - session.heartbeat_at, 3))
                self.close(session, None, GoodbyeReason.LEASE_ENDED)
                continue
            session.judge(now, self._limits)
            for relay in session.attempts.values():
                if not relay.over and attempt_is_silent(session.signs, relay.last_chunk_at, now, self._limits):
                    relay.fail(PotluckError(ErrorCode.NODE_LOST, "The node that was answering fell silent."))

    def _forgive_own_absence(self, now: float) -> None:
        """Time in which this process itself stood still is nobody's silence: what the nodes sent meanwhile is still to be read."""
        absence_seconds = now - self._ticked_at
        self._ticked_at = now
        if absence_seconds > ABSENCE_SECONDS_MIN:
            _log.warning("gateway_stood_still", seconds=round(absence_seconds, 1))
            for session in self._sessions.values():
                # One that was read already, after the pause, is not moved into the future.
                session.heartbeat_at = min(now, session.heartbeat_at + absence_seconds)
                if session.link_lost_at is not None:
                    session.link_lost_at = min(now, session.link_lost_at + absence_seconds)

    def take_snapshot(self, snapshot: PoolSnapshot) -> None:
        """Hands the directory's news to the nodes: new wishes, the end of broken groups' answers, and the end for those revoked."""
        self._outcasts, self._desired, self._leaving = snapshot.outcasts, snapshot.desired, snapshot.leaving
        for session in self.sessions:
            if session.node_id in snapshot.outcasts:
                self.close(session, GoodbyeReason.REVOKED, GoodbyeReason.REVOKED, snapshot.outcasts[session.node_id])
                continue
            session.leaving = snapshot.leaving
            session.fail_broken(snapshot.broken_groups)
            if session.node_id in snapshot.desired:
                session.wish(snapshot.desired[session.node_id])

    async def report(self, waiting_counts: Mapping[ModelId, int]) -> None:
        """Tells the directory how everyone did since the last time; of nobody, too: that says that somebody is watching.

        Args:
            waiting_counts: the requests that wait for a slot, by model.
        """
        now = self._clock.monotonic_seconds()
        await self._directory.nodes.report([session.report(now) for session in self._sessions.values()], waiting_counts)

    async def stop(self) -> None:
        """Tells every node that the coordinator goes away, and waits for what was still to be told to the directory."""
        for session in self.sessions:
            self.close(session, GoodbyeReason.COORDINATOR_STOPPING, GoodbyeReason.COORDINATOR_STOPPING)
        if self._closings:
            await asyncio.wait(self._closings, timeout=2)

    def _welcome(self, session: NodeSession) -> Welcome:
        return Welcome(
            protocol_version=PROTOCOL_VERSION,
            epoch=session.epoch,
            lease_ttl_ms=self.lease_ttl_ms,
            heartbeat_busy_ms=int(self._limits.heartbeat_busy_seconds * 1000),
            heartbeat_idle_ms=int(self._limits.heartbeat_idle_seconds * 1000),
            desired=session.desired,
            resume_points={attempt_id: relay.next_sequence for attempt_id, relay in session.attempts.items() if not relay.over},
        )

    async def _tell_directory(self, session: NodeSession, goodbye: GoodbyeReason | None) -> bool:
        try:
            await self._directory.nodes.close_session(session.node_id, session.epoch, goodbye)
        except PotluckError as error:
            # It learns of an end by silence too: a node that no gateway reports is not up. It does not learn that the node leaves for good.
            _log.warning("close_session_failed", node_id=session.node_id, code=error.code)
            return False
        return True
