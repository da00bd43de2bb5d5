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
WINDOW_SECONDS: Final = 8.0
SILENT_SECONDS: Final = 1.5
"""How long a window's two readings lasted, where a file does not say so itself: one that was written before it did."""
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
    """By process; the gateway's without heartbeats. The others hear of who is there three times a lease, whether or not it beats meanwhile,
    and of a heartbeat only where it brings news, as an idle node's does once a minute: theirs is that of the whole window, with heartbeats
    and without, so that no plan that was made in it is left out."""
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

    idle: Sequence[IdleCosts]
    """By pairs of windows. The median of what they come to counts, not what the medians of their parts come to: a plan falls into few
    windows, and would be in no such median."""
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


def line_through(few_count: int, few: float, many_count: int, many: float) -> Line:
    """What two counts spent."""
    each = max(0.0, (many - few) / (many_count - few_count))
    return Line(max(0.0, many - each * many_count), each)


def line_of(few: Mapping[str, Any], many: Mapping[str, Any], key: str, process: str) -> Line:
    """Through two counts."""
    return line_through(few["node_count"], few[key][process], many["node_count"], many[key][process])


def whole_cores(window: Mapping[str, Any], process: str) -> float:
    """What a process spent over both readings of a window, each by its seconds."""
    seconds, silent_seconds = window.get("seconds", WINDOW_SECONDS), window.get("silent_seconds", SILENT_SECONDS)
    return (window["cores"][process] * seconds + window["silent_cores"][process] * silent_seconds) / (seconds + silent_seconds)


def idle_costs_of(few: Mapping[str, Any], many: Mapping[str, Any]) -> IdleCosts:
    """Of a window of each of two counts, each measured with heartbeats (`cores`) and just after without (`silent_cores`)."""
    counts = few["node_count"], many["node_count"]
    lines = {
        name: line_through(counts[0], whole_cores(few, name), counts[1], whole_cores(many, name))
        for name in many["cores"]
        if name != "gateway"
    }
    lines["gateway"] = line_of(few, many, "silent_cores", "gateway")
    beats_cores = many["cores"]["gateway"] - many["silent_cores"]["gateway"]
    return IdleCosts(lines, max(0.0, beats_cores) / many["beats_per_second"] * 1e6)


def idle_costs_of_pairs(few: Sequence[Mapping[str, Any]], many: Sequence[Mapping[str, Any]]) -> list[IdleCosts]:
    """Of one window of each count after the other."""
    return [idle_costs_of(*pair) for pair in zip(few, many, strict=True)]


def costs_of(nodes: Mapping[str, Any], rounds: Sequence[Turn]) -> Costs:
    """Of what `many_nodes` found, and of Potluck's rounds of the relay's benchmark, whose median counts."""
    few, many = nodes["idle"]

    def micros(workload: str, process: str) -> float:
        return median(turn.cpu[workload][process] for turn in rounds)

    return Costs(
        idle_costs_of_pairs(few["windows"], many["windows"]),
        {name: line_of(few, many, "resident_bytes", name) for name in many["cores"]},
        nodes["joining_milliseconds_per_node"],
        micros("paced", "gateway"),
        micros("crowd", "gateway"),
        micros("crowd", "directory"),
    )


def need_of(node_count: int, costs: Costs) -> Need:
    """As few gateways as bear it, for more of them cost a little more each."""

    def idle_gateway_cores(gateways: int) -> float:
        return median(one.gateway_cores(node_count, gateways) for one in costs.idle)

    requests, tokens = node_count * costs.requests_per_node_second, node_count * costs.tokens_per_node_second
    busy_cores = (requests * costs.request_micros + tokens * costs.token_micros) / 1e6
    gateways = math.ceil(node_count / LINKS_MAX)
    idle_cores = median(one.all_cores(node_count, gateways) for one in costs.idle)
    while (idle_gateway_cores(gateways) + busy_cores) / gateways > GATEWAY_CORES_MAX:
        gateways += 1
    gateway_cores = idle_gateway_cores(gateways) + busy_cores
    directory_cores = median(one.cores["directory"].at(node_count) for one in costs.idle) + requests * costs.directory_request_micros / 1e6
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
