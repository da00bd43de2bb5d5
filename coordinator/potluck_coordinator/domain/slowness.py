"""When a replica counts as slow: measured against its own node's usual speed with the same model, never against others'.

Decides from one speed a minute: what a day's is, what is usual (the median of the last seven days'), and that three minutes in a row far
below it take work away, or all of it for a while. What is usual leaves today out, so that a slow day does not excuse itself. It must not
know how speeds are learned, nor where days are kept.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum
from statistics import median
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

DAYS_MAX: Final = 7
DAY_MINUTES_MIN: Final = 10
"""A day in which the replica answered in fewer minutes says nothing of what is usual."""
SLOW_SHARE: Final = 0.5
CRAWLING_SHARE: Final = 0.2
"""Of what is usual: below the first it gets less work, below the second none."""
MINUTES_IN_A_ROW: Final = 3
SLOW_WEIGHT: Final = 0.25
"""Of a slow replica's speeds, which placement believes: it gets what others have no room for."""
DRAINED_MINUTES: Final = 10
"""After that it gets requests again, few of them, to show whether it is still so slow."""


class Pace(StrEnum):
    """How a replica does, against what it usually does."""

    USUAL = "usual"
    SLOW = "slow"
    DRAINED = "drained"


@dataclass(frozen=True, slots=True)
class PaceBook:
    """One replica's days, and its last minutes. Days and minutes are of unix time."""

    days: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))
    """Median tokens a second of each earlier day that says something."""
    today: int = 0
    minutes: tuple[float, ...] = ()
    """Of today: the speed of each minute in which it answered."""
    slow_minute_count: int = 0
    crawling_minute_count: int = 0
    """In a row, up to now; minutes without an answer neither count nor end the row."""
    pace: Pace = Pace.USUAL
    drained_at_minute: int = 0
    drained_tokens_per_second: float = 0.0
    """How fast it was in that minute."""
    drained_usual_tokens_per_second: float = 0.0
    """What was usual of it then: at midnight the minutes go and another day counts, while the drain goes on."""


def day_of(minute: int) -> int:
    """The day that a minute is in."""
    return minute // (24 * 60)


def usual_tokens_per_second(book: PaceBook) -> float | None:
    """The median of the last seven days'; None while it has none."""
    recent = [speed for day, speed in book.days.items() if book.today - DAYS_MAX <= day < book.today]
    return median(recent) if recent else None


def day_median(book: PaceBook) -> float | None:
    """Today's so far; None while it says nothing."""
    return median(book.minutes) if len(book.minutes) >= DAY_MINUTES_MIN else None


def after_minute(book: PaceBook, minute: int, tokens_per_second: float | None) -> PaceBook:
    """What follows from one minute's speed; None: it answered nothing in it."""
    book = _on_day(book, day_of(minute))
    if book.pace is Pace.DRAINED and minute - book.drained_at_minute >= DRAINED_MINUTES:
        book = replace(book, pace=Pace.SLOW, crawling_minute_count=0)
    if tokens_per_second is None:
        return book
    usual = usual_tokens_per_second(book)
    share = 1.0 if usual is None else tokens_per_second / usual
    slow_count = book.slow_minute_count + 1 if share < SLOW_SHARE else 0
    crawling_count = book.crawling_minute_count + 1 if share < CRAWLING_SHARE else 0
    book = replace(book, minutes=(*book.minutes, tokens_per_second), slow_minute_count=slow_count, crawling_minute_count=crawling_count)
    if book.pace is Pace.DRAINED:
        # What was under way when it was drained.
        return book
    if usual is not None and crawling_count >= MINUTES_IN_A_ROW:
        return replace(
            book,
            pace=Pace.DRAINED,
            drained_at_minute=minute,
            drained_tokens_per_second=tokens_per_second,
            drained_usual_tokens_per_second=usual,
        )
    if slow_count >= MINUTES_IN_A_ROW:
        return replace(book, pace=Pace.SLOW)
    return replace(book, pace=Pace.USUAL) if slow_count == 0 else book


def pace_words(book: PaceBook) -> str:
    """Why a replica is drained, for its owner and the operator; empty where it is not."""
    if book.pace is not Pace.DRAINED:
        return ""
    return f"slow: {book.drained_tokens_per_second:.1f} tokens/s, where {book.drained_usual_tokens_per_second:.1f} are usual of it"


def _on_day(book: PaceBook, day: int) -> PaceBook:
    """The book with what was today put away, if that is over."""
    if day == book.today:
        return book
    ended = day_median(book)
    days = {**book.days, book.today: ended} if ended is not None else dict(book.days)
    kept = {known: speed for known, speed in days.items() if day - DAYS_MAX <= known < day}
    return replace(book, days=MappingProxyType(kept), today=day, minutes=())
