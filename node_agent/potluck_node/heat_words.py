"""A card's heat in words, for its owner.

Decides how much is said: of a card at full power only how warm it is. It must not know why a rung was taken.
"""

from __future__ import annotations

from typing import Final

from potluck_node.control import AgentStatus, CardLine
from potluck_node.domain.thermal_ladder import ThermalRung

_LEFT: Final = {
    ThermalRung.HALF: "half of its slots",
    ThermalRung.QUARTER: "a quarter of its slots",
    ThermalRung.ONE: "one answer at a time",
    ThermalRung.DRAIN: "no new answers",
    ThermalRung.PAUSE: "no work",
}


def heat_lines(status: AgentStatus) -> list[str]:
    """A line for each card, and what keeps the agent from capping their power."""
    lines = [f"card         {card_words(card)}" for card in status.cards]
    if status.cap_refusal:
        lines.append(f"             | power is not capped ({status.cap_refusal}): `potluck node doctor` tells how to give the right")
    return lines


def card_words(card: CardLine) -> str:
    """Such as "GPU-… 79 of 83 °C, gets 220 W and half of its slots until it is cooler; slowed down by heat for 12 s"."""
    if card.lost:
        return f"{card.uuid}: the driver no longer reaches it"
    warm = "temperature unknown" if card.temperature_celsius is None else f"{card.temperature_celsius} of {card.limit_celsius} °C"
    words = f"{card.uuid}: {warm}"
    gets = []
    if card.power_limit_milliwatts is not None and (card.rung == ThermalRung.COOL or card.capped):
        gets.append(f"{card.power_limit_milliwatts / 1000:.0f} W")
    if card.rung in _LEFT:
        gets.append(_LEFT[ThermalRung(card.rung)])
    if gets:
        # Without a temperature nobody can tell when it is cooler, and it may be so already.
        until = " until it is known to be cooler" if card.temperature_celsius is None else " until it is cooler"
        words += f", gets {' and '.join(gets)}" + (until if card.rung else "")
    if card.throttle_seconds:
        words += f"; slowed down by heat for {card.throttle_seconds:.0f} s since the agent started"
    return words
