"""What the benchmark makes of streams and requests whose engine was lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from tests.benchmarks.answers import Token
from tests.benchmarks.loss_traces import CUT, DOUBLED, HUNG, REFUSED, WHOLE, LossFigures, Trace, end_of, loss_figures

_LOST_AT = 10.0


def _trace(numbers: Sequence[int], pause_seconds: float = 0.0, **said: float | bool | None) -> Trace:
    """A stream of one token each 20 ms from 9.9 s on; what comes after the loss comes so much later."""
    at = [9.9 + 0.02 * place for place in range(len(numbers))]
    tokens = [Token(number, when, when + pause_seconds * (when > _LOST_AT)) for number, when in zip(numbers, at, strict=True)]
    return Trace(
        9.9, tokens, **{"over_at_seconds": tokens[-1].came_at_seconds if tokens else 9.95, "is_ended": True, "is_refused": False, **said}
    )


@pytest.mark.parametrize(
    ("trace", "end"),
    [
        (_trace(range(10)), WHOLE),
        (_trace(range(9)), CUT),
        (_trace([*range(5), *range(6, 11)]), CUT),
        (_trace(range(10), is_ended=False), CUT),
        (_trace([*range(6), *range(5, 10)]), DOUBLED),
        (_trace([*range(6), *range(5, 8)], over_at_seconds=None), DOUBLED),
        (_trace(range(5), is_refused=True), REFUSED),
        (_trace([], is_refused=True), REFUSED),
        (_trace(range(5), over_at_seconds=None, is_ended=False), HUNG),
    ],
)
def test_an_answer_ends_in_one_of_five_ways(trace: Trace, end: str) -> None:
    assert end_of(trace, 10) == end


def _probe(after_seconds: float, *, whole: bool) -> Trace:
    asked_at = _LOST_AT + after_seconds
    return Trace(asked_at, [Token(0, asked_at, asked_at)] if whole else [], asked_at if whole else None, whole, is_refused=False)


def _loss(streams: Sequence[Trace], probes: Sequence[Trace] = ()) -> LossFigures:
    return loss_figures(streams, 20, probes, 1, _LOST_AT)


def test_a_loss_that_streams_outlive_took_as_long_as_their_pause() -> None:
    found = _loss(
        [_trace(range(20)), _trace(range(20), pause_seconds=1.5), _trace(range(20), pause_seconds=1.9)], [_probe(0.1, whole=True)]
    )
    assert found.ends == {WHOLE: 3, REFUSED: 0, CUT: 0, DOUBLED: 0, HUNG: 0}
    assert found.pauses_seconds == pytest.approx([1.52, 1.92], abs=0.021)
    assert found.noticed_after_seconds == found.pauses_seconds[-1]
    assert found.longest_gap_seconds == pytest.approx(1.92, abs=0.001)


def test_streams_that_are_cut_have_heard_of_the_loss_then() -> None:
    cut = _trace(range(5), over_at_seconds=_LOST_AT + 0.8, is_ended=False)
    found = _loss([_trace(range(20)), cut, replace(cut, over_at_seconds=_LOST_AT + 0.1)])
    assert (found.ends[CUT], found.pauses_seconds) == (2, pytest.approx([0.1, 0.8]))
    assert found.noticed_after_seconds == pytest.approx(0.8)


def test_a_stream_that_was_over_before_was_not_hit() -> None:
    assert _loss([_trace(range(5), over_at_seconds=9.99, is_ended=False)]).pauses_seconds == []


def test_a_loss_is_noticed_when_new_requests_are_spared() -> None:
    probes = [_probe(after, whole=after > 3) for after in (4.0, 1.0, 2.0, 3.0, 5.0)]
    found = _loss([_trace(range(20))], [_probe(-1.0, whole=False), *probes])
    assert (found.probe_count, found.probe_failed_count, found.noticed_after_seconds) == (5, 3, 3.0)
    assert _loss([_trace(range(20))], [_probe(1.0, whole=True)]).noticed_after_seconds == 0.0


def test_a_loss_was_never_noticed_while_streams_hang_or_requests_still_come_to_harm() -> None:
    hanging = _trace(range(5), over_at_seconds=None, is_ended=False)
    assert _loss([_trace(range(20)), hanging], [_probe(1.0, whole=True)]).noticed_after_seconds is None
    assert _loss([_trace(range(20))], [_probe(after, whole=after == 2.0) for after in (1.0, 2.0, 3.0)]).noticed_after_seconds is None
