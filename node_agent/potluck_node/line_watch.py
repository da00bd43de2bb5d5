"""Keeps what is known of the line to the coordinator, for the agent and for the doctor.

Decides that it is measured while nothing else needs the line, that a failure costs only the figures, and that they outlive the agent: in
`line.json` in the state folder, so that one that is started again and again does not measure again and again. When a look is due is
`domain.line`'s. It must not know how the line is measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Final

import structlog

from potluck_node.credentials import Credentials
from potluck_node.domain.line import LineReading, completed, next_look_unix_ms, pause_seconds
from potluck_node.line_measurement import measure_line
from potluck_protocol.clock import Clock
from potluck_protocol.line import LineMeasurement
from potluck_protocol.private_files import read_json, write_private

LOOK_SECONDS: Final = 5.0
"""Between two looks at whether one is due and the line is quiet."""
_FILE: Final = "line.json"

_log = structlog.get_logger()


class LineWatch:
    """What the agent knows of its line.

    Args:
        credentials: what the node shows, and where.
        folder: the state folder.
        clock: time.
        jitter: random numbers from 0 to 1.
        quiet: whether nothing that matters is on the line now: two full seconds of ours would hold an answer's tokens up.
    """

    def __init__(
        self, credentials: Credentials, folder: Path, clock: Clock, jitter: Callable[[], float], quiet: Callable[[], bool]
    ) -> None:
        self._credentials = credentials
        self._folder = folder
        self._clock = clock
        self._jitter = jitter
        self._quiet = quiet
        self.found = kept_measurement(folder)
        now_unix_ms = clock.unix_ms()
        # In memory not by the clock on the wall: one that was a year ahead, and is set right, would leave the line unmeasured for a year.
        self._due_in((next_look_unix_ms(self.found, now_unix_ms, jitter()) - now_unix_ms) / 1000)

    async def run(self) -> None:
        """Measures, once a day and when the line is quiet, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            await self.look()

    async def look(self) -> None:
        """Measures if it is time."""
        if self._clock.monotonic_seconds() < self._due_at_seconds or not self._quiet():
            return
        reading = await measure_and_keep(self._credentials, self._folder, self._clock)
        self.found = reading.found or self.found
        self._due_in(pause_seconds(reading, self._jitter()))
        _log.info("line_measured", failure=reading.failure, **(asdict(reading.found) if reading.found else {}))

    def _due_in(self, seconds: float) -> None:
        self._due_at_seconds = self._clock.monotonic_seconds() + seconds


async def measure_and_keep(credentials: Credentials, folder: Path, clock: Clock) -> LineReading:
    """One look, completed by what the folder keeps, and kept there; never raises."""
    kept = kept_measurement(folder)
    reading = completed(await measure_line(credentials, clock), kept, clock.unix_ms())
    if reading.found is not None and reading.found != kept:
        # A full disk costs another look after the next start.
        with contextlib.suppress(OSError):
            write_private(folder / _FILE, json.dumps(asdict(reading.found)).encode(), durable=False)
    return reading


def kept_measurement(folder: Path) -> LineMeasurement | None:
    """What was measured last; None where nothing was, or the file is damaged."""
    try:
        fields = read_json(folder / _FILE)
        kept = LineMeasurement(**fields)
    except (OSError, ValueError, TypeError):
        return None
    sound = all(isinstance(value, int) or value is None for value in fields.values())
    return kept if sound and kept.measured_at_unix_ms is not None else None
