"""Who was refused and told when to come back, so that the time was true: room is kept for whoever comes then, and not given to others.

A request that comes back is known by its account and a hash of its body. Decides how many appointments are kept, and for how much they
count against newcomers: by the share of them that were kept lately, for some clients never come back. It must not know queues.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

from potluck_coordinator.domain.admission import Queued

if TYPE_CHECKING:
    from collections.abc import Mapping

    from potluck_coordinator.gateway.inference_request import InferenceRequest
    from potluck_protocol.values import AccountId

APPOINTMENTS_MAX: Final = 4096
"""Of one model and tier; whoever is refused beyond that is told a time, and not expected."""
LATE_SECONDS: Final = 10.0
"""How long after its time one is still expected: clients add some chance of their own, and lines are slow."""
EARLY_SECONDS: Final = 0.1
"""By so much whoever comes earlier is on time."""
GAIN: Final = 0.05
"""Of the newest appointment in the share that is kept."""

_Key: TypeAlias = "tuple[AccountId, int]"


@dataclass(frozen=True, slots=True)
class Expected:
    """What is to come back: the service that its account will be charged, and what it is expected to take."""

    service: float
    queued: Queued


@dataclass(frozen=True, slots=True)
class Appointment:
    """One."""

    due_at_seconds: float
    expected: Expected


class Appointments:
    """Those of one model and tier; seconds are monotonic."""

    def __init__(self) -> None:
        self._appointments: dict[_Key, Appointment] = {}
        self._sums: dict[AccountId, Expected] = {}
        self._kept_share = 1.0

    def __len__(self) -> int:
        return len(self._appointments)

    def expected_beside(self, request: InferenceRequest) -> Mapping[AccountId, Expected]:
        """What each account is expected to come back with beside the request, by the share of appointments that was kept lately."""
        share, sums, own = self._kept_share, dict(self._sums), self._appointments.get(_key(request))
        if own is not None:
            _add(sums, request.account_id, own.expected, -1)
        return {
            account_id: Expected(share * each.service, Queued(share * each.queued.count, share * each.queued.tokens))
            for account_id, each in sums.items()
        }

    def find(self, request: InferenceRequest, now: float) -> Appointment | None:
        """The request's own, be it due or not."""
        self._sweep(now)
        return self._appointments.get(_key(request)) if self._appointments else None

    def is_due(self, appointment: Appointment, now: float) -> bool:
        """Whether whoever comes now comes when it was told to."""
        return now >= appointment.due_at_seconds - EARLY_SECONDS

    def keep(self, request: InferenceRequest) -> None:
        """It has come, and is let in."""
        # The key is a hash of the whole body, which nobody needs where nobody is expected.
        if self._appointments and self._remove(_key(request)):
            self._kept_share += GAIN * (1.0 - self._kept_share)

    def make(self, request: InferenceRequest, due_at_seconds: float, expected: Expected) -> None:
        """Expects it back; instead of what was said before."""
        key = _key(request)
        self._remove(key)
        if len(self._appointments) < APPOINTMENTS_MAX:
            self._appointments[key] = Appointment(due_at_seconds, expected)
            _add(self._sums, key[0], expected, 1)

    def _sweep(self, now: float) -> None:
        """Forgets those that nobody kept. They stand in the order of making, which is nearly that of their times."""
        while self._appointments:
            key, oldest = next(iter(self._appointments.items()))
            if now <= oldest.due_at_seconds + LATE_SECONDS:
                return
            self._remove(key)
            self._kept_share -= GAIN * self._kept_share

    def _remove(self, key: _Key) -> bool:
        gone = self._appointments.pop(key, None)
        if gone is None:
            return False
        _add(self._sums, key[0], gone.expected, -1)
        return True


def _add(sums: dict[AccountId, Expected], account_id: AccountId, change: Expected, sign: int) -> None:
    known = sums.get(account_id, Expected(0.0, Queued()))
    count, tokens = known.queued.count + sign * change.queued.count, known.queued.tokens + sign * change.queued.tokens
    if count < 1:
        sums.pop(account_id, None)
    else:
        sums[account_id] = Expected(known.service + sign * change.service, Queued(count, tokens))


def _key(request: InferenceRequest) -> _Key:
    """Python's own hash, keyed anew by each process: nobody can make two bodies that look the same."""
    return request.account_id, hash(request.body)
