"""What a node says of its machine, and whether a heartbeat in full says anything that the last one did not.

It must not know sessions, nor what follows from a word.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from potluck_protocol.cards import CardTelemetry
    from potluck_protocol.line import LineMeasurement
    from potluck_protocol.rest import RestCause
    from potluck_protocol.values import Heartbeat, Hello, PeerMeasurement


class NodeWord:
    """One session's, as of its last hello or heartbeat that was read."""

    __slots__ = ("attached_model_names", "cards", "disk_free_bytes", "line", "peer_measurements", "rest_causes")

    def __init__(self, hello: Hello) -> None:
        self.cards: tuple[CardTelemetry, ...] = ()
        self.line: LineMeasurement | None = None
        self.peer_measurements: tuple[PeerMeasurement, ...] = ()
        self.disk_free_bytes = hello.inventory.disk_free_bytes
        self.begin(hello)

    def begin(self, hello: Hello) -> None:
        """The hello of a link, the first or a later one."""
        self.rest_causes: tuple[RestCause, ...] = hello.rest_causes
        self.attached_model_names = hello.inventory.attached_model_names
        self.cards = hello.cards or self.cards
        self.line = hello.inventory.line or self.line

    def take(self, heartbeat: Heartbeat) -> bool:
        """What a heartbeat says; whether it is news."""
        before = self.rest_causes, self.disk_free_bytes, self.cards, self.peer_measurements, self.line
        self.rest_causes, self.disk_free_bytes, self.cards = heartbeat.rest_causes, heartbeat.disk_free_bytes, heartbeat.cards
        self.peer_measurements, self.line = heartbeat.peer_measurements, heartbeat.line or self.line
        return before != (self.rest_causes, self.disk_free_bytes, self.cards, self.peer_measurements, self.line)
