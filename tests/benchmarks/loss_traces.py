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
    is_over: bool
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
    if not trace.is_over:
        return HUNG
    return WHOLE if trace.is_ended and numbers == list(range(token_count)) else CUT


def pause_of(trace: Trace, lost_at_seconds: float) -> float | None:
    """From the loss to the stream's next token; None where none came any more or the stream was over before."""
    return next((token.came_at_seconds - lost_at_seconds for token in trace.tokens if token.came_at_seconds > lost_at_seconds), None)


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
    resumed_after_seconds: list[float]
    """From the loss to the next token, of each stream that was hit and went on: what noticing and resuming took together."""
    probe_count: int
    """Short requests, one after the other from the loss on."""
    probe_failed_count: int
    noticed_after_seconds: float | None
    """When the last short request was asked that was sent into the loss; None: they still were at the end."""

    @property
    def detection_p99_seconds(self) -> float | None:
        """How long at most the loss went unnoticed, by the streams that resumed, and else by what new requests met."""
        return percentile(self.resumed_after_seconds, 99) if self.resumed_after_seconds else self.noticed_after_seconds


def loss_figures(
    streams: Sequence[Trace], token_count: int, probes: Sequence[Trace], probe_token_count: int, lost_at_seconds: float
) -> LossFigures:
    """The figures of a trial."""
    ends = [end_of(trace, token_count) for trace in streams]
    after = sorted((probe for probe in probes if probe.asked_at_seconds >= lost_at_seconds), key=lambda probe: probe.asked_at_seconds)
    failed = [trace.asked_at_seconds for trace in after if end_of(trace, probe_token_count) != WHOLE]
    noticed = None if after and failed and failed[-1] == after[-1].asked_at_seconds else max(failed, default=lost_at_seconds)
    pauses = [pause_of(trace, lost_at_seconds) for trace in streams]
    return LossFigures(
        ends={word: ends.count(word) for word in (WHOLE, REFUSED, CUT, DOUBLED, HUNG)},
        longest_gap_seconds=max(map(longest_gap, streams)),
        resumed_after_seconds=sorted(pause for pause in pauses if pause is not None and pause > HIT_SECONDS),
        probe_count=len(after),
        probe_failed_count=len(failed),
        noticed_after_seconds=None if noticed is None else noticed - lost_at_seconds,
    )


@dataclass(frozen=True, slots=True)
class LossRow:
    """One trial of a run."""

    contender: str
    lost: str
    """`engine` or `node`."""
    blow: str
    is_freeze: bool
    figures: LossFigures
