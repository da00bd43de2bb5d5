"""When a replica that failed gets no requests, when it is tried again, and how it comes back.

Decides from what became of its attempts: two failures within a window, and it is suspected; a probe that succeeds opens it to one request
at a time, and the first that succeeds to all. Whoever feeds this knows which failures are a replica's own: not those that a request
brings about, and not its owner's pause. It must not know how a probe is made.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

FAILURES_MAX: Final = 1
"""Within the window; one more and it is suspected."""
WINDOW_SECONDS: Final = 60.0
PROBE_PAUSE_FIRST_SECONDS: Final = 2.0
"""After a probe that failed; the first probe comes at once. It doubles."""
PROBE_PAUSE_MAX_SECONDS: Final = 60.0


class Standing(StrEnum):
    """What a replica gets."""

    TRUSTED = "trusted"
    SUSPECTED = "suspected"
    """No requests, but probes."""
    HALF_OPEN = "half_open"
    """One request at a time."""


@dataclass(frozen=True, slots=True)
class Suspicion:
    """What is held against one replica; seconds are monotonic."""

    standing: Standing = Standing.TRUSTED
    failed_at: tuple[float, ...] = ()
    """While it is trusted: the failures within the window."""
    probe_at: float = 0.0
    """While it is suspected: no probe before."""
    failed_probe_count: int = 0
    """In a row, half-open failures included."""


def after_failure(suspicion: Suspicion, now: float) -> Suspicion:
    """An attempt failed through no fault of its request."""
    match suspicion.standing:
        case Standing.TRUSTED:
            failed_at = (*(at for at in suspicion.failed_at if now - at < WINDOW_SECONDS), now)
            if len(failed_at) <= FAILURES_MAX:
                return replace(suspicion, failed_at=failed_at)
            return Suspicion(Standing.SUSPECTED, probe_at=now)
        case Standing.HALF_OPEN:
            return _after_bad_probe(suspicion, now)
        case Standing.SUSPECTED:
            # One that ran before.
            return suspicion


def after_success(suspicion: Suspicion) -> Suspicion:
    """An attempt was answered to its end. Of a trusted one it excuses nothing: half of its answers may fail."""
    return Suspicion() if suspicion.standing is Standing.HALF_OPEN else suspicion


def probe_is_due(suspicion: Suspicion, now: float) -> bool:
    """Whether the replica should show now what it can."""
    return suspicion.standing is Standing.SUSPECTED and now >= suspicion.probe_at


def after_probe(suspicion: Suspicion, now: float, *, succeeded: bool) -> Suspicion:
    """What a probe has shown; one of a replica that is not suspected shows nothing."""
    if suspicion.standing is not Standing.SUSPECTED:
        return suspicion
    return replace(suspicion, standing=Standing.HALF_OPEN) if succeeded else _after_bad_probe(suspicion, now)


def is_forgotten(suspicion: Suspicion, now: float) -> bool:
    """Whether nothing is held against it any more."""
    return suspicion.standing is Standing.TRUSTED and all(now - at >= WINDOW_SECONDS for at in suspicion.failed_at)


def _after_bad_probe(suspicion: Suspicion, now: float) -> Suspicion:
    pause_seconds = min(PROBE_PAUSE_MAX_SECONDS, PROBE_PAUSE_FIRST_SECONDS * 2.0 ** min(suspicion.failed_probe_count, 10))
    return Suspicion(Standing.SUSPECTED, probe_at=now + pause_seconds, failed_probe_count=suspicion.failed_probe_count + 1)
