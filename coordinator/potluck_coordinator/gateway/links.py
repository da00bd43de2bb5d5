"""Every node that is connected to this gateway, one `node_session` each.

Decides whether a hello begins a session or goes on with one, by the agent's session id. `domain.nodes` says which sessions end by silence
or a lost link; a goodbye, a newer agent, and a revocation end them too. The directory grants each session its epoch
(`desks.NodeDesk.open_session`), and with it the node's first wish; later ones, and revocations, come with snapshots.
What placement sees of all of them is in a `roster`, kept up where anything changes. It must not know requests: who waits for a slot is told
of new links through `on_change`, what was running hears of its end through its relay.
"""

from __future__ import annotations

import asyncio
from itertools import chain
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import structlog

from potluck_coordinator.domain.forecast import Forecast
from potluck_coordinator.domain.lethal import LoneDeath
from potluck_coordinator.domain.placement import rejection
from potluck_coordinator.domain.survival import LOSSES_PER_SECOND_GUESS
from potluck_coordinator.gateway.deaths_heard import DeathsHeard
from potluck_coordinator.gateway.directory_word import NOTHING_SAID, word_of
from potluck_coordinator.gateway.doorway import Doorway
from potluck_coordinator.gateway.judging import Elsewhere, Judging
from potluck_coordinator.gateway.leases import Leases
from potluck_coordinator.gateway.leavers import Leavers, has_died
from potluck_coordinator.gateway.measures import Measures
from potluck_coordinator.gateway.node_session import NodeSession
from potluck_coordinator.gateway.outbox import Outbox
from potluck_coordinator.gateway.probing import Probing
from potluck_coordinator.gateway.remote_node import RemoteNode
from potluck_coordinator.gateway.reporting import Reporting
from potluck_coordinator.gateway.roster import Roster
from potluck_coordinator.gateway.suspicions import Suspicions
from potluck_coordinator.pool_snapshot import PoolSnapshot
from potluck_protocol.culprits import Culprits
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import EngineState, GoodbyeReason, NodeId

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator, Mapping

    from potluck_coordinator.desks import DirectoryPort
    from potluck_coordinator.domain.nodes import LivenessLimits
    from potluck_coordinator.gateway.inference_request import InferenceRequest
    from potluck_coordinator.gateway.remote_node import Host
    from potluck_protocol.clock import Clock
    from potluck_protocol.culprits import Fingerprint
    from potluck_protocol.values import AccountId, AttemptId, Heartbeat, Hello, ModelId, ReplicaId, Welcome

_log = structlog.get_logger()


class Links:
    """The connected nodes.

    Args:
        directory: grants epochs, hears of ends and of uptime.
        limits: the lease and its companions.
        clock: whose monotonic seconds leases are counted in.
        on_change: called when a link has brought replicas; those that a node's word or an end makes usable are found by whoever looks.
    """

    def __init__(self, directory: DirectoryPort, limits: LivenessLimits, clock: Clock, on_change: Callable[[], None]) -> None:
        self._directory = directory
        self._limits = limits
        self._clock = clock
        self._on_change = on_change
        self._gateway_epoch = 0
        self.culprits = Culprits(clock.monotonic_seconds)
        """Which requests engines of these nodes died of, as far as this process saw it."""
        self.refused_requests: frozenset[Fingerprint] = frozenset()
        """For good, as the directory says."""
        self.suspect_requests: Mapping[Fingerprint, AccountId] = {}
        """Those that had one engine to themselves when it died, and whose that was."""
        self._leavers = Leavers(clock.monotonic_seconds)
        self._deaths_heard = DeathsHeard()
        self._sessions: dict[NodeId, NodeSession] = {}
        self.remote: Mapping[NodeId, RemoteNode] = {}
        """Nodes whose links other gateways have."""
        self.measures = Measures(clock.monotonic_seconds)
        self.usual: Callable[[ModelId], Forecast] = lambda _: Forecast()
        """What requests of a model usually are; whoever learns it says so here."""
        self._roster = Roster(lambda model_id: self.usual(model_id))  # noqa: PLW0108 - it is said later
        self._changed: set[NodeId] = set()
        """Whose replicas may be others than in the roster."""
        self._opening: WeakValueDictionary[NodeId, asyncio.Lock] = WeakValueDictionary()
        """Of those that connect now: each is gone when nobody holds it."""
        self._snapshot = PoolSnapshot()
        self.word = NOTHING_SAID
        """The directory's, which every session is given."""
        self._closings: set[asyncio.Task[bool]] = set()
        self._ticked_at = clock.monotonic_seconds()
        self.suspicions = Suspicions(clock.monotonic_seconds)
        self._judging = Judging(limits, self._elsewhere, self.suspicions, self.node_changed, self.tick)
        self._reporting = Reporting(directory, limits.lease_ttl_seconds)
        self.leases = Leases(limits)
        self._doorway = Doorway()
        self._probing = Probing(self.suspicions, self.node_changed, self.finish, clock.monotonic_seconds)

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def sessions(self) -> tuple[NodeSession, ...]:
        """Everyone who is in."""
        return tuple(self._sessions.values())

    @property
    def outcasts(self) -> Mapping[NodeId, str]:
        """Whom the link port turns away, and why."""
        return self._snapshot.outcasts

    def node_changed(self, node_id: NodeId) -> None:
        """To be called after anything that changes a node's replicas: its word, an attempt's start or end. It costs nothing here."""
        self._changed.add(node_id)

    async def is_enrolled(self, node_id: NodeId) -> bool:
        """Whether the books have the node as an active one.

        Of one with a session they had, and would have ended it by a snapshot: a link that comes back waits for no directory that is away.
        """
        return node_id in self._sessions or await self._directory.enrolment.is_enrolled(node_id)

    def session(self, node_id: NodeId) -> NodeSession | None:
        """The node's session, if it has one."""
        return self._sessions.get(node_id)

    def host(self, node_id: NodeId) -> Host | None:
        """By which attempts on the node are started: its session, or what another gateway said of it."""
        return self._sessions.get(node_id) or self.remote.get(node_id)

    @property
    def hosts(self) -> Iterator[Host]:
        """Of all nodes that requests of this gateway may run on."""
        return chain(self._sessions.values(), (remote for node_id, remote in self.remote.items() if node_id not in self._sessions))

    def engine_died(self, session: NodeSession, attempt_id: AttemptId) -> None:
        """A node says that an attempt's engine died while it worked on it."""
        # Probes are worded anew each time: to remember one would refuse nothing.
        present = [start for start in session.present_at_death(attempt_id) if start.attempt_id not in self._probing.attempt_ids]
        if not present:
            return
        replica_id = present[0].replica_id
        _log.warning("engine_died", node_id=session.node_id, replica_id=replica_id, attempts_lost=len(present))
        requests = [session.requests[start.attempt_id] for start in present]
        fingerprints = {request.fingerprint(self.culprits) for request in requests} | self._leavers.take(replica_id)
        self.culprits.died(fingerprints)
        if len(fingerprints) == 1 and self._deaths_heard.hears(session.node_id, self._clock.monotonic_seconds()):
            owner = session.owner_account_id
            is_only_owner = not self.others_can_take(requests[0], owner, session.tried(attempt_id))
            fingerprint = fingerprints.pop()
            # Until the directory says so itself: the request goes on at once, and should do so with another owner.
            self.suspect_requests = {fingerprint: owner, **self.suspect_requests}
            self._tell(self._directory.lethal.report_death(LoneDeath(attempt_id, fingerprint, owner, is_only_owner)))

    def beat(self, session: NodeSession, heartbeat: Heartbeat, now: float) -> None:
        """A node's sign of life. Where an engine has died with which nobody stayed, nothing but this tells so."""
        before = session.engines
        session.beat(heartbeat, now)
        self.node_changed(session.node_id)
        for replica_id, status in before.items():
            if status.state is EngineState.READY and not session.is_ready(replica_id):
                self._began_anew(session, replica_id)
        for replica_id, status in session.engines.items():
            if has_died(before.get(replica_id), status) and not session.at_engine(replica_id):
                self._deserted_engine_died(session, replica_id)

    def beat_again(self, session: NodeSession, beat_number: int, now: float) -> None:
        """A sign of life that says what the last one said. Where nothing runs, placement sees the same as before."""
        was_suspect = session.suspect
        if session.touch(beat_number, now) and (was_suspect or session.attempts):
            self.node_changed(session.node_id)

    def _began_anew(self, session: NodeSession, replica_id: ReplicaId) -> None:
        """A node's word ends what is believed of its own replicas, and of nobody else's."""
        if session.was_wished(replica_id):
            self.measures.began_anew(replica_id)

    def _deserted_engine_died(self, session: NodeSession, replica_id: ReplicaId) -> None:
        """Of whoever left it, maybe: they are refused for a while only. For good is what an engine was seen to work on to its end."""
        if all(view.replica_id != replica_id for view in session.replica_views()):
            return  # Another node's maybe, whatever this one says.
        suspects = self._leavers.take(replica_id)
        if suspects:
            _log.warning("deserted_engine_died", node_id=session.node_id, replica_id=replica_id, leavers_count=len(suspects))
            self.culprits.died(suspects)

    def finish(self, session: Host, attempt_id: AttemptId, replica_id: ReplicaId) -> None:
        """Nobody waits for an attempt any more. Its engine may be at it still and die of it, whoever else is there then.

        Its body is hashed here, on the loop, also where no engine ever died: milliseconds for one of megabytes. To keep bodies instead, in
        case their engine dies, would take memory.
        """
        if isinstance(session, NodeSession):
            relay = session.attempts.get(attempt_id)
            if relay is not None and attempt_id not in self._probing.attempt_ids:
                self.suspicions.over(session, replica_id, relay.answer_kind)
            if session.is_at_engine(attempt_id):
                self._leavers.left(replica_id, session.requests[attempt_id].fingerprint(self.culprits))
        session.finish(attempt_id, replica_id)
        self.node_changed(session.node_id)

    def stood(self, fingerprint: Fingerprint) -> None:
        """A request was answered in full."""
        self.culprits.clear(fingerprint)
        if fingerprint in self.suspect_requests:
            # Also where the directory has never heard of it, so that no news will say so.
            self.suspect_requests = {one: owner for one, owner in self.suspect_requests.items() if one != fingerprint}
            self._tell(self._directory.lethal.clear(fingerprint))

    @property
    def knows_lethal_requests(self) -> bool:
        """Whether there is anything to look a request up in: where engines do not die, only requests that were given up are hashed."""
        return self.culprits.has_any or bool(self.refused_requests or self.suspect_requests)

    def registered(self, epoch: int, fingerprint_key: bytes) -> None:
        """This gateway's epoch, and the pool's key; called before the first node connects."""
        self._gateway_epoch, self.culprits = epoch, Culprits(self._clock.monotonic_seconds, fingerprint_key)

    def others_can_take(self, request: InferenceRequest, owner: AccountId, tried: frozenset[NodeId] = frozenset()) -> bool:
        """Whether a node of another owner could answer the request, now or when it has a slot free; those `tried` would not."""
        others = (other.replica_views(request.model_id) for other in self.hosts if other.owner_account_id != owner)
        needs = request.endpoint, tried, request.prompt_tokens_min
        return any(rejection(replica, *needs, trusted_only=request.trusted_only) is None for views in others for replica in views)

    def _elsewhere(self, request: InferenceRequest, out: frozenset[NodeId]) -> Elsewhere:
        roster, needs = self.roster(), (request.endpoint, frozenset[NodeId](), request.prompt_tokens_min)
        able = [
            (len(kind), kind.free_count, *roster.count_on(kind, out)[:2])
            for kind in roster.kinds(request.model_id)
            if rejection(kind.sample, *needs, trusted_only=request.trusted_only) is None
        ]
        has_any = any(count > out_count for count, _, out_count, _ in able)
        return Elsewhere(has_any, any(free_count > out_free_count for _, free_count, _, out_free_count in able))

    def _tell(self, telling: Coroutine[Any, Any, None]) -> None:
        """Beside the reading loop. What does not reach the directory is known to this gateway alone."""

        async def tell() -> bool:
            try:
                await telling
            except PotluckError as error:
                _log.warning("lethal_request_not_told", code=error.code)
                return False
            return True

        task = asyncio.ensure_future(tell())
        self._closings.add(task)
        task.add_done_callback(self._closings.discard)

    def kills_engines(self, session: NodeSession, attempt_id: AttemptId) -> bool:
        """Whether the attempt's request is known to."""
        request = session.requests.get(attempt_id)
        return request is not None and self.culprits.is_refused(request.fingerprint(self.culprits))

    def roster(self) -> Roster:
        """Every replica of the connected nodes as it is now; true for no longer than until the next call."""
        while self._changed:
            node_id = self._changed.pop()
            host = self.host(node_id)
            self._roster.enter(node_id, host.replica_views() if host is not None else ())
        return self._roster

    def answer_began(self, session: NodeSession) -> None:
        """An attempt's first bytes are there: its replica has one prompt less to read, and may take another."""
        self.node_changed(session.node_id)
        self._on_change()

    async def connect(self, hello: Hello) -> tuple[NodeSession, Outbox, Welcome]:
        """Begins the node's session, or goes on with it over a new link.

        Raises:
            PotluckError: INVALID_CERTIFICATE from the directory for a node that may not serve, QUEUE_FULL for one that should come again.
        """
        async with self._opening.setdefault(hello.node_id, asyncio.Lock()):
            session = self._sessions.get(hello.node_id)
            if session is not None and session.session_id != hello.session_id:
                # The agent was started anew: what ran in the old process is lost, whatever its lease says.
                self.close(session, None, GoodbyeReason.REPLACED)
                session = None
            if session is None:
                with self._doorway.place():
                    grant = await self._directory.nodes.open_session(hello, gateway_epoch=self._gateway_epoch)
                if hello.node_id in self._snapshot.outcasts:
                    # The snapshot that says so came while the directory's answer was on its way.
                    raise PotluckError(ErrorCode.INVALID_CERTIFICATE)
                session = self._sessions[hello.node_id] = NodeSession(hello, grant, self._clock.monotonic_seconds())
                session.wish(self._snapshot.desired.get(hello.node_id, grant.desired))  # it may have come in that time, too
                session.word = self.word
                session.suspicions, session.measures = self.suspicions, self.measures
                session.losses_per_second = self._snapshot.losses_per_second.get(session.node_id, LOSSES_PER_SECOND_GUESS)
                _log.info("node_connected", node_id=hello.node_id, epoch=session.epoch, agent_version=hello.agent_version)
            elif session.outbox is not None:
                session.outbox.close(GoodbyeReason.REPLACED, "A newer link of this node took over.")
            outbox = Outbox()
            session.connect(hello, outbox, self._clock.monotonic_seconds())
            self.node_changed(hello.node_id)
        session.restart_missing(frozenset(hello.in_flight))
        self._on_change()
        return session, outbox, self.leases.welcome(session, self.word.link_addresses(self._gateway_epoch))

    def disconnect(self, session: NodeSession, outbox: Outbox, goodbye: GoodbyeReason | None) -> asyncio.Task[bool] | None:
        """A link has ended; without a goodbye the session waits out its grace.

        With one: whether the directory knows of it; None where the session was over already.
        """
        if session.outbox is not outbox or self._sessions.get(session.node_id) is not session:
            return None
        now = self._clock.monotonic_seconds()
        session.lose_link(now)
        self.node_changed(session.node_id)
        if goodbye is not None:
            self.suspicions.left(session)
            return self.close(session, goodbye)
        self._judging.look_in(session.grace_seconds(self._limits), now)
        return None

    def close(
        self, session: NodeSession, goodbye: GoodbyeReason | None, farewell: GoodbyeReason | None = None, words: str = ""
    ) -> asyncio.Task[bool]:
        """Ends a session and every attempt in it; whether the directory knows. A node that still listens is told `farewell`, and why."""
        if self._sessions.get(session.node_id) is session:
            del self._sessions[session.node_id]
        self.node_changed(session.node_id)
        if farewell is not None and session.outbox is not None:
            session.outbox.close(farewell, words)
        session.outbox = None
        if goodbye is None:
            self._judging.lost(session.node_id, self._clock.monotonic_seconds())
            if not self._judging.in_doubt:
                self.suspicions.lost(session)
        session.fail_attempts(PotluckError(ErrorCode.NODE_LOST))
        for replica_id in session.engines:
            self._began_anew(session, replica_id)
        _log.info("node_gone", node_id=session.node_id, epoch=session.epoch, goodbye=goodbye, attempts_lost=len(session.attempts))
        task = asyncio.ensure_future(self._tell_directory(session, goodbye))
        self._closings.add(task)
        task.add_done_callback(self._closings.discard)
        return task

    def tick(self) -> None:
        """Judges every node by the clock: called a few times a second."""
        now = self._clock.monotonic_seconds()
        absence_seconds, self._ticked_at = now - self._ticked_at, now
        self._judging.forgive(self._sessions.values(), absence_seconds, now)
        for session, reason in self._judging.look(self._sessions, now):
            _log.warning("session_ended", node_id=session.node_id, reason=reason, silence_seconds=round(now - session.heartbeat_at, 3))
            self.close(session, None, GoodbyeReason.LEASE_ENDED)
        self._probing.start_due(self._sessions.values())

    def take_snapshot(self, snapshot: PoolSnapshot) -> None:
        """Hands the directory's news to the nodes: new wishes, the end of broken groups' answers, and the end for those revoked."""
        self._snapshot = snapshot
        former_ways, self.word = self.word.link_addresses(self._gateway_epoch), word_of(snapshot)
        ways = self.word.link_addresses(self._gateway_epoch)
        self.refused_requests, self.suspect_requests = snapshot.refused_requests, snapshot.suspect_requests
        self._judging.drained = frozenset(snapshot.drained_replicas)
        are_forgotten = self.suspicions.retain(engine.replica_id for desired in snapshot.desired.values() for engine in desired.engines)
        for session in self.sessions:
            before = session.word, session.desired, session.losses_per_second
            if session.node_id in snapshot.outcasts:
                self.close(session, GoodbyeReason.REVOKED, GoodbyeReason.REVOKED, snapshot.outcasts[session.node_id])
                continue
            if ways not in {(), former_ways} and session.outbox is not None:
                session.outbox.show_ways(ways)
            session.word = self.word
            session.losses_per_second = snapshot.losses_per_second.get(session.node_id, LOSSES_PER_SECOND_GUESS)
            session.fail_broken(snapshot.broken_groups)
            if session.node_id in snapshot.desired:
                session.wish(snapshot.desired[session.node_id])
            if are_forgotten or before != (session.word, session.desired, session.losses_per_second):
                self.node_changed(session.node_id)

    async def report(self, waiting_counts: Mapping[ModelId, int]) -> int:
        """Tells the directory how everyone did since the last time, and is told how many should go elsewhere; of nobody, too: it watches.

        Args:
            waiting_counts: the requests that wait for a slot, and the people whose requests were refused lately, by model.
        """
        return await self._reporting.report(self._sessions.values(), waiting_counts, self._clock.monotonic_seconds(), self._gateway_epoch)

    async def stop(self) -> None:
        """Tells every node that the coordinator goes away, and waits for what was still to be told to the directory."""
        await self._probing.stop()
        for session in self.sessions:
            self.close(session, GoodbyeReason.COORDINATOR_STOPPING, GoodbyeReason.COORDINATOR_STOPPING)
        if self._closings:
            await asyncio.wait(self._closings, timeout=2)

    async def _tell_directory(self, session: NodeSession, goodbye: GoodbyeReason | None) -> bool:
        try:
            await self._directory.nodes.close_session(session.node_id, session.epoch, goodbye)
        except PotluckError as error:
            # It learns of an end by silence too: a node that no gateway reports is not up. It does not learn that the node leaves for good.
            _log.warning("close_session_failed", node_id=session.node_id, code=error.code)
            return False
        return True
