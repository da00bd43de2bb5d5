"""Our own policy in the simulator: the live decisions, asked in the order in which `gateway.queues` asks them.

Decides nothing: whether a request goes, waits or is refused is `domain.admission`, whose turn it is and what is kept for which tier are
the gateway's `model_line` over `domain.fairness` and `domain.tiers`, where it goes `ours_pool`. `gateway.queues` itself cannot run here,
for its requests wait as tasks in real time; who passes whom is said once more here, as `gateway.free_room` says it of live nodes. It must
not know how long answers will be.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import islice
from random import Random
from typing import TYPE_CHECKING, Final

from potluck_coordinator.domain.admission import (
    AdmissionLimits,
    Capacity,
    ModelLoad,
    Queued,
    Wait,
    admit,
    is_half_empty,
    is_hopeless,
    is_promised,
    predicted_wait_seconds,
    retry_after_seconds,
)
from potluck_coordinator.domain.admission import Refuse as Refusal
from potluck_coordinator.domain.catalogue import ServiceTier
from potluck_coordinator.domain.fairness import service
from potluck_coordinator.domain.forecast import Work
from potluck_coordinator.domain.tiers import RESERVE_PERCENT, flex_comes_free, flex_fits, flex_lacks_slots
from potluck_coordinator.gateway.appointments import Expected
from potluck_coordinator.gateway.free_room import OVERTAKEN_SECONDS_MAX
from potluck_coordinator.gateway.model_line import ModelLine
from potluck_coordinator.gateway.queues import CONTINUED_WAIT_SECONDS_MAX, REVIEW_SECONDS
from potluck_coordinator.simulation.asking import Request
from potluck_coordinator.simulation.node_model import Node
from potluck_coordinator.simulation.ours_beliefs import OurBeliefs
from potluck_coordinator.simulation.ours_pool import Pool
from potluck_coordinator.simulation.ours_words import Ended, Waiting, Words, words_of
from potluck_coordinator.simulation.policy import Attempt, Beliefs, Go, Hold, Refuse, Verdict
from potluck_coordinator.simulation.scenario import Scenario
from potluck_protocol.errors import ErrorCode
from potluck_protocol.values import NodeId, Usage

if TYPE_CHECKING:
    from potluck_coordinator.gateway.waiting import WaitingRequest

SHOWN_MAX: Final = 4
"""Of those that wait, that the check for idle nodes looks at."""


class Ours:
    """One gateway's decisions."""

    name = "ours"
    keeps_leases = True

    def __init__(self, random: Random, scenario: Scenario) -> None:
        self._limits = AdmissionLimits(queue_wait_seconds_max=scenario.queue_wait_seconds)
        self._pool = Pool(random, scenario.objective.token_seconds)
        self._line = ModelLine()
        self.beliefs: Beliefs | None = OurBeliefs(self._pool, self._line, RESERVE_PERCENT)
        self._words: dict[Request, Words] = {}
        self._waiting: dict[Request, Waiting] = {}
        self._sent_away: list[tuple[Request, Refuse]] = []
        self._running: dict[int, tuple[Words, Work, float]] = {}
        """Of each attempt: its request, what it is expected to be, and what its account was charged for that."""
        self._changed = True
        self._served_at = 0.0

    # Requests.

    def arrive(self, request: Request, now: float) -> Verdict:
        self._pool.now = now
        words = self._words[request] = Words(request)
        words.work = work = self._pool.expectations.work(words.live)
        line = self._line
        line.seen(words.live, now)
        node_id = self._room_for(words, work, now)
        if node_id is None and self._pool.hear_all():
            node_id = self._room_for(words, work, now)
        if node_id is not None:
            line.appointments[words.tier].keep(words.live)
            return Go(node_id)
        return self._wait_or_refuse(words, work, now)

    def _room_for(self, words: Words, work: Work, now: float) -> NodeId | None:
        """Where it can run now; nowhere while one that was overtaken waits for room, whose turn is no later."""
        if not self._pool.has_free or self._line.held_from(words.live) is not None or not self._may_fill(words, now):
            return None
        return self._pool.place(words, work)

    def _wait_or_refuse(self, words: Words, work: Work, now: float) -> Verdict:
        line, request = self._line, words.request
        appointments = line.appointments[words.tier]
        appointment = appointments.find(words.live, now)
        was_promised = appointment is not None and appointments.is_due(appointment, now)
        load = self._load(words, now, counts_expected=not was_promised)
        if words.continued and load.capacity.slot_count > 0:
            return self._keep(words, work, now, CONTINUED_WAIT_SECONDS_MAX)
        waited = now - request.arrived_at if request.attempt_count else 0.0
        verdict = admit(load, self._limits, waited, was_given_back=request.attempt_count > 0, was_promised=was_promised)
        if isinstance(verdict, Wait):
            appointments.keep(words.live)
            if line.waiting_count >= self._limits.queue_length_max and (gone := self._gives_way(words)) is not None:
                self._send_away(gone, now)
            return self._keep(words, work, now, verdict.wait_seconds_max)
        assert isinstance(verdict, Refusal), "there was no room, and nothing was said of any"
        if verdict.code is ErrorCode.QUEUE_FULL and appointment is not None and not was_promised:
            return self._refused(request, appointment.due_at_seconds - now)
        if verdict.code is ErrorCode.QUEUE_FULL:
            self._expect_back(words, work, verdict.retry_after_seconds, now)
        return self._refused(request, verdict.retry_after_seconds)

    def next_up(self, now: float) -> tuple[Request, NodeId] | None:
        self._pool.now = now
        # Who found no room finds none until something changes.
        if not self._waiting or not (self._changed or now - self._served_at > REVIEW_SECONDS) or not self._pool.has_free:
            return None
        self._served_at = now
        self._line.held_for = None
        queues = self._line.queues
        for turn in (tuple(self._line.continued), *(queues[tier].in_turn() for tier in (ServiceTier.DEFAULT, ServiceTier.FLEX))):
            found, goes_on = self._next_in_turn(turn, now)
            if found is not None:
                return found
            if not goes_on:
                break
        self._changed = False
        return None

    def _next_in_turn(self, turn: Iterable[WaitingRequest], now: float) -> tuple[tuple[Request, NodeId] | None, bool]:
        """Who has its turn and a place; and whether there may be something left for those that come after these."""
        lacking_tokens = math.inf
        for waiting in turn:
            if waiting.work.wanted_tokens >= lacking_tokens:
                continue
            words = words_of(waiting)
            left, lacks_cache = self._left_to_flex(words, now), False
            if left is not None and not flex_fits(left, waiting.work.wanted_tokens):
                if flex_lacks_slots(left):
                    return None, True
                lacking_tokens = waiting.work.wanted_tokens
                lacks_cache = flex_comes_free(left, self._line.default_use, lacking_tokens) and self._pool.lacks_cache(
                    words.request.excluded
                )
            elif (node_id := self._pool.place(words, waiting.work)) is not None:
                self._forget(words.request)
                return (words.request, node_id), True
            elif lacks_cache := self._pool.lacks_cache(words.request.excluded):
                lacking_tokens = waiting.work.wanted_tokens
            if lacks_cache and now - waiting.arrived_at_seconds > OVERTAKEN_SECONDS_MAX:
                self._line.held_for = waiting
                return None, False
        return None, True

    def heard(self, now: float) -> None:
        self._pool.now = now
        self._changed = True
        if self._waiting:
            self._pool.hear_all()

    def sweep(self, now: float) -> list[tuple[Request, Refuse]]:
        self._pool.now = now
        for waiting in [waiting for waiting in self._waiting.values() if waiting.deadline_seconds <= now]:
            self._send_away(waiting, now)
        self._review(now)
        gone, self._sent_away = self._sent_away, []
        return gone

    def _review(self, now: float) -> None:
        """Refuses those that would still wait at their deadline."""
        ahead = Queued(len(self._line.continued))
        for tier in (ServiceTier.DEFAULT, ServiceTier.FLEX):
            for waiting in self._line.queues[tier].in_foreseen_turn():
                assert isinstance(waiting, Waiting)
                if is_hopeless(
                    self._load(waiting.words, now, ahead=ahead),
                    now - waiting.arrived_at_seconds,
                    waiting.deadline_seconds - waiting.arrived_at_seconds,
                ):
                    self._send_away(self._waiting[words_of(waiting).request], now)
                else:
                    ahead += waiting.queued

    def waiting(self) -> list[Request]:
        queues = self._line.queues
        turns = (*self._line.continued, *(one for tier in queues for one in islice(queues[tier].in_turn(), SHOWN_MAX)))
        return [words_of(waiting).request for waiting in turns]

    def left(self, request: Request) -> None:
        self._forget(request)
        self._words.pop(request, None)

    # Attempts.

    def began(self, attempt: Attempt, now: float) -> None:
        self._pool.now = now
        words = self._words[attempt.request]
        work = self._pool.expectations.work(words.live)
        self._line.began(words.live, work, now)
        self._running[attempt.attempt_id] = (words, work, self._line.queues[words.tier].charge(words.live, work))
        self._pool.begin(attempt, words)

    def first_token(self, attempt: Attempt, now: float) -> None:
        self._pool.now = now
        self._changed = True
        self._pool.see(attempt.node_id)

    def over(self, attempt: Attempt, now: float, *, whole: bool) -> None:
        self._pool.now = now
        self._changed = True
        words, work, charged = self._running.pop(attempt.attempt_id)
        usage = Usage(attempt.prompt_tokens, attempt.answered_tokens, attempt.cached_tokens) if whole else None
        self._line.ended(words.live, work, now, now - attempt.began_at)
        ended = Ended(usage, attempt.answered_tokens, words.completion_tokens_max)
        self._line.queues[words.tier].correct(words.live, charged, ended.live)
        if usage is not None and not words.continued:
            self._pool.expectations.learn(words.live, usage, words.completion_tokens_max)
        self._pool.end(attempt, usage)
        self._words.pop(attempt.request, None)

    # Nodes.

    def joined(self, node: Node, now: float) -> None:
        self._pool.now = now
        self._changed = True
        self._pool.join(node)

    def orders(self, node: Node, now: float) -> None:
        self._pool.now = now
        self._changed = True
        self._pool.see(node.node_id)

    def suspected(self, node_id: NodeId, *, suspect: bool) -> None:
        self._changed = True
        self._pool.suspect(node_id, suspect=suspect)

    def gone(self, node_id: NodeId, now: float) -> None:
        self._pool.now = now
        self._pool.leave(node_id)

    # Inside.

    def _may_fill(self, words: Words, now: float) -> bool:
        """Whether the request would stay out of what is kept for a better tier."""
        left = self._left_to_flex(words, now)
        return left is None or flex_fits(left, self._pool.expectations.work(words.live).wanted_tokens)

    def _left_to_flex(self, words: Words, now: float) -> Capacity | None:
        """What requests of its tier may fill; None: whatever there is."""
        if words.tier is ServiceTier.DEFAULT or words.continued:
            return None
        return self._line.capacity(self._pool.capacity, words.tier, RESERVE_PERCENT, now)

    def _load(self, words: Words, now: float, *, ahead: Queued | None = None, counts_expected: bool = False) -> ModelLoad:
        capacity = self._line.capacity(self._pool.capacity, words.tier, RESERVE_PERCENT, now)
        if self._pool.slots(words.request.excluded)[0] == 0:
            capacity = capacity._replace(slot_count=0)
        if ahead is None:
            ahead = self._line.ahead_of(words.live, counts_expected=counts_expected)
        is_full = self._line.waiting_count >= self._limits.queue_length_max and self._gives_way(words) is None
        work, reading_seconds = self._pool.expectations.work(words.live), math.inf
        if is_half_empty(capacity, ahead) and self._may_fill(words, now):
            reading_seconds = self._pool.reading_seconds(words, work)
        return ModelLoad(capacity, work.wanted_tokens, ahead, self._line.pace(now), reading_seconds, is_full=is_full)

    def _gives_way(self, words: Words) -> Waiting | None:
        flex = self._line.queues[ServiceTier.FLEX]
        if words.tier is ServiceTier.DEFAULT and len(flex):
            return self._waiting[words_of(flex.newest_of_most()).request]
        gone = self._line.queues[words.tier].newest_to_give_way(words.account_id)
        return None if gone is None else self._waiting[words_of(gone).request]

    def _keep(self, words: Words, work: Work, now: float, seconds: float) -> Hold:
        request = words.request
        arrived_at = request.arrived_at if request.attempt_count else now
        waiting = self._waiting[request] = Waiting(words, work, arrived_at, now + seconds)
        self._line.join(waiting.live)
        return Hold()

    def _forget(self, request: Request) -> None:
        waiting = self._waiting.pop(request, None)
        if waiting is not None:
            self._line.leave(waiting.live)

    def _refused(self, request: Request, seconds: float) -> Refuse:
        self._words.pop(request, None)
        return Refuse(seconds, ErrorCode.QUEUE_FULL.value)

    def _send_away(self, waiting: Waiting, now: float) -> None:
        words = waiting.words
        self._forget(words.request)
        predicted = predicted_wait_seconds(self._load(words, now))
        retry_after = retry_after_seconds(predicted, self._limits)
        self._expect_back(words, waiting.work, retry_after, now)
        self._sent_away.append((words.request, self._refused(words.request, retry_after)))

    def _expect_back(self, words: Words, work: Work, retry_after: float, now: float) -> None:
        if is_promised(retry_after, self._limits):
            expected = Expected(service(work.prompt_tokens, work.answer_tokens), Queued(1, work.wanted_tokens))
            self._line.appointments[words.tier].make(words.live, now + retry_after, expected)
