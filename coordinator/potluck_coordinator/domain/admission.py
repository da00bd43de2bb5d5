"""Whether a request is dispatched, waits, or is refused, and what a refused client is told.

Decides by predicted work, in tokens. Whether one replica has room for a request is `domain.placement`'s to say; where none has, the wait is
predicted, from what comes before it and from how fast room becomes free. A wait beyond the request's deadline is refused at once, with the
time after which it would not be. It must not know tasks, sockets, or how anything is measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final, NamedTuple

from potluck_protocol.errors import ErrorCode

if TYPE_CHECKING:
    from potluck_coordinator.domain.catalogue import ServiceTier
    from potluck_coordinator.domain.placement import Candidate
    from potluck_protocol.values import AccountId, ModelId, RequestId

KV_SHARE_MAX: Final = 0.9
"""Of all caches together that is promised to requests: expectations err, and an engine that runs over throws work away."""
KEPT_MARGIN: Final = 1.25
"""By how much a prediction may pass the deadline of somebody who waits already, or was given back by a node: predictions err, too."""
PROMISED_SHARE: Final = 3.0
"""Of a deadline, that whoever was told to come back now may wait: chance makes a queue longer than it was foreseen, and to be sent away
twice is worse than to wait a little more."""
HORIZON_SHARE: Final = 6.0
"""Of a deadline, for which room is kept for whoever is told to come back: chance adds up, and later nothing is certain enough."""
AIM_SHARE: Final = 0.2
"""Of a deadline, that a newcomer's predicted wait may be, and that clients are told to come back for. Predictions err, and whoever comes
later may come first: in the simulator, where large requests wait for a cache that is shared, one of 45 refusals came late at a half of the
deadline, one of 110 at three tenths, and one of 330 at this; more answers were good, too."""
NEXT_SHARE: Final = 0.5
"""The same, for whoever would be the next: nobody has to go before, and where few slots are, one answer's end is far away."""


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """The queue's bounds, one queue per model."""

    queue_length_max: int = 1024
    """The hard bound, in requests; predicted seconds are reached long before."""
    queue_wait_seconds_max: float = 30.0
    retry_after_seconds_min: float = 1.0
    retry_after_seconds_max: float = 60.0
    """The longest that clients listen to."""
    queue_bytes_max: int = 256 * 1024 * 1024
    """Of the bodies that wait for all models together."""


class Capacity(NamedTuple):
    """All replicas of one model that take requests, together."""

    slot_count: int = 0
    in_flight_count: int = 0
    kv_tokens: int = 0
    """0: of some of them nobody knows."""
    committed_tokens: float = 0.0


@dataclass(frozen=True, slots=True)
class Queued:
    """Requests that wait, and what they are expected to take of caches."""

    count: float = 0.0
    tokens: float = 0.0

    def __add__(self, other: Queued) -> Queued:
        return Queued(self.count + other.count, self.tokens + other.tokens)


NOBODY: Final = Queued()


@dataclass(frozen=True, slots=True)
class Pace:
    """How long a request has held its room lately."""

    seconds_mean: float = 1.0
    seconds_mean_by_tokens: float = 1.0
    """The same, each request weighed by its tokens: large ones stay longer."""


_PACE_GUESS: Final = Pace()


@dataclass(frozen=True, slots=True)
class ModelLoad:
    """One model's position as one request sees it."""

    capacity: Capacity
    """What requests of its tier may fill."""
    wanted_tokens: float = 0.0
    """What there has to be room for."""
    ahead: Queued = NOBODY
    """What waits and comes before it, by its tier and its account's turn."""
    pace: Pace = _PACE_GUESS
    reading_seconds: float = math.inf
    """Until a replica that has a slot and room for the request has read what keeps others from it; infinite: none has them."""
    is_full: bool = False
    """The queue is at a hard bound, and nobody in it gives way to this request."""


class WaitsFor(StrEnum):
    """What keeps a request waiting."""

    NODES = "a node that can take it"
    SLOTS = "a slot"
    PACE = "a slot; some stay empty, since more answers at a time would come too slowly"
    CACHE = "room in a cache"
    TURN = "room beside what is kept for the default tier"


def waits_for(usable_slot_count: int, free_slot_count: int, *, may_fill: bool, withheld: bool = False) -> WaitsFor:
    """What keeps a request waiting.

    Args:
        usable_slot_count: of replicas that could take it.
        free_slot_count: of these.
        may_fill: its tier may fill what is free.
        withheld: replicas have slots that stay empty for their pace.
    """
    if usable_slot_count == 0:
        return WaitsFor.NODES
    if free_slot_count == 0:
        return WaitsFor.PACE if withheld else WaitsFor.SLOTS
    return WaitsFor.CACHE if may_fill else WaitsFor.TURN


@dataclass(frozen=True, slots=True)
class Waiting:
    """Where a waiting request stands."""

    request_id: RequestId
    account_id: AccountId
    model_id: ModelId
    tier: ServiceTier
    position_in_tier: int
    """As foreseen; 1 comes next."""
    position_in_account: int
    waiting_count: int
    """In its tier."""
    waited_seconds: float
    waits_for: WaitsFor
    predicted_wait_seconds: float | None
    """From now on; None: nothing can take it."""
    deadline_seconds: float
    """From now on."""
    candidates: tuple[Candidate, ...] = ()
    """What it would meet now."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Queue it, for so long at most."""

    wait_seconds_max: float
    predicted_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Refuse:
    """Tell the client to come back."""

    code: ErrorCode
    retry_after_seconds: float
    predicted_seconds: float = math.inf
    """Of the wait that it would have had."""


Admission = Wait | Refuse


def is_half_empty(capacity: Capacity, ahead: Queued) -> bool:
    """Whether what runs and what comes before take no more than half of the slots: then all that newcomers wait for is time to read.

    Fuller ones are short of that time, too, and who is let in for it is late: in the simulator's overload, with no such bound, the good
    answers were 1.7 % fewer.
    """
    return 2 * (capacity.in_flight_count + ahead.count) <= capacity.slot_count


def predicted_wait_seconds(load: ModelLoad) -> float:
    """Until there is room for the request, for which there is none now, once everything before it has its own.

    Room becomes free as fast as what runs now leaves: by Little's law so much in a second as there is, over the time that it stays,
    whatever it is that runs short. What is free already counts for nothing: it is in pieces that were too small for those who wait. Unless
    nothing runs short but time to read: then those before it take their turns at that.
    """
    capacity, pace = load.capacity, load.pace
    if capacity.slot_count <= 0:
        return math.inf
    running_count = max(1, capacity.in_flight_count)
    seconds = (load.ahead.count + 1) * pace.seconds_mean / running_count
    if capacity.kv_tokens and capacity.committed_tokens > 0:
        tokens = load.ahead.tokens + load.wanted_tokens
        seconds = max(seconds, tokens * pace.seconds_mean_by_tokens / capacity.committed_tokens)
    return min(seconds, (load.ahead.count + 1) * load.reading_seconds)


def beside(capacity: Capacity, announced: Queued) -> tuple[Capacity, Queued]:
    """The room once those that are announced have come, and what of them then waits. By numbers: nobody has placed them yet."""
    if announced.count < 1:
        return capacity, NOBODY
    each_tokens = announced.tokens / announced.count
    room = max(0.0, float(capacity.slot_count - capacity.in_flight_count))
    if capacity.kv_tokens and each_tokens > 0:
        room = min(room, max(0.0, (KV_SHARE_MAX * capacity.kv_tokens - capacity.committed_tokens) // each_tokens))
    run_count = int(min(room, announced.count))
    waits = Queued(announced.count - run_count, announced.tokens - run_count * each_tokens)
    in_flight_count = capacity.in_flight_count + run_count
    return capacity._replace(in_flight_count=in_flight_count, committed_tokens=capacity.committed_tokens + run_count * each_tokens), waits


def retry_after_seconds(predicted_seconds: float, limits: AdmissionLimits) -> float:
    """When the wait would have come down to what a request may well wait, between the limits' bounds."""
    drained = predicted_seconds - AIM_SHARE * limits.queue_wait_seconds_max
    return min(max(drained, limits.retry_after_seconds_min), limits.retry_after_seconds_max)


def is_promised(retry_after: float, limits: AdmissionLimits) -> bool:
    """Whether room is kept for whoever comes back then; else he asks anew."""
    return retry_after < min(limits.retry_after_seconds_max, HORIZON_SHARE * limits.queue_wait_seconds_max)


def admit(
    load: ModelLoad, limits: AdmissionLimits, waited_seconds: float = 0.0, *, was_given_back: bool = False, was_promised: bool = False
) -> Admission:
    """Decides over one request for which there is no room now, new or given back by a node.

    Args:
        load: the model's position now.
        limits: the queue's bounds.
        waited_seconds: since the request arrived; a request that a node gave back has no second deadline.
        was_given_back: it was let in before, and a node would not take it.
        was_promised: it was refused before, and comes when it was told to.
    """
    if load.capacity.slot_count <= 0:
        return Refuse(ErrorCode.NO_CAPACITY, limits.retry_after_seconds_min)
    predicted = predicted_wait_seconds(load)
    left_seconds = max(0.0, limits.queue_wait_seconds_max * (PROMISED_SHARE if was_promised else 1.0) - waited_seconds)
    share = 1.0 if was_promised else KEPT_MARGIN if was_given_back else AIM_SHARE if load.ahead.count else NEXT_SHARE
    if load.is_full or predicted > left_seconds * share:
        return Refuse(ErrorCode.QUEUE_FULL, retry_after_seconds(predicted, limits), predicted)
    return Wait(left_seconds, predicted)


def is_hopeless(load: ModelLoad, waited_seconds: float, patience_seconds: float) -> bool:
    """Whether one that waits, and may wait for so long in all, would still wait at its deadline, by more than predictions err."""
    return waited_seconds + predicted_wait_seconds(load) > patience_seconds * KEPT_MARGIN
