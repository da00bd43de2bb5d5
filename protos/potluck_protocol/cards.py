"""How a card is now, as a node tells it.

Decides nothing; None stands for a fact that a probe could not get. It must not know how a fact is got, nor what follows from it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CardTelemetry:
    """One card now. None stands for a fact its probe could not get."""

    uuid: str
    temperature_celsius: int | None = None
    power_milliwatts: int | None = None
    power_limit_milliwatts: int | None = None
    memory_used_bytes: int | None = None
    memory_foreign_bytes: int | None = None
    """By processes that are not this node's engines; None, as everywhere here, where that cannot be told."""
    utilization_percent: int | None = None
    throttle_reasons: tuple[str, ...] = ()
    lost: bool = False
    """The driver no longer reaches the card."""
    newest_xid: int | None = None
    """The number of the newest fault that the driver told of since the agent started."""
    xid_count: int = 0
    throttle_point_celsius: int | None = None
    """Where it would slow down by itself."""
    thermal_rung: int = 0
    """What the agent took from it for its heat: 0 nothing, 1 to 3 ever lower power caps, 4 half of the slots, 5 all but a quarter of them,
    6 all but one, 7 all, 8 its engine."""
    throttle_seconds: float = 0.0
    """How long it was slowed down by heat since the agent started."""
    power_limit_min_milliwatts: int | None = None
    power_limit_default_milliwatts: int | None = None
    power_limit_max_milliwatts: int | None = None
