"""When a replica that failed gets no requests, when it is tried again, and how it comes back.

Decides from what became of its attempts: two failures within a window, and it is suspected; so it is where it will not take what it said it
had room for, time after time with nothing answered between. A probe that succeeds opens it to one request at a time, and the first that
succeeds to all. Whoever feeds this knows which failures are a replica's own: not those that a request brings about, and not its owner's
pause. Of an error that an engine answers nobody knows: it brings a probe, beside the requests, and what that shows is the replica's own.
It must not know how a probe is made.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

FAILURES_MAX: Final = 1
"""Within the window; one more and it is suspected."""
REFUSALS_MAX: Final = 2
"""With nothing answered between them; one more and it is suspected. Now and then its word and a request cross on their way."""
ERRORS_MAX: Final = 1
"""With nothing answered between them; one more and it is probed, and serves on: most errors are their requests' own."""
REFUSALS_APART_SECONDS: Final = 0.5
"""Those closer to the last one that counted have the same cause: what was on its way when an engine went away is refused together."""
WINDOW_SECONDS: Final = 60.0
PROBE_PAUSE_FIRST_SECONDS: Final = 2.0
"""After a probe that failed; the first probe comes at once. It doubles."""
PROBE_PAUSE_MAX_SECONDS: Final = 60.0
DOUBT_PAUSE_SECONDS: Final = 10.0
"""After a probe that an error brought about and that went well: a client that asks nonsense must not keep engines busy with probes."""
BUSY_STATUSES: Final = frozenset({429, 503})
"""HTTP: an engine's word that it takes nothing now, whatever it is asked."""
GOOD_STATUS: Final = 200


class Standing(StrEnum):
    """What a replica gets."""

    TRUSTED = "trusted"
    SUSPECTED = "suspected"
    """No requests, but probes."""
    HALF_OPEN = "half_open"
    """One request at a time."""


class AnswerKind(StrEnum):
    """What an engine's answer says of it, whatever became of the request."""

    GOOD = "good"
    BUSY = "busy"
    ERROR = "error"
    """Its own, or its request's: the answer alone does not say which."""


def kind_of(http_status: int | None, *, ended: bool, fell_short: bool) -> AnswerKind | None:
    """What an answer is; None: it says nothing yet.

    Args:
        http_status: how it begins; None: it has not begun.
        ended: the engine came to the end of it.
        fell_short: that end came before the answer's.
    """
    if http_status in BUSY_STATUSES:
        return AnswerKind.BUSY
    if fell_short or (ended if http_status is None else http_status != GOOD_STATUS):
        return AnswerKind.ERROR
    return AnswerKind.GOOD if ended else None


@dataclass(frozen=True, slots=True)
class Suspicion:
    """What is held against one replica; seconds are monotonic."""

    standing: Standing = Standing.TRUSTED
    failed_at: tuple[float, ...] = ()
    """While it is trusted: the failures within the window."""
    refused_at: tuple[float, ...] = ()
    """While it is trusted: what it would not take within the window, since it answered last."""
    errors_at: tuple[float, ...] = ()
    """While it is trusted: the errors that it answered within the window, since it answered well last."""
    probe_at: float = 0.0
    """No probe before."""
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


def after_refused_body(suspicion: Suspicion, now: float) -> Suspicion:
    """It blamed a request that another replica on the same kind of engine answers.

    That takes trust away as other refusals do. What has passed its probe it neither opens nor closes: versions differ, too, and a client
    with one such request would keep an honest replica out for as long as it asks.
    """
    return after_refusal(suspicion, now) if suspicion.standing is Standing.TRUSTED else suspicion


def after_success(suspicion: Suspicion) -> Suspicion:
    """An attempt was answered well. Of a trusted one it excuses no failure: half of its answers may fail."""
    return Suspicion() if suspicion.standing is Standing.HALF_OPEN else replace(suspicion, refused_at=(), errors_at=())


def after_error(suspicion: Suspicion, now: float) -> Suspicion:
    """It answered with an error, and whose that is nobody knows. It takes no trust away, and gives none back: a probe will show."""
    if suspicion.standing is not Standing.TRUSTED:
        return suspicion
    recent = [at for at in suspicion.errors_at if now - at < WINDOW_SECONDS]
    return replace(suspicion, errors_at=(*recent, now)[-ERRORS_MAX - 1 :])


def probe_is_due(suspicion: Suspicion, now: float) -> bool:
    """Whether the replica should show now what it can."""
    return now >= suspicion.probe_at and (suspicion.standing is Standing.SUSPECTED or _is_doubted(suspicion))


def after_probe(suspicion: Suspicion, now: float, *, succeeded: bool, answered: bool = True) -> Suspicion:
    """What a probe has shown; one of a replica that is neither suspected nor doubted shows nothing.

    Of one that is trusted only its own bad answer counts: where the probe was lost, refused or late (not `answered`), that has its own
    ways to count.
    """
    if _is_doubted(suspicion):
        well = replace(suspicion, errors_at=(), probe_at=now + DOUBT_PAUSE_SECONDS)
        return well if succeeded or not answered else _after_bad_probe(suspicion, now)
    if suspicion.standing is not Standing.SUSPECTED:
        return suspicion
    return replace(suspicion, standing=Standing.HALF_OPEN) if succeeded else _after_bad_probe(suspicion, now)


def is_forgotten(suspicion: Suspicion, now: float) -> bool:
    """Whether nothing is held against it any more."""
    held = (*suspicion.failed_at, *suspicion.refused_at, *suspicion.errors_at)
    is_settled = suspicion.standing is Standing.TRUSTED and now >= suspicion.probe_at
    return is_settled and all(now - at >= WINDOW_SECONDS for at in held)


def _is_doubted(suspicion: Suspicion) -> bool:
    return suspicion.standing is Standing.TRUSTED and len(suspicion.errors_at) > ERRORS_MAX


def _after_bad_probe(suspicion: Suspicion, now: float) -> Suspicion:
    pause_seconds = min(PROBE_PAUSE_MAX_SECONDS, PROBE_PAUSE_FIRST_SECONDS * 2.0 ** min(suspicion.failed_probe_count, 10))
    return Suspicion(Standing.SUSPECTED, probe_at=now + pause_seconds, failed_probe_count=suspicion.failed_probe_count + 1)
