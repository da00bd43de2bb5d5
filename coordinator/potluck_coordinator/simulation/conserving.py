"""Whether anybody waits, or is sent away, although there is room: the coordinator's own count of slots against the policy's reasons.

Decides from what the world can count by itself: the slots that agents offer, the attempts that run, prompts that are unread, and what
answers may come to at most. Of the policy it takes only what is the policy's to say, and that only where it can be true: speeds that were
learned (over which the pace is reckoned anew here), a cache that would be too full, and room that is kept for somebody else. It must not
know how a policy chooses.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Final

from potluck_coordinator.domain.admission import Capacity
from potluck_coordinator.domain.pace import slots_in_pace
from potluck_coordinator.domain.placement import CACHE_SHARE_MAX
from potluck_coordinator.simulation.asking import Request
from potluck_coordinator.simulation.invariants import Invariant, Invariants
from potluck_coordinator.simulation.lease_model import Session
from potluck_coordinator.simulation.policy import Attempt, Beliefs
from potluck_coordinator.simulation.scenario import Scenario
from potluck_protocol.values import NodeId

WAITS_SECONDS_MAX: Final = 2.0
"""How long a request may wait while there is room for it at every look: two heartbeats, by which one knows of it."""
SESSIONS_MAX: Final = 512
"""That a look goes through; of a larger pool it sees those that came first."""


class Conserving:
    """One coordinator's; without beliefs its policy promises nothing of the kind, and nothing is looked at."""

    def __init__(self, beliefs: Beliefs | None, sessions: Mapping[NodeId, Session], invariants: Invariants, scenario: Scenario) -> None:
        self._beliefs = beliefs
        self._sessions = sessions
        self._invariants = invariants
        self._scenario = scenario
        self._room_since: dict[int, float] = {}
        """Of each request that waits: since when there has been room for it."""

    def look(self, waiting: Sequence[Request], now: float) -> None:
        """Every second, after all have been served who could be: those that wait, in their turn."""
        known, self._room_since = self._room_since, {}
        if self._beliefs is None or not waiting:
            return
        takers = self._takers()
        capacity = self._capacity(takers)
        for request in waiting:
            if self._beliefs.is_kept_from(request, capacity, now):
                continue
            node_id = self._taker_of(request, takers, now)
            if node_id is None:
                continue
            since = self._room_since[request.number] = known.get(request.number, now)
            if now - since >= WAITS_SECONDS_MAX:
                self._break(f"request {request.number} waits for {now - since:.1f} s while {node_id} could take it", now)

    def sent_away(self, requests: Sequence[Request], now: float) -> None:
        """Some of those that waited are refused: unless the last look found room for one, it may have stood behind another."""
        for request in requests:
            if request.number in self._room_since:
                self.refused(request, now)

    def refused(self, request: Request, now: float) -> None:
        """A client is sent away."""
        if self._beliefs is None:
            return
        takers = self._takers()
        node_id = self._taker_of(request, takers, now)
        if node_id is not None and not self._beliefs.is_kept_from(request, self._capacity(takers), now):
            self._break(f"request {request.number} is refused while {node_id} could take it", now)

    def _break(self, words: str, now: float) -> None:
        self._invariants.break_of(Invariant.IDLE_WHILE_WAITING, words, now)

    def _takers(self) -> list[tuple[Session, int]]:
        """Nodes that take requests at all, each with the slots that may be filled at the pace that was promised."""
        takers: list[tuple[Session, int]] = []
        for session in islice(self._sessions.values(), SESSIONS_MAX):
            orders = session.node.cards.orders
            if session.open and session.is_well and not session.suspect and orders.admits:
                takers.append((session, self._slots(session, orders.slot_count)))
        return takers

    def _slots(self, session: Session, slot_count: int) -> int:
        assert self._beliefs is not None
        speeds = self._beliefs.speeds(session.node.node_id)
        return 0 if speeds is None else slots_in_pace(slot_count, speeds, 1.0, self._scenario.objective.token_seconds)

    def _capacity(self, takers: Iterable[tuple[Session, int]]) -> Capacity:
        """Of what runs the policy's line keeps its own count."""
        takers = list(takers)
        kv_tokens = sum(session.node.node_class.engine.kv_tokens for session, _ in takers)
        return Capacity(slot_count=sum(slots for _, slots in takers), kv_tokens=kv_tokens)

    def _taker_of(self, request: Request, takers: Iterable[tuple[Session, int]], now: float) -> NodeId | None:
        """A node with a slot and room for the request, and nothing left to read."""
        assert self._beliefs is not None
        for session, slot_count in takers:
            node_id, attempts = session.node.node_id, session.attempts.values()
            if len(attempts) >= slot_count or node_id in request.excluded or any(one.first_token_at is None for one in attempts):
                continue
            if not self._fits(request, session):
                continue
            if self._beliefs.lacks_room(request, node_id) and self._may_lack_room(request, session, now):
                continue
            return node_id
        return None

    def _fits(self, request: Request, session: Session) -> bool:
        """Whether the context is long enough, or as long as any."""
        room_tokens = session.node.node_class.request_tokens_max
        return request.prompt_tokens + request.answer_tokens_max <= room_tokens or room_tokens == self._scenario.request_tokens_max

    def _may_lack_room(self, request: Request, session: Session, now: float) -> bool:
        """Whether the cache could be full at all, if everything came to what it may at most."""
        attempts, node = session.attempts.values(), session.node
        if not attempts:
            return False
        # What the node's last heartbeat said, of work that may be over by now, and what came since.
        told = node.told_kv_tokens() + sum(_tokens_max(one) for one in attempts if one.began_at >= int(now))
        in_use = max(told, sum(map(_tokens_max, attempts)))
        return in_use + request.prompt_tokens + request.answer_tokens_max > CACHE_SHARE_MAX * node.node_class.engine.kv_tokens


def _tokens_max(attempt: Attempt) -> int:
    return attempt.request.prompt_tokens + attempt.request.answer_tokens_max
