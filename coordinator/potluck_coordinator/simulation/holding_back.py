"""Whether a card is held back by its agent although it has been cool for longer than the live policy waits at most.

Decides by temperatures alone, at every look at the cards, whether the node thought that there was anything to look at or not. `conserving`
takes the agent's orders as they are; this is what they are held to. It must not know why a card was held back.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from potluck_coordinator.simulation.card_model import CardOrders
from potluck_coordinator.simulation.invariants import Invariant, Invariants
from potluck_coordinator.simulation.node_model import Node
from potluck_coordinator.simulation.node_side import COOL_SECONDS_MAX, is_cool
from potluck_protocol.values import NodeId

LOOKS_LATE: Final = 2
"""By so many looks the agent may be late: a pause and the draining before it each end at the first look after their time."""


class HoldingBack:
    """Of all nodes of a world."""

    def __init__(self, invariants: Invariants, step_seconds: float) -> None:
        self._invariants = invariants
        self._seconds_max = COOL_SECONDS_MAX + LOOKS_LATE * step_seconds
        self._since: dict[NodeId, tuple[CardOrders, float]] = {}
        """Of each card that is held back and cool: under which orders, and since when."""

    def look(self, nodes: Iterable[Node], now: float) -> None:
        """After every look of the nodes at their cards. Whoever is dead or frozen does not look, and its time counts anew."""
        known, self._since = self._since, {}
        for node in nodes:
            cards = node.cards
            if not cards.is_held_back or node.engine is None or node.frozen or not is_cool(cards.model, cards.celsius):
                continue
            orders, since = known.get(node.node_id, (cards.orders, now))
            if orders != cards.orders:
                since = now
            elif now - since > self._seconds_max:
                left = f"{cards.orders.slot_count} slots and {cards.orders.cap_watts:g} W"
                words = f"{node.node_id} has {left} at {cards.celsius:.0f} °C, cool for {now - since:.0f} s"
                self._invariants.break_of(Invariant.HELD_BACK_COOL, words, now)
                # One break for each time that this should have been over, not one a look.
                since = now
            self._since[node.node_id] = (cards.orders, since)
