"""How long a piece of an answer waits for others to share a frame of the link with.

Decides that it waits only where many streams run together: a frame costs the coordinator as much as a dozen pieces in it, but where few are
said hardly two meet within the wait, and it would only delay them. It changes, like a `dict`; it knows no clock, and must not know frames.
"""

from __future__ import annotations

from typing import Final

COMPANY_SECONDS: Final = 0.004
"""After the last frame; a lone stream of up to 250 pieces a second would lose nothing by it."""
BUSY_PIECES_PER_SECOND: Final = 2000.0
"""From here on eight share a frame, and more."""
RATE_SECONDS: Final = 0.05
"""Pieces are counted over so long at least."""


class Company:
    """Of one link."""

    __slots__ = ("_count", "_counted_since_seconds", "_is_busy")

    def __init__(self) -> None:
        self._count = 0
        self._counted_since_seconds = 0.0
        self._is_busy = False

    def said(self) -> None:
        """One more piece. On the hot path of every token."""
        self._count += 1

    def wait_seconds(self, now_seconds: float, flushed_at_seconds: float) -> float:
        """How long the next frame waits; nothing or less: not at all.

        Args:
            now_seconds: monotonic.
            flushed_at_seconds: when the last one left.
        """
        seconds = now_seconds - self._counted_since_seconds
        if seconds >= RATE_SECONDS:
            self._is_busy = self._count >= BUSY_PIECES_PER_SECOND * seconds
            self._counted_since_seconds, self._count = now_seconds, 0
        return flushed_at_seconds + COMPANY_SECONDS - now_seconds if self._is_busy else 0.0
