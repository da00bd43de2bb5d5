"""How much of a core this process spends, all its threads together, over the last seconds.

Decides how fast it forgets. It must not know what follows.
"""

from __future__ import annotations

from typing import Final

KEPT_SHARE: Final = 0.8
"""Of the last figure, with each new one: a busy second alone says little."""


class ProcessLoad:
    """Of one process."""

    def __init__(self) -> None:
        self.share = 0.0
        self._last: tuple[float, float] | None = None

    def note(self, cpu_seconds: float, now: float) -> float:
        """The share, with what was spent since the last note.

        Args:
            cpu_seconds: that the process has spent since it began.
            now: monotonic seconds.
        """
        if self._last is not None and now > self._last[1]:
            newest = (cpu_seconds - self._last[0]) / (now - self._last[1])
            self.share = KEPT_SHARE * self.share + (1 - KEPT_SHARE) * newest
        self._last = cpu_seconds, now
        return self.share
