"""A short look at what `tests.simulation.pressure` shows at length."""

from __future__ import annotations

from tests.simulation.pressure import fairness, goodput, late_refusals, politeness

HOURS = 0.075
ORACLE_SHARE_MIN = 0.9
FLOOD_NOTICED_MAX = 1.5


def test_unequal_nodes_at_twice_their_capacity_serve_more_than_under_the_peers() -> None:
    good = goodput(range(1, 2), HOURS)

    assert good["ours"] >= 1.5 * good["round-robin"]
    assert good["ours"] >= 1.2 * good["least-connections"]
    assert good["ours"] >= 1.2 * good["power-of-two"]
    assert good["ours"] >= ORACLE_SHARE_MIN * good["oracle"]
    assert good["oracle"] > 9


def test_accounts_that_always_wait_are_given_alike() -> None:
    found = fairness(1, 0.15)

    assert found["jain"] >= 0.99
    assert found["gap"] <= found["bound"]


def test_a_polite_account_hardly_notices_a_flood() -> None:
    found = politeness(1, 0.15)

    assert found["flooded"] <= FLOOD_NOTICED_MAX * found["alone"]


def test_nearly_nobody_who_was_let_in_to_wait_is_refused_later_even_by_a_pool_that_has_seen_nothing_yet() -> None:
    found = late_refusals(1, 0.05)

    assert found["refused"] > 1000
    assert found["late"] <= 0.01
