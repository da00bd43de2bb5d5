"""`python -m tests.benchmarks.many_nodes`: what a linked node and a heartbeat cost the coordinator, beside the least that gRPC can do.

Decides how it is measured. A real coordinator (`potluck coordinator serve`) and a bare server (`tests.support.bare_links`: the same port,
certificates, options and messages, and a handler that only stores each message) each get as many agents as the other, with links of their
own over mutual TLS. CPU time is the processes' own, all threads together, so that neighbours on the machine change it little.

- A heartbeat: with `--nodes`' first count, the agents beat once a second, then for as long not at all, in turns on both servers. Its cost
  is the difference over the beats. Round by round that of the gateway is divided by that of the bare server.
- A node's memory: resident bytes with the second count less those with the first, over the nodes in between.
- Joining: CPU time while those between the first count and the second come, handshake, hello and first wish included, over their number.
- Idle nodes: with both counts the agents beat as the coordinator tells them, and in turns not at all. All of the coordinator's processes
  are counted (gateway, directory, driver and Ray's own). What the gateway costs a second without heartbeats, and the others in the whole
  window, is taken to grow with the nodes as it does from the first count to the second; what a heartbeat costs the gateway is the
  difference, with the second count. For 10,000 that comes to as many heartbeats as so many nodes are told to send (`scaling.IdleCosts`),
  window by window.

`--only-heartbeats` stops after the first of these, so that many rounds of it take no longer than all of them together.

Marks, by the pessimistic end of the interval: a heartbeat <= 1.3 x the bare server's; memory <= 1.5 x; 10,000 idle nodes <= 0.4 core.
Progress goes to standard error. Ends with 1 where a mark is not met.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

import structlog

import potluck.command  # noqa: F401 - the loop of gRPC's that it names is that of all processes here
from potluck_coordinator.directory.certificate_authority import CertificateAuthority
from potluck_protocol.clock import SystemClock
from tests.benchmarks.arithmetic import Estimate, estimate, ratios
from tests.benchmarks.processes import Child, CpuReading, descendants, resident_bytes
from tests.benchmarks.scaling import IdleCosts, idle_costs_of_pairs
from tests.benchmarks.versions import versions
from tests.support.coordinator_process import CoordinatorProcess
from tests.support.node_fleet import Fleet, bare_links, enrol_nodes
from tests.support.simulated_agents import Nodes

HEARTBEAT_RATIO_MAX: Final = 1.3
MEMORY_RATIO_MAX: Final = 1.5
IDLE_CORES_MAX: Final = 0.4
IDLE_NODES: Final = 10_000
LINKED_PER_SECOND: Final = 150
SETTLE_SECONDS: Final = 8.0
HUSH_SECONDS: Final = 0.5
SILENT_SECONDS: Final = 1.5
"""Idle nodes: the last heartbeat of some is five seconds old by then. Where so many are silent for seven and a half, the gateway doubts
itself, and asks all of them."""
SILENT_PERIOD_SECONDS: Final = 1e6


@dataclass(frozen=True, slots=True)
class Round:
    """Microseconds of CPU time of one heartbeat."""

    gateway_micros: float
    bare_micros: float
    beats_per_second: float


@dataclass(frozen=True, slots=True)
class Window:
    """So many idle nodes for a while."""

    node_count: int
    beats_per_second: float
    cores: dict[str, float]
    """With heartbeats, as the coordinator has them."""
    seconds: float
    silent_cores: dict[str, float]
    """Without any, just after."""
    silent_seconds: float
    bare_cores: float
    resident_bytes: dict[str, int]


@dataclass(frozen=True, slots=True)
class Idle:
    """All windows of one count."""

    node_count: int
    period_seconds: list[float]
    windows: list[Window]

    def medians(self) -> dict[str, Any]:
        """One window's fields, each the median of all."""
        by_process = {
            key: {name: median(getattr(one, key)[name] for one in self.windows) for name in getattr(self.windows[0], key)}
            for key in ("cores", "silent_cores", "resident_bytes")
        }
        rates = {key: median(getattr(one, key) for one in self.windows) for key in ("beats_per_second", "bare_cores")}
        return {"node_count": self.node_count, "period_seconds": self.period_seconds, **rates, **by_process}


@dataclass(frozen=True, slots=True)
class Mark:
    """What a figure must not exceed, by the pessimistic end of its interval."""

    name: str
    limit: float
    unit: str
    estimate: Estimate

    @property
    def met(self) -> bool:
        return self.estimate.high <= self.limit


class Bench:
    """Both servers and their agents."""

    def __init__(self, folder: Path, stack: ExitStack, node_count: int, say: Callable[[str], None]) -> None:
        say(f"enrolling {node_count} nodes")
        keys = asyncio.run(enrol_nodes(folder / "coordinator", node_count))
        authority_dir = folder / "coordinator" / "ca"
        ca = CertificateAuthority.load_or_create(authority_dir, SystemClock().unix_ms()).ca_certificate_pem
        self.coordinator = stack.enter_context(CoordinatorProcess(folder / "coordinator"))
        ports = self.coordinator.wait_ready()
        self.bare: Child
        self.bare, bare_port = stack.enter_context(bare_links(folder, authority_dir))
        self.fleet = stack.enter_context(Fleet(folder / "agents", Nodes(f"127.0.0.1:{ports['link']}", ca, keys), 2))
        self.bare_fleet = stack.enter_context(Fleet(folder / "bare-agents", Nodes(f"127.0.0.1:{bare_port}", ca, keys), 2))
        self._say = say
        self._linked_count = 0

    def processes(self) -> dict[str, tuple[int, ...]]:
        """Of the coordinator, by what they are."""
        gateway, directory = (self.coordinator.actor(name).pid for name in ("GatewayActor", "DirectoryActor"))
        driver = self.coordinator.process.pid
        ray = tuple(process_id for process_id in descendants(driver) if process_id not in {gateway, directory})
        return {"gateway": (gateway,), "directory": (directory,), "driver": (driver,), "ray": ray}

    def link(self, count: int) -> dict[str, float]:
        """Until so many are linked to each; milliseconds of CPU time that each of those that came cost, by process."""
        self._say(f"linking {count} nodes to each")
        groups = {**self.processes(), "bare": (self.bare.process_id,)}
        everyone = [process_id for group in groups.values() for process_id in group]
        came, self._linked_count = count - self._linked_count, count
        before = CpuReading.take(everyone)
        self.fleet.link(count, LINKED_PER_SECOND, 300)
        self.bare_fleet.link(count, LINKED_PER_SECOND, 300)
        after = CpuReading.take(everyone)
        time.sleep(SETTLE_SECONDS)
        return {name: after.spent_since(before, groups[name]) / came * 1000 for name in ("gateway", "directory", "bare")}

    def heartbeats(self, rounds: int, seconds: float) -> list[Round]:
        """In turns, the order changing from round to round."""
        found = []
        (gateway,) = self.processes()["gateway"]
        sides = {"gateway": (self.fleet, gateway), "bare": (self.bare_fleet, self.bare.process_id)}
        for fleet, _ in sides.values():
            fleet.beat_every(5.0)
        for number in range(rounds):
            self._say(f"heartbeats, round {number + 1} of {rounds}")
            micros, rate = {}, 0.0
            for name in sorted(sides, reverse=bool(number % 2)):
                micros[name], rate = _beat_micros(*sides[name], seconds)
            found.append(Round(micros["gateway"], micros["bare"], rate))
        return found

    def idle(self, count: int, window_count: int, seconds: float) -> Idle:
        """As the coordinator tells them to beat, and not at all; the bare server's agents in the same period."""
        groups = {**self.processes(), "bare": (self.bare.process_id,)}
        windows = []
        for number in range(window_count):
            self._say(f"{count} idle nodes, window {number + 1} of {window_count}")
            self.fleet.beat_every(None)
            time.sleep(SETTLE_SECONDS)
            periods = self.fleet.idle_periods()
            self.bare_fleet.beat_every(max(periods))
            time.sleep(SETTLE_SECONDS)
            beats, cores = self._cores(seconds)
            self.fleet.beat_every(SILENT_PERIOD_SECONDS)
            time.sleep(HUSH_SECONDS)
            _, silent = self._cores(SILENT_SECONDS)
            bare = cores.pop("bare")
            resident = {name: sum(map(resident_bytes, group)) for name, group in groups.items()}
            silent = {name: silent[name] for name in cores}
            windows.append(Window(count, beats, cores, seconds, silent, SILENT_SECONDS, bare, resident))
        return Idle(count, periods, windows)

    def _cores(self, seconds: float) -> tuple[float, dict[str, float]]:
        """Heartbeats a second, and what each process spends meanwhile."""
        groups = {**self.processes(), "bare": (self.bare.process_id,)}
        everyone = [process_id for group in groups.values() for process_id in group]
        beats, before = self.fleet.beat_count(), CpuReading.take(everyone)
        time.sleep(seconds)
        after, beats = CpuReading.take(everyone), self.fleet.beat_count() - beats
        lasted = after.at_seconds - before.at_seconds
        return beats / lasted, {name: after.spent_since(before, group) / lasted for name, group in groups.items()}


def _beat_micros(fleet: Fleet, process_id: int, seconds: float) -> tuple[float, float]:
    """One heartbeat's microseconds, and how many came a second: what a process spends while they come, less what it spends without."""

    def spent(period_seconds: float, wait_seconds: float) -> tuple[float, int]:
        fleet.beat_every(period_seconds)
        time.sleep(wait_seconds)
        beats, before = fleet.beat_count(), CpuReading.take([process_id])
        time.sleep(seconds)
        after = CpuReading.take([process_id])
        cores = after.spent_since(before, [process_id]) / (after.at_seconds - before.at_seconds)
        return cores, fleet.beat_count() - beats

    with_beats, beat_count = spent(1.0, 2.0)
    # Shorter than a lease.
    without, strays = spent(SILENT_PERIOD_SECONDS, HUSH_SECONDS)
    fleet.beat_every(5.0)
    time.sleep(2.0)
    rate = (beat_count - strays) / seconds
    return (with_beats - without) / rate * 1e6, rate


def reckoned_cores(small: Idle, large: Idle, node_count: int) -> list[float]:
    """What so many idle nodes would cost all processes together, by one window of each count after the other."""
    return [costs.all_cores(node_count, 1) for costs in idle_costs(small, large)]


def idle_costs(small: Idle, large: Idle) -> list[IdleCosts]:
    return idle_costs_of_pairs(*([asdict(window) for window in one.windows] for one in (small, large)))


def memory_per_node(few: Window, many: Window) -> dict[str, float]:
    """Resident bytes, by process."""
    count = many.node_count - few.node_count
    return {name: (many.resident_bytes[name] - few.resident_bytes[name]) / count for name in many.resident_bytes}


def memory_ratios(small: Idle, large: Idle) -> list[float]:
    """The gateway's over the bare server's, by one window of each count after the other."""
    each = [memory_per_node(few, many) for few, many in zip(small.windows, large.windows, strict=True)]
    return [memory["gateway"] / memory["bare"] for memory in each]


def heartbeat_mark(rounds: Sequence[Round]) -> Mark:
    found = estimate(ratios([one.gateway_micros for one in rounds], [one.bare_micros for one in rounds]))
    return Mark("a heartbeat's CPU, gateway over bare server", HEARTBEAT_RATIO_MAX, "x", found)


def marks_of(rounds: Sequence[Round], small: Idle, large: Idle) -> list[Mark]:
    return [
        heartbeat_mark(rounds),
        Mark("a node's memory, gateway over bare server", MEMORY_RATIO_MAX, "x", estimate(memory_ratios(small, large))),
        Mark(
            f"{IDLE_NODES:,} idle nodes, all of the coordinator",
            IDLE_CORES_MAX,
            "cores",
            estimate(reckoned_cores(small, large, IDLE_NODES)),
        ),
    ]


def heartbeat_line(rounds: Sequence[Round]) -> str:
    ours, theirs = (estimate([getattr(one, name) for one in rounds]) for name in ("gateway_micros", "bare_micros"))
    gateway = f"gateway {ours.median:.0f} us ({ours.low:.0f} to {ours.high:.0f})"
    bare = f"bare server {theirs.median:.0f} us ({theirs.low:.0f} to {theirs.high:.0f})"
    return f"a heartbeat at {rounds[0].beats_per_second:.0f}/s: {gateway}, {bare}"


def mark_line(mark: Mark) -> str:
    shown = f"{mark.estimate.median:.2f} ({mark.estimate.low:.2f} to {mark.estimate.high:.2f}) {mark.unit}, at most {mark.limit}"
    return f"{'met    ' if mark.met else 'NOT MET'}  {mark.name}: {shown}"


def table(rounds: Sequence[Round], small: Idle, large: Idle) -> str:
    memory = {name: f"{size / 1024:.1f} KiB" for name, size in memory_per_node(small.windows[-1], large.windows[-1]).items()}
    lines = [heartbeat_line(rounds), f"memory of a node: {memory}"]
    for one in (small.medians(), large.medians()):
        for key, words in (
            ("cores", f"a beat each {one['period_seconds']} s, {one['beats_per_second']:.0f}/s"),
            ("silent_cores", "no beats"),
        ):
            shown = ", ".join(f"{name} {cores:.3f}" for name, cores in one[key].items())
            lines.append(f"{one['node_count']} idle nodes, {words}: cores {shown}; bare server {one['bare_cores']:.3f}")
    costs = idle_costs(small, large)
    gateway_cores = median(one.gateway_cores(IDLE_NODES, 1) for one in costs)
    reckoned = f"{gateway_cores:.3f} of {median(reckoned_cores(small, large, IDLE_NODES)):.3f} cores"
    lines.append(f"{IDLE_NODES:,} idle nodes, reckoned, a beat {median(one.beat_micros for one in costs):.0f} us: gateway {reckoned}")
    return "\n".join([*lines, *map(mark_line, marks_of(rounds, small, large))])


def marks_as_json(marks: Sequence[Mark]) -> list[dict[str, Any]]:
    return [{**asdict(mark), "met": mark.met} for mark in marks]


def as_json(rounds: Sequence[Round], small: Idle, large: Idle) -> Mapping[str, Any]:
    return {
        "heartbeat_rounds": [asdict(one) for one in rounds],
        "idle": [{**one.medians(), "windows": [asdict(window) for window in one.windows]} for one in (small, large)],
        "memory_bytes_per_node": memory_per_node(small.windows[-1], large.windows[-1]),
        "marks": marks_as_json(marks_of(rounds, small, large)),
    }


def show_heartbeats(programs: Mapping[str, Any], rounds: Sequence[Round], *, as_object: bool) -> int:
    """Where nothing else was measured; the exit code."""
    mark = heartbeat_mark(rounds)
    found = {"versions": programs, "heartbeat_rounds": [asdict(one) for one in rounds], "marks": marks_as_json([mark])}
    print(json.dumps(found) if as_object else f"{heartbeat_line(rounds)}\n{mark_line(mark)}", flush=True)
    return 0 if mark.met else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs=2, default=[1000, 3000], metavar=("FEW", "MANY"))
    parser.add_argument("--rounds", type=int, default=5, help="of heartbeats")
    parser.add_argument("--seconds", type=float, default=4.0, help="each window of a round, at most 6: a lease must outlast it")
    parser.add_argument("--only-heartbeats", action="store_true", help="with the first count; nothing else is measured")
    parser.add_argument("--windows", type=int, default=5, help="of idle nodes, with each count")
    parser.add_argument("--idle-seconds", type=float, default=10.0, help="each of them")
    parser.add_argument("--json", action="store_true", help="one object on standard output, nothing else")
    arguments = parser.parse_args()
    few, many = arguments.nodes
    if not (0 < few < many and arguments.rounds > 0 and arguments.windows > 0 and 0 < arguments.seconds <= 6):
        parser.error("--nodes are two counts, the smaller one first; --rounds and --windows at least 1; --seconds at most 6")
    idle = arguments.windows, arguments.idle_seconds
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    programs = versions(())
    with tempfile.TemporaryDirectory(prefix="potluck-nodes-") as folder, ExitStack() as stack:
        bench = Bench(Path(folder), stack, few if arguments.only_heartbeats else many, say)
        bench.link(few)
        if arguments.only_heartbeats:
            return show_heartbeats(programs, bench.heartbeats(arguments.rounds, arguments.seconds), as_object=arguments.json)
        small = bench.idle(few, *idle)
        rounds = bench.heartbeats(arguments.rounds, arguments.seconds)
        joining = bench.link(many)
        large = bench.idle(many, *idle)
    shown = table(rounds, small, large) + "\njoining, CPU ms a node: " + ", ".join(f"{name} {cost:.1f}" for name, cost in joining.items())
    found = {"versions": programs, **as_json(rounds, small, large), "joining_milliseconds_per_node": joining}
    print(json.dumps(found) if arguments.json else shown, flush=True)
    return 0 if all(mark.met for mark in marks_of(rounds, small, large)) else 1


if __name__ == "__main__":
    sys.exit(main())
