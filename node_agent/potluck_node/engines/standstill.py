"""Who waits for an engine's words, and since when in vain.

Decides what counts as silence: only time in which somebody waits for the engine, and not the client that reads slowly. Those who give up
while it is silent leave the count as it stands to whoever asks next. `domain.silence` says how much is too much. It must not know HTTP, nor
what becomes of such an engine.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from potluck_node.domain.silence import Silence

DOUBT_SECONDS: Final = 2.0
"""After a client hung up: an engine that let go of its work is as silent as one that cannot, so it is then asked for a token."""
SAMPLES_MAX: Final = 32
SAMPLE_BYTES_MIN: Final = 1024
"""How fast a shorter prompt was read says little."""

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
        self._carried_seconds = 0.0
        self._unread_bytes = 0
        self._abandoned_bytes = 0
        self._left_at_seconds: float | None = None
        self.word_count = 0
        """How often it was heard."""
        self._prefill_bytes_per_second: deque[float] = deque(maxlen=SAMPLES_MAX)

    def listen(self, prompt_bytes: int = 0) -> Ear:
        """Somebody waits for words from now on, who has sent so much to be read before."""
        return Ear(self, self._now, prompt_bytes)

    async def hear(
        self, words: Awaitable[_Words], prompt_bytes: int = 0, *, says_something: Callable[[_Words], object] = lambda _: True
    ) -> _Words:
        """Waits for what comes next from the engine; what says nothing, such as a keep-alive, leaves the silence as long as it was."""
        ear = self.listen(prompt_bytes)
        try:
            said = await words
            if says_something(said):
                ear.heard()
        finally:
            ear.close()
        return said

    def heard(self) -> None:
        """The engine said something."""
        self.word_count += 1
        self._heard_at_seconds = self._now()
        self._carried_seconds = 0.0
        self._abandoned_bytes = 0
        self._left_at_seconds = None

    def left(self) -> None:
        """A client hung up on the engine."""
        self._left_at_seconds = self._now()

    @property
    def silence(self) -> Silence:
        """For the policy."""
        return Silence(
            listening_count=self._listening_count,
            silent_seconds=self._now() - self._heard_at_seconds,
            unread_prompt_bytes=self._unread_bytes + self._abandoned_bytes,
            prefill_bytes_per_second=min(self._prefill_bytes_per_second, default=None),
        )

    @property
    def is_in_doubt(self) -> bool:
        """Nobody listens, and since a client left the engine has not been heard: only a question can tell."""
        return not self._listening_count and self._left_at_seconds is not None and self._now() - self._left_at_seconds > DOUBT_SECONDS

    def excuse(self, absence_seconds: float) -> None:
        """Whoever listens was not there to hear in so many of the last seconds: they are no silence, and what was before them still is."""
        self._heard_at_seconds = min(self._now(), self._heard_at_seconds + absence_seconds)
        # Whoever listened may have left since, and carried them along.
        self._carried_seconds = max(0.0, self._carried_seconds - absence_seconds)

    # What ears tell.

    def begin(self) -> None:
        """One more waits."""
        if not self._listening_count:
            self._heard_at_seconds = self._now() - self._carried_seconds
        self._listening_count += 1

    def end(self) -> None:
        """One fewer waits."""
        self._listening_count -= 1
        if not self._listening_count:
            self._carried_seconds = self._now() - self._heard_at_seconds

    def add_unread(self, prompt_bytes: int) -> None:
        """So much more is to be read before the engine can answer."""
        self._unread_bytes += prompt_bytes

    def take_read(self, prompt_bytes: int, seconds: float) -> None:
        """So much of it was read, in so many seconds."""
        self._unread_bytes -= prompt_bytes
        if prompt_bytes >= SAMPLE_BYTES_MIN and seconds > 0:
            self._prefill_bytes_per_second.append(prompt_bytes / seconds)

    def abandon(self, prompt_bytes: int) -> None:
        """Nobody waits for its answer any more; until the engine says something it may still be at it."""
        self._unread_bytes -= prompt_bytes
        self._abandoned_bytes += prompt_bytes


class Ear:
    """One who waits. Made by `Standstill.listen`, and closed by whoever asked for it."""

    __slots__ = ("_began_at_seconds", "_now", "_standstill", "_unread_bytes", "listening")

    def __init__(self, standstill: Standstill, now: Callable[[], float], prompt_bytes: int) -> None:
        self._standstill = standstill
        self._now = now
        self._began_at_seconds = now()
        self._unread_bytes = prompt_bytes
        self.listening = True
        standstill.begin()
        standstill.add_unread(prompt_bytes)

    def heard(self) -> None:
        """Words have come for it, so its prompt is read."""
        if self._unread_bytes:
            self._standstill.take_read(self._unread_bytes, self._now() - self._began_at_seconds)
            self._unread_bytes = 0
        self._standstill.heard()

    def turn_away(self) -> None:
        """It waits for its client, not for the engine."""
        if self.listening:
            self.listening = False
            self._standstill.end()

    def turn_back(self) -> None:
        """It waits for the engine again."""
        if not self.listening:
            self.listening = True
            self._standstill.begin()

    def close(self) -> None:
        """It waits no more. Again is harmless."""
        self._standstill.abandon(self._unread_bytes)
        self._unread_bytes = 0
        self.turn_away()
