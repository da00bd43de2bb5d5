"""How many bytes of answers may leave now, where the owner set a limit for the upload: a token bucket.

Decides from values and a given `now`. One piece may be larger than what is there: the bucket then owes, and nothing leaves until that is
made good, so that the rate holds over any second or two and no piece is ever too large to leave. It must not know frames.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

BURST_SECONDS: Final = 0.25
"""So much of the rate is saved up at most: the first words of an answer leave at once, and a slow line's queue stays short."""


@dataclass(frozen=True, slots=True)
class UploadPace:
    """The bucket."""

    bytes_per_second: int
    level_bytes: float
    """What may leave; below 0: what is owed."""
    at_seconds: float


def full(bytes_per_second: int, now_seconds: float) -> UploadPace:
    """A bucket that nothing has left yet."""
    return UploadPace(bytes_per_second, bytes_per_second * BURST_SECONDS, now_seconds)


def filled(pace: UploadPace, now_seconds: float) -> UploadPace:
    """With what has come in since."""
    passed_seconds = max(0.0, now_seconds - pace.at_seconds)
    level_bytes = min(pace.bytes_per_second * BURST_SECONDS, pace.level_bytes + passed_seconds * pace.bytes_per_second)
    return replace(pace, level_bytes=level_bytes, at_seconds=max(pace.at_seconds, now_seconds))


def spent(pace: UploadPace, size_bytes: int) -> UploadPace:
    """After so much has left."""
    return replace(pace, level_bytes=pace.level_bytes - size_bytes)


def wait_seconds(pace: UploadPace) -> float:
    """Until at least one byte may leave; 0 where one may now."""
    return max(0.0, (1 - pace.level_bytes) / pace.bytes_per_second)
