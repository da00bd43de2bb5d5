"""When an attempt that gives no token has stalled, and whose silence that is: its engine's, or the whole node's.

Decides from how long attempt and node have been quiet, against how long the replica's tokens have been apart lately. A node that is quiet
is asked for a heartbeat before it is given up, so that a slow engine behind a living agent is told from a machine that stands still. It
must not know links or frames, nor whether there is anywhere else to go.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

GapCounts: TypeAlias = "list[int]"
"""How often two chunks of one replica's answers were so far apart: by the bits that their distance in milliseconds has."""

GAP_BUCKETS: Final = 40
"""Seventeen years, so that whoever counts need not ask."""
GAPS_KNOWN_MIN: Final = 30
"""Fewer say nothing about their hundredth part."""
GAPS_KEPT_MAX: Final = 2048
"""Beyond it they count half: what an engine does now weighs more than what it did under another load."""
FIRST_TOKEN_SEQUENCE: Final = 1
"""The chunk that holds the first token at the latest: engines name the role in one of its own. What comes before is the prompt's time."""

GAP_FACTOR: Final = 3.0
GAP_SECONDS_MIN: Final = 0.7
GAP_SECONDS_MAX: Final = 2.0
"""So long without a token, or three times what is rare within these bounds, and the node is asked: whatever its tokens' pace, it owes a
heartbeat every second."""
GAP_UNKNOWN_SECONDS: Final = 0.5
"""What counts as rare of a replica that has not shown it."""
ANSWER_SECONDS: Final = 0.9
"""How long a node may take to say something once it was asked, beyond what its line takes there and back. With the least patience, and a
look that comes a quarter of a second late, a machine that stands still is given up within two seconds."""
QUIET_BEATS: Final = 1.5
"""Of the period in which a busy node beats: after so long it is asked, where no token is due."""
HUNG_FACTOR: Final = 10.0
HUNG_SECONDS_MIN: Final = 3.0
"""So long without a token, or ten times what is rare, and an engine has stalled, though its agent answers."""
FIRST_TOKEN_SECONDS_MIN: Final = 10.0
"""An engine has so long for the first token of the shortest prompt: it may be at work for others, or read its weights anew. And for any
token while it has not shown what is rare of it."""
PREFILL_SECONDS_MAX: Final = 120.0
PREFILL_TOKENS_PER_SECOND_UNKNOWN: Final = 50.0
"""A small model on two processor cores."""


class Stall(StrEnum):
    """What an attempt's silence means."""

    NONE = "none"
    ASK = "ask"
    """The node is to be asked for a heartbeat."""
    NODE = "node"
    """It was asked and said nothing: machine, agent or line stand still."""
    ENGINE = "engine"
    """Its agent answers, and the engine gives no token."""


@dataclass(frozen=True, slots=True)
class Quiet:
    """How long there has been nothing, and what would have been usual; all in seconds."""

    attempt_seconds: float
    """Without a chunk of this attempt, its client being ready to take one."""
    node_seconds: float
    """Without any frame of the node."""
    asked_seconds: float | None
    """Since the node was asked for a heartbeat; None: not asked, or it said something since."""
    streams: bool
    """Tokens come one by one; otherwise the whole answer comes at its end."""
    begun: bool
    """The first token has come."""
    gap_p99_seconds: float | None
    round_trip_seconds: float
    """Of its line, as the node measured it; 0: it has not."""
    prefill_seconds: float
    """What the prompts before their first token at this engine may take, this attempt's own among them."""


def judge(quiet: Quiet, beat_seconds: float) -> Stall:
    """What the silence means; a node that busy beats every `beat_seconds` and is heard is never `NODE`."""
    usual_seconds = GAP_UNKNOWN_SECONDS if quiet.gap_p99_seconds is None else quiet.gap_p99_seconds
    awaits_token = quiet.streams and quiet.begun
    token_seconds = min(max(GAP_FACTOR * usual_seconds, GAP_SECONDS_MIN), GAP_SECONDS_MAX)
    patience_seconds = token_seconds if awaits_token else QUIET_BEATS * beat_seconds
    if quiet.attempt_seconds < patience_seconds:
        return Stall.NONE
    if quiet.node_seconds >= (min(beat_seconds, GAP_SECONDS_MIN) if awaits_token else beat_seconds):
        if quiet.asked_seconds is None:
            return Stall.ASK if awaits_token or quiet.node_seconds >= patience_seconds else Stall.NONE
        return Stall.NODE if quiet.asked_seconds >= ANSWER_SECONDS + quiet.round_trip_seconds else Stall.NONE
    if not quiet.streams:
        # It may be long; `requests` bounds it, and its node watches its engine.
        return Stall.NONE
    is_known = quiet.begun and quiet.gap_p99_seconds is not None
    hung_seconds = max(HUNG_FACTOR * usual_seconds, HUNG_SECONDS_MIN) if is_known else FIRST_TOKEN_SECONDS_MIN
    return Stall.ENGINE if quiet.attempt_seconds >= hung_seconds + quiet.prefill_seconds else Stall.NONE


def prefill_seconds(prompts: Iterable[int], tokens_per_second: float | None) -> float:
    """How long an engine may be at these prompts (their bytes), one behind the other, before that is a stall.

    A byte counts as a token: three or four times what is to be expected of most languages.

    Args:
        prompts: bytes of each.
        tokens_per_second: the engine's measured rate; None: not known.
    """
    rate = tokens_per_second if tokens_per_second is not None and tokens_per_second > 0 else PREFILL_TOKENS_PER_SECOND_UNKNOWN
    return min(PREFILL_SECONDS_MAX, sum(prompts) / rate)


def gap_p99_seconds(counts: Sequence[int]) -> float | None:
    """What one gap of a hundred is longer than, rounded up to the bucket's end; None where too few are known."""
    total = sum(counts)
    if total < GAPS_KNOWN_MIN:
        return None
    longer = 0
    for bits in reversed(range(len(counts))):
        longer += counts[bits]
        if longer * 100 >= total:
            break
    return (1 << bits) / 1000


def faded(counts: Sequence[int]) -> Sequence[int]:
    """The counts, halved where there are many."""
    return [count // 2 for count in counts] if sum(counts) > GAPS_KEPT_MAX else counts
