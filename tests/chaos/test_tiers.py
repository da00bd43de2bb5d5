"""A sample of what `tests.chaos.tiers` shows in full."""

from __future__ import annotations

import pytest

from tests.chaos import tiers


@pytest.mark.timeout(300)
def test_the_default_tier_keeps_its_promise_and_clients_back_off_as_they_are_told():
    for part in tiers.show(7.0):
        assert part.broken == []
