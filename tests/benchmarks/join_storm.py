"""`python -m tests.benchmarks.join_storm --nodes 1000`: a coordinator dies with many nodes linked. When are all of them back?

Decides what is killed (the gateway's process, then the whole coordinator, both with SIGKILL), and the marks: every node is linked again
within 15 s of the moment from which something listens, and no second of the log has more lines than its bound. Coordinator and links are
real (`potluck coordinator serve`, `tests.support.simulated_agents`); all of it runs on this machine, the agents' half of each handshake
included. A gateway comes back by itself, so its time counts from the kill; a coordinator is started again by this program, and its time
counts from when it serves.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

import structlog

import potluck.command  # noqa: F401 - the loop of gRPC's that it names is that of all processes here
from potluck_coordinator.directory.certificate_authority import CertificateAuthority
from potluck_protocol.clock import SystemClock
from tests.benchmarks.processes import CpuReading
from tests.benchmarks.versions import versions
from tests.support.coordinator_process import CoordinatorProcess
from tests.support.node_fleet import Fleet, enrol_nodes
from tests.support.simulated_agents import Nodes

BACK_SECONDS_MAX: Final = 15.0
LINES_PER_SECOND_MAX: Final = 60
"""Of the log, in any second of a storm, whatever the number of nodes."""
GIVE_UP_SECONDS: Final = 90.0
QUIET_SECONDS: Final = 3.0
"""After a storm, for what is still to be told."""
COUNTED_FROM: Final = {"gateway": "the kill", "coordinator": "the next one served"}
"""By victim, what `half_back_seconds` and `all_back_seconds` count from."""
VICTIMS: Final = tuple(COUNTED_FROM)


@dataclass(frozen=True, slots=True)
class Storm:
    """One kill, and how it went."""

    victim: str
    node_count: int
    listening_after_seconds: float
    """From the kill until the first node was welcomed again, whoever was killed."""
    half_back_seconds: float
    """From a gateway's kill, or from when the next coordinator serves."""
    all_back_seconds: float
    """As that, of all nodes; what the mark is on."""
    dials: int
    """Of all agents together, until everybody was back."""
    failed_dials: dict[str, int]
    """Why, in the agents' words, the commonest first."""
    dials_each_second: tuple[int, ...]
    welcomes_each_second: tuple[int, ...]
    cpu_seconds: dict[str, float]
    """Since the kill, of the gateway and the directory that are there now, and of the agents."""
    log_lines: int
    log_lines_in_the_worst_second: int
    log_events: dict[str, int]

    @property
    def met(self) -> bool:
        return self.all_back_seconds <= BACK_SECONDS_MAX and self.log_lines_in_the_worst_second <= LINES_PER_SECOND_MAX


def each_second(moments: list[float]) -> tuple[int, ...]:
    counts = Counter(int(moment) for moment in moments)
    return tuple(counts[second] for second in range(max(counts, default=-1) + 1))


def log_since(log: str, at: datetime) -> tuple[int, int, dict[str, int]]:
    """Lines, those of the worst second, and how many of which event."""
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    later = [line for line in lines if datetime.fromisoformat(line["timestamp"]) >= at]
    by_second = Counter(line["timestamp"][:19] for line in later)
    return len(later), max(by_second.values(), default=0), dict(Counter(line["event"] for line in later).most_common())


class Pool:
    """A coordinator and its nodes."""

    def __init__(self, folder: Path, stack: ExitStack, node_count: int, say: Callable[[str], None]) -> None:
        self._folder, self._stack, self._node_count, self._say = folder, stack, node_count, say
        say(f"enrolling {node_count} nodes")
        keys = asyncio.run(enrol_nodes(folder / "coordinator", node_count))
        ca = CertificateAuthority.load_or_create(folder / "coordinator" / "ca", SystemClock().unix_ms()).ca_certificate_pem
        self.coordinator = stack.enter_context(CoordinatorProcess(folder / "coordinator"))
        self.ports = self.coordinator.wait_ready()
        nodes = Nodes(f"127.0.0.1:{self.ports['link']}", ca, keys)
        self.fleet = stack.enter_context(Fleet(folder / "agents", nodes, 2))
        say("linking them")
        self.fleet.link(node_count, per_second=200)
        time.sleep(QUIET_SECONDS)

    def processes(self) -> dict[str, tuple[int, ...]]:
        found = {name: (self.coordinator.actor(actor).pid,) for name, actor in (("gateway", "Gateway"), ("directory", "Directory"))}
        return {**found, "agents": self.fleet.process_ids}

    def storm(self, victim: str) -> Storm:
        self._say(f"killing the {victim}")
        before = self.processes()
        cpu_before, killed_at = CpuReading.take([pid for pids in before.values() for pid in pids]), time.monotonic()
        wall_at = datetime.now(tz=datetime.now().astimezone().tzinfo)
        counted_from = killed_at
        if victim == "gateway":
            os.kill(before["gateway"][0], signal.SIGKILL)
        else:
            for process in self.coordinator.processes():
                try:
                    os.kill(process.pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            self.coordinator.process.wait(10)
            ports = (self.ports["http"], self.ports["grpc"], self.ports["link"])
            self.coordinator = self._stack.enter_context(CoordinatorProcess(self._folder / "coordinator", ports=ports))
            self.coordinator.wait_ready()
            counted_from = time.monotonic()
        welcomed: list[float] = []
        while len(welcomed) < self._node_count and time.monotonic() - counted_from < GIVE_UP_SECONDS:
            time.sleep(0.25)
            welcomed, _, _ = self.fleet.since(killed_at)
        back_at = time.monotonic()
        if len(welcomed) < self._node_count:
            raise RuntimeError(f"{len(welcomed)} of {self._node_count} nodes came back within {GIVE_UP_SECONDS:.0f} s")
        welcomed, dialled, failures = self.fleet.since(killed_at)
        after = self.processes()
        cpu_after = CpuReading.take([pid for pids in after.values() for pid in pids])
        cpu = {name: sum(cpu_after.by_process[pid] - cpu_before.by_process.get(pid, 0.0) for pid in pids) for name, pids in after.items()}
        time.sleep(QUIET_SECONDS)
        self.fleet.wait(self._node_count, 5.0)
        lines, worst, events = log_since(self.coordinator.log(), wall_at)
        offset = counted_from - killed_at
        return Storm(
            victim=victim,
            node_count=self._node_count,
            listening_after_seconds=round(welcomed[0], 2),
            half_back_seconds=round(max(0.0, welcomed[len(welcomed) // 2] - offset), 2),
            all_back_seconds=round(max(0.0, welcomed[-1] - offset), 2),
            dials=sum(moment <= back_at - killed_at for moment in dialled),
            failed_dials=failures,
            dials_each_second=each_second(dialled),
            welcomes_each_second=each_second(welcomed),
            cpu_seconds={name: round(seconds, 2) for name, seconds in cpu.items()},
            log_lines=lines,
            log_lines_in_the_worst_second=worst,
            log_events=events,
        )


def show(storm: Storm) -> str:
    return (
        f"{storm.victim} killed, {storm.node_count} nodes: the first back {storm.listening_after_seconds} s after the kill; half of them "
        f"{storm.half_back_seconds} s and all {storm.all_back_seconds} s after {COUNTED_FROM[storm.victim]} "
        f"(mark: {BACK_SECONDS_MAX:.0f} s)\n"
        f"  {storm.dials} dials, by second {storm.dials_each_second}; welcomes {storm.welcomes_each_second}\n"
        f"  failed dials {storm.failed_dials}\n"
        f"  CPU seconds {storm.cpu_seconds}\n"
        f"  log: {storm.log_lines} lines, {storm.log_lines_in_the_worst_second} in the worst second (mark: {LINES_PER_SECOND_MAX}); "
        f"{storm.log_events}\n  {'met' if storm.met else 'NOT MET'}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--victims", nargs="+", choices=VICTIMS, default=list(VICTIMS))
    parser.add_argument("--json", action="store_true", help="one object for each storm on standard output, nothing else")
    arguments = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    storms, programs = [], versions(())
    with tempfile.TemporaryDirectory(prefix="potluck-storm-") as folder, ExitStack() as stack:
        pool = Pool(Path(folder), stack, arguments.nodes, say)
        for victim in arguments.victims:
            storm = pool.storm(victim)
            storms.append(storm)
            print(json.dumps({**asdict(storm), "met": storm.met, "versions": programs}) if arguments.json else show(storm), flush=True)
    return 0 if all(storm.met for storm in storms) else 1


if __name__ == "__main__":
    sys.exit(main())
