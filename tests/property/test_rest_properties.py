"""Hours and rest, for any settings and any moment: edges are where they are said to be, the strictest reason wins, nothing flaps."""

from __future__ import annotations

from datetime import datetime
from zoneinfo import ZoneInfo

from hypothesis import given
from hypothesis import strategies as st

from potluck_node.domain.hours import DAY_MINUTES, DAYS, opening, parse_window
from potluck_node.domain.rest import (
    LEFT_SECONDS,
    STRICTNESS,
    TAKEN_BYTES,
    CardUse,
    Facts,
    Memory,
    Moment,
    Posture,
    Reason,
    Rules,
    Use,
    Word,
    decide,
)
from potluck_node.domain.upload_pace import BURST_SECONDS, filled, full, spent, wait_seconds
from potluck_protocol.rest import RestCause

ZONES = [ZoneInfo(name) for name in ("UTC", "Europe/Berlin", "America/St_Johns", "Australia/Lord_Howe", "Asia/Kathmandu", "America/Havana")]
MOMENTS_MS = st.integers(1_600_000_000, 2_000_000_000).map(lambda seconds: seconds * 1000)
# Around the nights in which clocks are set.
CLOCK_CHANGES_MS = st.builds(
    lambda day, minutes: round(datetime(2026, *day, tzinfo=ZoneInfo("UTC")).timestamp() * 1000) + minutes * 60_000,
    st.sampled_from([(3, 7), (3, 28), (4, 4), (10, 3), (10, 24), (10, 31)]),
    st.integers(0, 2 * DAY_MINUTES),
)


def clock(minutes: int) -> str:
    return f"{minutes // 60:02}:{minutes % 60:02}"


@st.composite
def windows(draw: st.DrawFn) -> str:
    start = draw(st.integers(0, DAY_MINUTES - 1))
    end = draw(st.integers(0, DAY_MINUTES).filter(lambda minutes: minutes != start))
    days = draw(st.lists(st.sampled_from(DAYS), min_size=1, max_size=3))
    return f"{','.join(days)} {clock(start)}-{clock(end)}"


@given(st.lists(windows(), min_size=1, max_size=4), MOMENTS_MS | CLOCK_CHANGES_MS, st.sampled_from(ZONES))
def test_until_its_end_nothing_changes_and_at_its_end_it_does(hours: list[str], now_ms: int, zone: ZoneInfo) -> None:
    parsed = [parse_window(words) for words in hours]
    found = opening(parsed, now_ms, zone)
    if found.until_unix_ms is None:
        assert found.is_open
        return
    assert found.until_unix_ms > now_ms
    assert opening(parsed, found.until_unix_ms - 1, zone) == found
    assert opening(parsed, (now_ms + found.until_unix_ms) // 2, zone) == found
    assert opening(parsed, found.until_unix_ms, zone).is_open is not found.is_open


@given(windows(), MOMENTS_MS)
def test_where_clocks_are_never_set_the_clock_on_the_wall_says_it(words: str, now_ms: int) -> None:
    zone = ZoneInfo("Asia/Kathmandu")
    wall = datetime.fromtimestamp(now_ms / 1000, zone)
    window = parse_window(words)
    minutes = wall.hour * 60 + wall.minute
    today = wall.weekday() in window.days and window.start_minutes <= minutes < window.end_minutes
    since_yesterday = (wall.weekday() - 1) % 7 in window.days and minutes + DAY_MINUTES < window.end_minutes
    assert opening([window], now_ms, zone).is_open is (today or since_yesterday)


REASONS = st.builds(Reason, st.just(RestCause.HEAT), st.sampled_from(Posture), st.just("is hot"), st.none() | MOMENTS_MS)
WORDS = st.builds(Word, st.sampled_from(Posture), st.none() | MOMENTS_MS)
USES = st.builds(Use, st.none() | st.floats(0, 1e6))
CARDS = st.lists(st.builds(CardUse, st.sampled_from(["a", "b"]), st.none() | st.integers(0, 4 * TAKEN_BYTES), st.booleans()), max_size=2)
FACTS = st.builds(Facts, WORDS, USES, CARDS.map(lambda cards: tuple({card.uuid: card for card in cards}.values())), st.tuples(REASONS))
RULES = st.builds(
    lambda hours, idle, zone, others: Rules(tuple(parse_window(words) for words in hours), idle, zone, others),
    st.lists(windows(), max_size=2),
    st.none() | st.integers(1, 600),
    st.sampled_from(ZONES),
    st.booleans(),
)


@given(RULES, st.lists(st.tuples(FACTS, st.integers(0, 120)), min_size=1, max_size=12), MOMENTS_MS)
def test_a_rest_is_as_strict_as_its_strictest_reason_and_serving_has_none(
    rules: Rules, looks: list[tuple[Facts, int]], now_ms: int
) -> None:
    memory, passed = Memory(), 0
    for facts, seconds in looks:
        passed += seconds
        now = Moment(now_ms + passed * 1000, float(passed))
        rest, memory = decide(rules, facts, memory, now)
        strictness = [STRICTNESS[reason.posture] for reason in rest.reasons]
        assert STRICTNESS[rest.posture] == max(strictness, default=0)
        assert strictness == sorted(strictness, reverse=True)
        assert 0 not in strictness
        assert all(reason.words for reason in rest.reasons)
        if rest.until_unix_ms is not None:
            assert rest.until_unix_ms > now.unix_ms or any(reason.cause is RestCause.HEAT for reason in rest.reasons)


@given(RULES, FACTS, WORDS, MOMENTS_MS)
def test_another_reason_never_makes_a_node_serve_more(rules: Rules, facts: Facts, word: Word, now_ms: int) -> None:
    now = Moment(now_ms, 0.0)
    without, _ = decide(rules, Facts(Word(), facts.use, facts.cards, facts.others), Memory(), now)
    with_word, _ = decide(rules, Facts(word, facts.use, facts.cards, facts.others), Memory(), now)
    assert STRICTNESS[with_word.posture] >= STRICTNESS[without.posture]


@given(st.lists(st.tuples(st.integers(1, 30), st.none() | st.integers(0, 2 * TAKEN_BYTES), st.booleans()), max_size=60))
def test_a_card_is_not_taken_again_within_the_wait_after_it_was_left(looks: list[tuple[int, int | None, bool]]) -> None:
    """Each rest lasts at least the wait, however the memory of other programs moves: engines are not started and stopped by turns."""
    memory, now, began = Memory(), 0.0, None
    for seconds, foreign_bytes, ours in looks:
        now += seconds
        rest, memory = decide(Rules(), Facts(cards=(CardUse("a", foreign_bytes, ours),)), memory, Moment(int(now * 1000), now))
        if rest.posture is Posture.HAND_OVER and began is None:
            began = now
        elif rest.posture is Posture.SERVE and began is not None:
            assert now - began >= LEFT_SECONDS
            began = None


@given(st.integers(1_000, 100_000_000), st.lists(st.tuples(st.floats(0, 3), st.integers(1, 65_536)), min_size=1, max_size=50))
def test_no_more_leaves_than_the_owner_allows_and_what_may_leave_does(bytes_per_second: int, pieces: list[tuple[float, int]]) -> None:
    """Over the whole time at most the rate, the saved burst, and the one piece that may overdraw it."""
    pace, now, sent, largest = full(bytes_per_second, 0.0), 0.0, 0, 0
    for pause_seconds, size_bytes in pieces:
        now += pause_seconds
        pace = filled(pace, now)
        if wait_seconds(pace) > 0:
            now += wait_seconds(pace) + 1e-6
            pace = filled(pace, now)
        assert wait_seconds(pace) <= 1e-3
        pace = spent(pace, size_bytes)
        sent, largest = sent + size_bytes, max(largest, size_bytes)
        assert sent <= bytes_per_second * (now + BURST_SECONDS) + largest + 1
