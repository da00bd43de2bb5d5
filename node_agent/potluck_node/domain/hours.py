"""The hours in which a volunteer's machine may serve: how they are written, and whether they are now.

Decides what "mon-fri 22:00-07:00" means at every instant, in the owner's local time. A window belongs to the day on which it begins. Its
edges are instants: the first at which the clock on the wall shows that time, or has jumped past it. So a night in which the clock is set
back is not opened twice, and one in which it is set forward ends no later than it says. It must not know clocks, nor what an edge brings.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta, tzinfo
from typing import Final

DAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
DAY_MINUTES: Final = 24 * 60
WINDOWS_MAX: Final = 32
"""More than any week needs; each is looked at again and again."""
SCANNED_DAYS: Final = 16
"""Forward. Two weeks, because a short window of one day in the week can fall into the hour that a clock set forward leaves out."""
_FORM: Final = re.compile(r"(?:(?P<days>[a-z]{3}(?:[-,][a-z]{3})*)\s+)?(?P<start>\d\d:\d\d)-(?P<end>\d\d:\d\d)", re.IGNORECASE)
_EXAMPLE: Final = 'write it as "mon-fri 22:00-07:00", "sat,sun 00:00-24:00", or "22:00-07:00" for every day'


@dataclass(frozen=True, slots=True)
class Window:
    """A part of some days of the week."""

    days: frozenset[int]
    """On which it begins; Monday is 0."""
    start_minutes: int
    """After that day's midnight."""
    end_minutes: int
    """After the same midnight; beyond 24 hours where it ends on the next day."""


@dataclass(frozen=True, slots=True)
class Opening:
    """Whether the hours are now, and until when that stays so."""

    is_open: bool
    until_unix_ms: int | None
    """None: it never changes."""


def parse_window(words: str) -> Window:
    """The window that an owner wrote; raises ValueError, which says how to write it."""
    found = _FORM.fullmatch(words.strip())
    if found is None:
        raise ValueError(f"{words!r} is no window of hours: {_EXAMPLE}")
    start, end = _minutes(found["start"], words), _minutes(found["end"], words)
    if start in {DAY_MINUTES, end}:
        raise ValueError(f"{words!r} is empty: {_EXAMPLE}")
    days = frozenset(range(7)) if found["days"] is None else _days(found["days"].lower(), words)
    return Window(days, start, end if end > start else end + DAY_MINUTES)


def opening(windows: Sequence[Window], now_unix_ms: int, zone: tzinfo) -> Opening:
    """Whether some window is open now; without windows it always is."""
    if not windows:
        return Opening(is_open=True, until_unix_ms=None)
    today = datetime.fromtimestamp(now_unix_ms / 1000, zone).date()
    found: list[tuple[int, int]] = []
    # One that began the day before yesterday still runs where a day lasted 25 hours.
    for day in (today + timedelta(days=offset) for offset in range(-2, SCANNED_DAYS)):
        found += [_span(window, day, zone) for window in windows if day.weekday() in window.days]
    for start_ms, end_ms in _merged(found):
        if now_unix_ms < start_ms:
            return Opening(is_open=False, until_unix_ms=start_ms)
        if now_unix_ms < end_ms:
            # Its end lies where the look ends: every day is followed by the next without a gap.
            endless = end_ms - now_unix_ms > (SCANNED_DAYS - 3) * DAY_MINUTES * 60_000
            return Opening(is_open=True, until_unix_ms=None if endless else end_ms)
    return Opening(is_open=False, until_unix_ms=None)


def _span(window: Window, day: date, zone: tzinfo) -> tuple[int, int]:
    midnight = datetime(day.year, day.month, day.day)  # noqa: DTZ001 - on the wall; the zone comes in where it becomes an instant
    return tuple(_first_at(midnight + timedelta(minutes=minutes), zone) for minutes in (window.start_minutes, window.end_minutes))  # type: ignore[return-value]


def _first_at(wall: datetime, zone: tzinfo) -> int:
    """The first instant at which the clock shows this time or has jumped past it, as Unix milliseconds."""
    shown = wall.replace(tzinfo=zone)
    instant = shown.astimezone(UTC)
    if instant.astimezone(zone).replace(tzinfo=None) != wall:
        # Never shown: the clock was set forward over it. By the rules before the jump it is `instant`, by those after it lies earlier.
        before, after = shown.replace(fold=1).astimezone(UTC), instant
        offset = after.astimezone(zone).utcoffset()
        while after - before > timedelta(seconds=1):
            middle = before + (after - before) // 2
            before, after = (before, middle) if middle.astimezone(zone).utcoffset() == offset else (middle, after)
        instant = (after + timedelta(microseconds=500_000)).replace(microsecond=0)
    return round(instant.timestamp() * 1000)


def _merged(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """In order; those that meet are one."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(span for span in spans if span[0] < span[1]):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def _minutes(clock: str, words: str) -> int:
    hours, minutes = (int(part) for part in clock.split(":"))
    total = hours * 60 + minutes
    if minutes > 59 or total > DAY_MINUTES:
        raise ValueError(f"{clock} in {words!r} is no time of a day: {_EXAMPLE}")
    return total


def _days(words: str, window: str) -> frozenset[int]:
    days: set[int] = set()
    for part in words.split(","):
        named = part.split("-")
        if len(named) > 2 or not set(named) <= set(DAYS):
            raise ValueError(f"{part!r} in {window!r} is no day of {', '.join(DAYS)}: {_EXAMPLE}")
        first, last = DAYS.index(named[0]), DAYS.index(named[-1])
        days.update((first + step) % 7 for step in range((last - first) % 7 + 1))
    return frozenset(days)
