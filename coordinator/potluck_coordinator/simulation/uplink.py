"""A modelled node's way to its coordinator: what it sends, held while its agent stands still, and garbled while its line is.

Decides when a frame arrives, in which order, and whether it comes twice. It must not know what frames say.
"""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Final

from potluck_coordinator.simulation.agenda import Agenda
from potluck_coordinator.simulation.link_model import Frame

if TYPE_CHECKING:
    from potluck_coordinator.simulation.node_model import Node

TOKEN_BYTES: Final = 250
"""Of one token on the link: an engine's event with its JSON."""
GARBLED_SHARE: Final = 0.3
GARBLED_LATE_SECONDS_MAX: Final = 0.6


class Uplink:
    """One node's."""

    __slots__ = ("_agenda", "_garbled_until", "_random", "held")

    def __init__(self, agenda: Agenda, random: Random) -> None:
        self.held: list[Frame] = []
        """Of a frozen agent's engine."""
        self._agenda = agenda
        self._random = random
        self._garbled_until = -1.0

    @property
    def is_garbled(self) -> bool:
        """Frames come twice, or late."""
        return self._agenda.now < self._garbled_until

    def garble(self, seconds: float) -> None:
        """From now on, for so long."""
        self._garbled_until = self._agenda.now + seconds

    def delay_seconds(self, node: Node) -> float:
        """One way, for a token behind those of the other answers."""
        running = node.engine.running_count if node.engine is not None else 0
        return node.round_trip_seconds / 2 + running * TOKEN_BYTES * 8 / (node.node_class.line.upload_mbit * 1e6)

    def send(self, node: Node, frame: Frame) -> None:
        """By the link that stands now; without one it is lost."""
        if not node.linked:
            return
        if node.frozen:
            self.held.append(frame)
            return
        delay = self.delay_seconds(node)
        if self.is_garbled:
            drawn = self._random.random()
            if drawn < GARBLED_SHARE:
                late = delay + self._random.uniform(0, GARBLED_LATE_SECONDS_MAX)
                self._agenda.after(late, self._arrive, node, frame, node.link_number)
            elif drawn < 2 * GARBLED_SHARE:
                delay += self._random.uniform(0, GARBLED_LATE_SECONDS_MAX)
        self._agenda.after(delay, self._arrive, node, frame, node.link_number)

    def _arrive(self, node: Node, frame: Frame, link: int) -> None:
        if link == node.link_number and node.linked:
            node.coordinator.receive(node, frame)
