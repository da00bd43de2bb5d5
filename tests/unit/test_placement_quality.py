"""Few candidates and words half a second old cost nearly nothing, in choices and in time: the benchmark in small pools."""

from __future__ import annotations

import pytest

from potluck_coordinator.gateway import roster
from tests.benchmarks import placement
from tests.benchmarks.placement import COST_RATIO_MAX, REGRET_MAX, Desk, microseconds, regret


@pytest.mark.parametrize(("seed", "node_count", "load"), [(1, 12, 0.5), (2, 100, 0.6), (3, 100, 0.85)])
def test_choices_are_nearly_the_best_of_all(seed, node_count, load):
    found = regret(seed, node_count, 300, load)
    assert 1.0 <= found.ratio <= REGRET_MAX
    assert found.decision_count == 300
    assert found.warm_share > 0.2, "caches had a part in it"


def test_it_would_show_if_the_candidates_were_any(monkeypatch):
    monkeypatch.setattr(roster, "_least", lambda *_: [])
    assert regret(2, 100, 300, 0.6).ratio > REGRET_MAX


def test_older_words_cost_more(monkeypatch):
    monkeypatch.setattr(placement, "CHANGE_SECONDS", 2.0)
    fresh, stale = [], []
    for ratios, seconds in ((fresh, 0.0), (stale, 60.0)):
        monkeypatch.setattr(placement, "TELEMETRY_SECONDS", seconds)
        ratios += [regret(seed, 60, 200, 0.6).ratio for seed in (1, 2)]
    assert sum(fresh) < sum(stale)


def test_a_decision_costs_no_more_in_a_large_pool():
    small, large = Desk(10), Desk(20_000)
    costs = [(microseconds(small.decide, 100, 5), microseconds(large.decide, 100, 5)) for _ in range(3)]
    assert min(of_large for _, of_large in costs) <= COST_RATIO_MAX * min(of_small for of_small, _ in costs)
