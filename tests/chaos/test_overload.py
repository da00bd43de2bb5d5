"""A sample of what `tests.benchmarks.overload` shows in full: Potluck's turn, at one rate, for some seconds."""

from __future__ import annotations

import pytest

from tests.benchmarks.open_client import OpenClient
from tests.benchmarks.open_load import OpenLoad
from tests.benchmarks.overload import DRAIN_SECONDS_MAX
from tests.benchmarks.overload_contenders import DeathWatch, fleet_requests_per_second, start
from tests.benchmarks.overload_figures import EMPTY_SECONDS_MAX, OVERLOAD_FACTOR, Spell, figures_of

SECONDS = 8.0


@pytest.mark.timeout(300)
def test_engines_that_die_of_too_much_outlive_five_times_what_they_can_do(tmp_path):
    client = OpenClient(tmp_path / "client.log")
    try:
        contender, target = start("Potluck", tmp_path / "Potluck")
        try:
            watch, load = DeathWatch(contender), OpenLoad(1, OVERLOAD_FACTOR * fleet_requests_per_second(), SECONDS, DRAIN_SECONDS_MAX)
            with watch.watching():
                result = client.run(load, target)
        finally:
            contender.stop()
    finally:
        client.stop()
    figures = figures_of(Spell(load.requests_per_second, load.seconds, result.asked, result.busy_share, watch.count))
    assert (figures.engine_death_count, figures.broken_count, figures.unfinished_count) == (0, 0, 0), figures
    assert figures.good_count + figures.slow_count > 0
    assert figures.refused_count > figures.asked_count / 2, "most of it has no room"
    assert figures.empty_seconds is not None
    assert figures.empty_seconds <= EMPTY_SECONDS_MAX
