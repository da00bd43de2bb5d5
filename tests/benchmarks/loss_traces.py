"""What became of the streams and requests of a trial in which one of two engines was killed or frozen.

Decides when an answer counts as whole, cut short, doubled, refused or hung, and how long a loss went unnoticed. Pure: it must not know who
was asked, nor how an engine was lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from tests.benchmarks.answers import Token
from tests.benchmarks.arithmetic import percentile

WHOLE: Final = "whole"
REFUSED: Final = "failed"
"""An HTTP status other than 200, an error in the stream, or no connection."""
CUT: Final = "truncated"
"""It ended before its last token, or with one left out."""
DOUBLED: Final = "duplicated"
HUNG: Final = "hung"
"""Not over when the trial was."""
HIT_SECONDS: Final = 0.25
"""A stream whose next token after the loss took longer than this, at 20 ms a token, was hit by it."""


@dataclass(frozen=True, slots=True)
class Trace:
    """One request of a trial, as its client saw it."""

    asked_at_seconds: float
    tokens: Sequence[Token]
    over_at_seconds: float | None
    """None: it was not, when the trial was."""
    is_ended: bool
    """By the word for it, `[DONE]`."""
    is_refused: bool


def end_of(trace: Trace, token_count: int) -> str:
    """One of the words above."""
    numbers = [token.number for token in trace.tokens]
    if any(number in numbers[:index] for index, number in enumerate(numbers)):
        return DOUBLED
    if trace.is_refused:
        return REFUSED
    if trace.over_at_seconds is None:
        return HUNG
    return WHOLE if trace.is_ended and numbers == list(range(token_count)) else CUT


def pause_of(trace: Trace, lost_at_seconds: float) -> float | None:
    """From the loss to what the stream's client heard next, a token or its end; None where it was never anything."""
    heard = [token.came_at_seconds for token in trace.tokens]
    if trace.over_at_seconds is not None:
        heard.append(trace.over_at_seconds)
    return min((at - lost_at_seconds for at in heard if at > lost_at_seconds), default=None)


def longest_gap(trace: Trace) -> float:
    """The longest time between two of its tokens."""
    came = [token.came_at_seconds for token in trace.tokens]
    return max((later - earlier for earlier, later in pairwise(came)), default=0.0)


@dataclass(frozen=True, slots=True)
class LossFigures:
    """One trial. Times are in seconds."""

    ends: dict[str, int]
    """Of the streams, by the words above."""
    longest_gap_seconds: float
    pauses_seconds: list[float]
    """From the loss to what they heard next, of each stream that was hit and heard anything: noticing and resuming together."""
    probe_count: int
    """Short requests, one after the other from the loss on."""
    probe_failed_count: int
    noticed_after_seconds: float | None
    """The 99th percentile of these pauses, or when the last short request was asked that came to harm, whichever is longer. None: when the
    trial was over, streams still heard nothing, or short requests still came to harm."""


def loss_figures(
    streams: Sequence[Trace], token_count: int, probes: Sequence[Trace], probe_token_count: int, lost_at_seconds: float
) -> LossFigures:
    """The figures of a trial."""
    ends = [end_of(trace, token_count) for trace in streams]
    after = sorted((probe for probe in probes if probe.asked_at_seconds >= lost_at_seconds), key=lambda probe: probe.asked_at_seconds)
    failed = [trace.asked_at_seconds for trace in after if end_of(trace, probe_token_count) != WHOLE]
    alive = [trace for trace in streams if trace.over_at_seconds is None or trace.over_at_seconds > lost_at_seconds]
    pauses = [pause_of(trace, lost_at_seconds) for trace in alive]
    hit = sorted(pause for pause, trace in zip(pauses, alive, strict=True) if pause is not None and _is_hit(pause, trace, token_count))
    is_open = HUNG in ends or (bool(failed) and failed[-1] == after[-1].asked_at_seconds)
    noticed_seconds = max(percentile(hit, 99) or 0.0, max(failed, default=lost_at_seconds) - lost_at_seconds)
    return LossFigures(
        ends={word: ends.count(word) for word in (WHOLE, REFUSED, CUT, DOUBLED, HUNG)},
        longest_gap_seconds=max(map(longest_gap, streams)),
        pauses_seconds=hit,
        probe_count=len(after),
        probe_failed_count=len(failed),
        noticed_after_seconds=None if is_open else noticed_seconds,
    )


def _is_hit(pause_seconds: float, trace: Trace, token_count: int) -> bool:
    return pause_seconds > HIT_SECONDS or end_of(trace, token_count) != WHOLE


@dataclass(frozen=True, slots=True)
class LossRow:
    """One trial of a run."""

    contender: str
    lost: str
    """`engine` or `node`."""
    blow: str
    is_freeze: bool
    figures: LossFigures
