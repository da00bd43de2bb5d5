"""What rate follows from when a measurement's pieces came, and when an agent measures again."""

from __future__ import annotations

from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck_node.domain.line import (
    AGAIN_SECONDS,
    FAILED_SECONDS,
    FIRST_SECONDS_MAX,
    PAUSE_SECONDS_MIN,
    LineReading,
    bytes_per_second,
    completed,
    next_look_unix_ms,
    pause_seconds,
)
from potluck_protocol.line import PIECE_BYTES, Arrival, LineMeasurement

MBIT = 1_000_000 // 8
DAY_MS = int(AGAIN_SECONDS * 1000)
NOW = 1_800_000_000_000


def transfer(*gaps_seconds: float, piece_bytes: int = PIECE_BYTES) -> list[Arrival]:
    """The first piece at 0, and one more after each gap."""
    times = [0.0, *accumulate(gaps_seconds)]
    return [Arrival(seconds, piece_bytes * (number + 1)) for number, seconds in enumerate(times)]


def steady(count: int, rate: float) -> list[float]:
    return [PIECE_BYTES / rate] * count


@pytest.mark.parametrize(
    ("gaps", "rate"),
    [
        ([], None),
        ([0.1], None),
        (steady(2, MBIT), MBIT),
        (steady(15, MBIT), MBIT),
        (steady(511, 1000 * MBIT), 1000 * MBIT),
        # Slow start: each round trip twice as many pieces as the one before, then a hundred at the line's own pace.
        ([gap for power in range(6) for gap in [0.05, *[0.0] * (2**power - 1)]] + steady(100, 20 * MBIT), 20 * MBIT),
        # It stands still for a second in the counted half: lost, then as before.
        ([*steady(60, 10 * MBIT), 1.0, *steady(40, 10 * MBIT)], 10 * MBIT),
        # The receiver was not looking: what piled up is there at once.
        (steady(60, 10 * MBIT) + [10 * PIECE_BYTES / (10 * MBIT)] + [0.0] * 9 + steady(30, 10 * MBIT), 10 * MBIT),
        # A router saves allowance up and lets the first 40 pieces through.
        ([0.0] * 40 + steady(60, 5 * MBIT), 5 * MBIT),
        # Pieces that come in clumps of four.
        ([4 * PIECE_BYTES / (8 * MBIT), 0.0, 0.0, 0.0] * 30, 8 * MBIT),
        # No clock is fine enough for it.
        ([0.0] * 100, None),
    ],
)
def test_the_rate_of_a_transfer_is_its_steady_part_s(gaps: list[float], rate: int | None) -> None:
    found = bytes_per_second(transfer(*gaps))
    assert found == (rate if rate is None else pytest.approx(rate, rel=0.1))


@pytest.mark.parametrize(
    "arrivals",
    [
        [Arrival(0, 1), Arrival(2, 2), Arrival(1, 3), Arrival(3, 4)],
        [Arrival(0, 4), Arrival(1, 3), Arrival(2, 2), Arrival(3, 1)],
        [Arrival(0, 1), Arrival(1, 1), Arrival(2, 1)],
        [Arrival(0, -9), Arrival(1, 1), Arrival(2, 3)],
    ],
)
def test_arrivals_in_no_order_make_no_rate(arrivals: list[Arrival]) -> None:
    assert bytes_per_second(arrivals) is None


gaps = st.lists(st.floats(0, 3), max_size=60)
rates = st.floats(1000, 1e10)


@given(st.lists(st.builds(Arrival, st.floats(allow_nan=True), st.integers()), max_size=20))
def test_whatever_a_coordinator_answers_a_rate_is_above_zero_or_none(arrivals: list[Arrival]) -> None:
    found = bytes_per_second(arrivals)
    assert found is None or found >= 1


@given(st.integers(2, 600), rates)
def test_a_steady_line_has_its_own_rate(count: int, rate: float) -> None:
    assert bytes_per_second(transfer(*steady(count, rate))) == pytest.approx(rate, rel=1e-3, abs=1)


@given(gaps.filter(lambda found: len(found) > 1), st.floats(1.5, 100))
def test_a_line_that_is_slower_in_everything_is_slower_by_as_much(found: list[float], factor: float) -> None:
    before, after = bytes_per_second(transfer(*found)), bytes_per_second(transfer(*(gap * factor for gap in found)))
    if before is not None and before > 1000:
        assert after == pytest.approx(before / factor, rel=0.01, abs=1)


@given(st.integers(16, 400), rates, st.floats(0, 1), st.floats(0, 2))
def test_one_standstill_anywhere_changes_nothing(count: int, rate: float, place: float, still_seconds: float) -> None:
    stalled = steady(count, rate)
    stalled[int(place * (count - 1))] += still_seconds
    assert bytes_per_second(transfer(*stalled)) == pytest.approx(rate, rel=1e-3, abs=1)


@given(st.integers(16, 200), rates, st.data())
def test_how_a_transfer_begins_does_not_matter(count: int, rate: float, data: st.DataObject) -> None:
    begins = data.draw(st.lists(st.floats(0, 1), min_size=count // 2 - 1, max_size=count // 2 - 1))
    assert bytes_per_second(transfer(*begins, *steady(count - len(begins), rate))) == pytest.approx(rate, rel=1e-3, abs=1)


# When, and what is kept.


KEPT = LineMeasurement(NOW - 3_600_000, 9000, 100, 200)


@pytest.mark.parametrize(
    ("kept", "due_in_ms"),
    [
        (None, 0),
        (KEPT, DAY_MS - 3_600_000),
        (LineMeasurement(NOW - 2 * DAY_MS, 1, 2, 3), 0),
        (LineMeasurement(NOW + 1, 1, 2, 3), 0),
        (LineMeasurement(NOW - 1, 1, 2, None), 0),
        (LineMeasurement(NOW - 1, 1, None, 3), 0),
    ],
)
def test_an_agent_measures_soon_after_its_start_unless_it_did_within_the_day(kept: LineMeasurement | None, due_in_ms: int) -> None:
    assert next_look_unix_ms(kept, NOW, 0.0) == NOW + due_in_ms
    assert next_look_unix_ms(kept, NOW, 1.0) == NOW + max(due_in_ms, int(FIRST_SECONDS_MAX * 1000))


def test_the_next_look_is_a_day_later_or_when_the_coordinator_says() -> None:
    assert pause_seconds(LineReading(KEPT), 1.0) == AGAIN_SECONDS
    assert pause_seconds(LineReading(failure="no"), 0.5) == FAILED_SECONDS + FIRST_SECONDS_MAX / 2
    assert pause_seconds(LineReading(failure="no", retry_after_seconds=400), 0.0) == 400
    assert pause_seconds(LineReading(failure="no", retry_after_seconds=1), 0.0) == PAUSE_SECONDS_MIN
    assert pause_seconds(LineReading(KEPT, "half of it was refused, and known from before", 10), 0.0) == AGAIN_SECONDS
    half = LineMeasurement(NOW, 8000, None, 200)
    assert pause_seconds(LineReading(half, "half of it was refused", 200), 0.0) == 200


def test_a_reading_that_lacks_something_is_completed_by_one_of_the_day() -> None:
    half = LineReading(LineMeasurement(NOW, 8000, 150, None), "busy", 10)
    both = completed(half, KEPT, NOW)
    assert both == LineReading(LineMeasurement(KEPT.measured_at_unix_ms, 8000, 150, 200), "busy", 10)
    assert completed(LineReading(failure="away"), KEPT, NOW).found == KEPT
    for kept in (None, LineMeasurement(NOW - DAY_MS, 1, 2, 3), LineMeasurement(NOW + 1, 1, 2, 3)):
        assert completed(half, kept, NOW) == half
    whole = LineReading(LineMeasurement(NOW, 8000, 150, 250))
    assert completed(whole, KEPT, NOW) == whole
