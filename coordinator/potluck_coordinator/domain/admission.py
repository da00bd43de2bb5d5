"""Whether a request is dispatched, waits, or is refused, and what a refused client is told.

Decides from counts: the slots that could take the request, those of them that are free and left over by whoever waits, and the requests in
the model's queue. How long a request has held a slot in the mean lately says only when a refused client should come back.
`gateway.queues` counts and measures. It must not know tasks or sockets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from potluck_protocol.errors import ErrorCode


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """The queue's bounds, one queue per model."""

    queue_length_max: int = 64
    queue_wait_seconds_max: float = 30.0
    retry_after_seconds_min: float = 1.0
    retry_after_seconds_max: float = 60.0


@dataclass(frozen=True, slots=True)
class ModelLoad:
    """One model's position when a request for it arrives."""

    usable_slot_count: int
    """Slots of replicas that could take this request, busy or not."""
    free_slot_count: int
    """Of these, that nobody who waits could take."""
    queued_count: int
    request_seconds_mean: float
    """How long a request has held a slot lately."""
    may_displace: bool = False
    """Whether somebody who has more in a full queue gives way to this request (`domain.fairness`)."""


@dataclass(frozen=True, slots=True)
class Admitted:
    """Place it now."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Queue it, for so long at most."""

    wait_seconds_max: float


@dataclass(frozen=True, slots=True)
class Refuse:
    """Tell the client to come back."""

    code: ErrorCode
    retry_after_seconds: float


Admission = Admitted | Wait | Refuse


def drain_seconds(load: ModelLoad) -> float:
    """How long until a request that joined the queue's end now would start, if requests keep their length."""
    if load.usable_slot_count == 0:
        return math.inf
    return (load.queued_count + 1) * load.request_seconds_mean / load.usable_slot_count


def retry_after_seconds(load: ModelLoad, limits: AdmissionLimits) -> float:
    """What a refused client is told, between the limits' bounds."""
    return min(max(drain_seconds(load), limits.retry_after_seconds_min), limits.retry_after_seconds_max)


def admit(load: ModelLoad, limits: AdmissionLimits, waited_seconds: float = 0.0) -> Admission:
    """Decides over one request, new or given back by a node. A slot that is free is its own, for whoever waits already cannot take it.

    Args:
        load: the model's position now.
        limits: the queue's bounds.
        waited_seconds: since the request arrived; a request that a node gave back has no second deadline.
    """
    if load.usable_slot_count == 0:
        return Refuse(ErrorCode.NO_CAPACITY, limits.retry_after_seconds_min)
    if load.free_slot_count > 0:
        return Admitted()
    if load.queued_count >= limits.queue_length_max and not load.may_displace:
        return Refuse(ErrorCode.QUEUE_FULL, retry_after_seconds(load, limits))
    return Wait(max(0.0, limits.queue_wait_seconds_max - waited_seconds))
