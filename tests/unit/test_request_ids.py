"""Which request ids of callers are kept."""

from __future__ import annotations

import pytest

from potluck_coordinator.gateway.request_ids import request_id_of


@pytest.mark.parametrize("offered", ["a", "req_1", "A.b-c_9", "x" * 64])
def test_a_harmless_id_is_the_callers_own(offered: str) -> None:
    assert request_id_of(offered) == offered


@pytest.mark.parametrize("offered", [None, "", "x" * 65, "a b", "a\n", "é", 'a"', "../a"])
def test_anything_else_gets_a_new_one(offered: str | None) -> None:
    made = {request_id_of(offered) for _ in range(10)}
    assert len(made) == 10
    assert all(request_id_of(request_id) == request_id for request_id in made)
