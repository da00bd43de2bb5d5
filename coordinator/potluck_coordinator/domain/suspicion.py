"""When a replica that failed gets no requests, when it is tried again, and how it comes back.

Decides from what became of its attempts: two failures within a window, and it is suspected; so it is where it will not take what it said it
had room for, time after time with nothing answered between. A probe that succeeds opens it to one request at a time, and the first that
succeeds to all. Whoever feeds this knows which failures are a replica's own: not those that a request brings about, and not its owner's
pause. It must not know how a probe is made.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

FAILURES_MAX: Final = 1
"""Within the window; one more and it is suspected."""
REFUSALS_MAX: Final = 2
"""With nothing answered between them; one more and it is suspected. Now and then its word and a request cross on their way."""
REFUSALS_APART_SECONDS: Final = 0.5
"""Those closer to the last one that counted have the same cause: what was on its way when an engine went away is refused together."""
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
    refused_at: tuple[float, ...] = ()
    """While it is trusted: what it would not take within the window, since it answered last."""
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


def after_refusal(suspicion: Suspicion, now: float) -> Suspicion:
    """It would not take a request for which it had said that it had room, or gave it back."""
    if suspicion.standing is not Standing.TRUSTED:
        return after_failure(suspicion, now)
    if suspicion.refused_at and now - suspicion.refused_at[-1] < REFUSALS_APART_SECONDS:
        return suspicion
    refused_at = (*(at for at in suspicion.refused_at if now - at < WINDOW_SECONDS), now)
    if len(refused_at) <= REFUSALS_MAX:
        return replace(suspicion, refused_at=refused_at)
    return Suspicion(Standing.SUSPECTED, probe_at=now)


def after_success(suspicion: Suspicion) -> Suspicion:
    """An attempt was answered to its end. Of a trusted one it excuses no failure: half of its answers may fail."""
    return Suspicion() if suspicion.standing is Standing.HALF_OPEN else replace(suspicion, refused_at=())


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
    held = (*suspicion.failed_at, *suspicion.refused_at)
    return suspicion.standing is Standing.TRUSTED and all(now - at >= WINDOW_SECONDS for at in held)


def _after_bad_probe(suspicion: Suspicion, now: float) -> Suspicion:
    pause_seconds = min(PROBE_PAUSE_MAX_SECONDS, PROBE_PAUSE_FIRST_SECONDS * 2.0 ** min(suspicion.failed_probe_count, 10))
    return Suspicion(Standing.SUSPECTED, probe_at=now + pause_seconds, failed_probe_count=suspicion.failed_probe_count + 1)
