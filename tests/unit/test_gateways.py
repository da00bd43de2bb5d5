"""Gateways: which of them others may count on, by what they said and when."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck_coordinator.domain.gateways import SILENCE_SECONDS_MAX, GatewayRecord, reachable

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
