"""`python -m tests.benchmarks.scaling`: what 1,000, 10,000 and 100,000 nodes need, reckoned from figures that were measured and kept.

Decides the arithmetic alone; it measures nothing. Figures of idle and joining nodes are those that `many_nodes --json` wrote
(`docs/benchmarks/many-nodes.json`), those of requests and tokens those of `make bench-peers` (`docs/benchmarks/relay-peers.json`). The
table that it prints is the one in `docs/scaling.md`; a test compares them.

A pool's load is assumed, and taken to be even: each node answers as many requests and gives as many tokens as stands here, over the day.
Costs are taken to grow in proportion to what causes them. That was seen up to the counts that were measured, and is an assumption beyond.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

from potluck_coordinator.domain.beat_period import idle_period_seconds
from potluck_coordinator.domain.nodes import LivenessLimits
from potluck_coordinator.gateway.grpc_server import LINKS_MAX
from tests.benchmarks.marks import OURS
from tests.benchmarks.outcome import outcome_of
from tests.benchmarks.turns import Turn

FOLDER: Final = Path(__file__).resolve().parents[2] / "docs" / "benchmarks"
MEASURED_NODES: Final = FOLDER / "many-nodes.json"
MEASURED_RELAY: Final = FOLDER / "relay-peers.json"
NODE_COUNTS: Final = (1_000, 10_000, 100_000)
GATEWAY_CORES_MAX: Final = 0.6
"""Of the one core that a gateway's process can use: the rest is for bursts, and for the nodes of one that died."""
DIRECTORY_CORES_MAX: Final = 0.8
GATEWAYS_MAX: Final = 64
REQUESTS_PER_NODE_SECOND: Final = 0.1
TOKENS_PER_NODE_SECOND: Final = 30.0
"""Assumed, not measured: one answer of 300 tokens every ten seconds, over the day, from each node."""


@dataclass(frozen=True, slots=True)
class Line:
    """What so many idle nodes cost one process: a part that is there without any, and one for each."""

    base: float
    each: float

    def at(self, count: float) -> float:
        return self.base + self.each * count


@dataclass(frozen=True, slots=True)
class IdleCosts:
    """Of nodes that only wait."""

    cores: Mapping[str, Line]
    """By process; the gateway's without heartbeats, the others' with those that came then, though they hear of few of them."""
    beat_micros: float
    """The gateway's, of one heartbeat and its share of an answer."""

    def gateway_cores(self, node_count: int, gateways: int) -> float:
        """Of all gateways together, with the period that so many nodes are told."""
        period = idle_period_seconds(math.ceil(node_count / gateways), 0.0, LivenessLimits())
        line = self.cores["gateway"]
        return gateways * line.base + line.each * node_count + node_count / period * self.beat_micros / 1e6

    def all_cores(self, node_count: int, gateways: int) -> float:
        """Of all processes."""
        others = sum(line.at(node_count) for name, line in self.cores.items() if name != "gateway")
        return self.gateway_cores(node_count, gateways) + others


@dataclass(frozen=True, slots=True)
class Costs:
    """All that was measured."""

    idle: IdleCosts
    resident_bytes: Mapping[str, Line]
    joining_ms: Mapping[str, float]
    token_micros: float
    """Of the gateway."""
    request_micros: float
    """Of the gateway."""
    directory_request_micros: float
    requests_per_node_second: float = REQUESTS_PER_NODE_SECOND
    tokens_per_node_second: float = TOKENS_PER_NODE_SECOND


@dataclass(frozen=True, slots=True)
class Need:
    """Of a pool of so many nodes."""

    node_count: int
    idle_cores: float
    """Of all processes together, with nothing to do and as few gateways as can hold the links."""
    requests_per_second: float
    tokens_per_second: float
    gateways: int
    gateway_cores: float
    """Of all gateways together."""
    directory_cores: float
    memory_gib: float
    back_seconds: float
    """CPU time, of the directory or one gateway, whichever is more, until all nodes are back after a restart."""

    @property
    def fits(self) -> bool:
        """Whether one directory and the gateways that there may be bear it."""
        return self.directory_cores <= DIRECTORY_CORES_MAX and self.gateways <= GATEWAYS_MAX


def line_of(few: Mapping[str, Any], many: Mapping[str, Any], key: str, process: str) -> Line:
    """Through two counts."""
    each = max(0.0, (many[key][process] - few[key][process]) / (many["node_count"] - few["node_count"]))
    return Line(max(0.0, many[key][process] - each * many["node_count"]), each)


def idle_costs_of(few: Mapping[str, Any], many: Mapping[str, Any]) -> IdleCosts:
    """Of two counts, each measured with heartbeats (`cores`) and without (`silent_cores`)."""
    lines = {name: line_of(few, many, "silent_cores" if name == "gateway" else "cores", name) for name in many["cores"]}
    beats_cores = many["cores"]["gateway"] - many["silent_cores"]["gateway"]
    return IdleCosts(lines, max(0.0, beats_cores) / many["beats_per_second"] * 1e6)


def costs_of(nodes: Mapping[str, Any], rounds: Sequence[Turn]) -> Costs:
    """Of what `many_nodes` found, and of Potluck's rounds of the relay's benchmark, whose median counts."""
    few, many = nodes["idle"]

    def micros(workload: str, process: str) -> float:
        return median(turn.cpu[workload][process] for turn in rounds)

    return Costs(
        idle_costs_of(few, many),
        {name: line_of(few, many, "resident_bytes", name) for name in many["cores"]},
        nodes["joining_milliseconds_per_node"],
        micros("paced", "gateway"),
        micros("crowd", "gateway"),
        micros("crowd", "directory"),
    )


def need_of(node_count: int, costs: Costs) -> Need:
    """As few gateways as bear it, for more of them cost a little more each."""
    requests, tokens = node_count * costs.requests_per_node_second, node_count * costs.tokens_per_node_second
    busy_cores = (requests * costs.request_micros + tokens * costs.token_micros) / 1e6
    gateways = math.ceil(node_count / LINKS_MAX)
    idle_cores = costs.idle.all_cores(node_count, gateways)
    while (costs.idle.gateway_cores(node_count, gateways) + busy_cores) / gateways > GATEWAY_CORES_MAX:
        gateways += 1
    gateway_cores = costs.idle.gateway_cores(node_count, gateways) + busy_cores
    directory_cores = costs.idle.cores["directory"].at(node_count) + requests * costs.directory_request_micros / 1e6
    memory = gateways * costs.resident_bytes["gateway"].base + costs.resident_bytes["gateway"].each * node_count
    memory += sum(line.at(node_count) for name, line in costs.resident_bytes.items() if name != "gateway")
    back = max(node_count / gateways * costs.joining_ms["gateway"], node_count * costs.joining_ms["directory"]) / 1000
    return Need(node_count, idle_cores, requests, tokens, gateways, gateway_cores, directory_cores, memory / (1 << 30), back)


def table(needs: Sequence[Need]) -> str:
    """For docs/scaling.md."""
    head = (
        *("Nodes", "Cores, all idle", "Requests a second", "Tokens a second", "Gateways", "Their cores", "The directory's"),
        *("Memory, GiB", "All back, s", "Fits"),
    )
    rows = [head, ("---",) * len(head), *(cells(one) for one in needs)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows).replace("| --- ", "|---").replace("--- |", "---|")


def cells(need: Need) -> tuple[str, ...]:
    """One line of it."""
    return (
        *(f"{need.node_count:,}", f"{need.idle_cores:.2f}", f"{need.requests_per_second:,.0f}", f"{need.tokens_per_second:,.0f}"),
        *(f"{need.gateways}", f"{need.gateway_cores:.1f}", f"{need.directory_cores:.2f}", f"{need.memory_gib:.1f}"),
        *(f"{need.back_seconds:.0f}", "yes" if need.fits else "no"),
    )


def kept_table() -> str:
    """From the figures that are kept."""
    relay = outcome_of(json.loads(MEASURED_RELAY.read_text()))
    costs = costs_of(json.loads(MEASURED_NODES.read_text())["result"], relay.rounds.turns[OURS])
    return table([need_of(count, costs) for count in NODE_COUNTS])


def main() -> int:
    print(kept_table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
