"""The live thermal policy of the agent, for modelled nodes.

The only module of the coordinator that imports the agent, and only one of its decisions: a function of values, which the simulator has to
run as it stands (DESIGN, rule 3). It turns a modelled card into what a driver would tell of it, and the policy's rung into watts and slots.
"""

from __future__ import annotations

from typing import Final

from potluck_coordinator.simulation.card_model import CardOrders
from potluck_coordinator.simulation.heat import HeatModel
from potluck_coordinator.simulation.scenario import NodeClass
from potluck_node.domain.thermal import (
    COOL_MARGIN_CELSIUS,
    PATIENCE_SECONDS,
    PATIENCE_SECONDS_MAX,
    CardLook,
    HeatLimits,
    ThermalState,
    next_state,
)
from potluck_node.domain.thermal_ladder import PowerRange, ThermalRung, cap_at, slots_at

LOWEST_POWER_SHARE: Final = 100 / 350
"""Of its full power, that a 3090's driver takes as a cap."""
SLOWED_BY_HEAT: Final = ("software_thermal",)
QUIET_CELSIUS: Final = 20
"""So far below its throttle point a card on the lowest rung is not looked at: nothing could come of it before the next look."""
COOL_SECONDS_MAX: Final = PATIENCE_SECONDS_MAX + PATIENCE_SECONDS
"""Of looks at a cool card, in which the agent gives something back: one that rests drains first, and of that nothing is seen."""
_NO_LIMITS: Final = HeatLimits()


def is_cool(heat: HeatModel, celsius: float) -> bool:
    """Whether the agent sees a card at this temperature as cool enough to get something back."""
    return celsius <= round(heat.throttle_celsius) - COOL_MARGIN_CELSIUS


class LiveCardPolicy:
    """One node's cards as the agent's policy sees them. They are alike: one look stands for all."""

    __slots__ = ("_orders", "_power", "_quiet_celsius", "_slot_count", "_state", "_throttle_point_celsius", "_usual")

    def __init__(self, node_class: NodeClass) -> None:
        heat = node_class.heat
        milliwatts = round(heat.full_watts * 1000)
        self._power = PowerRange(round(milliwatts * LOWEST_POWER_SHARE), milliwatts, milliwatts) if node_class.power_is_set else None
        self._slot_count = node_class.slot_count
        self._throttle_point_celsius = round(heat.throttle_celsius)
        self._quiet_celsius = heat.throttle_celsius - QUIET_CELSIUS
        self._state = ThermalState()
        self._orders = self._usual = CardOrders(heat.full_watts, node_class.slot_count)

    @property
    def rung(self) -> ThermalRung:
        """Where the card stands now."""
        return self._state.rung

    def look(self, celsius: float, clock_share: float, now: float) -> CardOrders:
        """What the agent orders after one more look."""
        if celsius < self._quiet_celsius and self._state.rung is ThermalRung.COOL:
            return self._usual
        look = CardLook(
            temperature_celsius=int(celsius),
            throttle_point_celsius=self._throttle_point_celsius,
            throttle_reasons=SLOWED_BY_HEAT if clock_share < 1.0 else (),
            power=self._power,
            slot_count=self._slot_count,
        )
        before = self._state.rung
        self._state = next_state(self._state, look, _NO_LIMITS, now)
        if self._state.rung is not before:
            self._orders = self._ordered(self._state.rung)
        return self._orders

    def _ordered(self, rung: ThermalRung) -> CardOrders:
        slots = slots_at(rung, self._slot_count)
        watts = self._usual.cap_watts if self._power is None else cap_at(rung, self._power, None) / 1000
        return CardOrders(watts, slots, admits=slots > 0)
