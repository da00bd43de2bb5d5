"""When an engine that keeps crashing may be started again.

Decides the pause after each crash: 1, 2, 4 … 60 s. The fifth crash within ten minutes opens the breaker: no start for a minute. Then one
start is tried, and if that crashes before it was healthy for five minutes, the breaker opens for twice as long, up to 32 minutes. An engine
that was healthy begins again with the shortest pauses, but its crashes of the last ten minutes still count. So where every end is a crash
there are never more than `STARTS_MAX` starts in any ten minutes.

Two ends are no crashes, and that bound does not count them. A start that ran out of memory and will be made with less is a planned step, of
which there are only so many. And where a server that its owner runs was away or busy, nothing is loaded here for the next try, so nothing
opens, and only the pause grows, to 60 s: up to 15 tries in its first ten minutes, and then one a minute for as long as it stays away. It
must not know engines or clocks: all times are handed in, in seconds of one monotonic clock.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

BACKOFF_FIRST_SECONDS: Final = 1.0
BACKOFF_LAST_SECONDS: Final = 60.0
HEALTHY_AFTER_SECONDS: Final = 300.0
CRASHES_MAX: Final = 5
WINDOW_SECONDS: Final = 600.0
OPEN_FIRST_SECONDS: Final = 60.0
OPEN_LAST_SECONDS: Final = 1920.0
STARTS_MAX: Final = 8
"""In any ten minutes of crashes alone: five that crash, then those after pauses of one, two and four minutes."""


@dataclass(frozen=True, slots=True)
class CrashRecord:
    """What is remembered of an engine's crashes."""

    crashed_at_seconds: tuple[float, ...] = ()
    """The last ones, at most CRASHES_MAX, oldest first."""
    in_a_row_count: int = 0
    """Since it was last healthy."""
    opened_count: int = 0
    """How often in a row the breaker has opened."""

    @property
    def is_open(self) -> bool:
        """Its next start waits for the breaker, or is the one that is tried."""
        return self.opened_count > 0


NO_CRASHES: Final = CrashRecord()


def after_crash(record: CrashRecord, now_seconds: float, healthy_for_seconds: float = 0.0) -> CrashRecord:
    """One more crash, of an engine that had been ready for so long (0: it never was)."""
    record = _without_its_row(record, healthy_for_seconds)
    crashes = (*record.crashed_at_seconds, now_seconds)[-CRASHES_MAX:]
    too_many = len(crashes) == CRASHES_MAX and now_seconds - crashes[0] <= WINDOW_SECONDS
    opens = record.is_open or too_many
    return CrashRecord(crashes, record.in_a_row_count + 1, record.opened_count + 1 if opens else 0)


def after_absence(record: CrashRecord, healthy_for_seconds: float = 0.0) -> CrashRecord:
    """What is tried next was not there, after it had been ready for so long: the pause grows as after a crash, and nothing opens."""
    record = _without_its_row(record, healthy_for_seconds)
    return replace(record, in_a_row_count=record.in_a_row_count + 1)


def _without_its_row(record: CrashRecord, healthy_for_seconds: float) -> CrashRecord:
    return CrashRecord(record.crashed_at_seconds) if healthy_for_seconds >= HEALTHY_AFTER_SECONDS else record


def pause_seconds(record: CrashRecord) -> float:
    """How long after the last crash the next start waits."""
    if record.is_open:
        return min(OPEN_LAST_SECONDS, OPEN_FIRST_SECONDS * 2.0 ** min(record.opened_count - 1, 16))
    return backoff_seconds(record.in_a_row_count)


def backoff_seconds(in_a_row_count: int) -> float:
    """The pause after so many crashes in a row: 1, 2, 4 … 60 s."""
    return min(BACKOFF_LAST_SECONDS, BACKOFF_FIRST_SECONDS * 2.0 ** max(0, min(in_a_row_count - 1, 16)))
