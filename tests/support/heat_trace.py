"""A card's recorded heat, played back through a driver's library in the place of `pynvml`.

A trace is a JSON file of `tests/fixtures/heat`: phases of points, each with where it comes from. The card follows it whatever is done about
it, as a recording does; caps that are set stand, and are written down.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.support.nvml_dump import DumpedDriver, load_dump

FIXTURES = Path(__file__).parents[1] / "fixtures/heat"
DUMP = "healthy_3090"
CARD = "GPU-00000000-0000-4000-8000-000000000000"


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of a trace, in seconds from its beginning."""

    name: str
    begins_at: float
    ends_at: float
    points: tuple[tuple[float, float, float], ...]
    """Seconds from the trace's beginning, °C, watts."""
    reasons: int
    """Bits of nvmlClocksEventReasons."""

    def at(self, seconds: float) -> tuple[float, float]:
        """°C and watts."""
        for (since, celsius, watts), (until, next_celsius, next_watts) in zip(self.points, self.points[1:], strict=False):
            if seconds <= until:
                share = max(0.0, seconds - since) / (until - since)
                return celsius + (next_celsius - celsius) * share, watts + (next_watts - watts) * share
        return self.points[-1][1:]


@dataclass(frozen=True, slots=True)
class Trace:
    """All phases, one after the other."""

    throttle_point_celsius: int
    phases: tuple[Phase, ...]

    def phase(self, name: str) -> Phase:
        return next(phase for phase in self.phases if phase.name == name)

    def phase_at(self, seconds: float) -> Phase:
        return next((phase for phase in self.phases if seconds < phase.ends_at), self.phases[-1])

    def celsius_at(self, seconds: float) -> int:
        return round(self.phase_at(seconds).at(seconds)[0])

    def throttles_at(self) -> float:
        """When the card first is at its throttle point."""
        return next(second for second in range(round(self.phases[-1].ends_at)) if self.celsius_at(second) >= self.throttle_point_celsius)


def load_trace(name: str) -> Trace:
    data: dict[str, Any] = json.loads((FIXTURES / f"{name}.json").read_text())
    phases, begins_at = [], 0.0
    for phase in data["phases"]:
        points = tuple((begins_at + seconds, celsius, watts) for seconds, celsius, watts in phase["points"])
        phases.append(Phase(phase["name"], begins_at, points[-1][0], points, phase.get("reasons", 0)))
        begins_at = points[-1][0]
    return Trace(data["throttle_point_celsius"], tuple(phases))


class ReplayedDriver(DumpedDriver):
    """A 3090 that follows a trace, faster than it was recorded.

    Args:
        trace: what it follows; None: it stays as the dump has it.
        seconds: of the trace, as of now; 0 until it begins.
        cap_was_set: called with every cap, in milliwatts.
    """

    def __init__(self, trace: Trace | None, seconds: Callable[[], float], cap_was_set: Callable[[int], None]) -> None:
        super().__init__(load_dump(DUMP))
        self.trace = trace
        self.seconds = seconds
        self.cap_was_set = cap_was_set

    def _answer(self, name: str, arguments: tuple[Any, ...]) -> Any:
        if self.trace is not None:
            seconds = self.seconds()
            phase = self.trace.phase_at(seconds)
            celsius, watts = phase.at(seconds)
            device = self.devices[0]
            device["nvmlDeviceGetTemperatureV"] = round(celsius)
            device["nvmlDeviceGetPowerUsage"] = min(round(watts * 1000), device["nvmlDeviceGetEnforcedPowerLimit"])
            device["nvmlDeviceGetCurrentClocksEventReasons"] = phase.reasons
        return super()._answer(name, arguments)

    def _nvmlDeviceSetPowerManagementLimit(self, handle: SimpleNamespace, limit: int) -> None:  # noqa: N802 - the library's own name
        super()._nvmlDeviceSetPowerManagementLimit(handle, limit)
        self.cap_was_set(limit)


class Pace:
    """How fast a trace is played: slowly around the throttle point, where it matters what comes first, fast where a card only waits."""

    SLOW, FAST = 4.0, 30.0
    """Seconds of the trace to one of the machine's."""

    def __init__(self, trace: Trace) -> None:
        self.slow_from = trace.phase("heating").begins_at + 30
        self.slow_until = trace.throttles_at() + 20

    def factor_at(self, seconds: float) -> float:
        return self.SLOW if self.slow_from <= seconds < self.slow_until else self.FAST

    def seconds(self, passed_seconds: float) -> float:
        """Of the trace, after so many of the machine's."""
        before, during = self.slow_from / self.FAST, (self.slow_until - self.slow_from) / self.SLOW
        if passed_seconds <= before:
            return passed_seconds * self.FAST
        if passed_seconds <= before + during:
            return self.slow_from + (passed_seconds - before) * self.SLOW
        return self.slow_until + (passed_seconds - before - during) * self.FAST

    def passed_seconds(self, seconds: float) -> float:
        """The other way round."""
        slowly = max(0.0, min(seconds, self.slow_until) - self.slow_from)
        return slowly / self.SLOW + (seconds - slowly) / self.FAST
