"""How old a plan may be: time alone, an absence or an idle replica, may call for another one.

Decides by how long the last one took, so that a pool of thousands does not spend its directory on plans that change nothing. What nodes and
people do calls for one at once. It must not know clocks.
"""

from __future__ import annotations

from typing import Final

USUAL_SECONDS: Final = 5.0
LONGEST_SECONDS: Final = 30.0
TIME_SHARE_MAX: Final = 0.02
"""Of all time, that may go into such plans as long as they are no older than the longest."""


def age_seconds_max(took_seconds: float) -> float:
    """Seconds from the beginning of one plan to the next, if the last one took so long."""
    return min(LONGEST_SECONDS, max(USUAL_SECONDS, took_seconds / TIME_SHARE_MAX))
