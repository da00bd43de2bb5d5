"""How long an engine that has work may say nothing, and what its silence means.

Decides by what waits on it: 30 s, and beside them the time that the prompts which it has not begun to answer may take to read. It must not
know sockets or processes. The engine's own `/health` is no sign: it stays well while its model hangs.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

SILENCE_SECONDS_MAX: Final = 30.0
"""Between two tokens, once its prompts are read. A grammar that branches without end keeps llama.cpp silent for minutes."""
PREFILL_SECONDS_MAX: Final = 300.0
"""However much waits to be read: half of what a gateway gives a request in all."""
ASSUMED_BYTES_PER_SECOND: Final = 100.0
"""Of prompts, where nothing was measured: some 25 tokens, a mid-sized model on an old processor."""
BELIEVED_BYTES_PER_SECOND_MAX: Final = 4_000.0
"""A thousand tokens: what was measured may be a prompt that the engine remembered, and the next one is new."""
MARGIN: Final = 3.0
"""How much slower than the slowest that was measured."""


class Verdict(StrEnum):
    """What becomes of an engine."""

    SOUND = "sound"
    ASK = "ask"
    """Only unstreamed answers wait, which come whole, so it may well be at work: it is asked for a token."""
    HUNG = "hung"


@dataclass(frozen=True, slots=True)
class Silence:
    """One engine's, as those heard it who wait for its words."""

    listening_count: int
    silent_seconds: float
    unread_prompt_bytes: int
    """Of requests of which it has not said a token."""
    prefill_bytes_per_second: float | None = None
    """The slowest measured lately; None where none was."""

    @property
    def is_too_long(self) -> bool:
        """Somebody waits, and has waited for longer than any work takes."""
        allowed_seconds = SILENCE_SECONDS_MAX + prefill_seconds_max(self.unread_prompt_bytes, self.prefill_bytes_per_second)
        return self.listening_count > 0 and self.silent_seconds > allowed_seconds


def prefill_seconds_max(unread_prompt_bytes: int, bytes_per_second: float | None) -> float:
    """How long so much may take to read; a request's whole body counts as its prompt."""
    rate = ASSUMED_BYTES_PER_SECOND if bytes_per_second is None else min(bytes_per_second / MARGIN, BELIEVED_BYTES_PER_SECOND_MAX)
    return min(PREFILL_SECONDS_MAX, unread_prompt_bytes / max(rate, 1.0))


def judge(streams: Silence, documents: Silence) -> Verdict:
    """What the silence towards streamed and unstreamed answers means."""
    if streams.is_too_long:
        return Verdict.HUNG
    return Verdict.ASK if documents.is_too_long else Verdict.SOUND
