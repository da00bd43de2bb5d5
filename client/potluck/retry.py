"""Whether and when a failed call is made again.

Decides by the error catalogue, where the same call may well succeed later: one that may as well be made twice, and one that costs but names
an idempotency key, also if nobody knows what became of it; another one that costs only if nothing was produced or charged. It must not know
what the call was, nor sleep; it is handed the time and the randomness.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from typing import Final

from potluck.errors import PoolError
from potluck_protocol.clock import Clock

TRIES_MAX: Final = 3
BACKOFF_FIRST_SECONDS: Final = 0.5
BACKOFF_MAX_SECONDS: Final = 8.0
RETRY_AFTER_MAX_SECONDS: Final = 30.0
"""A pool that asks for a longer pause gets its answer passed on to the caller instead."""

_log = logging.getLogger("potluck")
_log.addHandler(logging.NullHandler())  # silent until the program that uses the SDK listens


def delay_before_retry_seconds(
    error: PoolError, tries_made: int, remaining_seconds: float, jitter: float, *, keyed: bool = False
) -> float | None:
    """How long to wait before the next try; None where there must be none.

    Args:
        error: how the last try failed.
        tries_made: tries so far, the failed one included.
        remaining_seconds: what is left of the caller's limit.
        jitter: uniform in [0, 1), so that many clients do not come back together.
        keyed: every try names the same idempotency key, so that the pool makes one of them, whatever became of the last.
    """
    may_succeed = error.spec.retry_is_safe if keyed else error.retry_is_safe
    if not may_succeed or tries_made >= TRIES_MAX:
        return None
    if error.retry_after_seconds is not None:
        if error.retry_after_seconds > RETRY_AFTER_MAX_SECONDS:
            return None
        delay_seconds = error.retry_after_seconds * (1 + jitter / 4)
    else:
        delay_seconds = min(BACKOFF_MAX_SECONDS, BACKOFF_FIRST_SECONDS * 2 ** (tries_made - 1)) * (0.5 + jitter / 2)
    return delay_seconds if delay_seconds < remaining_seconds else None


class Tries:
    """The tries of one call under one time limit."""

    def __init__(
        self,
        clock: Clock,
        timeout_seconds: float,
        *,
        repeatable: bool = True,
        keyed: bool = False,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._clock = clock
        self._deadline_seconds = clock.monotonic_seconds() + timeout_seconds
        self._repeatable = repeatable
        self._keyed = keyed
        self._jitter = jitter
        self._made = 0

    def remaining_seconds(self) -> float:
        """What is left of the limit; never below zero."""
        return max(0.0, self._deadline_seconds - self._clock.monotonic_seconds())

    def delay_after(self, error: PoolError) -> float:
        """Seconds to wait before trying again; raises the error itself where that is not to be."""
        self._made += 1
        delay_seconds = None
        if self._repeatable:
            delay_seconds = delay_before_retry_seconds(error, self._made, self.remaining_seconds(), self._jitter(), keyed=self._keyed)
        if delay_seconds is None:
            raise error
        _log.debug("call failed with %s, trying again in %.2f s", error.code, delay_seconds)
        return delay_seconds
