"""What of one node is still to be told to the directory: whether there is news, and for how long its lease was fresh and its link up.

Decides nothing; `node_session` counts, `reporting` tells. It must not know what either does with it.
"""

from __future__ import annotations


class Telling:
    """Of one session.

    Args:
        now: monotonic seconds, as everywhere here.
    """

    __slots__ = ("_counted_at", "covered_seconds", "has_news", "report_at", "reported_at")

    def __init__(self, now: float) -> None:
        self.has_news = True
        """Beside the time."""
        self.report_at = now
        """When the time alone is told."""
        self.reported_at = now
        """When all of it was told last."""
        self.covered_seconds = 0.0
        self._counted_at = now

    def count(self, now: float, *, is_fresh: bool) -> None:
        """The time until now; called before that changes."""
        if is_fresh:
            self.covered_seconds += now - self._counted_at
        self._counted_at, self.has_news = now, True

    def take_seconds(self) -> float:
        """What was counted; it is told, and counted no more."""
        seconds, self.covered_seconds = self.covered_seconds, 0.0
        return seconds
