"""When pieces of answers wait for each other on their way to the coordinator."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from potluck_node.domain.company import COMPANY_SECONDS, Company


def waits_of(stream_count: int, gap_seconds: float) -> list[float]:
    """How long frames wait in a second in which so many streams say a piece each, every so often, a tenth of a second after they began.

    Each frame leaves when its wait is over, with all that was said by then.
    """
    company, waits, flushed_at = Company(), [], 0.0
    piece_seconds = gap_seconds / stream_count
    for number in range(int(1.1 / piece_seconds)):
        now = 100 + number * piece_seconds
        company.said()
        if now < flushed_at:
            continue
        wait = company.wait_seconds(now, flushed_at)
        flushed_at = now + max(0.0, wait)
        if now > 100.1:
            waits.append(wait)
    return waits


def test_few_streams_wait_for_nobody():
    assert max(waits_of(1, 0.02)) <= 0
    assert max(waits_of(16, 0.02)) <= 0


def test_many_streams_share_frames():
    waits = waits_of(64, 0.02)
    assert min(waits) > 0
    assert max(waits) <= COMPANY_SECONDS
    # 3,200 pieces, a dozen to a frame.
    assert len(waits) < 3200 / 10


def test_what_comes_after_a_burst_waits_no_more():
    company = Company()
    for number in range(400):
        company.said()
        company.wait_seconds(100.0 + number / 4000, 0.0)
    company.said()
    assert company.wait_seconds(100.1, 100.099) > 0
    company.said()
    assert company.wait_seconds(101.0, 100.999) <= 0


@given(st.lists(st.floats(0.0, 1.0), max_size=200))
def test_no_wait_is_longer_than_its_bound(gaps: list[float]):
    company, now, flushed_at = Company(), 1.0, 0.0
    for gap in gaps:
        now += gap
        company.said()
        wait = company.wait_seconds(now, flushed_at)
        assert wait <= COMPANY_SECONDS
        flushed_at = now + max(0.0, wait)
