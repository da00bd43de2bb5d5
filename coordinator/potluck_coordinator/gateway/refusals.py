"""Who was refused lately for want of a slot, by model: a model without a replica has no queue, and would else look like one nobody wants.

Decides that people count, not requests: a client that asks again and again is one; and what is said first to whoever demands what there
is none of. It must not know why there was no slot.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from potluck_coordinator.domain.admission import AIM_SHARE, NEXT_SHARE
from potluck_coordinator.domain.trust import NOBODY_TRUSTED
from potluck_protocol.errors import ErrorCode, PotluckError

if TYPE_CHECKING:
    from collections.abc import Collection

    from potluck_coordinator.gateway.inference_request import InferenceRequest
    from potluck_protocol.clock import Clock
    from potluck_protocol.values import AccountId, ModelId

REFUSED_SECONDS: Final = 60.0
"""How long a refusal counts: clients that still want their answer ask again within `AdmissionLimits.retry_after_seconds_max`."""
ACCOUNTS_MAX: Final = 1000
"""Of one model: more than that say nothing new."""

AT_ITS_BOUND: Final = "So many requests, or so large ones, wait here that no more can."


class Refusals:
    """The refusals of one gateway.

    Args:
        clock: whose monotonic seconds the window is counted in.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._refused_at: dict[ModelId, dict[AccountId, float]] = {}
        """Of each model those who were refused longest ago come first."""

    def note(self, model_id: ModelId, account_id: AccountId) -> None:
        """A request for a model of the catalogue got no slot."""
        now = self._clock.monotonic_seconds()
        accounts = self._refused_at.setdefault(model_id, {})
        accounts.pop(account_id, None)
        accounts[account_id] = now
        while (oldest := next(iter(accounts))) and (len(accounts) > ACCOUNTS_MAX or now - accounts[oldest] > REFUSED_SECONDS):
            del accounts[oldest]

    def counts(self, model_ids: Collection[ModelId]) -> dict[ModelId, int]:
        """How many people were refused lately, of every model that some were; what is not among the models is forgotten."""
        oldest = self._clock.monotonic_seconds() - REFUSED_SECONDS
        self._refused_at = {model_id: accounts for model_id, accounts in self._refused_at.items() if model_id in model_ids}
        counts = {model_id: sum(1 for at in accounts.values() if at >= oldest) for model_id, accounts in self._refused_at.items()}
        return {model_id: count for model_id, count in counts.items() if count}


def refusal_words(request: InferenceRequest, code: ErrorCode, predicted_seconds: float, deadline_seconds: float) -> str:
    """What is told first of why there is no slot; the replicas' reasons follow.

    Args:
        request: the one that is refused.
        code: what it is refused with.
        predicted_seconds: that it would wait; infinite where nobody knows.
        deadline_seconds: of a queue.
    """
    text = NOBODY_TRUSTED if request.trusted_only and code is ErrorCode.NO_CAPACITY else PotluckError(code).message
    if code is not ErrorCode.QUEUE_FULL or not math.isfinite(predicted_seconds):
        return text
    if predicted_seconds <= AIM_SHARE * deadline_seconds:
        # It would not wait for long: what is reached is a bound of the queue's.
        return AT_ITS_BOUND
    bearable = f"{AIM_SHARE * deadline_seconds:g} s are bearable, or {NEXT_SHARE * deadline_seconds:g} s for whoever would be next"
    return f"{text} In the {request.tier} tier it would wait some {predicted_seconds:.1f} s; {bearable}."
