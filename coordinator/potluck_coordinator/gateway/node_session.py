"""One connected node: its lease, its attempts, and what placement sees of its replicas.

Decides which attempts are started again after a broken link, and that a replica is ready when the node's last hello or heartbeat said so.
It measures, for the directory's count of uptime, how long its lease was fresh and its link up. A session outlives its link by a short
grace, so that a broken connection that comes back costs a pause and no attempt. It must not know frames: `link_servicer` feeds it values,
and what it says goes into the link's `outbox`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from potluck_coordinator.desks import NodeReport
from potluck_coordinator.domain.catalogue import ATTACH_KIND
from potluck_coordinator.domain.nodes import Liveness, SignsOfLife, link_grace_seconds, liveness
from potluck_coordinator.domain.placement import ReplicaView, slots_beside_owner
from potluck_coordinator.domain.stall import (
    FIRST_TOKEN_SEQUENCE,
    GAP_BUCKETS,
    GAP_SECONDS_MIN,
    GapCounts,
    Quiet,
    faded,
    gap_p99_seconds,
    prefill_seconds,
)
from potluck_coordinator.domain.suspicion import Standing
from potluck_coordinator.gateway.directory_word import NOTHING_SAID
from potluck_coordinator.gateway.measured_view import measured
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import AttemptId, EngineState, NodeState

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from potluck_coordinator.desks import SessionGrant
    from potluck_coordinator.domain.nodes import LivenessLimits
    from potluck_coordinator.gateway.inference_request import InferenceRequest
    from potluck_coordinator.gateway.measures import Measures
    from potluck_coordinator.gateway.outbox import Outbox
    from potluck_coordinator.gateway.relay import Relay
    from potluck_coordinator.gateway.suspicions import Suspicions
    from potluck_protocol.cards import CardTelemetry
    from potluck_protocol.line import LineMeasurement
    from potluck_protocol.values import (
        DesiredEngine,
        DesiredState,
        EngineStatus,
        Heartbeat,
        Hello,
        ModelId,
        NodeId,
        PeerMeasurement,
        ReplicaId,
        StartAttempt,
    )

ATTEMPTS_PER_NODE_MAX: Final = 1024
"""Over all its replicas, whatever slots they have; beyond it they count as busy, and requests wait."""


class NodeSession:
    """One agent process, from its hello to its goodbye, a link lost for longer than the grace, or the end of its lease."""

    def __init__(self, hello: Hello, grant: SessionGrant, now: float) -> None:
        self.node_id: NodeId = hello.node_id
        self.session_id = hello.session_id
        self.epoch = grant.epoch
        self.owner_account_id = grant.owner_account_id
        self.desired = grant.desired
        self._wished_replica_ids = {wish.replica_id for wish in grant.desired.engines}
        """In this session, ever."""
        self.state = hello.state
        self._rest_causes = hello.rest_causes
        self.engines: dict[ReplicaId, EngineStatus] = {status.replica_id: status for status in hello.engines}
        self.attempts: dict[AttemptId, Relay] = {}
        self.requests: dict[AttemptId, InferenceRequest] = {}
        """What each attempt is one of."""
        self._starts: dict[AttemptId, StartAttempt] = {}
        self._tried: dict[AttemptId, frozenset[NodeId]] = {}
        self._bereaved: set[AttemptId] = set()
        """Those whose engine's death is known."""
        self.attempts_by_replica: dict[ReplicaId, int] = {}
        self._used_replica_ids: set[ReplicaId] = set()
        """Those with attempts since the last report."""
        self._disk_free_bytes = hello.inventory.disk_free_bytes
        self._attached_model_names = hello.inventory.attached_model_names
        self._cards: tuple[CardTelemetry, ...] = hello.cards
        self._peer_measurements: tuple[PeerMeasurement, ...] = ()
        self._line: LineMeasurement | None = hello.inventory.line
        self.heartbeat_at = now
        self._beat_number = 0
        self.heard_at = now
        """When the last frame of any kind came."""
        self._asked_at: float | None = None
        self._gap_counts: dict[ReplicaId, GapCounts] = {}
        self.busy_since: float | None = None
        self.suspect = False
        self.word = NOTHING_SAID
        """The directory's, over replicas of this node and of others."""
        self.vouched_models: frozenset[ModelId] = frozenset()
        """While the coordinator doubts itself: those that nobody else is known to serve; for these the last view of the node holds."""
        self.unrivalled_models: frozenset[ModelId] = frozenset()
        """Those that no replica serves which is trusted: caution would leave requests waiting for nobody better."""
        self.suspicions: Suspicions | None = None
        """What is held against its replicas; None: nothing can be."""
        self.measures: Measures | None = None
        """What was measured of its replicas; None: nothing is."""
        self.losses_per_second = 0.0
        """How often it goes away at this hour, by the directory's word."""
        self.outbox: Outbox | None = None
        """None while the link is down."""
        self.link_lost_at: float | None = None
        self._reported_at = now

    @property
    def signs(self) -> SignsOfLife:
        """What `domain.nodes` judges by."""
        return SignsOfLife(self.heartbeat_at, self.busy_since if self.suspect or self._is_at_work() else None)

    def connect(self, hello: Hello, outbox: Outbox, now: float) -> None:
        """A link, the first or a later one, is there."""
        self.outbox, self.link_lost_at = outbox, None
        self.heartbeat_at = self.heard_at = now
        self.suspect = False
        self.state, self._rest_causes = hello.state, hello.rest_causes
        self.engines = {status.replica_id: status for status in hello.engines}
        self._attached_model_names = hello.inventory.attached_model_names
        self._cards = hello.cards or self._cards
        self._line = hello.inventory.line or self._line

    def grace_seconds(self, limits: LivenessLimits) -> float:
        """How long its link may be away."""
        return link_grace_seconds(self.round_trip_seconds, limits)

    @property
    def round_trip_seconds(self) -> float:
        """As the node measured it; 0: it has not."""
        return (self._line.round_trip_microseconds or 0) / 1e6 if self._line is not None else 0.0

    def beat(self, heartbeat: Heartbeat, now: float) -> None:
        """A sign of life. One that comes again, or late, is none."""
        if heartbeat.number:
            if heartbeat.number <= self._beat_number:
                return
            self._beat_number = heartbeat.number
        if not self.attempts:
            self.busy_since = None
        self.heartbeat_at = now
        self.suspect = False
        self.state, self._rest_causes = heartbeat.state, heartbeat.rest_causes
        self.engines = {status.replica_id: status for status in heartbeat.engines}
        self._disk_free_bytes = heartbeat.disk_free_bytes
        self._cards, self._peer_measurements = heartbeat.cards, heartbeat.peer_measurements
        self._line = heartbeat.line or self._line

    def start(
        self, start: StartAttempt, relay: Relay, now: float, request: InferenceRequest, tried: frozenset[NodeId] = frozenset()
    ) -> None:
        """Sends an attempt to the node; raises NO_CAPACITY if the link has just gone or it has as many as it may."""
        if self.outbox is None or self.outbox.closed or len(self.attempts) >= ATTEMPTS_PER_NODE_MAX:
            raise PotluckError(ErrorCode.NO_CAPACITY, retry_after_seconds=1)
        if self.busy_since is None or not (self.suspect or self._is_at_work()):
            self.busy_since = now
        relay.gap_counts = self._gap_counts.setdefault(start.replica_id, [0] * GAP_BUCKETS)
        self.attempts[start.attempt_id] = relay
        self.requests[start.attempt_id] = request
        self._starts[start.attempt_id] = start
        self._tried[start.attempt_id] = tried
        self.attempts_by_replica[start.replica_id] = self.attempts_by_replica.get(start.replica_id, 0) + 1
        self._used_replica_ids.add(start.replica_id)
        if self.measures is not None:
            self.measures.begin(start.replica_id, start.attempt_id, request, relay)
        self.outbox.start(start)

    def finish(self, attempt_id: AttemptId, replica_id: ReplicaId) -> None:
        """Forgets an attempt; one that the node has not ended itself is cancelled there, whatever ended it here."""
        relay = self.attempts.pop(attempt_id, None)
        if relay is None:
            return
        del self._starts[attempt_id], self._tried[attempt_id], self.requests[attempt_id]
        self._bereaved.discard(attempt_id)
        self.attempts_by_replica[replica_id] -= 1
        if self.measures is not None:
            self.measures.end(attempt_id)
        if not self.attempts and not self.suspect:
            # Of a suspect node only its next sign of life says so: its silence would else look like an idle node's.
            self.busy_since = None
        if not relay.ended_by_node and self.outbox is not None:
            self.outbox.cancel(attempt_id)

    def restart_missing(self, in_flight: frozenset[AttemptId]) -> None:
        """After a new link's hello: an attempt unknown to the node was lost on its way; it starts again if nothing came of it."""
        for attempt_id, relay in self.attempts.items():
            if attempt_id in in_flight or relay.over:
                continue
            if relay.next_sequence == 0 and self.outbox is not None:
                self.outbox.start(self._starts[attempt_id])
            else:
                relay.fail(PotluckError(ErrorCode.NODE_LOST))

    def present_at_death(self, attempt_id: AttemptId) -> tuple[StartAttempt, ...]:
        """Everything that was with the engine which, as the node says of this attempt, has died; nothing where that death is known."""
        start = self._starts.get(attempt_id)
        if start is None or attempt_id in self._bereaved:
            return ()
        present = self.at_engine(start.replica_id)
        self._bereaved.update(other.attempt_id for other in present)
        return present

    def at_engine(self, replica_id: ReplicaId) -> tuple[StartAttempt, ...]:
        """Everything that somebody here waits for and that the replica's engine may be at work on."""
        return tuple(start for start in self._starts.values() if start.replica_id == replica_id and self.is_at_engine(start.attempt_id))

    def is_at_engine(self, attempt_id: AttemptId) -> bool:
        """Whether an engine that lives may be at work on it, also where nobody here waits for it any more."""
        relay = self.attempts.get(attempt_id)
        return relay is not None and not relay.ended_by_node and attempt_id not in self._bereaved

    def tried(self, attempt_id: AttemptId) -> frozenset[NodeId]:
        """The nodes that would not take its request before this one did."""
        return self._tried.get(attempt_id, frozenset())

    def _is_at_work(self) -> bool:
        """Whether the node owes anything. What it has ended may stay here for long, for a slow client or a directory that is away."""
        return any(not relay.ended_by_node for relay in self.attempts.values())

    def acknowledge(self, attempt_id: AttemptId, next_sequence: int) -> None:
        """Tells the node what it may forget, and by how much it may go on."""
        if self.outbox is not None:
            self.outbox.acknowledge(attempt_id, next_sequence)

    def wish(self, desired: DesiredState) -> None:
        """Hands on the directory's wish if it is new."""
        if desired.revision > self.desired.revision:
            self.desired = desired
            self._wished_replica_ids |= {wish.replica_id for wish in desired.engines}
            if self.outbox is not None:
                self.outbox.wish(desired)

    def fail_attempts(self, error: PotluckError) -> None:
        """Every answer on its way from this node ends with the error."""
        for relay in self.attempts.values():
            relay.fail(error)

    def fail_broken(self, broken_groups: Mapping[ReplicaId, str]) -> None:
        """Ends the answers of groups that are no more; the engine of the one that leads may not have noticed yet."""
        for attempt_id, relay in self.attempts.items():
            reason = broken_groups.get(self._starts[attempt_id].replica_id)
            if reason is not None:
                relay.fail(PotluckError(ErrorCode.NODE_LOST, f"The group of nodes that was answering broke: {reason}."))

    def judge(self, now: float, limits: LivenessLimits) -> bool:
        """Notes whether new work should keep away; whether that is news."""
        before, self.suspect = self.suspect, liveness(self.signs, now, limits) is not Liveness.FRESH
        return self.suspect is not before

    def ask_for_beat(self, now: float) -> None:
        """Asks a node that has been quiet to say something, once until it does."""
        if self.outbox is not None and now - self.heard_at >= GAP_SECONDS_MIN and self.asked_seconds(now) is None:
            self._asked_at = now
            self.outbox.ask_for_beat()

    def asked_seconds(self, now: float) -> float | None:
        """How long the node has owed a word that it was asked for."""
        return None if self._asked_at is None or self.heard_at > self._asked_at else now - self._asked_at

    def quiet(self, attempt_id: AttemptId, now: float) -> Quiet:
        """What `domain.stall` judges an attempt by."""
        start, relay = self._starts[attempt_id], self.attempts[attempt_id]
        status = self.engines.get(start.replica_id)
        waiting = (
            self.requests[other_id].prompt_bytes
            for other_id, other in self.attempts.items()
            if other.next_sequence <= FIRST_TOKEN_SEQUENCE and not other.over and self._starts[other_id].replica_id == start.replica_id
        )
        return Quiet(
            attempt_seconds=now - relay.last_chunk_at,
            node_seconds=now - self.heard_at,
            asked_seconds=self.asked_seconds(now),
            streams=start.stream,
            begun=relay.next_sequence > FIRST_TOKEN_SEQUENCE,
            gap_p99_seconds=gap_p99_seconds(self._gap_counts[start.replica_id]),
            prefill_seconds=prefill_seconds(waiting, status.prefill_tokens_per_second if status is not None else None),
        )

    def fade_gaps(self) -> None:
        """What answers were like long ago counts less."""
        for counts in self._gap_counts.values():
            counts[:] = faded(counts)

    def excuse(self, absence_seconds: float, now: float) -> None:
        """Nobody could hear the node in so many of the last seconds. What was heard after them is not moved into the future."""
        self.heartbeat_at = min(now, self.heartbeat_at + absence_seconds)

    def excuse_attempts(self, absence_seconds: float, now: float) -> None:
        """The same, for what is counted in shorter times."""
        if self.link_lost_at is not None:
            self.link_lost_at = min(now, self.link_lost_at + absence_seconds)
        self.heard_at = min(now, self.heard_at + absence_seconds)
        if self._asked_at is not None:
            self._asked_at = min(now, self._asked_at + absence_seconds)
        for relay in self.attempts.values():
            relay.last_chunk_at = min(now, relay.last_chunk_at + absence_seconds)

    def was_wished(self, replica_id: ReplicaId) -> bool:
        """Whether the replica is, or was, this node's to run."""
        return replica_id in self._wished_replica_ids

    def is_ready(self, replica_id: ReplicaId) -> bool:
        """Whether the replica's engine serves, as the node said last."""
        status = self.engines.get(replica_id)
        return status is not None and status.state is EngineState.READY

    def replica_of(self, attempt_id: AttemptId) -> ReplicaId:
        """Where it runs."""
        return self._starts[attempt_id].replica_id

    def unanswered(self) -> list[ReplicaId]:
        """The replicas of everything that is still to be answered, each as often."""
        return [self.replica_of(attempt_id) for attempt_id, relay in self.attempts.items() if not relay.over and not relay.ended_by_node]

    def report(self, now: float) -> NodeReport:
        """What happened since the last report, for the directory's count of uptime and its planning."""
        report = NodeReport(
            node_id=self.node_id,
            epoch=self.epoch,
            covered_seconds=0.0 if self.suspect or self.outbox is None else now - self._reported_at,
            suspect=self.suspect,
            state=self.state,
            engines=tuple(self.engines.values()),
            attempt_counts={replica_id: self.attempts_by_replica.get(replica_id, 0) for replica_id in self._used_replica_ids},
            disk_free_bytes=self._disk_free_bytes,
            cards=self._cards,
            peer_measurements=self._peer_measurements,
            attached_model_names=self._attached_model_names,
            line=self._line,
            decode_tokens_per_second=self._speeds_learned(),
            rest_causes=self._rest_causes,
        )
        self._used_replica_ids = {replica_id for replica_id, count in self.attempts_by_replica.items() if count}
        self._reported_at = now
        return report

    def _speeds_learned(self) -> Mapping[ReplicaId, float]:
        """Since the last report."""
        if self.measures is None:
            return {}
        learned = {replica_id: self.measures.tokens_per_second_since(replica_id, self._reported_at) for replica_id in self.engines}
        return {replica_id: speed for replica_id, speed in learned.items() if speed is not None}

    def replica_views(self, model_id: ModelId | None = None) -> Iterator[ReplicaView]:
        """Its replicas, of one model or all, as placement sees them: what was wished of it, as far as it says that it is there."""
        for wish in self.desired.engines:
            group = wish.group
            if model_id not in {None, wish.model.model_id} or (group is not None and group.rank > 0):
                continue
            status = self.engines.get(wish.replica_id)
            if group is not None and status is not None and status.group_generation != group.generation:
                # Of an earlier generation, on its way out.
                status = None
            yield self._view(wish, status)

    def _view(self, wish: DesiredEngine, status: EngineStatus | None) -> ReplicaView:
        in_flight_count = self.attempts_by_replica.get(wish.replica_id, 0)
        # A node at its bound of attempts has no slot left, whatever its replicas offer.
        room_count = in_flight_count + ATTEMPTS_PER_NODE_MAX - len(self.attempts)
        standing = Standing.TRUSTED if self.suspicions is None else self.suspicions.standing(wish.replica_id)
        is_unrivalled = wish.model.model_id in self.unrivalled_models
        half_open = standing is Standing.HALF_OPEN and not is_unrivalled
        if half_open:
            room_count = min(room_count, 1)
        if wish.engine_kind == ATTACH_KIND and status is not None:
            room_count = slots_beside_owner(room_count, in_flight_count, status.waiting_count)
        slot_count = min(status.slot_count, wish.slot_count, room_count) if status is not None else 0
        view = ReplicaView(
            replica_id=wish.replica_id,
            node_id=self.node_id,
            model_id=wish.model.model_id,
            ready=status is not None and status.state is EngineState.READY and status.slot_count > 0,
            slot_count=slot_count,
            in_flight_count=in_flight_count,
            node_paused=self.state is not NodeState.SERVING,
            node_suspect=standing is Standing.SUSPECTED or (self.suspect and wish.model.model_id not in self.vouched_models),
            link_up=self.outbox is not None and not self.outbox.closed,
            endpoints=status.endpoints if status is not None else (),
            leaving=wish.replica_id in self.word.leaving,
            context_length_tokens=max(0, min(status.context_length_tokens, wish.context_length_tokens)) if status is not None else 0,
            owner_account_id=self.owner_account_id,
            is_trusted=wish.replica_id in self.word.trusted,
            engine_kind=wish.engine_kind,
            losses_per_second=self.losses_per_second,
            half_open=half_open,
            drained="" if is_unrivalled else self.word.drained.get(wish.replica_id, ""),
            weight=self.word.slow.get(wish.replica_id, 1.0),
            heard_at_seconds=self.heartbeat_at,
        )
        if self.measures is None or status is None:
            return view
        return measured(view, status, self.measures, self._line)
