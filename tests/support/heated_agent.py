"""The agent on a machine whose one card follows a trace, fast: its looks at cards, and its judgement of them, run with the trace's time.

The link, leases and engines keep the machine's own time. The engine is the scripted one, which computes on no card: here it is taken to
have the card that is there. SIGUSR1 begins the trace. What is set and when stands in `heat.jsonl` of the folder POTLUCK_TEST_HEAT names.
POTLUCK_TEST_HEAT_UNHEEDED=1 switches the policy off; with POTLUCK_TEST_HEAT_FOLLOWS=0 the card stays as it is.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from tests.support.heat_trace import CARD, Pace, ReplayedDriver, load_trace

FOLDER = Path(os.environ["POTLUCK_TEST_HEAT"])
FOLLOWS = os.environ["POTLUCK_TEST_HEAT_FOLLOWS"] == "1"
TRACE = load_trace(os.environ["POTLUCK_TEST_HEAT_TRACE"])
PACE = Pace(TRACE)


class TraceClock:
    """The trace's time, which stands at 0 until it begins; for what measures durations, it went at the same pace before."""

    def __init__(self) -> None:
        self.made_at = time.time()
        self.began_at: float | None = None

    @property
    def seconds(self) -> float:
        return 0.0 if self.began_at is None else PACE.seconds(time.time() - self.began_at)

    def monotonic_seconds(self) -> float:
        return ((self.began_at or time.time()) - self.made_at) * PACE.FAST + self.seconds

    def unix_ms(self) -> int:
        return time.time_ns() // 1_000_000


CLOCK = TraceClock()


def begin(_number: int, _frame: FrameType | None) -> None:
    CLOCK.began_at = time.time()
    write("began", 0)


def write(what: str, value: int) -> None:
    with (FOLDER / "heat.jsonl").open("a") as file:
        file.write(json.dumps({"what": what, "value": value, "unix_seconds": time.time()}) + "\n")


def main() -> None:
    sys.modules["pynvml"] = ReplayedDriver(TRACE if FOLLOWS else None, lambda: CLOCK.seconds, lambda limit: write("cap", limit))

    from potluck.command import main as command
    from potluck_node import agent, heat, readings
    from potluck_node.domain import thermal
    from potluck_node.supervisor import EngineSupervisor

    class OnItsCard(EngineSupervisor):
        def residence(self, replica_id: Any) -> Any:
            found = super().residence(replica_id)
            return None if found is None else replace(found, card_uuids=(CARD,))

        def cards_given(self) -> frozenset[str]:
            return frozenset({CARD}) if self.statuses() else frozenset()

    class PacedReadings(readings.Readings):
        async def run(self) -> None:
            while True:
                await self.read()
                await asyncio.sleep(readings.READING_SECONDS / PACE.factor_at(CLOCK.seconds))

    agent.Readings = PacedReadings
    agent.EngineSupervisor = OnItsCard
    agent.heat_of = lambda settings, folder, read, replicas, _: heat.heat_of(settings, folder, read, replicas, CLOCK)
    if os.environ.get("POTLUCK_TEST_HEAT_UNHEEDED"):
        heat.next_state = lambda state, *_: state
    decided = heat.next_state

    def told(state: thermal.ThermalState, *rest: Any) -> thermal.ThermalState:
        after = decided(state, *rest)
        if after.rung is not state.rung:
            write("rung", int(after.rung))
        return after

    heat.next_state = told
    signal.signal(signal.SIGUSR1, begin)
    command()


if __name__ == "__main__":
    main()
