"""`python -m tests.benchmarks.relay`: Potluck's relay beside LiteLLM and sglang-router, in front of the same engine, in one run.

Decides what is run, in which order and for how long, and the exit status: 0 unless a mark is missed, a token lost or the harness itself
fails. A peer that cannot be run costs only its own row. Nothing that it starts outlives it or listens beyond loopback.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Final

from tests.benchmarks.arithmetic import Figures, micros_per_unit, order_of_round, weighted_mean
from tests.benchmarks.contenders import Contender, PeerUnavailableError, start_direct, start_litellm, start_sglang_router
from tests.benchmarks.load import Load, LoadFailedError, LoadResult
from tests.benchmarks.load_client import LoadClient
from tests.benchmarks.pool import start_potluck
from tests.benchmarks.processes import CpuReading, resident_bytes
from tests.benchmarks.report import Outcome, Standing, document, marks, table

CROWD: Final = Load(streamed=True, connection_count=64, requests_per_connection=1, token_count=200, stagger_ms=200)
ALONE: Final = Load(streamed=True, connection_count=1, requests_per_connection=1, token_count=200)
FIRST_TOKENS: Final = Load(streamed=True, connection_count=1, requests_per_connection=30, token_count=2)
WHOLE: Final = Load(streamed=False, connection_count=8, requests_per_connection=75, token_count=1)
WARM_UP: Final = (
    replace(CROWD, token_count=50),
    replace(WHOLE, requests_per_connection=20),
    replace(FIRST_TOKENS, requests_per_connection=5),
)
SETTLE_SECONDS: Final = 0.3
"""Between two runs, so that the end of one is not counted with the next."""
IDLE_SECONDS: Final = 5.0
ROUNDS_SECONDS_MAX: Final = 330.0
"""No further round begins after so long."""
STUMBLES_MAX: Final = 3
"""Turns of a peer that may break off and be run again; with one more it is out."""


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _split_cores() -> tuple[frozenset[int], frozenset[int]]:
    """The relay's core, and those of client, engine and agent; both empty where there are too few to part them."""
    cores = sorted(os.sched_getaffinity(0))
    return (frozenset(cores[-1:]), frozenset(cores[:-1])) if len(cores) > 1 else (frozenset(), frozenset())


def measure(client: LoadClient, contender: Contender) -> Figures:
    """One contender's turn in a round; raises LoadFailedError."""

    def run(load: Load) -> LoadResult:
        time.sleep(SETTLE_SECONDS)
        return client.run(load, contender.target())

    first_tokens, alone, crowd, whole = run(FIRST_TOKENS), run(ALONE), run(CROWD), run(WHOLE)
    return Figures(
        cpu_per_token=micros_per_unit(crowd.cpu_seconds, crowd.window_token_count),
        cpu_per_token_alone=micros_per_unit(alone.cpu_seconds, alone.window_token_count),
        cpu_per_request=micros_per_unit(whole.cpu_seconds, whole.window_request_count),
        first_token_ms=median(first_tokens.first_token_ms),
        first_token_crowded_ms=median(crowd.first_token_ms),
        request_ms=median(whole.request_ms),
        requests_per_second=whole.window_request_count / whole.window_seconds,
        tokens_per_second=crowd.window_token_count / crowd.window_seconds,
        foreign_cpu_share=weighted_mean([(result.foreign_cpu_share, result.window_seconds) for result in (alone, crowd, whole)]),
    )


class Benchmark:
    """One run: what takes part, what was measured so far, and who dropped out."""

    def __init__(self, client: LoadClient) -> None:
        self._client = client
        self.contenders: dict[str, Contender] = {}
        self.rounds: dict[str, list[Figures]] = {}
        self.absent: dict[str, str] = {}
        self.stumbles: Counter[str] = Counter()

    def add(self, name: str, start: Callable[[], Contender]) -> None:
        """Starts a contender; a peer that does not start is noted as absent."""
        _say(f"starting {name}")
        try:
            contender = start()
        except PeerUnavailableError as error:
            self.absent[name] = str(error)
            _say(f"{name}: {error}")
        else:
            self.contenders[name] = contender
            self.rounds[name] = []

    def warm_up(self) -> None:
        for name in list(self.contenders):
            _say(f"warming up {name}")
            self._guarded(name, lambda contender: [self._client.run(load, contender.target()) for load in WARM_UP])

    def run_rounds(self, count: int) -> None:
        began_at = time.monotonic()
        for index in range(count):
            if time.monotonic() - began_at > ROUNDS_SECONDS_MAX:
                _say(f"stopping after {index} rounds: the time is up")
                return
            for name in order_of_round(list(self.contenders), index):
                _say(f"round {index + 1} of {count}: {name}")
                self._guarded(name, lambda contender: self.rounds[contender.name].append(measure(self._client, contender)))

    def _guarded(self, name: str, work: Callable[[Contender], object]) -> None:
        """A peer that answers wrongly has its turn again, or is out, with the reason in its row; Potluck or the engine may not."""
        while name in self.contenders:
            try:
                work(self.contenders[name])
            except LoadFailedError as error:
                if name in {"direct", "Potluck"}:
                    raise
                self.stumbles[name] += 1
                _say(f"{name}: failed under load: {error}")
                if self.stumbles[name] > STUMBLES_MAX:
                    self.absent[name] = f"failed under load: {error}"
                    self.contenders.pop(name).stop()
                    del self.rounds[name]
            else:
                return

    def standings(self) -> dict[str, Standing]:
        """Memory after the load, and what each costs while nobody asks anything."""
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


@contextlib.contextmanager
def _benchmark(client: LoadClient) -> Iterator[Benchmark]:
    benchmark = Benchmark(client)
    try:
        yield benchmark
    finally:
        benchmark.stop()


def run_benchmark(round_count: int, folder: Path) -> Outcome:
    """The whole of it; raises LoadFailedError or RuntimeError where Potluck, the engine or the harness fails."""
    began_at = time.monotonic()
    relay_cores, home_cores = _split_cores()
    with contextlib.ExitStack() as stack:
        client = LoadClient(folder / "client.log", home_cores)
        stack.callback(client.stop)
        benchmark = stack.enter_context(_benchmark(client))
        benchmark.add("direct", lambda: start_direct(folder, home_cores))
        engine_url = benchmark.contenders["direct"].url
        benchmark.add("Potluck", lambda: start_potluck(folder, relay_cores, home_cores))
        benchmark.add("LiteLLM", lambda: start_litellm(folder, [engine_url], relay_cores))
        benchmark.add("sglang-router", lambda: start_sglang_router(folder, [engine_url], relay_cores))
        benchmark.warm_up()
        benchmark.run_rounds(round_count)
        return Outcome(
            rounds=benchmark.rounds,
            relay_groups={name: contender.relay_groups for name, contender in benchmark.contenders.items()},
            standings=benchmark.standings(),
            absent=benchmark.absent,
            stumbles=benchmark.stumbles,
            pinned=bool(relay_cores),
            seconds=time.monotonic() - began_at,
        )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.relay", description=__doc__)
    parser.add_argument("--rounds", type=int, default=6, help="interleaved rounds, each about 40 s (default: 6)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every round's figures there")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    for number in (signal.SIGINT, signal.SIGTERM):
        # A polite end is an ordinary one: everything is stopped on the way out.
        signal.signal(number, lambda received, _frame: sys.exit(128 + received))
    try:
        with tempfile.TemporaryDirectory(prefix="potluck-bench-") as folder:
            outcome = run_benchmark(options.rounds, Path(folder))
    except (LoadFailedError, RuntimeError) as error:
        _say(f"the benchmark failed: {error}")
        return 1
    print(table(outcome))
    if options.json is not None:
        options.json.write_text(json.dumps(document(outcome), indent=1) + "\n")
    return 1 if any(mark.met is False for mark in marks(outcome)) else 0


if __name__ == "__main__":
    sys.exit(main())
