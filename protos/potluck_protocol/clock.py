"""Time as something handed in, so that tests move it.

Decides that durations and dates come from two clocks, for a machine's date may jump.
"""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """The two times a process needs: durations by `monotonic_seconds`, records by `unix_ms`."""

    def monotonic_seconds(self) -> float:
        """Seconds that never go back; only differences mean anything."""
        ...

    def unix_ms(self) -> int:
        """Milliseconds since 1970, for what people read and databases keep."""
        ...


class SystemClock:
    """The machine's clocks."""

    def monotonic_seconds(self) -> float:
        return time.monotonic()

    def unix_ms(self) -> int:
        return time.time_ns() // 1_000_000
