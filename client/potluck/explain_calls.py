"""The calls that ask why: why a request ran where it did, why it waits, why a node has what it has.

Decides how the coordinator's reasons become results. It must not know how they are shown.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from potluck.calls import POOL_SERVICE, Call
from potluck_protocol.v1 import pool_pb2
from potluck_protocol.values import AccountId, AttemptId, ModelId, NodeId, ReplicaId, RequestId


@dataclass(frozen=True, slots=True)
class CandidateInfo:
    """One replica that a request could have had, or several that lost for the same reason."""

    node_id: NodeId
    """Empty where several are meant."""
    replica_id: ReplicaId
    replica_count: int
    chosen: bool
    reason: str
    cost_seconds: float | None
    """None: it could not be chosen at all."""
    terms_seconds: dict[str, float]
    """What the cost is made of, by name."""


@dataclass(frozen=True, slots=True)
class RequestStepInfo:
    """One thing that was decided over a request, or that happened to it."""

    elapsed_ms: int
    kind: str
    """One word, such as "waits", "placed", "failed", "continued" or "answered"."""
    node_id: NodeId
    attempt_id: AttemptId
    words: str
    candidates: tuple[CandidateInfo, ...]


@dataclass(frozen=True, slots=True)
class RequestStory:
    """One request of the last minutes."""

    request_id: RequestId
    account_id: AccountId
    model_id: ModelId
    arrived_at_unix_ms: int
    steps: tuple[RequestStepInfo, ...]


@dataclass(frozen=True, slots=True)
class WaitingInfo:
    """Where a request stands that waits, or why it does not."""

    waiting: bool
    words: str
    position: int
    """1 comes next."""
    waiting_count: int
    waited_ms: int
    predicted_wait_ms: int | None
    deadline_ms: int
    candidates: tuple[CandidateInfo, ...]


@dataclass(frozen=True, slots=True)
class ReplicaVerdictInfo:
    """One replica of a node, now and in the placements of the last minutes."""

    replica_id: ReplicaId
    model_id: ModelId
    hurdle: str
    """Why it takes no request now; empty where it does."""
    slot_count: int
    running_count: int
    considered_count: int
    chosen_count: int
    losses: dict[str, int]


@dataclass(frozen=True, slots=True)
class NodeShare:
    """Why a node gets the requests that it gets."""

    watched_seconds: int
    placement_count: int
    """Of the models that it has."""
    replicas: tuple[ReplicaVerdictInfo, ...]


def explain_request(request_id: RequestId) -> Call[pool_pb2.ExplainRequestResponse, RequestStory]:
    """What was decided over a request, one's own or as the operator anyone's; NOT_FOUND after some minutes."""
    return Call(
        POOL_SERVICE + "ExplainRequest",
        pool_pb2.ExplainRequestRequest(request_id=request_id),
        pool_pb2.ExplainRequestResponse,
        lambda reply: RequestStory(
            request_id=RequestId(reply.request_id),
            account_id=AccountId(reply.account_id),
            model_id=ModelId(reply.model_id),
            arrived_at_unix_ms=reply.arrived_at_unix_ms,
            steps=tuple(_step(message) for message in reply.steps),
        ),
    )


def explain_waiting(request_id: RequestId) -> Call[pool_pb2.ExplainWaitingResponse, WaitingInfo]:
    """What a request waits for; NOT_FOUND for one that this pool does not know any more."""
    return Call(
        POOL_SERVICE + "ExplainWaiting",
        pool_pb2.ExplainWaitingRequest(request_id=request_id),
        pool_pb2.ExplainWaitingResponse,
        lambda reply: WaitingInfo(
            waiting=reply.waiting,
            words=reply.words,
            position=reply.position,
            waiting_count=reply.waiting_count,
            waited_ms=reply.waited_ms,
            predicted_wait_ms=reply.predicted_wait_ms if reply.HasField("predicted_wait_ms") else None,
            deadline_ms=reply.deadline_ms,
            candidates=_candidates(reply.candidates),
        ),
    )


def explain_node(node_id: NodeId) -> Call[pool_pb2.ExplainNodeResponse, NodeShare]:
    """Why a node gets what it gets, one's own or as the operator anyone's."""
    return Call(
        POOL_SERVICE + "ExplainNode",
        pool_pb2.ExplainNodeRequest(node_id=node_id),
        pool_pb2.ExplainNodeResponse,
        lambda reply: NodeShare(
            watched_seconds=reply.watched_seconds,
            placement_count=reply.placement_count,
            replicas=tuple(
                ReplicaVerdictInfo(
                    replica_id=ReplicaId(message.replica_id),
                    model_id=ModelId(message.model_id),
                    hurdle=message.hurdle,
                    slot_count=message.slot_count,
                    running_count=message.running_count,
                    considered_count=message.considered_count,
                    chosen_count=message.chosen_count,
                    losses={loss.reason: loss.count for loss in message.losses},
                )
                for message in reply.replicas
            ),
        ),
    )


def _step(message: pool_pb2.RequestStep) -> RequestStepInfo:
    return RequestStepInfo(
        elapsed_ms=message.elapsed_ms,
        kind=message.kind,
        node_id=NodeId(message.node_id),
        attempt_id=AttemptId(message.attempt_id),
        words=message.words,
        candidates=_candidates(message.candidates),
    )


def _candidates(messages: Iterable[pool_pb2.PlacementCandidate]) -> tuple[CandidateInfo, ...]:
    return tuple(
        CandidateInfo(
            node_id=NodeId(message.node_id),
            replica_id=ReplicaId(message.replica_id),
            replica_count=message.replica_count,
            chosen=message.chosen,
            reason=message.reason,
            cost_seconds=message.cost_seconds if message.HasField("cost_seconds") else None,
            terms_seconds={term.name: term.seconds for term in message.terms},
        )
        for message in messages
    )
