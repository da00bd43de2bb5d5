"""What the benchmark makes of streams and requests whose engine was lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from tests.benchmarks.answers import Token
from tests.benchmarks.loss_traces import CUT, DOUBLED, HUNG, REFUSED, WHOLE, Trace, end_of, loss_figures

_LOST_AT = 10.0


def _trace(numbers: Sequence[int], pause_seconds: float = 0.0, **said: bool) -> Trace:
    """A stream of one token each 20 ms from 9.9 s on; what comes after the loss comes so much later."""
    at = [9.9 + 0.02 * place for place in range(len(numbers))]
    tokens = [Token(number, when, when + pause_seconds * (when > _LOST_AT)) for number, when in zip(numbers, at, strict=True)]
    return Trace(9.9, tokens, **{"is_over": True, "is_ended": True, "is_refused": False, **said})


@pytest.mark.parametrize(
    ("trace", "end"),
    [
        (_trace(range(10)), WHOLE),
        (_trace(range(9)), CUT),
        (_trace([*range(5), *range(6, 11)]), CUT),
        (_trace(range(10), is_ended=False), CUT),
        (_trace([*range(6), *range(5, 10)]), DOUBLED),
        (_trace([*range(6), *range(5, 8)], is_over=False), DOUBLED),
        (_trace(range(5), is_refused=True), REFUSED),
        (_trace([], is_refused=True), REFUSED),
        (_trace(range(5), is_over=False, is_ended=False), HUNG),
    ],
)
def test_an_answer_ends_in_one_of_five_ways(trace: Trace, end: str) -> None:
    assert end_of(trace, 10) == end


def _probe(after_seconds: float, *, whole: bool) -> Trace:
    asked_at = _LOST_AT + after_seconds
    return Trace(asked_at, [Token(0, asked_at, asked_at)] if whole else [], whole, whole, is_refused=False)


def test_a_loss_that_streams_outlive_took_as_long_as_their_pause() -> None:
    streams = [_trace(range(20)), _trace(range(20), pause_seconds=1.5), _trace(range(20), pause_seconds=1.9)]
    found = loss_figures(streams, 20, [_probe(0.1, whole=True)], 1, _LOST_AT)
    assert found.ends == {WHOLE: 3, REFUSED: 0, CUT: 0, DOUBLED: 0, HUNG: 0}
    assert found.resumed_after_seconds == pytest.approx([1.52, 1.92], abs=0.021)
    assert found.detection_p99_seconds == found.resumed_after_seconds[-1]
    assert found.longest_gap_seconds == pytest.approx(1.92, abs=0.001)


def test_a_loss_that_no_stream_outlives_is_noticed_when_new_requests_are_spared() -> None:
    streams = [_trace(range(5), is_over=False, is_ended=False)] * 2
    probes = [_probe(after, whole=after > 3) for after in (4.0, 1.0, 2.0, 3.0, 5.0)]
    found = loss_figures(streams, 20, [_probe(-1.0, whole=False), *probes], 1, _LOST_AT)
    assert (found.probe_count, found.probe_failed_count) == (5, 3)
    assert found.detection_p99_seconds == found.noticed_after_seconds == 3.0


def test_a_loss_that_the_last_new_request_still_met_was_never_noticed() -> None:
    probes = [_probe(after, whole=after == 2.0) for after in (1.0, 2.0, 3.0)]
    found = loss_figures([_trace(range(5), is_over=False)], 20, probes, 1, _LOST_AT)
    assert found.detection_p99_seconds is None
    unharmed = [replace(probe, tokens=[Token(0, 0, 0)], is_over=True, is_ended=True) for probe in probes]
    assert loss_figures([_trace(range(20))], 20, unharmed, 1, _LOST_AT).detection_p99_seconds == 0.0
