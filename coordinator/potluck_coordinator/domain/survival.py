"""How likely a node goes away in the next hours, by its own history at the same hour of the week.

Decides from judged minutes alone: an hour with minutes of both kinds is one in which the node went or came. What little is known of one
hour of the week leans on the node's whole history, and that on the pool's usual. It must not know where minutes are kept, nor calendars:
hours are those of unix time, and 168 of them are a week.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

WEEK_HOURS: Final = 168
HISTORY_HOURS: Final = 8 * WEEK_HOURS
"""How far back it is looked: habits change."""
LOSSES_PER_HOUR_GUESS: Final = 1 / 24
"""Of a node of which nothing is known: it goes once a day."""
GUESS_HOURS: Final = 24.0
"""So many hours of its own weigh as much as the guess."""
LOSSES_PER_SECOND_GUESS: Final = LOSSES_PER_HOUR_GUESS / 3600
OWN_HOURS: Final = 4.0
"""So many of one hour of the week weigh as much as the node's whole history."""
LOSSES_OF_MIXED_HOUR: Final = 0.5
"""An hour of both kinds is as often one of coming back."""
LOSSES_PER_HOUR_MAX: Final = 4.0


@dataclass(frozen=True, slots=True)
class History:
    """Some hours of one node, added up."""

    up_minutes: int = 0
    down_minutes: int = 0
    mixed_hour_count: int = 0
    """Of these hours those with minutes of both kinds."""


def hour_of_week(unix_ms: int) -> int:
    """Which of a week's hours it is; the weeks of unix time begin on a Thursday, which nobody needs to know."""
    return unix_ms // 3_600_000 % WEEK_HOURS


def losses_per_second(whole: History, this_hour: History) -> float:
    """The rate at which the node goes away now.

    Args:
        whole: its history of `HISTORY_HOURS`.
        this_hour: the same, of this hour of the week and the next.
    """
    usual = _leaning(whole, 0, LOSSES_PER_HOUR_GUESS, GUESS_HOURS)
    # Who is up now, and was down at this hour in other weeks, goes before it.
    return min(_leaning(this_hour, this_hour.down_minutes / 60, usual, OWN_HOURS), LOSSES_PER_HOUR_MAX) / 3600


def _leaning(history: History, absence_hours: float, towards: float, weight_hours: float) -> float:
    losses = LOSSES_OF_MIXED_HOUR * history.mixed_hour_count + absence_hours
    return (losses + towards * weight_hours) / (history.up_minutes / 60 + weight_hours)
