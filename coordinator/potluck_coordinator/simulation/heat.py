"""The heat of a modelled card, and what power and temperature leave of its speed.

Decides with two first-order steps: the card above the air that it breathes, within a minute, and that air above the room, within the hour
where a case or a small room is closed. The card's own governor takes clock away above its limit. What a watt is worth is measured (six RTX
3090 under power caps; see `docs/simulator.md`): reading prompts goes with the clock, and writing answers hardly does. It must not know
engines, nodes or policies.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from typing import Final

POWER_SHARES: Final = (0.0, 150 / 350, 200 / 350, 250 / 350, 1.0)
"""Of the card's full power, ascending; the first is where nothing would run any more."""
PREFILL_SHARES: Final = (0.02, 2549 / 9893, 5941 / 9893, 8436 / 9893, 1.0)
"""What each leaves of the speed at which prompts are read."""
DECODE_SHARES: Final = (0.1, 62.6 / 72.6, 68.3 / 72.6, 70.7 / 72.6, 1.0)
"""What each leaves of the speed at which answers are written."""
READING_POWER_SHARE: Final = 1.0
WRITING_POWER_SHARE: Final = 0.85
"""Of its full power, that a card would draw while it reads prompts, and while it only writes answers, which waits for memory; a limit below
that is what it draws."""
CLOCK_LOST_PER_DEGREE: Final = 0.2
CLOCK_SHARE_MIN: Final = 0.6
"""The governor's line: from its limit on, so much of the clock a degree, down to two degrees above it."""


@dataclass(frozen=True, slots=True)
class HeatModel:
    """A card in its case and room."""

    ambient_celsius: float = 25.0
    celsius_per_watt: float = 0.13
    """From the card to the air around it: 70 °C at 350 W in free air."""
    time_constant_seconds: float = 60.0
    """In which the card makes two thirds of its way."""
    case_celsius_per_watt: float = 0.0
    """From the air around the card to the room, for each card's watt; 0: free air."""
    case_time_constant_seconds: float = 1800.0
    idle_watts: float = 30.0
    full_watts: float = 350.0
    throttle_celsius: float = 83.0
    """Where the card's own governor begins to take clock away; the RTX 3090's target temperature."""


def interpolated(x: float, xs: tuple[float, ...], ys: tuple[float, ...]) -> float:
    """On the line through the points; outside of them the last point's value."""
    place = bisect_left(xs, x)
    if place == 0:
        return ys[0]
    if place == len(xs):
        return ys[-1]
    share = (x - xs[place - 1]) / (xs[place] - xs[place - 1])
    return ys[place - 1] + share * (ys[place] - ys[place - 1])


def speed_shares(model: HeatModel, watts: float) -> tuple[float, float]:
    """What a limit of so many watts leaves of the prefill and decode speeds."""
    share = watts / model.full_watts
    return interpolated(share, POWER_SHARES, PREFILL_SHARES), interpolated(share, POWER_SHARES, DECODE_SHARES)


def clock_share(model: HeatModel, celsius: float) -> float:
    """What the card's governor leaves of its clock at this temperature."""
    return min(1.0, max(CLOCK_SHARE_MIN, 1.0 - CLOCK_LOST_PER_DEGREE * (celsius - model.throttle_celsius)))


def governed_watts(model: HeatModel, cap_watts: float, celsius: float) -> float:
    """The power limit that cap and governor leave together. A clock share is worth the watts that read prompts at that share."""
    share = clock_share(model, celsius)
    return min(cap_watts, model.full_watts * interpolated(share, PREFILL_SHARES, POWER_SHARES))


def case_celsius_after(model: HeatModel, celsius: float, watts: float, seconds: float) -> float:
    """Of the air around the card after so long at that power."""
    balance = model.ambient_celsius + model.case_celsius_per_watt * watts
    return balance + (celsius - balance) * math.exp(-seconds / model.case_time_constant_seconds)


def decay(model: HeatModel, seconds: float) -> float:
    """What is left of a card's distance from its balance after so long."""
    return math.exp(-seconds / model.time_constant_seconds)


def celsius_after(model: HeatModel, celsius: float, case_celsius: float, watts: float, left_share: float) -> float:
    """Of the card, in air that hardly changes meanwhile; `left_share` is the `decay` of the time that passed."""
    balance = case_celsius + model.celsius_per_watt * watts
    return balance + (celsius - balance) * left_share
