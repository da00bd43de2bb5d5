"""Potluck's relay beside its peers, in front of the same engine, in one run: what it costs, and what clients see when an engine is lost.

Decides what is run and in which order, and the exit status: 0 unless a mark is missed, a token lost or the harness itself fails. A peer
that cannot be run costs only its own row. Nothing that it starts outlives it or listens beyond loopback.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shlex
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.benchmarks.arithmetic import orders
from tests.benchmarks.contenders import Contender, PeerUnavailableError, start_engine, wait_until_answers
from tests.benchmarks.load import Load, LoadFailedError, LoadResult
from tests.benchmarks.load_client import LoadClient
from tests.benchmarks.loss_traces import LossRow
from tests.benchmarks.loss_trials import peer_losses, pool_losses
from tests.benchmarks.marks import ENGINE, FLOOR, OURS, Rounds
from tests.benchmarks.outcome import Outcome, Standing, document, outcome_of
from tests.benchmarks.peer_contenders import STARTS, install
from tests.benchmarks.plot import draw
from tests.benchmarks.pool import Pool, start_pool
from tests.benchmarks.processes import CpuReading, resident_bytes
from tests.benchmarks.report import table
from tests.benchmarks.turns import OF_THE_ENGINE, WORKLOADS, Turn, take_turn, warm_up_of
from tests.benchmarks.versions import versions

NEAR_PEERS: Final = ("HAProxy", "aiohttp relay", FLOOR, "sglang-router")
"""Those that start fast and say most."""
HEAVY_PEERS: Final = ("LiteLLM", "Ray Serve, HAProxy", "Ray Serve")
"""Their trials of losses are run alone: 16 streams are work for them."""
IDLE_SECONDS: Final = 3.0
STUMBLES_MAX: Final = 3
"""Turns that may break off and be run again; with one more a peer is out, and of Potluck's the run has failed."""


@dataclass(frozen=True, slots=True)
class Cores:
    """Which processors the relays have, and which client, engine and agent; both empty where there are too few to part them."""

    relay: frozenset[int]
    home: frozenset[int]

    @classmethod
    def split(cls) -> Cores:
        cores = sorted(os.sched_getaffinity(0))
        return cls(frozenset(cores[-1:]), frozenset(cores[:-1])) if len(cores) > 1 else cls(frozenset(), frozenset())


def say(text: str) -> None:
    """A line of progress, with the time since the start."""
    print(f"{time.monotonic() - _BEGAN_AT:6.1f} s  {text}", file=sys.stderr, flush=True)


_BEGAN_AT: Final = time.monotonic()


class Benchmark:
    """The rounds: who takes part, what was measured so far, and who dropped out."""

    def __init__(self, client: LoadClient, workloads: Mapping[str, Load], wait: Callable[[Contender], None] = wait_until_answers) -> None:
        self._client = client
        self._wait = wait
        self._workloads = workloads
        self.contenders: dict[str, Contender] = {}
        self.turns: dict[str, list[Turn]] = {}
        self.absent: dict[str, str] = {}
        self.stumbles: Counter[str] = Counter()

    def add(self, name: str, start: Callable[[], Contender]) -> None:
        """Starts a contender; a peer that does not start is noted as absent."""
        say(f"starting {name}")
        try:
            self.contenders[name] = start()
        except PeerUnavailableError as error:
            self.absent[name] = str(error)
            say(f"{name}: {error}")
        else:
            self.turns[name] = []

    def prepare(self, name: str) -> bool:
        """Whether all is there that a peer needs; installs it on the first run, and else notes it as absent."""
        try:
            install(name)
        except PeerUnavailableError as error:
            self.absent[name] = str(error)
            say(f"{name}: {error}")
        return name not in self.absent

    def _workloads_of(self, name: str) -> Mapping[str, Load]:
        return {key: load for key, load in self._workloads.items() if name != ENGINE or key in OF_THE_ENGINE}

    def warm_up(self) -> None:
        for name in list(self.contenders):
            say(f"warming up {name}")
            shorter = {key: warm_up_of(load) for key, load in self._workloads_of(name).items()}
            self._guarded(name, lambda contender, shorter=shorter: take_turn(self._runner(contender), shorter))

    def run_rounds(self, count: int, seed: int) -> None:
        for index, order in enumerate(orders(list(self.contenders), count, seed)):
            for name in order:
                say(f"round {index + 1} of {count}: {name}")
                loads = self._workloads_of(name)
                self._guarded(
                    name, lambda contender, loads=loads: self.turns[contender.name].append(take_turn(self._runner(contender), loads))
                )

    def _runner(self, contender: Contender) -> Callable[[Load], LoadResult]:
        return lambda load: self._client.run(load, contender.target())

    def _guarded(self, name: str, work: Callable[[Contender], object]) -> None:
        """Who answers wrongly has the turn again, or is out, with the reason in its row; the engine may not, and Potluck misses a mark."""
        while name in self.contenders:
            try:
                work(self.contenders[name])
            except LoadFailedError as error:
                if name == ENGINE:
                    raise
                self.stumbles[name] += 1
                say(f"{name}: failed under load: {error}")
                if self.stumbles[name] > STUMBLES_MAX:
                    if name == OURS:
                        raise
                    self.absent[name] = f"failed under load: {error}"
                    self.contenders.pop(name).stop()
                    del self.turns[name]
                    return
                self._wait(self.contenders[name])
            else:
                return

    def standings(self) -> dict[str, Standing]:
        """Memory after the load, and what each costs while nobody asks anything."""
        say("idle")
        groups = {name: contender.process_ids() for name, contender in self.contenders.items()}
        watched = [process_id for by_group in groups.values() for ids in by_group.values() for process_id in ids]
        before = CpuReading.take(watched)
        time.sleep(IDLE_SECONDS)
        after = CpuReading.take(watched)
        return {
            name: Standing(
                resident_bytes={group: sum(map(resident_bytes, ids)) for group, ids in by_group.items()},
                idle_cpu_ms_per_second={group: after.spent_since(before, ids) / IDLE_SECONDS * 1e3 for group, ids in by_group.items()},
            )
            for name, by_group in groups.items()
        }

    def stop(self) -> None:
        for contender in reversed(self.contenders.values()):
            contender.stop()


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run does."""

    peers: Sequence[str]
    round_count: int
    seed: int
    with_losses: bool
    command: str
    workloads: Mapping[str, Load]


def run_benchmark(plan: Plan, folder: Path) -> Outcome:
    """The whole of it; raises LoadFailedError or RuntimeError where Potluck, the engine or the harness fails."""
    began_at, cores = time.monotonic(), Cores.split()
    with contextlib.ExitStack() as stack:
        client = LoadClient(folder / "client.log", cores.home)
        stack.callback(client.stop)
        benchmark = Benchmark(client, plan.workloads)
        stack.callback(benchmark.stop)
        pools: list[Pool] = []

        def start_ours() -> Contender:
            pools.append(start_pool(folder, cores.relay, cores.home))
            return pools[0].contender

        peers = [name for name in plan.peers if benchmark.prepare(name)]
        if plan.round_count:
            benchmark.add(ENGINE, lambda: start_engine(folder, cores.home))
            engine_url = benchmark.contenders[ENGINE].url
            for name in peers:
                benchmark.add(name, lambda name=name: STARTS[name](folder, [engine_url], cores.relay))
        benchmark.add(OURS, start_ours)
        standings: dict[str, Standing] = {}
        if plan.round_count:
            benchmark.warm_up()
            benchmark.run_rounds(plan.round_count, plan.seed)
            standings = benchmark.standings()
        rounds = Rounds(
            {name: turns for name, turns in benchmark.turns.items() if turns},
            {name: contender.relay_groups for name, contender in benchmark.contenders.items() if benchmark.turns[name]},
        )
        losses: list[LossRow] = []
        if plan.with_losses:
            for name in (ENGINE, *peers):
                if name in benchmark.contenders:
                    benchmark.contenders.pop(name).stop()
            losses = _losses([name for name in peers if name not in {FLOOR, *benchmark.absent}], pools[0], folder, cores)
        return Outcome(
            rounds=rounds,
            standings=standings,
            losses=losses,
            absent=benchmark.absent,
            stumbles=benchmark.stumbles,
            versions=versions([*plan.peers, OURS]),
            command=plan.command,
            seed=plan.seed,
            pinned=bool(cores.relay),
            seconds=time.monotonic() - began_at,
        )


def _losses(peers: Sequence[str], pool: Pool, folder: Path, cores: Cores) -> list[LossRow]:
    say("another node joins Potluck")
    pool.add_node()
    rows = pool_losses(pool, say)
    light = [name for name in peers if name not in HEAVY_PEERS]
    for names in filter(None, [light, *([name] for name in peers if name in HEAVY_PEERS)]):
        found, absent = peer_losses(names, folder, cores.relay, cores.home, say)
        rows += found
        for name, reason in absent.items():
            say(f"{name}: {reason}")
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    if options.show is not None:
        return _show(options.show, options.plot)
    for number in (signal.SIGINT, signal.SIGTERM):
        # A polite end is an ordinary one: everything is stopped on the way out.
        signal.signal(number, lambda received, _frame: sys.exit(128 + received))
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    peers = tuple(name for name in STARTS if options.all or name in options.peers)
    command = shlex.join(["python", "-m", "tests.benchmarks.relay", *(sys.argv[1:] if arguments is None else arguments)])
    plan = Plan(peers, options.rounds, seed, not options.no_losses, command, WORKLOADS)
    try:
        with tempfile.TemporaryDirectory(prefix="potluck-bench-") as folder:
            outcome = run_benchmark(plan, Path(folder))
    except (LoadFailedError, RuntimeError) as error:
        say(f"the benchmark failed: {error}")
        return 1
    print(table(outcome))
    if options.json is not None:
        options.json.write_text(json.dumps(document(outcome), indent=1) + "\n")
    if options.plot is not None:
        draw(outcome, options.plot)
    return 1 if any(verdict.met is False for verdict in outcome.verdicts) else 0


def _show(kept: Path, plot: Path | None) -> int:
    """What an earlier run found."""
    outcome = outcome_of(json.loads(kept.read_text()))
    print(table(outcome))
    if plot is not None:
        draw(outcome, plot)
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.relay", description=__doc__)
    peers = parser.add_mutually_exclusive_group()
    peers.add_argument("--peers", nargs="*", choices=tuple(STARTS), default=NEAR_PEERS, metavar="PEER", help=_PEERS_HELP)
    peers.add_argument("--all", action="store_true", help="every peer; about six minutes, and more where they are installed first")
    parser.add_argument("--rounds", type=int, default=2, help="how often each is measured, 6 s each time (default: 2; 0: losses only)")
    parser.add_argument("--seed", type=int, help="of the order within the rounds (default: drawn, and printed)")
    parser.add_argument("--no-losses", action="store_true", help="kill and freeze nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every round's figures, the versions and the seed there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw the figures there, a .png")
    parser.add_argument("--show", type=Path, metavar="FILE", help="measure nothing: print the table of an earlier run's --json")
    options = parser.parse_args(arguments)
    if options.rounds < 0:
        parser.error("--rounds must be 0 at least")
    return options


_PEERS_HELP: Final = f"those beside Potluck, of: {', '.join(STARTS)} (default: {', '.join(NEAR_PEERS)})"


if __name__ == "__main__":
    sys.exit(main())
