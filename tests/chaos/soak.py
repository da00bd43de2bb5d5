"""A pool lives through some minutes of coming and going. What it holds must not grow.

    python -m tests.chaos.soak --minutes 5

Real nodes answer streams, of which some are read to the end and some are given up; one of the nodes is killed again and again, so that
requests fail over; other nodes (`tests.support.simulated_agents`) end and begin anew all the time, with a goodbye or without; keys are made
and revoked. Every second or two each process is asked what it holds: resident memory, descriptors, threads, and tasks of the gateway's loop
(`potluck_asyncio_tasks`). What remembers a fixed number of requests is filled first, and the first third of the time is left out; then
`tests.support.slopes` lays a line through the floors of the rest. A figure is flat if the line's 95 % interval is below its bound, and
grows if it is above. Prints a line for each figure and exits 1 if one is not flat, or nothing was done. One that is unclear takes more
minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import psutil
import structlog

from potluck_coordinator.directory.certificate_authority import CertificateAuthority
from potluck_coordinator.gateway.decisions import STORIES_MAX
from potluck_protocol.clock import SystemClock
from tests.benchmarks.versions import versions
from tests.support.coordinator_process import CoordinatorProcess
from tests.support.node_fleet import Fleet, enrol_nodes
from tests.support.pool_processes import NodeProcess, Pool, command, new_invite, write_catalogue
from tests.support.simulated_agents import Nodes
from tests.support.slopes import SPAN_COUNT, Slope, Verdict, slope

BOUNDS: Final[Mapping[str, float]] = {"resident_mib": 1.0, "descriptors": 1.0, "threads": 1.0, "tasks": 2.5}
"""Each minute, in which some 250 requests, 240 nodes, 10 keys and 7 deaths come and go: one of these for any of those would be over. What
runs just then moves the floor of the tasks by one or two, which five minutes cannot tell from a smaller growth."""
WARM_UP_SHARE: Final = 1 / 3
SAMPLE_SECONDS: Final = 1.5
SAMPLES_PER_SPAN: Final = 4
FILL_COUNT: Final = STORIES_MAX
FILLERS: Final = 8
SCRIPT: Final = {"tokens": [f" {number}" for number in range(50)], "token_count": 120, "inter_token_ms": 10}
NODE_COUNT: Final = 2
COMING_AND_GOING: Final = 20
CLIENTS: Final = 4


@dataclass(frozen=True, slots=True)
class Figure:
    """One thing that one process holds."""

    process: str
    what: str
    first: float
    last: float
    slope: Slope
    bound: float

    @property
    def verdict(self) -> Verdict:
        return self.slope.verdict(self.bound)

    def __str__(self) -> str:
        line = self.slope
        return (
            f"{self.verdict:<7} {self.process:<10} {self.what:<13} {self.first:8.1f} to {self.last:8.1f}, "
            f"{line.value:+.2f} a minute ({line.low:+.2f} to {line.high:+.2f}), bound {self.bound}"
        )


class Doings:
    """What goes on meanwhile, each in a thread of its own, and how often it did."""

    def __init__(self, pool: Pool, fleet: Fleet) -> None:
        self._pool, self._fleet = pool, fleet
        self._stop = threading.Event()
        self.counts: Counter[str] = Counter()
        doings: list[Callable[[random.Random], None]] = [self._client] * CLIENTS + [self._keys, self._deaths, self._churn]
        self._threads = [threading.Thread(target=self._repeat, args=(doing, number)) for number, doing in enumerate(doings)]

    def __enter__(self) -> Doings:  # noqa: PYI034
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def _repeat(self, doing: Callable[[random.Random], None], seed: int) -> None:
        draw = random.Random(seed)
        while not self._stop.is_set():
            try:
                doing(draw)
            except Exception as error:  # noqa: BLE001 - a request may fail in many ways here; what is asked is what stays behind
                self.counts[f"failed: {type(error).__name__}"] += 1
                self._stop.wait(0.2)

    def _client(self, draw: random.Random) -> None:
        stream = self._pool.stream()
        if draw.random() < 0.3:
            stream.read_tokens(draw.randint(1, 60))
            stream.response.close()
            self.counts["given up"] += 1
            return
        stream.read_to_end()
        self.counts["answered" if stream.done else "ended early"] += 1

    def _keys(self, _: random.Random) -> None:
        made = json.loads(command(self._pool, "keys", "create", "--json").stdout)
        command(self._pool, "keys", "revoke", made["key_prefix"])
        self.counts["keys"] += 1
        self._stop.wait(3.0)

    def _deaths(self, _: random.Random) -> None:
        """The first node stays, and is looked at."""
        self._stop.wait(8.0)
        if not self._stop.is_set():
            victim = self._pool.nodes[-1]
            for process in (victim.agent(), *victim.agent().children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            victim.start_again()
            self.counts["deaths"] += 1

    def _churn(self, _: random.Random) -> None:
        self._fleet.churn(2.0, per_second=4.0)
        self.counts["comings and goings"] += 8


def sample(pool: Pool) -> dict[tuple[str, str], float]:
    """What each process holds now."""
    found: dict[tuple[str, str], float] = {}
    watched = {
        "gateway": pool.coordinator.actor("GatewayActor"),
        "directory": pool.coordinator.actor("DirectoryActor"),
        "agent": pool.nodes[0].agent(),
    }
    for name, process in watched.items():
        found[name, "resident_mib"] = process.memory_info().rss / (1 << 20)
        found[name, "descriptors"] = process.num_fds()
        found[name, "threads"] = process.num_threads()
    _, page = pool.coordinator.get("/metrics", pool.api_key)
    shown = [line.split() for line in page.decode().splitlines() if line.startswith("potluck_asyncio_tasks ")]
    found["gateway", "tasks"] = float(shown[0][1])
    return found


def fill(pool: Pool) -> None:
    """As many short answers as a gateway remembers the stories of: until then each one makes it larger."""

    def ask(count: int) -> None:
        for _ in range(count):
            pool.stream(max_tokens=1).read_to_end()

    with ThreadPoolExecutor(FILLERS) as threads:
        for done in [threads.submit(ask, FILL_COUNT // FILLERS) for _ in range(FILLERS)]:
            done.result()


def figures_of(samples: list[tuple[float, dict[tuple[str, str], float]]], since: float) -> list[Figure]:
    """Of the samples after the warm-up; times in seconds."""
    kept = [(at, held) for at, held in samples if at >= since]
    times = [at / 60 for at, _ in kept]
    figures = []
    for key in kept[0][1]:
        values = [held[key] for _, held in kept]
        figures.append(Figure(*key, values[0], values[-1], slope(times, values), BOUNDS[key[1]]))
    return figures


@contextmanager
def soaked_pool(folder: Path) -> Iterator[tuple[Pool, Fleet]]:
    """A coordinator, its answering nodes, and those that come and go."""
    catalogue = write_catalogue(folder / "models", SCRIPT)
    keys = asyncio.run(enrol_nodes(folder / "coordinator", COMING_AND_GOING))
    ca = CertificateAuthority.load_or_create(folder / "coordinator" / "ca", SystemClock().unix_ms()).ca_certificate_pem
    with ExitStack() as stack:
        coordinator = stack.enter_context(CoordinatorProcess(folder / "coordinator", "--catalogue", str(catalogue)))
        ports = coordinator.wait_ready()
        pool = Pool(folder, coordinator, [])
        for number in range(NODE_COUNT):
            pool.nodes.append(stack.enter_context(NodeProcess(folder / f"node-{number}", new_invite(pool))))
        pool.wait_connected()
        fleet = stack.enter_context(Fleet(folder / "agents", Nodes(f"127.0.0.1:{ports['link']}", ca, keys), 1))
        fleet.link(COMING_AND_GOING, per_second=50)
        yield pool, fleet


def soak(pool: Pool, fleet: Fleet, seconds: float) -> tuple[list[Figure], Counter[str]]:
    """What each process holds over the time, and what went on."""
    samples: list[tuple[float, dict[tuple[str, str], float]]] = []
    pause_seconds = min(SAMPLE_SECONDS, seconds * (1 - WARM_UP_SHARE) / (SPAN_COUNT * SAMPLES_PER_SPAN) / 2)
    began_at = time.monotonic()
    with Doings(pool, fleet) as doings:
        while (at := time.monotonic() - began_at) < seconds:
            samples.append((at, sample(pool)))
            time.sleep(pause_seconds)
    return figures_of(samples, seconds * WARM_UP_SHARE), doings.counts


def at_rest(pool: Pool, seconds: float) -> dict[tuple[str, str], float]:
    """The least of what each process holds within the time, once nothing goes on any more."""
    lowest = sample(pool)
    give_up_at = time.monotonic() + seconds
    while time.monotonic() < give_up_at:
        time.sleep(0.5)
        lowest = {key: min(lowest[key], value) for key, value in sample(pool).items()}
    return lowest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--json", action="store_true", help="one object on standard output, nothing else")
    arguments = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    programs = versions(())
    with tempfile.TemporaryDirectory(prefix="potluck-soak-") as folder, soaked_pool(Path(folder)) as (pool, fleet):
        print(f"{FILL_COUNT} short answers first", file=sys.stderr, flush=True)
        fill(pool)
        print(f"{arguments.minutes:g} minutes of coming and going", file=sys.stderr, flush=True)
        figures, counts = soak(pool, fleet, arguments.minutes * 60)
    told = [{**asdict(figure), "verdict": figure.verdict} for figure in figures]
    shown: dict[str, Any] = {"versions": programs, "figures": told, "doings": dict(counts)}
    print(json.dumps(shown) if arguments.json else "\n".join([*map(str, figures), f"what went on: {dict(counts)}"]), flush=True)
    did_nothing = not all(counts[name] for name in ("answered", "given up", "keys", "deaths", "comings and goings"))
    return 1 if did_nothing or any(figure.verdict is not Verdict.FLAT for figure in figures) else 0


if __name__ == "__main__":
    sys.exit(main())
