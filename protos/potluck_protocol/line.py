"""The line between a node and its coordinator: how it is measured, and what was found.

Decides how much a measurement may take of either side's line: both hold to these bounds, whatever the other asks for. It must not know who
measures when (the coordinator's `domain.turns`, the node's `domain.line`), nor how a rate follows from arrivals (the same).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MEASURED_BYTES_MAX: Final = 8 * 1024 * 1024
"""Each way. A line of 1 Gbit/s has carried it in 70 ms, once it is quick; most homes' lines end by the clock instead."""
MEASURED_SECONDS_MAX: Final = 2.0
"""From the first piece on. Enough for a line of 200 ms to have left its slow start, too little for anyone at home to notice."""
PIECE_BYTES: Final = 16 * 1024
"""Of one message: a line of 1 Mbit/s brings 15 of them in time, and 8 MiB of them cost either side few milliseconds of work."""
ARRIVALS_MAX: Final = MEASURED_BYTES_MAX // PIECE_BYTES + 2
"""A piece each, the first and the last ones beside them."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """So much had come by then, in seconds of the receiver's monotonic clock."""

    seconds: float
    received_bytes: int


@dataclass(frozen=True, slots=True)
class LineMeasurement:
    """The way from a node to its coordinator as the node measured it last. None stands for a figure that was not to be had."""

    measured_at_unix_ms: int
    """By the node's clock."""
    round_trip_microseconds: int | None = None
    """Of a TCP connection's start."""
    upload_bytes_per_second: int | None = None
    download_bytes_per_second: int | None = None
