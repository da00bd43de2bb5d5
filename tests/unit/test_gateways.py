"""Gateways: which of them others may count on, by what they said and when."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potluck_coordinator.domain.gateways import (
    SILENCE_SECONDS_MAX,
    SURPLUS_COUNT_MIN,
    SURPLUS_SHARE_MIN,
    GatewayRecord,
    link_addresses,
    reachable,
    surplus_count,
)

NEW = GatewayRecord(0, 7)
OPEN = GatewayRecord(1, 8, "", "host:8602")


@pytest.mark.parametrize(
    ("heard_at", "now", "expected"),
    [
        ({7: 10.0, 8: 10.0}, 10.0, {8}),
        ({7: 10.0, 8: 10.0}, 9.9 + SILENCE_SECONDS_MAX, {8}),
        ({7: 10.0, 8: 10.0}, 10.0 + SILENCE_SECONDS_MAX, set()),
        ({}, 0.0, set()),
    ],
)
def test_who_is_reachable(heard_at, now, expected):
    assert reachable({7: NEW, 8: OPEN}, heard_at, now).keys() == expected


@given(heard_at=st.dictionaries(st.integers(1, 9), st.floats(0, 100)), now=st.floats(0, 200))
def test_nobody_is_reachable_who_is_not_registered_announced_and_heard_of(heard_at, now):
    records = {epoch: GatewayRecord(epoch, epoch, "", "host:1" if epoch % 2 else "") for epoch in range(1, 7)}
    found = reachable(records, heard_at, now)
    assert all(found[epoch] is records[epoch] for epoch in found)
    assert found.keys() == {epoch for epoch in (1, 3, 5) if epoch in heard_at and now - heard_at[epoch] < SILENCE_SECONDS_MAX}


A, B, C = 1, 2, 3


@pytest.mark.parametrize(
    ("counts", "epochs", "expected"),
    [
        ({A: 2, B: 0}, {A, B}, 0),  # one too many
        ({A: 4, B: 0}, {A, B}, 1),
        ({A: 4}, {A}, 0),  # nowhere to go
        ({A: 4, B: 0}, {B, C}, 0),  # it is gone itself
        ({A: 110, B: 90}, {A, B}, 0),  # within a quarter
        ({A: 150, B: 50}, {A, B}, 3),
        ({A: 5000, B: 0}, {A, B}, 100),
        ({A: 40, B: 0, C: 20}, {A, B, C}, 1),
        ({A: 0, B: 40}, {A, B}, 0),
    ],
)
def test_how_many_nodes_a_gateway_lets_go(counts, epochs, expected):
    assert surplus_count(counts, epochs, A) == expected


@given(counts=st.lists(st.integers(0, 3000), min_size=2, max_size=6), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_nodes_come_to_rest_about_evenly_and_then_stay(counts, seed):
    """Those let go land anywhere else, at random."""
    draw = random.Random(seed)
    nodes, everyone = dict(enumerate(counts)), range(len(counts))
    for _ in range(600):
        surplus = {epoch: surplus_count(nodes, everyone, epoch) for epoch in everyone}
        if not any(surplus.values()):
            break
        for epoch, count in surplus.items():
            nodes[epoch] -= count
            for _ in range(count):
                nodes[draw.choice([other for other in everyone if other != epoch])] += 1
    share = sum(counts) / len(counts)
    assert sum(nodes.values()) == sum(counts)
    assert all(count - share < max(SURPLUS_COUNT_MIN, SURPLUS_SHARE_MIN * share) for count in nodes.values())


def test_a_node_is_told_its_own_gateway_first_and_of_one_alone_nothing():
    other = GatewayRecord(0, 7, "", ":8603")
    assert link_addresses({8: OPEN, 7: other}, 8) == ("host:8602", ":8603")
    assert link_addresses({8: OPEN}, 8) == ()
    assert link_addresses({8: OPEN, 7: other}, 9) == ()
