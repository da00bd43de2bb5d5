"""The measure for the other policies: one that knows how long every answer will be and how fast every node is at this moment.

Decides first come, first served, at the node where the request would be over soonest, among those where it would still be served within
the objective and where the cache has room for all that was promised; whoever fits nowhere waits until it could not be served in time any
more. It does not serve short requests first, which would raise its count at the cost of those who ask for more. It cheats: it looks into
engines.
"""

from __future__ import annotations

from collections import OrderedDict
from random import Random
from typing import Final

from potluck_coordinator.simulation.asking import Request
from potluck_coordinator.simulation.engine_model import Engine, EngineModel
from potluck_coordinator.simulation.node_model import Node
from potluck_coordinator.simulation.policy import Attempt, Beliefs, Go, Hold, Refuse, Verdict
from potluck_coordinator.simulation.scenario import Scenario
from potluck_protocol.values import NodeId

KV_SHARE_MAX: Final = 0.95
RETRY_AFTER_SECONDS: Final = 5.0
TOKEN_SHARE_MAX: Final = 0.92
"""Of the objective between tokens, that a node's requests may take together: their tokens vary around that."""


class Oracle:
    """One queue for all."""

    name = "oracle"
    keeps_leases = True
    beliefs: Beliefs | None = None

    def __init__(self, random: Random, scenario: Scenario) -> None:
        del random
        self._objective = scenario.objective
        self._nodes: dict[NodeId, Node] = {}
        self._promised: dict[NodeId, int] = {}
        self._strains: dict[NodeId, float] = {}
        """Of each node: the seconds that its requests together add to a step, each by its own place in the batch and by its prompt's
        reading, spread over its answer."""
        self._on_the_way: dict[NodeId, int] = {}
        self._queue: OrderedDict[int, Request] = OrderedDict()
        self._blocked = False

    def arrive(self, request: Request, now: float) -> Verdict:
        node_id = self._best(request, now)
        if node_id is not None:
            return Go(node_id)
        self._queue[request.number] = request
        return Hold()

    def next_up(self, now: float) -> tuple[Request, NodeId] | None:
        for request in list(self._queue.values())[:8]:
            node_id = self._best(request, now)
            if node_id is not None:
                del self._queue[request.number]
                return request, node_id
        return None

    def heard(self, now: float) -> None: ...

    def sweep(self, now: float) -> list[tuple[Request, Refuse]]:
        late = [request for request in self._queue.values() if now - request.arrived_at > self._objective.first_token_seconds]
        for request in late:
            del self._queue[request.number]
        return [(request, Refuse(RETRY_AFTER_SECONDS, "it could not be served in time")) for request in late]

    def waiting(self) -> list[Request]:
        return []

    def left(self, request: Request) -> None:
        self._queue.pop(request.number, None)

    def began(self, attempt: Attempt, now: float) -> None:  # noqa: ARG002
        self._promised[attempt.node_id] += attempt.prompt_tokens + attempt.request.tokens_left
        self._on_the_way[attempt.node_id] += attempt.prompt_tokens
        self._strain(attempt, 1)

    def first_token(self, attempt: Attempt, now: float) -> None:  # noqa: ARG002
        self._read(attempt)

    def over(self, attempt: Attempt, now: float, *, whole: bool) -> None:  # noqa: ARG002
        if attempt.node_id in self._promised:
            self._promised[attempt.node_id] -= attempt.prompt_tokens + attempt.request.answer_tokens - attempt.first_index
            self._strain(attempt, -1)
            if attempt.first_token_at is None:
                self._read(attempt)

    def joined(self, node: Node, now: float) -> None:  # noqa: ARG002
        self._nodes[node.node_id] = node
        self._promised[node.node_id] = self._on_the_way[node.node_id] = 0
        self._strains[node.node_id] = 0.0

    def orders(self, node: Node, now: float) -> None: ...

    def suspected(self, node_id: NodeId, *, suspect: bool) -> None: ...

    def gone(self, node_id: NodeId, now: float) -> None:  # noqa: ARG002
        for known in (self._nodes, self._promised, self._on_the_way, self._strains):
            known.pop(node_id, None)

    def _read(self, attempt: Attempt) -> None:
        if attempt.node_id in self._on_the_way:
            self._on_the_way[attempt.node_id] -= attempt.prompt_tokens

    def _strain(self, attempt: Attempt, sign: int) -> None:
        model = self._nodes[attempt.node_id].node_class.engine
        self._strains[attempt.node_id] += sign * _strain(model, attempt.prompt_tokens, attempt.request.answer_tokens - attempt.first_index)

    def _best(self, request: Request, now: float) -> NodeId | None:
        """Where it would be over soonest among those where it would be served well; a request that has begun is served anyhow."""
        best, best_seconds = None, float("inf")
        for node_id, node in self._nodes.items():
            engine = node.engine
            if engine is None or node.frozen or not node.linked or not node.cards.orders.admits:
                continue
            seconds = self._seconds(request, node, engine, now)
            if seconds is not None and seconds < best_seconds:
                best, best_seconds = node_id, seconds
        return best

    def _seconds(self, request: Request, node: Node, engine: Engine, now: float) -> float | None:
        model = engine.model
        prefill_share, decode_share = engine.speed_shares
        prompt = request.prompt_tokens + request.delivered_tokens
        if self._promised[node.node_id] + prompt + request.tokens_left > KV_SHARE_MAX * model.kv_tokens:
            return None
        strain = self._strains[node.node_id] + _strain(model, prompt, request.tokens_left)
        token = (model.step_seconds + strain) / decode_share
        rate = model.prefill_tokens_per_second * prefill_share
        # A chunk of a prompt is read within a step, which takes the batch's time, too.
        reading = 1 / rate + (token / model.prefill_chunk_tokens if engine.running_count else 0.0)
        unread = max(engine.unread_tokens, self._on_the_way[node.node_id])
        first = node.round_trip_seconds + (unread + max(1, prompt - engine.cached_tokens(request.prefixes))) * reading
        waited = now - request.arrived_at
        in_time = waited + first <= self._objective.first_token_seconds and token <= TOKEN_SHARE_MAX * self._objective.token_seconds
        if not in_time and request.first_token_at is None:
            return None
        return first + request.tokens_left * token


def _strain(model: EngineModel, prompt_tokens: int, answer_tokens: int) -> float:
    return model.step_seconds_per_answer + prompt_tokens / (model.prefill_tokens_per_second * max(1, answer_tokens))
