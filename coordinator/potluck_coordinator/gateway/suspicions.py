"""What is held against the replicas of this gateway's nodes, whichever session they are of: a node that comes back is no other one.

Decides which ends of attempts speak for or against a replica: a node lost, a stall, an answer broken off by an engine that blames no
request, an error where another node answers. What follows is `domain.suspicion`'s. Neither what a client or its request did, nor an owner's
pause, nor a silence that may be the coordinator's own counts. It must not know links; `probing` makes the probes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from potluck_coordinator.domain.suspicion import (
    AnswerKind,
    Standing,
    Suspicion,
    after_error,
    after_failure,
    after_probe,
    after_refusal,
    after_refused_body,
    after_success,
    is_forgotten,
    probe_is_due,
)
from potluck_protocol.errors import ErrorCode
from potluck_protocol.values import NodeState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from potluck_coordinator.gateway.node_session import NodeSession
    from potluck_protocol.values import ReplicaId

_log = structlog.get_logger()


class Suspicions:
    """One `Suspicion` for each replica that failed lately.

    Args:
        now: monotonic seconds.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._suspicions: dict[ReplicaId, Suspicion] = {}

    def standing(self, replica_id: ReplicaId) -> Standing:
        """What the replica gets."""
        suspicion = self._suspicions.get(replica_id)
        return Standing.TRUSTED if suspicion is None else suspicion.standing

    def failed(self, replica_id: ReplicaId) -> None:
        """An attempt of the replica failed, and not by its request."""
        self._put(replica_id, after_failure(self._suspicions.get(replica_id, Suspicion()), self._now()))

    def refused(self, session: NodeSession, replica_id: ReplicaId) -> None:
        """The replica would not take an attempt, or gave it back. By its node's last word it had room; a node that rests has said so."""
        if session.state is NodeState.SERVING:
            self._put(replica_id, after_refusal(self._suspicions.get(replica_id, Suspicion()), self._now()))

    def left(self, session: NodeSession) -> None:
        """The node said goodbye to everything that it had still to answer."""
        for replica_id in set(session.unanswered()):
            self.refused(session, replica_id)

    def lost(self, session: NodeSession) -> None:
        """The node went away from everything that it had still to answer."""
        for replica_id in session.unanswered():
            self.failed(replica_id)

    def over(self, session: NodeSession, replica_id: ReplicaId, answer: AnswerKind | None) -> None:
        """A client's attempt is over, and that is what its engine answered."""
        match answer:
            case AnswerKind.GOOD if (suspicion := self._suspicions.get(replica_id)) is not None:
                self._put(replica_id, after_success(suspicion))
            case AnswerKind.BUSY:
                self.refused(session, replica_id)
            case AnswerKind.ERROR:
                self._put(replica_id, after_error(self._suspicions.get(replica_id, Suspicion()), self._now()))

    def outdone(self, session: NodeSession, replica_id: ReplicaId, code: ErrorCode, *, by_its_like: bool) -> None:
        """Another node answers what this replica had that error for: then it was not the request.

        What one engine stumbles over another may know how to answer, so it counts only where an engine of the same kind (`by_its_like`)
        answers. Elsewhere it stays what `over` has counted it for: an error, of which a probe shows whose it was. That contexts differ in
        length is no fault.
        """
        if not by_its_like:
            return
        match code:
            case ErrorCode.ENGINE_FAILED:
                self.failed(replica_id)
            case ErrorCode.INVALID_REQUEST if session.state is NodeState.SERVING:
                self._put(replica_id, after_refused_body(self._suspicions.get(replica_id, Suspicion()), self._now()))

    def probed(self, replica_id: ReplicaId, *, succeeded: bool, answered: bool) -> None:
        """What a probe has shown."""
        if (suspicion := self._suspicions.get(replica_id)) is not None:
            self._put(replica_id, after_probe(suspicion, self._now(), succeeded=succeeded, answered=answered))

    def due(self) -> Iterable[ReplicaId]:
        """Those to be probed now; what was held against others and is old is forgotten."""
        now = self._now()
        for replica_id in [replica_id for replica_id, suspicion in self._suspicions.items() if is_forgotten(suspicion, now)]:
            del self._suspicions[replica_id]
        return [replica_id for replica_id, suspicion in self._suspicions.items() if probe_is_due(suspicion, now)]

    @property
    def half_open(self) -> frozenset[ReplicaId]:
        """Those that get one request at a time."""
        return frozenset(replica_id for replica_id, suspicion in self._suspicions.items() if suspicion.standing is Standing.HALF_OPEN)

    def retain(self, replica_ids: Iterable[ReplicaId]) -> bool:
        """Forgets all others: replicas that are no longer wished anywhere. Whether there were any."""
        known_count = len(self._suspicions)
        if known_count:
            self._suspicions = {known: self._suspicions[known] for known in self._suspicions.keys() & set(replica_ids)}
        return len(self._suspicions) < known_count

    def _put(self, replica_id: ReplicaId, suspicion: Suspicion) -> None:
        before = self.standing(replica_id)
        self._suspicions[replica_id] = suspicion
        if suspicion.standing is not before:
            _log.info("replica_standing_changed", replica_id=replica_id, before=before, now=suspicion.standing)
