"""Whether an engine that has work stands still.

Decides from the times of its last words, and of clients that hung up on it. It must not know HTTP, nor what becomes of such an engine.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

STANDSTILL_SECONDS_MAX: Final = 60.0
"""An engine at work says something after each batch of a prompt and after each token. A grammar that branches without end keeps llama.cpp
silent for minutes, its other answers too."""
DOUBT_SECONDS: Final = 2.0
"""After a client hung up: an engine that let go of its work is as silent as one that cannot, so it is then asked for a token."""

_Words = TypeVar("_Words")


class Standstill:
    """One engine's silence.

    Args:
        now: monotonic seconds.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._listening_count = 0
        self._heard_at_seconds = now()
        self._left_at_seconds: float | None = None

    async def hear(self, words: Awaitable[_Words]) -> _Words:
        """Waits for the engine's next words. Who waits for a slow client instead does not listen."""
        if not self._listening_count:
            self._heard_at_seconds = self._now()
        self._listening_count += 1
        try:
            said = await words
        finally:
            self._listening_count -= 1
        self._heard_at_seconds = self._now()
        self._left_at_seconds = None
        return said

    def left(self) -> None:
        """A client hung up on the engine."""
        self._left_at_seconds = self._now()

    @property
    def is_over_time(self) -> bool:
        """Somebody listens, and the engine has been silent for too long."""
        return self._listening_count > 0 and self._now() - self._heard_at_seconds > STANDSTILL_SECONDS_MAX

    @property
    def is_in_doubt(self) -> bool:
        """Nobody listens, and since a client left the engine has not been heard: only a question can tell."""
        return not self._listening_count and self._left_at_seconds is not None and self._now() - self._left_at_seconds > DOUBT_SECONDS
