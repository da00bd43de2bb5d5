"""Why: the part of `PoolService` that says what was decided over a request, what a waiting one waits for, and what a node gets.

Decides who may ask about what: about a request whoever made it, about a node whoever owns it, and the operator about all of them; and that
what a cost tells of an owner's habits is for him and the operator alone. What is told is what `decisions` kept, what the `queues` know and
what placement sees of the node now. It must not know how anything was decided.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import grpc

from potluck_coordinator.desks import NodeDesk
from potluck_coordinator.domain.admission import Waiting
from potluck_coordinator.domain.decisions import KEPT_SECONDS, Step, Story, placement_count, replica_records, told_terms, trust_loss_count
from potluck_coordinator.domain.placement import CHOSEN, NOT_TRUSTED, Candidate, hurdle
from potluck_coordinator.gateway.decisions import REFUSED_MAX, STORIES_MAX
from potluck_coordinator.gateway.interceptors import caller
from potluck_coordinator.gateway.links import Links
from potluck_coordinator.gateway.requests import RequestService
from potluck_protocol.clock import Clock
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.v1 import pool_pb2, pool_pb2_grpc
from potluck_protocol.values import AccountId, NodeId, RequestId

_Context = grpc.aio.ServicerContext[Any, Any]


class ExplainServicer(pool_pb2_grpc.PoolServiceServicer):
    """The reasons' part of `PoolService`.

    Args:
        nodes: whose each node is.
        requests: what was decided, and who waits.
        links: the nodes as placement sees them.
        clock: how long ago that was.
    """

    def __init__(self, nodes: NodeDesk, requests: RequestService, links: Links, clock: Clock) -> None:
        self._nodes = nodes
        self._requests = requests
        self._links = links
        self._clock = clock

    async def ExplainRequest(  # noqa: N802 - the contract's name, as for every method here
        self, request: pool_pb2.ExplainRequestRequest, context: _Context
    ) -> pool_pb2.ExplainRequestResponse:
        """One request's story."""
        del context
        story, is_own = self._story(request.request_id), self._is_own
        return pool_pb2.ExplainRequestResponse(
            request_id=story.request_id,
            account_id=story.account_id,
            model_id=story.model_id,
            arrived_at_unix_ms=story.arrived_at_unix_ms,
            steps=[_step_message(step, story, is_own) for step in story.steps],
        )

    async def ExplainWaiting(  # noqa: N802
        self, request: pool_pb2.ExplainWaitingRequest, context: _Context
    ) -> pool_pb2.ExplainWaitingResponse:
        """What one request waits for."""
        del context
        story = self._story(request.request_id)
        waiting = self._requests.queues.waiting(story.account_id, story.request_id)
        if waiting is None:
            last = f": {story.steps[-1].kind}" if story.steps else ""
            command = f"`potluck explain {story.request_id} --request`"
            return pool_pb2.ExplainWaitingResponse(words=f"{story.request_id} does not wait{last}. {command} has its whole story.")
        message = _waiting_message(waiting)
        # One that would be chosen now has room that is kept for somebody else, as `words` says.
        others = (candidate for candidate in waiting.candidates if not candidate.chosen)
        message.candidates.extend(_candidate_messages(others, self._is_own))
        return message

    async def ExplainNode(  # noqa: N802
        self, request: pool_pb2.ExplainNodeRequest, context: _Context
    ) -> pool_pb2.ExplainNodeResponse:
        """What one node gets."""
        del context
        node_id = NodeId(request.node_id)
        await self._check_owner(node_id)
        host = self._links.host(node_id)
        if host is None:
            raise PotluckError(ErrorCode.NO_CAPACITY, f"Node {node_id} is not connected, so it gets nothing; see `potluck nodes`.")
        stories = self._requests.decisions.stories
        records = replica_records(stories, node_id)
        views = tuple(host.replica_views())
        response = pool_pb2.ExplainNodeResponse(
            watched_seconds=int(self._watched_seconds(stories)),
            placement_count=placement_count(stories, frozenset(view.model_id for view in views)),
        )
        for view in views:
            verdict = response.replicas.add(
                replica_id=view.replica_id,
                model_id=view.model_id,
                hurdle=hurdle(view) or "",
                slot_count=view.slot_count,
                running_count=view.in_flight_count,
            )
            if (record := records.get(view.replica_id)) is not None:
                verdict.considered_count, verdict.chosen_count = record.considered_count, record.chosen_count
                verdict.losses.extend(pool_pb2.LossReason(reason=reason, count=count) for reason, count in record.losses.most_common())
            if not view.is_trusted and (left_out_count := trust_loss_count(stories, view.model_id)):
                verdict.losses.add(reason=NOT_TRUSTED, count=left_out_count)
        return response

    def _story(self, request_id: str) -> Story:
        identity = caller()

        def may_see(account_id: AccountId) -> bool:
            return identity.operator or account_id == identity.account_id

        story = self._requests.decisions.story(RequestId(request_id), may_see)
        if story is None:
            # Somebody else's is not told apart from none: ids may be guessed.
            text = (
                f"No request {request_id!r} of yours is known here. They are kept for {KEPT_SECONDS / 60:.0f} minutes at most, and no more"
                f" than {STORIES_MAX}, and {REFUSED_MAX} refused ones: of more, whoever has the most loses his oldest."
            )
            raise PotluckError(ErrorCode.NOT_FOUND, text, param="request_id")
        return story

    @property
    def _is_own(self) -> Callable[[NodeId], bool]:
        """Whether a node's habits are the caller's to know; of one that is not connected only the operator's."""
        identity, host = caller(), self._links.host

        def is_own(node_id: NodeId) -> bool:
            found = host(node_id)
            return identity.operator or (found is not None and found.owner_account_id == identity.account_id)

        return is_own

    async def _check_owner(self, node_id: NodeId) -> None:
        identity = caller()
        record = next((record for record in await self._nodes.list_nodes() if record.node_id == node_id), None)
        if record is None:
            raise PotluckError(ErrorCode.NOT_FOUND, f"The pool has no node {node_id!r}; see `potluck nodes`.", param="node_id")
        if not identity.operator and record.owner_account_id != identity.account_id:
            raise PotluckError(ErrorCode.PERMISSION_DENIED, "Only a node's owner and the operator see why it gets what it gets.")

    def _watched_seconds(self, stories: tuple[Story, ...]) -> float:
        return min(KEPT_SECONDS, self._clock.monotonic_seconds() - stories[0].arrived_at_seconds) if stories else 0.0


def _step_message(step: Step, story: Story, is_own: Callable[[NodeId], bool]) -> pool_pb2.RequestStep:
    return pool_pb2.RequestStep(
        elapsed_ms=round((step.at_seconds - story.arrived_at_seconds) * 1000),
        kind=step.kind,
        node_id=step.node_id or "",
        attempt_id=step.attempt_id or "",
        words=step.words,
        candidates=_candidate_messages(step.placement.candidates, is_own) if step.placement is not None else (),
    )


def _candidate_messages(candidates: Iterable[Candidate], is_own: Callable[[NodeId], bool]) -> list[pool_pb2.PlacementCandidate]:
    return [_candidate_message(candidate, is_own) for candidate in candidates]


def _candidate_message(candidate: Candidate, is_own: Callable[[NodeId], bool]) -> pool_pb2.PlacementCandidate:
    message = pool_pb2.PlacementCandidate(
        node_id=candidate.node_id or "",
        replica_id=candidate.replica_id or "",
        replica_count=candidate.replica_count,
        chosen=candidate.reason == CHOSEN,
        reason=f"{candidate.reason} ({candidate.origin})" if candidate.origin else candidate.reason,
    )
    if candidate.cost is not None:
        terms = told_terms(candidate.cost, tells_habits=candidate.node_id is not None and is_own(candidate.node_id))
        # Made of what is told, not of what is not.
        message.cost_seconds = sum(terms.values())
        for name, seconds in terms.items():
            message.terms.add(name=name, seconds=seconds)
    return message


def _waiting_message(waiting: Waiting) -> pool_pb2.ExplainWaitingResponse:
    message = pool_pb2.ExplainWaitingResponse(
        waiting=True,
        words=f"{waiting.request_id} waits in the {waiting.tier} tier: {waiting.waits_for}.",
        position=waiting.position_in_tier,
        waiting_count=waiting.waiting_count,
        waited_ms=round(waiting.waited_seconds * 1000),
        deadline_ms=round(waiting.deadline_seconds * 1000),
    )
    if waiting.predicted_wait_seconds is not None:
        message.predicted_wait_ms = round(waiting.predicted_wait_seconds * 1000)
    return message
