"""How old a plan may be, for time alone, an absence or an idle replica, may call for another one; and how soon after one the next is made.

Decides by how long the last one took, so that a pool of thousands does not spend its directory on plans that change nothing, nor on one for
each of many nodes that come together. It must not know clocks.
"""

from __future__ import annotations

from typing import Final

USUAL_SECONDS: Final = 5.0
LONGEST_SECONDS: Final = 30.0
TIME_SHARE_MAX: Final = 0.02
"""Of all time, that may go into such plans as long as they are no older than the longest."""
REST_SECONDS_MAX: Final = 0.5
"""After a plan: so long, at most, waits whoever calls for the next one."""


def age_seconds_max(took_seconds: float) -> float:
    """Seconds from the beginning of one plan to the next, if the last one took so long."""
    return min(LONGEST_SECONDS, max(USUAL_SECONDS, took_seconds / TIME_SHARE_MAX))


def rest_seconds(took_seconds: float, ended_seconds: float) -> float:
    """How long a plan that is called for waits, so that those that come meanwhile share it and plans take half of the time at most.

    Args:
        took_seconds: the last one.
        ended_seconds: since its end.
    """
    return max(0.0, min(REST_SECONDS_MAX, took_seconds) - ended_seconds)
