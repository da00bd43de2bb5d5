"""All that waits for one model and all that runs there, by tier: who comes next, what room each tier has, and how fast it becomes free.

Decides nothing: order is `waiting` and `domain.fairness`, room is `domain.tiers`. It must not know nodes, tasks or answers.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from potluck_coordinator.domain.admission import NOBODY, Capacity, Pace, Queued
from potluck_coordinator.domain.catalogue import ServiceTier
from potluck_coordinator.domain.fairness import service
from potluck_coordinator.domain.tiers import left_to_flex
from potluck_coordinator.gateway.appointments import Appointments, Expected
from potluck_coordinator.gateway.waiting import TierQueue

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from potluck_coordinator.domain.forecast import Work
    from potluck_coordinator.gateway.inference_request import InferenceRequest
    from potluck_coordinator.gateway.waiting import WaitingRequest
    from potluck_protocol.errors import PotluckError

HOLD_SECONDS_GUESS: Final = 8.0
"""Of a request's stay, at a model that has not answered yet: 256 tokens at thirty a second. Whoever is let in by too rosy a guess is sent
away later, which is worse than at once."""
GAIN_MIN: Final = 0.02
"""Of the newest request in how long they stay: they differ much, and predictions must not. The first ones count for more."""
AGE_SHARE: Final = 0.5
"""Of the mean age of those that run. While they stay as long as ever this says less than what is known; where nothing ends, it grows."""


@dataclass(slots=True)
class _Use:
    """What one tier has of the model's room."""

    count: int = 0
    tokens: float = 0.0
    began_sum: float = 0.0
    """Of the moments when those that run began: their mean age by one subtraction."""


class ModelLine:
    """One model's."""

    def __init__(self) -> None:
        self.queues = {tier: TierQueue() for tier in ServiceTier}
        self.appointments = {tier: Appointments() for tier in ServiceTier}
        self.continued: deque[WaitingRequest] = deque()
        """Whose clients have a part of their answer already: they come before everybody."""
        self.reviewed_at_seconds = 0.0
        self.announced = NOBODY
        """Requests that may come in a moment, and are let in then if nobody else has come: see `announce`."""
        self.held_for: WaitingRequest | None = None
        """One that needs much of a cache was passed by long enough: what becomes free is its own, until it leaves. See `held_from`."""
        self._uses = {tier: _Use() for tier in ServiceTier}
        self._ended_count = 0
        self._hold_seconds = HOLD_SECONDS_GUESS
        self._held_tokens = 1.0
        self._held_token_seconds = HOLD_SECONDS_GUESS
        self._default_seen_at: float | None = None

    @property
    def waiting_count(self) -> int:
        """Requests that wait."""
        count = len(self.continued)
        for queue in self.queues.values():
            count += len(queue)
        return count

    def __iter__(self) -> Iterator[WaitingRequest]:
        yield from tuple(self.continued)
        for queue in self.queues.values():
            yield from queue

    def join(self, waiting: WaitingRequest) -> None:
        """At its place."""
        if waiting.request.continued is not None:
            self.continued.append(waiting)
        else:
            self.queues[waiting.request.tier].join(waiting)

    def leave(self, waiting: WaitingRequest) -> None:
        """Whatever became of it; again is harmless."""
        if waiting is self.held_for:
            self.held_for = None
        if waiting.request.continued is None:
            self.queues[waiting.request.tier].leave(waiting)
        elif waiting in self.continued:
            self.continued.remove(waiting)

    def held_from(self, request: InferenceRequest) -> WaitingRequest | None:
        """For whom room is held that the request may not take. Nobody holds up one whose turn is earlier than its own: None."""
        held = self.held_for
        if held is None or held.request is request or _turn_of(request) < _turn_of(held.request):
            return None
        return held

    def ahead_of(self, request: InferenceRequest, *, counts_expected: bool) -> Queued:
        """What comes before one more request: the better tier, and in its own what is served before its account's turn.

        Args:
            request: the one more.
            counts_expected: those that were told to come back count like those that wait, the request itself apart.
        """
        expected = self.appointments[request.tier].expected_beside(request) if counts_expected else {}
        ahead = self.queues[request.tier].ahead_of(request, expected) + Queued(len(self.continued))
        return ahead + self.queues[ServiceTier.DEFAULT].waiting if request.tier is ServiceTier.FLEX else ahead

    def announce(self, queued: Queued) -> Callable[[], None]:
        """One that may come in a moment: whoever is announced after it finds it before him, until what is returned is called."""
        self.announced += queued
        is_over = False

        def over() -> None:
            nonlocal is_over
            if is_over:
                return
            is_over = True
            left = self.announced + Queued(-queued.count, -queued.tokens)
            # Sums of fractions do not come back to nothing by themselves.
            self.announced = left if left.count >= 1 else NOBODY

        return over

    def expect_back(self, request: InferenceRequest, work: Work, due_at_seconds: float) -> None:
        """One that was refused is to come back then: its room is kept for it."""
        expected = Expected(service(work.prompt_tokens, work.answer_tokens), Queued(1, work.wanted_tokens))
        self.appointments[request.tier].make(request, due_at_seconds, expected)

    def fail_all(self, error: PotluckError) -> None:
        """Nobody who waits gets a slot any more."""
        for waiting in self:
            self.leave(waiting)
            if not waiting.turn.done():
                waiting.turn.set_exception(error)

    def gives_way(self, request: InferenceRequest) -> WaitingRequest | None:
        """Whose place in a full queue is the request's: first of the flex tier's, then of its own; None: nobody's."""
        flex = self.queues[ServiceTier.FLEX]
        if request.tier is ServiceTier.DEFAULT and len(flex):
            return flex.newest_of_most()
        return self.queues[request.tier].newest_to_give_way(request.account_id)

    def position_of(self, waiting: WaitingRequest) -> tuple[int, int, Queued]:
        """One that waits: its place in its tier and among its account's own, 1 for the next, and what comes before it."""
        if waiting.request.continued is not None:
            return 1, 1, NOBODY
        queue = self.queues[waiting.request.tier]
        position, own_position = queue.place_of(waiting)
        ahead = Queued(len(self.continued))
        if waiting.request.tier is ServiceTier.FLEX:
            ahead += self.queues[ServiceTier.DEFAULT].waiting
        return position, own_position, sum((one.queued for one in queue.in_foreseen_turn()[: position - 1]), ahead)

    def seen(self, request: InferenceRequest, now: float) -> None:
        """Somebody asks: capacity is kept for the default tier while anybody uses it."""
        if request.tier is ServiceTier.DEFAULT:
            self._default_seen_at = now

    def began(self, request: InferenceRequest, work: Work, now: float) -> None:
        """A request runs."""
        use = self._uses[request.tier]
        use.count += 1
        use.tokens += work.tokens
        use.began_sum += now

    def ended(self, request: InferenceRequest, work: Work, now: float, seconds: float) -> None:
        """It does no more; it has held its room for so long."""
        use = self._uses[request.tier]
        use.count -= 1
        use.tokens -= work.tokens
        use.began_sum -= now - seconds
        if use.count == 0:
            # Sums of fractions do not come back to nothing by themselves.
            self._uses[request.tier] = _Use()
        self._ended_count += 1
        gain = max(GAIN_MIN, 1 / (self._ended_count + 1))
        self._hold_seconds += gain * (seconds - self._hold_seconds)
        self._held_tokens += gain * (work.tokens - self._held_tokens)
        self._held_token_seconds += gain * (seconds * work.tokens - self._held_token_seconds)

    def pace(self, now: float) -> Pace:
        """How long a request stays: as long as they did lately, or as those have that are still there, if that is longer."""
        count = sum(use.count for use in self._uses.values())
        age = AGE_SHARE * (now - sum(use.began_sum for use in self._uses.values()) / count) if count else 0.0
        by_tokens = self._held_token_seconds / max(1.0, self._held_tokens)
        return Pace(max(self._hold_seconds, age), max(by_tokens, age))

    def capacity(self, whole: Capacity, tier: ServiceTier, reserve_percent: int, now: float) -> Capacity:
        """The model's room as a tier may fill it, and what is in use of it.

        Args:
            whole: its slots and cache.
            tier: whose.
            reserve_percent: what is kept for the default tier.
            now: monotonic.
        """
        uses = self._uses.values()
        in_flight_count, committed_tokens = sum(use.count for use in uses), sum(use.tokens for use in uses)
        whole = Capacity(whole.slot_count, in_flight_count, whole.kv_tokens, committed_tokens)
        if tier is ServiceTier.DEFAULT or self._default_seen_at is None:
            return whole
        return left_to_flex(whole, self.default_use, reserve_percent, now - self._default_seen_at)

    @property
    def default_use(self) -> Capacity:
        """What the default tier has in use."""
        use = self._uses[ServiceTier.DEFAULT]
        return Capacity(in_flight_count=use.count, committed_tokens=use.tokens)


def _turn_of(request: InferenceRequest) -> int:
    """Which turn a request has its place in: continued ones have the first."""
    if request.continued is not None:
        return 0
    return 1 if request.tier is ServiceTier.DEFAULT else 2
