"""A few seconds of `tests.chaos.soak`: it does what it says, and what it counts goes back to where it was; and that it finds leaks."""

from __future__ import annotations

import random
from typing import Final

import pytest

from tests.chaos import soak
from tests.support.slopes import Verdict

SLACK: Final = {"descriptors": 4, "threads": 8, "tasks": 4}
"""A pool of connections, and threads that wait for work, may be there that were not needed before."""
LEAKS: Final = [("gateway", "descriptors"), ("directory", "resident_mib"), ("gateway", "tasks")]


@pytest.mark.timeout(240)
def test_after_some_coming_and_going_descriptors_threads_and_tasks_are_what_they_were(tmp_path):
    with soak.soaked_pool(tmp_path) as (pool, fleet):
        before = soak.at_rest(pool, 3)
        figures, counts = soak.soak(pool, fleet, 12)
        pool.wait_connected()
        fleet.wait(soak.COMING_AND_GOING, 20)
        after = soak.at_rest(pool, 6)
    assert {(figure.process, figure.what) for figure in figures} == before.keys()
    for name in ("answered", "given up", "keys", "deaths", "comings and goings"):
        assert counts[name], counts
    assert counts["comings and goings"] > 4 * max(SLACK.values()), counts
    grown = {key: (before[key], after[key]) for key in before if key[1] in SLACK and after[key] > before[key] + SLACK[key[1]]}
    assert not grown


@pytest.mark.parametrize("leak", LEAKS, ids=" ".join)
def test_a_soak_finds_what_one_in_fifty_leaves_behind(leak):
    """Of the 240 nodes of a minute: a descriptor or a task of every fiftieth, or 20 KiB of each. What only comes and goes is flat."""
    draw, busy = random.Random(7), dict.fromkeys(LEAKS, 0.0)
    samples = []
    for number in range(200):
        at = number * soak.SAMPLE_SECONDS
        for key in LEAKS:
            busy[key] = max(0.0, 0.7 * busy[key] + draw.gauss(0.5, 1))
        held = {key: 100 + round(busy[key]) + (4.8 * at / 60 if key == leak else 0.0) for key in LEAKS}
        samples.append((at, held))
    figures = soak.figures_of(samples, 300 * soak.WARM_UP_SHARE)
    assert {(figure.process, figure.what): figure.verdict for figure in figures} == {
        key: Verdict.GROWS if key == leak else Verdict.FLAT for key in LEAKS
    }
