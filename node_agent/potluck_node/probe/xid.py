"""Faults of cards as they happen, by the driver's events.

Decides how events are listened to: an event set for each card, because an event of a lost card no longer says whose it is, asked without
waiting whenever telemetry is taken. What was heard of each card is counted. It must not know what a fault means: `domain.xid` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from potluck_node.domain.hardware import CardIdentity, XidEvent
from potluck_node.probe.nvidia import card_count, card_handle, read_identity
from potluck_node.probe.nvml import CardLostError, DriverUnavailableError, NvmlLibrary, process_library

EVENTS_MAX: Final = 64
"""Of one card taken at one poll; a card in a fault loop must not hold telemetry up."""
_XID_CRITICAL: Final = 0x08
"""nvmlEventTypeXidCriticalError."""


@dataclass(frozen=True, slots=True)
class XidCount:
    """What was heard of one card."""

    newest_xid: int
    count: int


class XidWatcher:
    """Listens from the first poll on; cards that come later are heard after the agent's next start.

    Args:
        library: the driver's library.
    """

    def __init__(self, library: NvmlLibrary | None = None) -> None:
        self._library = library or process_library()
        self._binding: Any = None
        self._event_sets: list[tuple[CardIdentity, Any]] = []
        self.counts: dict[str, XidCount] = {}
        """By the card's uuid; of one that had no fault there is none."""

    def poll(self) -> tuple[XidEvent, ...]:
        """What happened since the last poll. Does not wait, and does not fail: without a driver nothing is heard."""
        try:
            binding = self._library.binding()
            if binding is not self._binding:
                self._event_sets = self._registered(binding)
                self._binding = binding
        except DriverUnavailableError:
            self._binding = None
            return ()
        events: list[XidEvent] = []
        for card, event_set in self._event_sets:
            taken = _taken(binding, card.bus_id, event_set)
            if taken and card.uuid is not None:
                before = self.counts.get(card.uuid)
                self.counts[card.uuid] = XidCount(taken[-1].xid, len(taken) + (before.count if before else 0))
            events += taken
        return tuple(events)

    def _registered(self, binding: Any) -> list[tuple[CardIdentity, Any]]:
        event_sets = []
        for index in range(card_count(self._library)):
            handle = card_handle(self._library, index)
            if handle is None:
                continue
            try:
                card = read_identity(self._library, handle)
                event_set = binding.nvmlEventSetCreate()
                binding.nvmlDeviceRegisterEvents(handle, _XID_CRITICAL, event_set)
            except (CardLostError, binding.NVMLError):
                # Not every card has events; one that is lost will have none.
                continue
            event_sets.append((card, event_set))
        return event_sets


def _taken(binding: Any, bus_id: str | None, event_set: Any) -> list[XidEvent]:
    events: list[XidEvent] = []
    while len(events) < EVENTS_MAX:
        try:
            event = binding.nvmlEventSetWait_v2(event_set, 0)
        except binding.NVMLError:
            # Mostly a timeout: nothing waits.
            break
        if event.eventType == _XID_CRITICAL:
            events.append(XidEvent(int(event.eventData), bus_id))
    return events
