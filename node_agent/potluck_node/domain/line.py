"""The line to the coordinator: what rate follows from arrivals, and when it is measured again.

Decides what of a measurement counts: not its beginning, in which TCP feels its way up, and not a single standstill. It must not know how
pieces travel, nor whether a rate is good: `domain.doctor_line` judges.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final

from potluck_protocol.line import Arrival, LineMeasurement

GROUPS_MAX: Final = 8
"""Into so many the counted half is cut; an even number, for pieces come in clumps: of an odd one the median may be a group of no time."""
MANY: Final = 10
"""Arrivals from which on a half of them is enough to tell a rate by."""
AGAIN_SECONDS: Final = 24 * 3600.0
"""A line is what its owner pays for; it changes by the month."""
PACE_MIN: Final = 1e-12
"""Seconds a byte: what comes quicker than a terabyte a second was there before the clock was read."""
FIRST_SECONDS_MAX: Final = 60.0
"""Agents that were started together, as after a coordinator's upgrade, come one after the other."""
PAUSE_SECONDS_MIN: Final = 180.0
"""Whatever a coordinator hints: a look may cost 8 MiB each way."""
FAILED_SECONDS: Final = 900.0
"""After a failure without a word of when to come again."""


@dataclass(frozen=True, slots=True)
class LineReading:
    """One look at the line: what was found, and why there is not more."""

    found: LineMeasurement | None = None
    """None where the coordinator was not even reached."""
    failure: str = ""
    """Why a rate, or both, is missing."""
    retry_after_seconds: float | None = None
    """When the coordinator would have it asked again."""


def bytes_per_second(arrivals: Sequence[Arrival]) -> int | None:
    """The steady rate of a transfer; None where too little came to tell, or the arrivals are in no order.

    The first half of the bytes is TCP's slow start, or more, and does not count. The rest is cut into groups of equally many pieces; the
    median of their paces (seconds a byte) is the line's. One standstill, however long, is one group's, and so is what piled up behind it.
    Of few pieces all count alike: a line that brings so few has no slow start to speak of, and they come in clumps.
    """
    if len(arrivals) < 3 or not all(
        before.seconds <= after.seconds and 0 <= before.received_bytes < after.received_bytes for before, after in pairwise(arrivals)
    ):
        return None
    pace = _pace(arrivals[0], arrivals[-1])
    if len(arrivals) >= MANY:
        half_bytes = (arrivals[0].received_bytes + arrivals[-1].received_bytes) / 2
        settled = next(index for index, arrival in enumerate(arrivals) if arrival.received_bytes >= half_bytes)
        counted = arrivals[min(settled, len(arrivals) - 2) :]
        pace = statistics.median(_paces(counted)) or _pace(counted[0], counted[-1])
    return max(1, round(1 / pace)) if pace >= PACE_MIN else None


def completed(reading: LineReading, kept: LineMeasurement | None, now_unix_ms: int) -> LineReading:
    """The reading, and what it lacks from one that is not a day old; together they are as old as that one."""
    if not reading.failure or kept is None or not 0 <= now_unix_ms - kept.measured_at_unix_ms < AGAIN_SECONDS * 1000:
        return reading
    found = reading.found or kept
    both = replace(
        kept,
        round_trip_microseconds=found.round_trip_microseconds or kept.round_trip_microseconds,
        upload_bytes_per_second=found.upload_bytes_per_second or kept.upload_bytes_per_second,
        download_bytes_per_second=found.download_bytes_per_second or kept.download_bytes_per_second,
    )
    return replace(reading, found=both)


def next_look_unix_ms(kept: LineMeasurement | None, now_unix_ms: int, jitter: float) -> int:
    """When an agent that starts now measures for the first time.

    Args:
        kept: what an earlier run found. Half of it does not count, nor one of the future: a clock was wrong when it was made.
        now_unix_ms: the clock.
        jitter: from 0 to 1.
    """
    soon = now_unix_ms + round(jitter * FIRST_SECONDS_MAX * 1000)
    if kept is None or kept.measured_at_unix_ms > now_unix_ms or None in {kept.upload_bytes_per_second, kept.download_bytes_per_second}:
        return soon
    return max(soon, kept.measured_at_unix_ms + round(AGAIN_SECONDS * 1000))


def pause_seconds(reading: LineReading, jitter: float) -> float:
    """How long after a look the next one is due: a day once both rates are known, wherever from.

    Else a refusal's hint is followed, within bounds, and a little jitter keeps those refused together apart.
    """
    found = reading.found
    if not reading.failure or (found is not None and None not in {found.upload_bytes_per_second, found.download_bytes_per_second}):
        return AGAIN_SECONDS
    return max(reading.retry_after_seconds or FAILED_SECONDS, PAUSE_SECONDS_MIN) + jitter * FIRST_SECONDS_MAX


def _paces(arrivals: Sequence[Arrival]) -> list[float]:
    """Of each group, in seconds a byte."""
    interval_count = len(arrivals) - 1
    group_count = min(GROUPS_MAX, interval_count - interval_count % 2) or 1
    edges = [arrivals[interval_count * number // group_count] for number in range(group_count + 1)]
    return [_pace(first, last) for first, last in pairwise(edges)]


def _pace(first: Arrival, last: Arrival) -> float:
    return (last.seconds - first.seconds) / (last.received_bytes - first.received_bytes)
