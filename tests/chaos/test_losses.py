"""A sample of what `tests.chaos.node_loss`, `coordinator_loss` and `many_gateways` show in full."""

from __future__ import annotations

import pytest

from tests.chaos import coordinator_loss, many_gateways, node_loss
from tests.chaos.gateway_pool import pool_of_gateways
from tests.support.pool_processes import running_pool


@pytest.mark.timeout(180)
def test_where_nobody_can_go_on_a_node_that_dies_or_freezes_costs_the_client_no_more_than_it_got(tmp_path):
    with running_pool(tmp_path) as pool:
        for fault in ("killed", "frozen"):
            assert node_loss.lose(pool, fault).broken() == []


@pytest.mark.timeout(240)
def test_each_process_of_the_coordinator_can_die_under_load(tmp_path):
    with coordinator_loss.pool_to_break(tmp_path, node_count=1) as (pool, catalogue, stack):
        for number in range(len(coordinator_loss.VICTIMS)):
            assert coordinator_loss.play(pool, number, catalogue, stack).broken == ()


@pytest.mark.timeout(240)
def test_a_gateway_and_the_directory_die_beside_another_gateway(tmp_path):
    with pool_of_gateways(tmp_path) as pool:
        for play in many_gateways.shows(pool, kill_count=1, directory_kill_count=1):
            assert play().broken == ()
