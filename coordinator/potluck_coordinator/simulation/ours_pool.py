"""The modelled nodes as the live gateway keeps them, and placement over these.

Decides nothing: candidates are drawn by the gateway's own `roster`, speeds and caches are learned by its `measures`, lengths by its
`expectations`, and `domain.placement` chooses. This turns modelled nodes into their views. It must not know queues.
"""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Final

from potluck_coordinator.domain.admission import Capacity
from potluck_coordinator.domain.forecast import Work
from potluck_coordinator.domain.pace import slots_in_pace
from potluck_coordinator.domain.placement import Draw, ReplicaView, hurdle, place, reading_seconds, tokens_wanted
from potluck_coordinator.domain.speeds import Speeds
from potluck_coordinator.domain.survival import History, losses_per_second
from potluck_coordinator.gateway.expectations import Expectations
from potluck_coordinator.gateway.measures import Measures
from potluck_coordinator.gateway.roster import Roster
from potluck_coordinator.simulation.node_model import Node
from potluck_coordinator.simulation.ours_words import ENDPOINT, MODEL, Words
from potluck_coordinator.simulation.policy import Attempt
from potluck_protocol.values import AttemptId, EngineState, EngineStatus, NodeId, ReplicaId, Usage

_NO_HISTORY: Final = losses_per_second(History(), History())


class Pool:
    """One gateway's. `now` is set by whoever calls."""

    def __init__(self, random: Random, token_seconds_max: float) -> None:
        self.now = 0.0
        self._random = random
        self.expectations = Expectations()
        self.measures = Measures(lambda: self.now)
        self.measures.token_seconds_max = token_seconds_max
        self.roster = Roster(self.expectations.usual)
        self.nodes: dict[NodeId, Node] = {}
        self._suspects: set[NodeId] = set()
        self._in_flight: dict[NodeId, int] = {}
        self._heard_second = -1
        self._statuses: dict[NodeId, EngineStatus] = {}
        self._histories: dict[NodeId, tuple[float, int]] = {}
        self._losses: dict[NodeId, float] = {}

    def place(self, words: Words, work: Work) -> NodeId | None:
        """As the gateway does it: candidates, costs, the lowest."""
        chance = self._random.random
        draw = self._drawn(words, work, self.measures.warm(words.live, work))
        chosen = place(draw, work, chance(), self.now, curiosity=chance()).chosen
        return None if chosen is None else chosen.node_id

    def reading_seconds(self, words: Words, work: Work) -> float:
        """Until a node that has a slot and room for the request has read what keeps others from it; infinite: none has them."""
        return reading_seconds(self._drawn(words, work, {}, takes_any_slot=True), work, self.now)

    def _drawn(self, words: Words, work: Work, warm: Mapping[ReplicaId, float], *, takes_any_slot: bool = False) -> Draw:
        return self.roster.draw(
            MODEL,
            work,
            endpoint=ENDPOINT,
            excluded=words.request.excluded,
            tokens_min=self._tokens_wanted(words),
            takes_any_slot=takes_any_slot,
            warm=warm,
            chance=self._random.random,
        )

    def _tokens_wanted(self, words: Words) -> int:
        """What its node's context has to hold."""
        kinds = [kind for kind in self.roster.kinds(MODEL) if hurdle(kind.sample) is None]
        out = words.request.excluded
        contexts = (kind.sample.context_length_tokens for kind in kinds if not out or len(kind) > self.roster.count_on(kind, out)[0])
        return tokens_wanted(contexts, words.request.prompt_tokens + words.request.delivered_tokens, words.completion_tokens_max)

    @property
    def has_free(self) -> bool:
        """Whether some request could be placed now."""
        return any(kind.free_count for kind in self.roster.kinds(MODEL))

    @property
    def capacity(self) -> Capacity:
        """Of all that takes requests, as the gateway sums it."""
        kinds = [kind for kind in self.roster.kinds(MODEL) if hurdle(kind.sample) is None]
        return Capacity(
            slot_count=sum(kind.slot_count for kind in kinds),
            in_flight_count=sum(kind.in_flight_count for kind in kinds),
            kv_tokens=sum(kind.kv_capacity_tokens for kind in kinds) if all(kind.tells_capacity for kind in kinds) else 0,
            committed_tokens=float(sum(kind.committed_tokens for kind in kinds)),
        )

    def slots(self, excluded: frozenset[NodeId]) -> tuple[int, int]:
        """The slots of nodes that can take a request which these have had, and the free ones among them."""
        usable = free = 0
        for kind in self.roster.kinds(MODEL):
            if hurdle(kind.sample) is None:
                _, _, out_slots, out_free = self.roster.count_on(kind, excluded) if excluded else (0, 0, 0, 0)
                usable += kind.slot_count - out_slots
                free += kind.free_slot_count - out_free
        return usable, free

    def lacks_cache(self, excluded: frozenset[NodeId]) -> bool:
        """Whether a slot is free for one that could not be placed, and no node barred to it that others like it may go to."""
        is_barred = any(node_id in self.nodes for node_id in excluded)
        return not is_barred and self.slots(excluded)[1] > 0

    # What becomes of nodes and attempts.

    def join(self, node: Node) -> None:
        """A new session: its engine may have begun anew."""
        node_id = node.node_id
        self.nodes[node_id] = node
        self._suspects.discard(node_id)
        self._in_flight[node_id] = 0
        self._count_history(node_id)
        replica_id = ReplicaId(node_id)
        self.measures.began_anew(replica_id)
        engine = node.node_class.engine
        self._statuses[node_id] = EngineStatus(
            replica_id,
            MODEL,
            EngineState.READY,
            "vllm",
            prefill_tokens_per_second=engine.prefill_tokens_per_second,
            decode_tokens_per_second=1 / (engine.step_seconds + engine.step_seconds_per_answer),
        )
        self.see(node_id)

    def leave(self, node_id: NodeId) -> None:
        """Its session is over."""
        if self.nodes.pop(node_id, None) is not None:
            first_at, losses = self._histories[node_id]
            self._histories[node_id] = (first_at, losses + 1)
            self.roster.enter(node_id, ())

    def suspect(self, node_id: NodeId, *, suspect: bool) -> None:
        """Its silence has begun to mean something, or no longer does."""
        (self._suspects.add if suspect else self._suspects.discard)(node_id)
        self.see(node_id)

    def begin(self, attempt: Attempt, words: Words) -> None:
        """An attempt is dispatched."""
        self._in_flight[attempt.node_id] += 1
        self.measures.begin(ReplicaId(attempt.node_id), _attempt_id(attempt), words.live, attempt.relay)
        self.see(attempt.node_id)

    def end(self, attempt: Attempt, usage: Usage | None) -> None:
        """It is over, and teaches what it can."""
        if usage is not None:
            self.measures.count(_attempt_id(attempt), usage, attempt.answered_tokens)
        self.measures.end(_attempt_id(attempt))
        if attempt.node_id in self.nodes:
            self._in_flight[attempt.node_id] -= 1
            self.see(attempt.node_id)

    def hear_all(self) -> bool:
        """The heartbeats of this second, which matter where somebody finds no room: what caches hold now. False: they were heard."""
        if int(self.now) <= self._heard_second:
            return False
        self._heard_second = int(self.now)
        for node_id, in_flight_count in self._in_flight.items():
            if in_flight_count:
                self.see(node_id)
        return True

    def see(self, node_id: NodeId) -> None:
        """The roster is told what a node's replica is now."""
        node = self.nodes.get(node_id)
        if node is not None:
            self.roster.enter(node_id, (self._view(node),))

    def view(self, node_id: NodeId) -> ReplicaView | None:
        """A node's replica as it is now; None: it is no node of the pool's."""
        node = self.nodes.get(node_id)
        return None if node is None else self._view(node)

    def speeds(self, node_id: NodeId) -> Speeds | None:
        """As learned of it; None as above."""
        node = self.nodes.get(node_id)
        if node is None:
            return None
        return self.measures.hear(ReplicaId(node_id), self._statuses[node_id], node.node_class.engine.kv_tokens)

    def _view(self, node: Node) -> ReplicaView:
        node_id, orders, model = node.node_id, node.cards.orders, node.node_class.engine
        replica_id = ReplicaId(node_id)
        # A busy node's heartbeat comes every second.
        heard_at = float(int(self.now))
        load = self.measures.load(replica_id, heard_at)
        speeds = self.measures.hear(replica_id, self._statuses[node_id], model.kv_tokens)
        slot_count = slots_in_pace(orders.slot_count, speeds, 1.0, self.measures.token_seconds_max)
        return ReplicaView(
            replica_id=replica_id,
            node_id=node_id,
            model_id=MODEL,
            ready=True,
            slot_count=slot_count,
            withheld_slot_count=orders.slot_count - slot_count,
            in_flight_count=self._in_flight[node_id],
            node_paused=not orders.admits,
            node_suspect=node_id in self._suspects,
            link_up=True,
            endpoints=(ENDPOINT,),
            context_length_tokens=node.node_class.request_tokens_max,
            kv_capacity_tokens=model.kv_tokens,
            kv_used_tokens=int(node.told_kv_tokens()),
            committed_tokens=load.committed_tokens,
            dispatched_tokens=load.dispatched_tokens,
            prefill_backlog_tokens=load.prefill_backlog_tokens,
            prefill_since_seconds=load.prefill_since_seconds,
            speeds=speeds,
            round_trip_seconds=node.round_trip_seconds,
            losses_per_second=self._losses.get(node_id, _NO_HISTORY),
            heard_at_seconds=heard_at,
        )

    def _count_history(self, node_id: NodeId) -> None:
        """What its coming and going so far says of how likely it goes again."""
        first_at, losses = self._histories.setdefault(node_id, (self.now, 0))
        history = History(up_minutes=int((self.now - first_at) / 60), mixed_hour_count=2 * losses)
        self._losses[node_id] = losses_per_second(history, history)


def _attempt_id(attempt: Attempt) -> AttemptId:
    return AttemptId(str(attempt.attempt_id))
