"""One connected node: its lease, its attempts, and what placement sees of its replicas.

Decides which attempts are started again after a broken link, and that a replica is ready when the node's last hello or heartbeat said so.
It measures, for the directory's count of uptime, how long its lease was fresh and its link up. A session outlives its link by a short
grace, so that a broken connection that comes back costs a pause and no attempt. It must not know frames: `link_servicer` feeds it values,
and what it says goes into the link's `outbox`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from potluck_coordinator.domain.nodes import Granted, Liveness, SignsOfLife, link_grace_seconds, liveness
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
from potluck_coordinator.gateway.directory_word import NOTHING_SAID
from potluck_coordinator.gateway.node_word import NodeWord
from potluck_coordinator.gateway.replica_view import ATTEMPTS_PER_NODE_MAX, is_serving, view_of
from potluck_coordinator.gateway.telling import Telling
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import AttemptId, EngineState

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from potluck_coordinator.desks import SessionGrant
    from potluck_coordinator.domain.nodes import LivenessLimits
    from potluck_coordinator.domain.placement import ReplicaView
    from potluck_coordinator.gateway.inference_request import InferenceRequest
    from potluck_coordinator.gateway.measures import Measures
    from potluck_coordinator.gateway.outbox import Outbox
    from potluck_coordinator.gateway.relay import Relay
    from potluck_coordinator.gateway.suspicions import Suspicions
    from potluck_protocol.values import (
        DesiredEngine,
        DesiredState,
        EngineStatus,
        Heartbeat,
        Hello,
        ModelId,
        NodeId,
        ReplicaId,
        StartAttempt,
    )


class NodeSession:
    """One agent process, from its hello to its goodbye, a link lost for longer than the grace, or the end of its lease."""

    is_leaving = False
    """It begins nothing new, and goes to another gateway when it has nothing left to do."""
    beat_number = 0
    """Of the newest heartbeat; 0: it has no number."""
    counts_by_number = False
    """Whether its agent is known to count its lease from the heartbeat that was answered (`domain.nodes.renewal_is_due`)."""

    def __init__(self, hello: Hello, grant: SessionGrant, now: float) -> None:
        self.node_id: NodeId = hello.node_id
        self.session_id = hello.session_id
        self.epoch = grant.epoch
        self.owner_account_id = grant.owner_account_id
        self.desired = grant.desired
        self.is_in_group = _has_group(grant.desired)
        """Whether it serves, or is to serve, a model together with other nodes; behind the leader it has no attempts of its own."""
        self._wished_replica_ids = {wish.replica_id for wish in grant.desired.engines}
        """In this session, ever."""
        self.state = hello.state
        self.machine = NodeWord(hello)
        self.engines: dict[ReplicaId, EngineStatus] = {status.replica_id: status for status in hello.engines}
        self.attempts: dict[AttemptId, Relay] = {}
        self.requests: dict[AttemptId, InferenceRequest] = {}
        """What each attempt is one of."""
        self._starts: dict[AttemptId, StartAttempt] = {}
        self._tried: dict[AttemptId, frozenset[NodeId]] = {}
        self._bereaved: set[AttemptId] = set()
        """Those whose engine's death is known."""
        self.attempts_by_replica: dict[ReplicaId, int] = {}
        self.used_replica_ids: set[ReplicaId] = set()
        """Those with attempts since the last report."""
        self.heartbeat_at = self.heard_at = now
        """When the last heartbeat came, and the last frame of any kind."""
        self.granted = Granted()
        self.look_at = -math.inf
        """Before then it needs no look by the clock."""
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
        self.telling = Telling(now)

    @property
    def signs(self) -> SignsOfLife:
        """What `domain.nodes` judges by."""
        busy_since = self.busy_since if self.suspect or self._is_at_work() else None
        return SignsOfLife(self.heartbeat_at, busy_since, self.granted)

    def connect(self, hello: Hello, outbox: Outbox, now: float) -> None:
        """A link, the first or a later one, is there."""
        self.cover(now)
        self.outbox, self.link_lost_at = outbox, None
        self.heartbeat_at = self.heard_at = now
        self.suspect, self.look_at = False, -math.inf
        self.state = hello.state
        self.engines = {status.replica_id: status for status in hello.engines}
        self.machine.begin(hello)

    def grace_seconds(self, limits: LivenessLimits) -> float:
        """How long its link may be away."""
        return link_grace_seconds(self.round_trip_seconds, limits)

    @property
    def round_trip_seconds(self) -> float:
        """As the node measured it; 0: it has not."""
        line = self.machine.line
        return (line.round_trip_microseconds or 0) / 1e6 if line is not None else 0.0

    def cover(self, now: float) -> None:
        """Counts the time until now as its lease and its link are: called before either changes, and before it is told."""
        self.telling.count(now, is_fresh=not self.suspect and self.outbox is not None)

    def lose_link(self, now: float) -> None:
        """Its link has ended."""
        self.cover(now)
        self.outbox, self.link_lost_at, self.look_at = None, now, -math.inf

    def has_heard(self, beat_number: int) -> bool:
        """Whether a heartbeat comes again, or late: then it is no sign of life."""
        return 0 < beat_number <= self.beat_number

    def touch(self, beat_number: int, now: float) -> bool:
        """A sign of life; whether it is one."""
        if self.has_heard(beat_number):
            return False
        self.beat_number = beat_number or self.beat_number
        if not self.attempts:
            self.busy_since = None
        self.heartbeat_at = now
        if self.suspect:
            self.cover(now)
            self.suspect = False
        return True

    def beat(self, heartbeat: Heartbeat, now: float) -> None:
        """A sign of life, and what it says."""
        if not self.touch(heartbeat.number, now):
            return
        before = self.state, self.engines
        self.state, self.engines = heartbeat.state, {status.replica_id: status for status in heartbeat.engines}
        if self.machine.take(heartbeat) or before != (self.state, self.engines):
            self.telling.has_news = True

    def start(
        self, start: StartAttempt, relay: Relay, now: float, request: InferenceRequest, tried: frozenset[NodeId] = frozenset()
    ) -> None:
        """Sends an attempt to the node; raises NO_CAPACITY if the link has just gone or it has as many as it may."""
        if self.outbox is None or self.outbox.closed or len(self.attempts) >= ATTEMPTS_PER_NODE_MAX:
            raise PotluckError(ErrorCode.NO_CAPACITY, retry_after_seconds=1)
        if self.busy_since is None or not (self.suspect or self._is_at_work()):
            self.busy_since = now
        self.look_at, self.telling.has_news = -math.inf, True
        relay.gap_counts = self._gap_counts.setdefault(start.replica_id, [0] * GAP_BUCKETS)
        self.attempts[start.attempt_id], self.requests[start.attempt_id] = relay, request
        self._starts[start.attempt_id] = start
        self._tried[start.attempt_id] = tried
        self.attempts_by_replica[start.replica_id] = self.attempts_by_replica.get(start.replica_id, 0) + 1
        self.used_replica_ids.add(start.replica_id)
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
        self.telling.has_news = True
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
            has_ended = (relay := self.attempts.get(attempt_id)) is not None and relay.ended_by_node
            self.outbox.acknowledge(attempt_id, next_sequence, can_wait=has_ended)

    def wish(self, desired: DesiredState) -> None:
        """Hands on the directory's wish if it is new."""
        if desired.revision > self.desired.revision:
            self.desired, self.is_in_group = desired, _has_group(desired)
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
        suspect = liveness(self.signs, now, limits) is not Liveness.FRESH
        if suspect is self.suspect:
            return False
        self.cover(now)
        self.suspect = suspect
        return True

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
            round_trip_seconds=self.round_trip_seconds,
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

    def replica_views(self, model_id: ModelId | None = None) -> Iterator[ReplicaView]:
        """Its replicas, of one model or all, as placement sees them: what was wished of it, as far as it says that it is there."""
        for wish, status in self._replicas():
            if model_id in {None, wish.model.model_id}:
                yield view_of(self, wish, status)

    def models(self, *, ready_only: bool = False) -> frozenset[ModelId]:
        """Those of its replicas, or of those whose engines serve. A view of each replica would take a hundred times as long."""
        return frozenset(wish.model.model_id for wish, status in self._replicas() if not ready_only or is_serving(status))

    def _replicas(self) -> Iterator[tuple[DesiredEngine, EngineStatus | None]]:
        """What was wished of it, but for stages behind a group's leader, with what it says of that."""
        for wish in self.desired.engines:
            group = wish.group
            if group is not None and group.rank > 0:
                continue
            status = self.engines.get(wish.replica_id)
            if group is not None and status is not None and status.group_generation != group.generation:
                # Of an earlier generation, on its way out.
                status = None
            yield wish, status


def _has_group(desired: DesiredState) -> bool:
    return any(wish.group is not None for wish in desired.engines)
