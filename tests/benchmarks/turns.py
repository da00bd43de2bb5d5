"""What one contender is asked in one round, and the figures of it.

Decides the workloads: how many connections, how many tokens, at which pace and for how long. It must not know who is asked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import Final

from tests.benchmarks.arithmetic import micros_per_unit, percentile
from tests.benchmarks.load import Load, LoadFailedError, LoadResult

PACE_MS: Final = 20
_MANY: Final = 5000
"""Requests of one connection, where time is the bound."""

WORKLOADS: Final[Mapping[str, Load]] = {
    "request": Load(streamed=False, connection_count=1, token_count=1, requests_per_connection=_MANY, asking_seconds=0.4),
    "first token": Load(streamed=True, connection_count=1, token_count=2, requests_per_connection=_MANY, asking_seconds=0.4),
    "few": Load(streamed=True, connection_count=8, token_count=60, pace_ms=PACE_MS, stagger_ms=PACE_MS),
    "delay": Load(streamed=True, connection_count=16, token_count=50, pace_ms=PACE_MS, stagger_ms=PACE_MS),
    "paced": Load(streamed=True, connection_count=64, token_count=50, pace_ms=PACE_MS, stagger_ms=10 * PACE_MS),
    "flat out": Load(streamed=True, connection_count=16, token_count=600),
    "crowd": Load(streamed=False, connection_count=32, token_count=1, requests_per_connection=_MANY, asking_seconds=0.5),
    "long prompt": Load(
        streamed=False, connection_count=8, token_count=1, requests_per_connection=_MANY, prompt_bytes=220_000, asking_seconds=0.5
    ),
}
"""In the order in which they are run. A stream's tokens come one each 20 ms, flat out as fast as the engine can."""
OF_THE_ENGINE: Final = ("request", "first token", "delay")
"""What the engine is asked directly, to be taken off."""
SETTLE_SECONDS: Final = 0.1
"""Between two runs, so that the end of one is not counted with the next."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One contender in one round."""

    times: Mapping[str, float]
    """Medians and percentiles in milliseconds, and rates a second, by name."""
    cpu: Mapping[str, Mapping[str, float]]
    """Microseconds by workload and group of processes: per token where streams flow steadily, per request elsewhere."""
    foreign_cpu_share: float


def warm_up_of(load: Load) -> Load:
    """The same, shorter."""
    return replace(load, token_count=min(load.token_count, 20), asking_seconds=min(load.asking_seconds, 0.2))


def take_turn(run: Callable[[Load], LoadResult], workloads: Mapping[str, Load]) -> Turn:
    """Runs these workloads one after the other; raises LoadFailedError."""
    results: dict[str, LoadResult] = {}
    for name, load in workloads.items():
        time.sleep(SETTLE_SECONDS)
        try:
            results[name] = run(load)
        except LoadFailedError as error:
            raise LoadFailedError(f"{name}: {error}") from error
    cpu = {name: _cost(workloads[name], result) for name, result in results.items()}
    return Turn(_times(results), cpu, fmean(result.foreign_cpu_share for result in results.values()))


def _cost(load: Load, result: LoadResult) -> dict[str, float]:
    return micros_per_unit(result.cpu_seconds, result.window_token_count if load.steady else result.window_request_count)


def _times(results: Mapping[str, LoadResult]) -> dict[str, float]:
    found: dict[str, float] = {}
    if "request" in results:
        found["request_ms"] = median(results["request"].request_ms)
    if "first token" in results:
        found["first_token_ms"] = median(results["first token"].first_token_ms)
    if "delay" in results:
        found["delay_p50_ms"] = median(results["delay"].delay_ms)
        found["delay_p99_ms"] = percentile(results["delay"].delay_ms, 99)
    if "crowd" in results:
        found["requests_per_second"] = results["crowd"].window_request_count / results["crowd"].window_seconds
    if "flat out" in results:
        found["tokens_per_second"] = results["flat out"].window_token_count / results["flat out"].window_seconds
    return found
