"""What pools of many nodes need: the arithmetic, and that the document tells what it comes to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from potluck_coordinator.gateway.grpc_server import LINKS_MAX
from tests.benchmarks.scaling import (
    DIRECTORY_CORES_MAX,
    GATEWAY_CORES_MAX,
    GATEWAYS_MAX,
    Costs,
    IdleCosts,
    Line,
    costs_of,
    kept_table,
    need_of,
)
from tests.benchmarks.turns import Turn

ROOT = Path(__file__).resolve().parents[2]
COSTS = Costs(
    idle=IdleCosts({"gateway": Line(0.02, 4e-6), "directory": Line(0.02, 1e-6), "driver": Line(0.01, 0.0)}, beat_micros=30.0),
    resident_bytes={"gateway": Line(1 << 30, 1 << 17), "directory": Line(1 << 30, 0.0)},
    joining_ms={"gateway": 4.0, "directory": 1.0},
    token_micros=50.0,
    request_micros=1000.0,
    directory_request_micros=500.0,
    requests_per_node_second=0.1,
    tokens_per_node_second=30.0,
)


def test_the_document_has_the_table_that_the_kept_figures_come_to():
    assert kept_table() in (ROOT / "docs/scaling.md").read_text()


def test_a_need_is_the_sum_of_what_was_measured():
    need = need_of(1000, COSTS)
    # 0.02 for each gateway, 0.004 and 200 heartbeats of 30 us for the nodes, 100 requests of 1 ms, 30,000 tokens of 50 us.
    assert (need.requests_per_second, need.tokens_per_second, need.gateways) == (100.0, 30_000.0, 3)
    assert need.gateway_cores == pytest.approx(1.67)
    assert need.directory_cores == pytest.approx(0.02 + 0.001 + 0.05)
    assert need.memory_gib == pytest.approx(4 + 1000 / 8192)
    assert need.idle_cores == pytest.approx(0.02 + 0.01 + 0.02 + 0.001 + 0.01)
    assert need.back_seconds == pytest.approx(4.0 / 3)
    assert need.fits


@pytest.mark.parametrize("node_count", [1, 999, 10_000, 50_000, 200_000])
def test_no_gateway_has_more_than_it_bears(node_count):
    need = need_of(node_count, COSTS)
    assert need.gateway_cores / need.gateways <= GATEWAY_CORES_MAX
    assert node_count <= need.gateways * LINKS_MAX
    assert need.fits is (need.directory_cores <= DIRECTORY_CORES_MAX and need.gateways <= GATEWAYS_MAX)


def test_without_load_the_links_alone_count():
    idle = replace(COSTS, requests_per_node_second=0.0, tokens_per_node_second=0.0)
    assert [need_of(count, idle).gateways for count in (1, LINKS_MAX, LINKS_MAX + 1)] == [1, 1, 2]


def test_costs_are_the_lines_through_the_two_counts_that_were_measured():
    def idle(count, cores, silent, resident):
        return {
            "node_count": count,
            "beats_per_second": count / 5,
            "cores": {"gateway": cores, "directory": cores},
            "silent_cores": {"gateway": silent},
            "resident_bytes": {"gateway": resident, "directory": resident},
        }

    nodes = {"idle": [idle(1000, 0.03, 0.02, 2_000), idle(3000, 0.05, 0.03, 6_000)], "joining_milliseconds_per_node": {"gateway": 3.0}}
    rounds = [
        Turn({}, {"paced": {"gateway": token}, "crowd": {"gateway": 10 * token, "directory": 5 * token}}, 0.0) for token in (1.0, 3.0, 2.0)
    ]
    costs = costs_of(nodes, rounds)
    assert (costs.token_micros, costs.request_micros, costs.directory_request_micros) == (2.0, 20.0, 10.0)
    assert costs.idle.beat_micros == pytest.approx(0.02 / 600 * 1e6)
    assert costs.idle.cores["directory"].at(10_000) == pytest.approx(0.12)
    # 0.065 without heartbeats, and one each 9.25 s.
    assert costs.idle.gateway_cores(10_000, 1) == pytest.approx(0.065 + 10_000 / 9.25 * 0.02 / 600)
    assert costs.resident_bytes["gateway"].at(2000) == pytest.approx(4000)
