"""What happens when: the virtual clock of a simulated world.

Decides only the order of events: by time, of equal times by who came first, so that a seed always gives the same run. It must not know
what an event is. Nothing is ever taken off the agenda; whoever puts an event there knows, when it comes, whether it still means anything.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count
from typing import Any


class Agenda:
    """A heap of events. `now` is in seconds since the world began and moves only from event to event."""

    __slots__ = ("_heap", "_numbers", "event_count", "now")

    def __init__(self) -> None:
        self.now = 0.0
        self.event_count = 0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._numbers = count()

    def at(self, seconds: float, action: Callable[..., None], *arguments: Any) -> None:
        """Has the action called at that time, or at once if it has passed."""
        heappush(self._heap, (max(self.now, seconds), next(self._numbers), action, arguments))

    def after(self, seconds: float, action: Callable[..., None], *arguments: Any) -> None:
        """The same, counted from now."""
        self.at(self.now + seconds, action, *arguments)

    def run_until(self, end_seconds: float) -> None:
        """Everything before the end, which is then now."""
        heap = self._heap
        while heap and heap[0][0] < end_seconds:
            self.now, _, action, arguments = heappop(heap)
            self.event_count += 1
            action(*arguments)
        self.now = end_seconds
