"""A few seconds of `tests.chaos.soak`: that it does what it says, and that what it counts goes back to where it was."""

from __future__ import annotations

import pytest

from tests.chaos import soak


@pytest.mark.timeout(180)
def test_after_some_coming_and_going_descriptors_and_tasks_are_what_they_were(tmp_path):
    with soak.soaked_pool(tmp_path) as (pool, fleet):
        before = soak.at_rest(pool, 3)
        figures, counts = soak.soak(pool, fleet, 12)
        pool.wait_connected()
        fleet.wait(soak.COMING_AND_GOING, 20)
        after = soak.at_rest(pool, 6)
    assert {(figure.process, figure.what) for figure in figures} == before.keys()
    for name in ("answered", "given up", "keys", "deaths", "comings and goings"):
        assert counts[name], counts
    # A pool of connections, and threads that wait for work, may be there that were not needed before.
    grown = {key: (before[key], after[key]) for key in before if key[1] != "resident_mib" and after[key] > before[key] + 8}
    assert not grown
