"""Whether the power supply carries what the cards may take together, and their peaks.

Decides what a card takes at its worst, and which cap would do. It must not know what a supply really gives: its owner says what is written
on it.
"""

from __future__ import annotations

import math
from typing import Final

from potluck_node.domain.findings import Examination, Finding, Level, limit_milliwatts, listed
from potluck_node.domain.hardware import Card

TRANSIENT_FACTOR: Final = 500 / 350
"""What a card takes for milliseconds, by what it is limited to: guides that go back to Igor's Lab's measurements of the 350 W RTX 3090
budget up to 500 W for it (unanswered.io/guide/rtx-3090-power-consumption-psu-requirements). The driver's limit does not bound such peaks,
and the cards of one model peak together (github.com/noonghunna/club-3090/issues/1019)."""
HOST_WATTS: Final = 100
"""The machine without its cards: 70 to 100 W at such work (research of the design, ecosystem §3.5)."""
CAP_STEP_WATTS: Final = 10
CLOCKS_BOUND_MHZ: Final = "210,1550"
"""What keeps the peaks of four 3090s below a 1500 W supply's protection: github.com/noonghunna/club-3090/issues/814."""


def check_power_supply(examination: Examination) -> tuple[Finding, ...]:
    """The sum of the cards' limits, and of their peaks, against what the owner says of the supply."""
    cards = examination.live_cards
    if not cards:
        return ()
    limits_watts = {card.index: limit / 1000 for card in cards if (limit := limit_milliwatts(card)) is not None}
    if not limits_watts:
        level = Level.OK if examination.owner.power_supply_watts is None else Level.WARN
        return (Finding(level, "power", "not judged: the driver tells no card's power limit", "nvidia-smi -q -d POWER"),)
    untold = [str(card.index) for card in cards if card.index not in limits_watts]
    steady_watts = round(sum(limits_watts.values()) + HOST_WATTS)
    peak_watts = round(sum(limits_watts.values()) * TRANSIENT_FACTOR + HOST_WATTS)
    supply_watts = examination.owner.power_supply_watts
    load = f"the machine may take about {steady_watts} W, and {peak_watts} W for milliseconds"
    if untold:
        load += f", without {'card' if len(untold) == 1 else 'cards'} {listed(untold)}, of which the driver tells no limit"
    if supply_watts is None:
        return (Finding(Level.OK, "power", load, "set power_supply_watts in node.toml to have your power supply checked"),)
    if peak_watts > supply_watts:
        level = Level.FAIL if steady_watts > supply_watts else Level.WARN
        what = f"{load}, but the power supply gives {supply_watts} W: it may switch off under load"
        return (Finding(level, "power", what, _fix(cards, limits_watts, supply_watts, peak_watts)),)
    if untold:
        return (Finding(Level.WARN, "power", f"{load}; the power supply gives {supply_watts} W", "nvidia-smi -q -d POWER"),)
    return (Finding(Level.OK, "power", f"{load}; the power supply gives {supply_watts} W"),)


def _fix(cards: tuple[Card, ...], limits_watts: dict[int, float], supply_watts: int, peak_watts: int) -> str:
    cap_watts = math.floor((supply_watts - HOST_WATTS) / TRANSIENT_FACTOR / len(cards) / CAP_STEP_WATTS) * CAP_STEP_WATTS
    lowest_watts = max((card.identity.power_limit_min_milliwatts or 0) / 1000 for card in cards)
    if cap_watts < max(lowest_watts, CAP_STEP_WATTS):
        return f"use a power supply of {math.ceil(peak_watts / 50) * 50} W, or fewer cards"
    above = [index for index, limit in limits_watts.items() if limit > cap_watts]
    which = "" if len(above) == len(cards) else f"-i {','.join(str(index) for index in above)} "
    bound = f"if it still switches off, bound the clocks too: sudo nvidia-smi -lgc {CLOCKS_BOUND_MHZ}"
    return f"after each start of the machine: sudo nvidia-smi {which}-pl {cap_watts}; {bound}"
