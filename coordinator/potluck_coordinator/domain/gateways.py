"""Gateways: what is known of each, and which of them are silent.

Decides when a gateway that says nothing counts as gone. Its epoch is its own all the same until its number is given out anew: it may only
be cut off, and what it relays is paid for. It must not know reports, links or tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

SILENCE_SECONDS_MAX: Final = 5.0
"""A gateway reports every second, and a directory that restarts is away for about two."""


@dataclass(frozen=True, slots=True)
class GatewayRecord:
    """One gateway that has registered."""

    number: int
    """0, 1, ... of as many as the operator runs; the next process of the same number takes this one's place."""
    epoch: int
    """Of this process's registration; no other had it, and a later one's is higher."""
    peer_address: str = ""
    """Where other gateways reach it, as "host:port"; empty until it has announced itself."""
    link_address: str = ""
    """Where nodes reach it; empty for as long."""

    @property
    def is_announced(self) -> bool:
        """Whether its ports are open."""
        return bool(self.link_address)


def reachable(records: Mapping[int, GatewayRecord], heard_at_seconds: Mapping[int, float], now_seconds: float) -> dict[int, GatewayRecord]:
    """Those that others may count on now, by epoch: announced, and heard of lately.

    Args:
        records: all that are registered, by epoch.
        heard_at_seconds: when each last said something, by epoch; one that is missing here never did.
        now_seconds: monotonic, as the others.
    """
    return {
        epoch: record
        for epoch, record in records.items()
        if record.is_announced and now_seconds - heard_at_seconds.get(epoch, -SILENCE_SECONDS_MAX) < SILENCE_SECONDS_MAX
    }
