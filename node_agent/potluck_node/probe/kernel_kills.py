"""Whether the kernel has just killed for want of memory: where this process and its children live, or anywhere on the machine.

Decides how long after such a kill an engine's end may be laid at it. The counts are looked at again and again while an engine runs: one of
weeks ago, of somebody else's browser, explains no end of today. It must not know engines.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

from potluck_node.probe.control_groups import ControlGroups

LOOK_SECONDS: Final = 1.0
"""Between looks."""
OWN_SECONDS_MAX: Final = 30.0
"""After a kill in the own control group: an engine of several processes may need a while to end when one of them is gone."""
MACHINE_SECONDS_MAX: Final = 5.0
"""After a kill anywhere: it may have been anybody's, so only one that came with the engine's end counts."""
_LOOK_COUNT_MAX: Final = int(OWN_SECONDS_MAX / LOOK_SECONDS) + 2
"""One before the longest time, and the last."""
_MACHINE_COUNTS: Final = Path("/proc/vmstat")


class _Look(NamedTuple):
    at_seconds: float
    own_count: int | None
    machine_count: int | None


class KernelKills:
    """What was seen of the kernel's counts, the last seconds of it.

    Args:
        groups: the control groups of this process.
        machine_counts: the kernel's file for the whole machine.
        now: monotonic seconds.
    """

    def __init__(
        self,
        groups: ControlGroups | None = None,
        machine_counts: Path = _MACHINE_COUNTS,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._groups = groups or ControlGroups()
        self._machine_counts = machine_counts
        self._now = now
        self._looks: deque[_Look] = deque(maxlen=_LOOK_COUNT_MAX)
        self.look()

    def look(self) -> None:
        """Reads the counts; to be called every LOOK_SECONDS."""
        self._looks.append(_Look(self._now(), self._groups.memory_kill_count(), self._machine_count()))

    def came_lately(self) -> bool:
        """Whether there was one that an end of just now may be laid at."""
        self.look()
        last = self._looks[-1]
        own_count, machine_count = self._before(OWN_SECONDS_MAX).own_count, self._before(MACHINE_SECONDS_MAX).machine_count
        return _has_grown(own_count, last.own_count) or _has_grown(machine_count, last.machine_count)

    def _before(self, seconds: float) -> _Look:
        """The last look that is so old, or the first. Where this process stood still, as without memory it may, the one before that."""
        limit_seconds = self._now() - seconds
        return next((look for look in reversed(self._looks) if look.at_seconds <= limit_seconds), self._looks[0])

    def _machine_count(self) -> int | None:
        try:
            lines = self._machine_counts.read_text().splitlines()
        except OSError:
            return None
        counts = dict(line.partition(" ")[::2] for line in lines)
        count = counts.get("oom_kill", "")
        return int(count) if count.isdecimal() else None


def _has_grown(before: int | None, after: int | None) -> bool:
    return before is not None and after is not None and after > before
