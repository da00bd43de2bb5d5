"""`python -m tests.benchmarks.overload`: five times as much as the engines can do, before Potluck, LiteLLM and sglang-router.

Each contender gets engines of its own, alike: they batch, their cache is finite, and they die of what is too much. First its peak of good
answers a second is looked for at growing rates, then come the burst and the drain. The burst is the same trace for all, five times the
first contender's peak. Decides what is run, in which order and for how long, and the exit status: 0 unless Potluck breaks a bound or the
harness fails. A peer that cannot be run costs its own row. Nothing that it starts outlives it or listens beyond loopback.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tests.benchmarks.contenders import Contender, PeerUnavailableError
from tests.benchmarks.open_client import OpenClient
from tests.benchmarks.open_load import OpenLoad, OpenTarget
from tests.benchmarks.overload_contenders import NAMES, DeathWatch, fleet_requests_per_second, start
from tests.benchmarks.overload_figures import OVERLOAD_FACTOR, Figures, Outcome, Spell, document, exit_status, figures_of, peak_of, table

MODERATE_SHARES: Final = (0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8)
"""Of what the engines can do by a rough sum; those behind the peak are left out."""
PAST_PEAK_SHARE: Final = 0.85
"""With so much less good than before, the peak is passed."""
SECONDS: Final = 60.0
SECONDS_MIN: Final = 8.0
MODERATE_SECONDS_MIN: Final = 15.0
"""Fewer arrivals say little of a rate."""
DRAIN_SECONDS_MAX: Final = 60.0
_SEED: Final = 20_300


def moderate_loads(seconds: float) -> tuple[OpenLoad, ...]:
    """Each moderate rate for half as long as the burst, or a little more."""
    base, each_seconds = fleet_requests_per_second(), max(seconds / 2, MODERATE_SECONDS_MIN)
    return tuple(OpenLoad(_SEED + index, base * share, each_seconds, DRAIN_SECONDS_MAX) for index, share in enumerate(MODERATE_SHARES))


def burst_load(peak: float, seconds: float) -> OpenLoad:
    """Five times as much as that; raises RuntimeError where there was no good answer even at a moderate rate."""
    if peak <= 0:
        raise RuntimeError("no answer was good at a moderate rate: the machine may be too busy to measure anything")
    return OpenLoad(_SEED, peak * OVERLOAD_FACTOR, seconds, DRAIN_SECONDS_MAX)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _spell(client: OpenClient, watch: DeathWatch, target: OpenTarget, load: OpenLoad) -> Figures:
    with watch.watching():
        result = client.run(load, target)
    figures = figures_of(Spell(load.requests_per_second, load.seconds, result.asked, result.busy_share, watch.count))
    _say(
        f"  {load.requests_per_second:.1f} requests/s: {figures.goodput:.2f} good a second, {figures.refused_count} refused, "
        f"{figures.broken_count} broken, {figures.engine_death_count} engine deaths; machine {figures.busy_share:.0%} busy"
    )
    return figures


def measure(
    client: OpenClient, contender: Contender, target: OpenTarget, seconds: float, burst: OpenLoad | None
) -> tuple[Outcome, OpenLoad]:
    """A contender's whole turn, and the burst that it had; without one it gets five times its own peak."""
    watch = DeathWatch(contender)
    moderate: list[Figures] = []
    for load in moderate_loads(seconds):
        moderate.append(_spell(client, watch, target, load))
        if moderate[-1].goodput < PAST_PEAK_SHARE * peak_of(moderate):
            break
    burst = burst or burst_load(peak_of(moderate), seconds)
    return Outcome(tuple(moderate), _spell(client, watch, target, burst)), burst


def run_benchmark(names: Sequence[str], seconds: float, folder: Path) -> tuple[dict[str, Outcome], dict[str, str]]:
    """Every contender's outcome, and why others have none; raises RuntimeError where Potluck or the harness fails."""
    outcomes: dict[str, Outcome] = {}
    absent: dict[str, str] = {}
    burst: OpenLoad | None = None
    client = OpenClient(folder / "client.log")
    try:
        for name in names:
            _say(f"{name}: starting")
            try:
                contender, target = start(name, folder / name)
            except PeerUnavailableError as error:
                absent[name] = str(error)
                _say(f"{name}: {error}")
                continue
            try:
                outcomes[name], burst = measure(client, contender, target, seconds, burst)
            finally:
                contender.stop()
    finally:
        client.stop()
    return outcomes, absent


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.overload", description=__doc__)
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"how long the burst lasts (default: {SECONDS:.0f}; a sample: 10)")
    parser.add_argument("--contenders", nargs="+", choices=NAMES, default=list(NAMES), help="who takes part (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure there")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="work in this new folder and leave what processes printed there")
    options = parser.parse_args()
    if options.seconds < SECONDS_MIN:
        parser.error(f"--seconds must be at least {SECONDS_MIN:.0f}")
    for number in (signal.SIGINT, signal.SIGTERM):
        # A polite end is an ordinary one: everything is stopped on the way out.
        signal.signal(number, lambda received, _frame: sys.exit(128 + received))
    try:
        with tempfile.TemporaryDirectory(prefix="potluck-overload-") as temporary:
            folder = Path(temporary)
            if options.keep is not None:
                options.keep.mkdir(parents=True)
                folder = options.keep
            outcomes, absent = run_benchmark(options.contenders, options.seconds, folder)
    except RuntimeError as error:
        _say(f"the benchmark failed: {error}")
        return 1
    print(table(outcomes, absent))
    if options.json is not None:
        options.json.write_text(json.dumps(document(outcomes, absent), indent=1) + "\n")
    return exit_status(outcomes)


if __name__ == "__main__":
    sys.exit(main())
