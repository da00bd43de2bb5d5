"""What goes wrong in a simulated world, and when.

Decides by the seed alone: the same faults meet every policy. It must not know what becomes of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from random import Random
from typing import Final

from potluck_coordinator.simulation.agenda import Agenda
from potluck_coordinator.simulation.coordinator_model import CoordinatorModel
from potluck_coordinator.simulation.node_model import Node
from potluck_coordinator.simulation.scenario import Faults

GARBLED_SECONDS: Final = 30.0
SKEW_MAX: Final = 0.05
"""By which a node's clock runs too fast or too slow."""


class Misfortune:
    """Draws a scenario's faults, one kind after the other, each from a generator of its own."""

    def __init__(
        self, faults: Faults, seconds: float, agenda: Agenda, random: Random, nodes: Sequence[Node], coordinator: CoordinatorModel
    ) -> None:
        self._faults = faults
        self._seconds = seconds
        self._agenda = agenda
        self._random = random
        self._nodes = nodes
        self._coordinator = coordinator
        self.count = 0

    def begin(self) -> None:
        """Puts all of them on the agenda."""
        faults, random = self._faults, self._random
        for node in self._nodes:
            if random.random() < faults.skewed_share:
                node.lease.rate = math.exp(random.uniform(-SKEW_MAX, SKEW_MAX))
        for at, node in self._drawn(faults.deaths_per_hour):
            self._at(at, node.die)
        for at, node in self._drawn(faults.freezes_per_hour):
            self._at(at, partial(node.freeze, with_engine=random.random() < 0.5), random.expovariate(1 / faults.freeze_seconds))
        for at, node in self._drawn(faults.cuts_per_hour):
            self._at(at, node.cut, random.expovariate(1 / faults.cut_seconds))
        for at, node in self._drawn(faults.garbled_per_hour):
            self._at(at, node.garble, GARBLED_SECONDS)
        for at, node in self._drawn(faults.slow_per_hour):
            self._at(at, node.be_slow, faults.slow_share, random.expovariate(1 / faults.slow_seconds))
        for at, _ in self._drawn(faults.coordinator_restarts_per_hour):
            self._at(at, self._coordinator.restart, faults.coordinator_restart_seconds)

    def _drawn(self, per_hour: float) -> list[tuple[float, Node]]:
        """A Poisson process over the whole pool, each event for a node at random."""
        random = Random(self._random.getrandbits(64))
        drawn: list[tuple[float, Node]] = []
        at = 0.0
        while per_hour > 0:
            at += random.expovariate(per_hour / 3600)
            if at >= self._seconds:
                break
            drawn.append((at, random.choice(self._nodes)))
        return drawn

    def _at(self, at: float, action: Callable[..., None], *arguments: float) -> None:
        self.count += 1
        self._agenda.at(at, action, *arguments)
