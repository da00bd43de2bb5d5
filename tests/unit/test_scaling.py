"""What pools of many nodes need: the arithmetic, and that the document tells what it comes to."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest

from potluck_coordinator.gateway.grpc_server import LINKS_MAX
from tests.benchmarks.arithmetic import estimate
from tests.benchmarks.scaling import (
    DIRECTORY_CORES_MAX,
    GATEWAY_CORES_MAX,
    GATEWAYS_MAX,
    MEASURED_NODES,
    Costs,
    IdleCosts,
    Line,
    costs_of,
    idle_costs_of_pairs,
    kept_table,
    need_of,
    whole_cores,
)
from tests.benchmarks.turns import Turn

ROOT = Path(__file__).resolve().parents[2]
COSTS = Costs(
    idle=[IdleCosts({"gateway": Line(0.02, 4e-6), "directory": Line(0.02, 1e-6), "driver": Line(0.01, 0.0)}, beat_micros=30.0)],
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


def test_the_page_of_many_nodes_has_what_the_kept_windows_come_to():
    text = (ROOT / "docs/many-nodes.md").read_text()
    few, many = (one["windows"] for one in json.loads(MEASURED_NODES.read_text())["result"]["idle"])
    found = estimate([costs.all_cores(10_000, 1) for costs in idle_costs_of_pairs(few, many)])
    assert f"cost {found.median:.2f} cores ({found.low:.2f} to {found.high:.2f}) of all these together" in text
    directory, driver, ray = ([whole_cores(window, name) for window in many] for name in ("directory", "driver", "ray"))
    assert f"the directory spent {median(directory):.3f} cores on 3,000 idle nodes" in text
    assert f"the driver {median(driver):.3f} and Ray's own processes {median(ray):.3f}." in text
    assert f"it spent {min(directory):.3f} to {max(directory):.3f} cores on 3,000 nodes" in text


def test_the_page_of_many_nodes_has_the_storms_that_are_kept():
    text = (ROOT / "docs/many-nodes.md").read_text()
    storms = json.loads((ROOT / "docs/benchmarks/join-storm.json").read_text())["result"]
    words = {"gateway": ("The gateway's process", "the kill"), "coordinator": ("The whole coordinator", "when the next one serves")}
    assert {storm["victim"] for storm in storms} == set(words)
    for storm in storms:
        killed, counted_from = words[storm["victim"]]
        half, back = storm["half_back_seconds"], storm["all_back_seconds"]
        cpu = ", ".join(f"{storm['cpu_seconds'][name]:.1f}" for name in ("gateway", "directory", "agents"))
        row = (
            f"| {killed} | {storm['listening_after_seconds']:.1f} s | {counted_from} | {half:.1f} s | {back:.1f} s | {storm['dials']:,} "
            f"| {cpu} | {storm['log_lines_in_the_worst_second']} lines |"
        )
        assert row in text
        if storm["victim"] == "coordinator":
            assert f"more than {len(storm['welcomes_each_second']) - 1} s went by" in text


def test_both_readings_of_a_window_count_by_their_seconds_and_those_of_an_old_file_are_known():
    old = {"cores": {"directory": 0.02}, "silent_cores": {"directory": 0.21}}
    assert whole_cores(old, "directory") == pytest.approx((0.02 * 8 + 0.21 * 1.5) / 9.5)
    assert whole_cores({**old, "seconds": 3.0, "silent_seconds": 1.0}, "directory") == pytest.approx((0.06 + 0.21) / 4)


def test_the_median_of_what_pairs_of_windows_come_to_counts():
    directories = [Line(0.01, 0.0), Line(0.5, 0.0), Line(0.02, 0.0)]
    idle = [IdleCosts({**COSTS.idle[0].cores, "directory": line}, 30.0) for line in directories]
    assert need_of(1000, replace(COSTS, idle=idle)).directory_cores == pytest.approx(0.02 + 0.05)


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
        window = {
            "node_count": count,
            "beats_per_second": count / 5,
            "cores": {"gateway": cores, "directory": cores},
            "silent_cores": {"gateway": silent, "directory": cores},
            "resident_bytes": {"gateway": resident, "directory": resident},
        }
        return {**window, "windows": [window]}

    nodes = {"idle": [idle(1000, 0.03, 0.02, 2_000), idle(3000, 0.05, 0.03, 6_000)], "joining_milliseconds_per_node": {"gateway": 3.0}}
    rounds = [
        Turn({}, {"paced": {"gateway": token}, "crowd": {"gateway": 10 * token, "directory": 5 * token}}, 0.0) for token in (1.0, 3.0, 2.0)
    ]
    costs = costs_of(nodes, rounds)
    assert (costs.token_micros, costs.request_micros, costs.directory_request_micros) == (2.0, 20.0, 10.0)
    (waiting,) = costs.idle
    assert waiting.beat_micros == pytest.approx(0.02 / 600 * 1e6)
    assert waiting.cores["directory"].at(10_000) == pytest.approx(0.12)
    # 0.065 without heartbeats, and one each 9.25 s.
    assert waiting.gateway_cores(10_000, 1) == pytest.approx(0.065 + 10_000 / 9.25 * 0.02 / 600)
    assert costs.resident_bytes["gateway"].at(2000) == pytest.approx(4000)
