"""The cards of a modelled node: their heat from look to look, what it costs them, and what the agent makes of it.

Decides how power, temperature and the agent's orders come together to a power limit. What the agent orders is the live policy, which comes
in from outside. It must not know engines, links or requests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

from potluck_coordinator.simulation.heat import (
    READING_POWER_SHARE,
    WRITING_POWER_SHARE,
    HeatModel,
    case_celsius_after,
    celsius_after,
    decay,
    governed_watts,
    speed_shares,
)

WATTS_STEP: Final = 3.0
"""A smaller change leaves an engine's pace as it is."""
SETTLED_CELSIUS: Final = 0.1


@dataclass(frozen=True, slots=True)
class CardOrders:
    """What the agent wants of its cards, and of the requests that it is offered."""

    cap_watts: float
    slot_count: int
    admits: bool = True


class CardPolicy(Protocol):
    """The agent's decision about its cards; `node_side` asks the live one."""

    def look(self, celsius: float, clock_share: float, now: float) -> CardOrders:
        """Called at every look at the cards of a node that runs."""


class Cards:
    """One node's, which are alike and get warm alike."""

    __slots__ = (
        "_decay",
        "_decay_seconds",
        "_policy",
        "_power_is_set",
        "_usual",
        "case_celsius",
        "celsius",
        "celsius_max",
        "clock_share_min",
        "model",
        "orders",
        "throttled_at",
        "throttled_seconds",
        "watts",
        "watts_limit",
    )

    def __init__(self, model: HeatModel, slot_count: int, policy: CardPolicy | None, *, power_is_set: bool) -> None:
        self.model = model
        self.orders = self._usual = CardOrders(model.full_watts, slot_count)
        self._decay = 1.0
        self._decay_seconds = 0.0
        self.watts = model.idle_watts
        self.watts_limit = model.full_watts
        self.case_celsius = model.ambient_celsius + model.case_celsius_per_watt * model.idle_watts
        self.celsius = self.celsius_max = self.case_celsius + model.celsius_per_watt * model.idle_watts
        self.clock_share_min = 1.0
        self.throttled_seconds = 0.0
        self.throttled_at: float | None = None
        """When the governor first took clock away."""
        self._policy = policy
        self._power_is_set = power_is_set

    def look(self, seconds: float, busy_share: float, now: float, *, reading: bool, agent_looks: bool) -> bool:
        """Whether the power limit changed, and with it the engine's speed.

        Args:
            seconds: since the last look.
            busy_share: of that time, in which the engine had something to do.
            now: for the agent's policy.
            reading: it reads prompts now.
            agent_looks: the agent runs, and its policy is asked.
        """
        model = self.model
        wanted_watts = model.full_watts * (READING_POWER_SHARE if reading else WRITING_POWER_SHARE)
        self.watts = model.idle_watts + busy_share * max(0.0, min(self.watts_limit, wanted_watts) - model.idle_watts)
        if model.case_celsius_per_watt:
            self.case_celsius = case_celsius_after(model, self.case_celsius, self.watts, seconds)
        if seconds != self._decay_seconds:
            self._decay_seconds, self._decay = seconds, decay(model, seconds)
        self.celsius = celsius = celsius_after(model, self.celsius, self.case_celsius, self.watts, self._decay)
        self.celsius_max = max(self.celsius_max, celsius)
        governed = model.full_watts
        clock_share = 1.0
        if celsius > model.throttle_celsius:
            governed = governed_watts(model, model.full_watts, celsius)
            clock_share, _ = speed_shares(model, governed)
            if busy_share > 0:
                self.throttled_seconds += seconds
                self.throttled_at = now if self.throttled_at is None else self.throttled_at
                self.clock_share_min = min(self.clock_share_min, clock_share)
        if self._policy is not None and agent_looks:
            self.orders = self._policy.look(celsius, clock_share, now)
        limit = min(self.orders.cap_watts, governed) if self._power_is_set else governed
        if abs(limit - self.watts_limit) > WATTS_STEP:
            self.watts_limit = limit
            return True
        return False

    def is_settled(self) -> bool:
        """As warm as it gets with nothing to do, and nothing ordered: looking again would change nothing until it has work."""
        model = self.model
        balance = self.case_celsius + model.celsius_per_watt * model.idle_watts
        return abs(self.celsius - balance) < SETTLED_CELSIUS and not model.case_celsius_per_watt and not self.is_held_back

    @property
    def is_held_back(self) -> bool:
        """The agent has taken something away, watts or slots."""
        return self.orders != self._usual

    @property
    def speed_shares(self) -> tuple[float, float]:
        """What the power limit leaves of the prefill and decode speeds."""
        return speed_shares(self.model, self.watts_limit)
