"""A volunteer's hours, with their edges to the second: over midnight, over the week's end, and where clocks are set."""

from __future__ import annotations

from datetime import datetime
from zoneinfo import ZoneInfo

import pytest

from potluck_node.domain.hours import Opening, opening, parse_window

BERLIN, KOLKATA, APIA = ZoneInfo("Europe/Berlin"), ZoneInfo("Asia/Kolkata"), ZoneInfo("Pacific/Apia")
NIGHTS = ("mon-fri 22:00-07:00",)
WEEKEND = ("sat,sun 00:00-24:00",)


def at(words: str, zone: ZoneInfo = BERLIN, fold: int = 0) -> int:
    return round(datetime.fromisoformat(words).replace(tzinfo=zone, fold=fold).timestamp() * 1000)


def look(hours: tuple[str, ...], now_unix_ms: int, zone: ZoneInfo = BERLIN) -> Opening:
    return opening([parse_window(words) for words in hours], now_unix_ms, zone)


@pytest.mark.parametrize(
    ("hours", "now", "is_open", "until"),
    [
        # 2026-11-20 is a Friday.
        (NIGHTS, "2026-11-20 21:59:59", False, "2026-11-20 22:00"),
        (NIGHTS, "2026-11-20 22:00:00", True, "2026-11-21 07:00"),
        (NIGHTS, "2026-11-21 06:59:59", True, "2026-11-21 07:00"),
        (NIGHTS, "2026-11-21 07:00:00", False, "2026-11-23 22:00"),
        (NIGHTS, "2026-11-23 03:00:00", False, "2026-11-23 22:00"),  # the night to Monday began on Sunday
        (WEEKEND, "2026-11-20 23:59:59", False, "2026-11-21 00:00"),
        (WEEKEND, "2026-11-21 00:00:00", True, "2026-11-23 00:00"),
        (NIGHTS + WEEKEND, "2026-11-21 06:00:00", True, "2026-11-23 00:00"),
        (("fri-mon 08:00-12:00",), "2026-11-22 13:00:00", False, "2026-11-23 08:00"),
        (("fri-mon 08:00-12:00",), "2026-11-24 08:00:00", False, "2026-11-27 08:00"),
        (("22:00-07:00",), "2026-11-24 03:00:00", True, "2026-11-24 07:00"),
        (("wed 12:00-12:01",), "2026-11-25 12:01:00", False, "2026-12-02 12:00"),
    ],
)
def test_a_window_belongs_to_the_day_on_which_it_begins(hours, now, is_open, until):
    assert look(hours, at(now)) == Opening(is_open, at(until))


@pytest.mark.parametrize("hours", [(), ("00:00-24:00",), ("mon-fri 00:00-24:00", "sat,sun 00:00-24:00"), ("20:00-08:00", "08:00-20:00")])
def test_what_is_open_at_all_hours_has_no_edge(hours):
    assert look(hours, at("2026-03-29 01:30")) == Opening(is_open=True, until_unix_ms=None)


def test_a_night_in_which_the_clock_is_set_forward_ends_no_later_than_it_says():
    # On 2026-03-29 the hour from 02:00 to 03:00 is left out.
    until = look(("22:00-02:30",), at("2026-03-28 23:00")).until_unix_ms
    assert until == at("2026-03-29 03:00") == at("2026-03-29 01:59:59") + 1000
    assert look(("02:30-05:00",), at("2026-03-29 01:30")) == Opening(is_open=False, until_unix_ms=until)
    assert look(("sun 02:10-02:20",), at("2026-03-29 01:00")) == Opening(is_open=False, until_unix_ms=at("2026-04-05 02:10"))


def test_a_night_in_which_the_clock_is_set_back_is_not_opened_twice():
    # On 2026-10-25 the hour from 02:00 to 03:00 comes twice.
    first, second = at("2026-10-25 02:30"), at("2026-10-25 02:30", fold=1)
    assert second - first == 3_600_000
    assert look(("22:00-02:30",), first - 1) == Opening(is_open=True, until_unix_ms=first)
    assert look(("22:00-02:30",), second - 1) == Opening(is_open=False, until_unix_ms=at("2026-10-25 22:00"))
    assert look(("02:30-05:00",), first) == Opening(is_open=True, until_unix_ms=at("2026-10-25 05:00"))
    assert look(("sat 22:00-07:00",), at("2026-10-24 22:00")).until_unix_ms == at("2026-10-24 22:00") + 10 * 3_600_000


def test_other_zones_have_other_instants_and_a_day_that_a_country_left_out_is_left_out():
    assert look(NIGHTS, at("2026-11-20 22:00", KOLKATA), KOLKATA).until_unix_ms == at("2026-11-21 07:00", KOLKATA)
    # Samoa had no 2011-12-30, a Friday.
    assert look(("fri 10:00-12:00",), at("2011-12-29 23:00", APIA), APIA).until_unix_ms == at("2012-01-06 10:00", APIA)


@pytest.mark.parametrize(
    "words",
    [
        "",
        "noon",
        "24:00-07:00",
        "22:00-22:00",
        "00:00-00:00",
        "22:60-23:00",
        "7:00-9:00",
        "mon-tue-wed 10:00-11:00",
        "mon 10:00",
        "xyz 1:00",
    ],
)
def test_what_is_no_window_is_refused_with_an_example(words):
    with pytest.raises(ValueError, match="mon-fri 22:00-07:00"):
        parse_window(words)
