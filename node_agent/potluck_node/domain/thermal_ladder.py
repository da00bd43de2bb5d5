"""The rungs between a cool card and one that rests: what each takes away, and which of them a card has.

Decides the caps to try, the slots left, and which rungs would change nothing: a card that may not be capped has none of those, an engine
with two slots no quarter. It must not know when a rung is taken; `thermal` decides that.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final

CAP_SHARES: Final = (0.8, 0.66, 0.54)
"""Of the power that a card is made for: 280, 230 and 190 W of a 3090's 350. At 210 W instead of 310 W a 3090 wrote 9 % slower and was
32 °C cooler, at 250 W 3 % slower (github.com/noonghunna/club-3090/issues/104). At 190 W it still writes at nine tenths and reads at half of
its speed, where half of the slots cost half of both and hardly cool, since one answer takes nearly the power of eight. Below that reading
falls off: to a quarter at 150 W."""
CAP_STEP_MILLIWATTS: Final = 10_000


class ThermalRung(IntEnum):
    """From a cool card upwards; each includes what those below it take away. Their numbers travel, and stay."""

    COOL = 0
    CAP_1 = 1
    CAP_2 = 2
    CAP_3 = 3
    HALF = 4
    QUARTER = 5
    ONE = 6
    DRAIN = 7
    """No new answers; those under way go on."""
    PAUSE = 8
    """No engine."""


CAP_RUNGS: Final = (ThermalRung.CAP_1, ThermalRung.CAP_2, ThermalRung.CAP_3)
SLOT_RUNGS: Final = (ThermalRung.HALF, ThermalRung.QUARTER, ThermalRung.ONE)


@dataclass(frozen=True, slots=True)
class PowerRange:
    """Which caps a card takes, by its driver, and the one that stands while nothing is wrong."""

    lowest_milliwatts: int
    default_milliwatts: int
    highest_milliwatts: int
    found_milliwatts: int | None = None
    """As the owner had set it before the agent changed anything; None: as the card is made."""

    @property
    def usual_milliwatts(self) -> int:
        """What is restored."""
        return self.default_milliwatts if self.found_milliwatts is None else self.found_milliwatts


def base_cap_milliwatts(power: PowerRange, owner_milliwatts: int | None) -> int:
    """The cap of a cool card at work: what its owner allows, within what the card takes."""
    wanted = power.usual_milliwatts if owner_milliwatts is None else min(power.usual_milliwatts, owner_milliwatts)
    return max(power.lowest_milliwatts, min(power.highest_milliwatts, wanted))


def caps_milliwatts(power: PowerRange, owner_milliwatts: int | None) -> dict[ThermalRung, int]:
    """The caps of the rungs that have one which is lower than that of the rungs before, and that the card takes."""
    base_milliwatts = base_cap_milliwatts(power, owner_milliwatts)
    caps = {}
    for rung, share in zip(CAP_RUNGS, CAP_SHARES, strict=True):
        cap_milliwatts = round(power.default_milliwatts * share / CAP_STEP_MILLIWATTS) * CAP_STEP_MILLIWATTS
        if power.lowest_milliwatts <= cap_milliwatts < base_milliwatts:
            caps[rung] = cap_milliwatts
    return caps


def cap_at(rung: ThermalRung, power: PowerRange, owner_milliwatts: int | None) -> int:
    """The cap that stands at a rung."""
    reached = [cap for own_rung, cap in caps_milliwatts(power, owner_milliwatts).items() if own_rung <= rung]
    return min(reached, default=base_cap_milliwatts(power, owner_milliwatts))


def slots_at(rung: ThermalRung, slot_count: int) -> int:
    """How many of an engine's slots are left at a rung."""
    if rung < ThermalRung.HALF or slot_count <= 0:
        return max(0, slot_count)
    if rung >= ThermalRung.DRAIN:
        return 0
    divisor = {ThermalRung.HALF: 2, ThermalRung.QUARTER: 4}.get(rung, slot_count)
    return max(1, slot_count // divisor)


def rungs_of(power: PowerRange | None, owner_milliwatts: int | None, slot_count: int) -> tuple[ThermalRung, ...]:
    """The rungs that would change something, lowest first; a cool card, a drained one and a paused one there always are.

    Args:
        power: None where the card cannot be capped: its driver does not tell the limits, or this agent has no right to set one.
        owner_milliwatts: the owner's limit.
        slot_count: of the engine on the card that has the most.
    """
    rungs = [ThermalRung.COOL, *(caps_milliwatts(power, owner_milliwatts) if power is not None else ())]
    left = slot_count
    for rung in SLOT_RUNGS:
        if 0 < slots_at(rung, slot_count) < left:
            left = slots_at(rung, slot_count)
            rungs.append(rung)
    return (*rungs, ThermalRung.DRAIN, ThermalRung.PAUSE)
