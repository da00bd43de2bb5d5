"""Faults of cards as they happen, by the driver's events.

Decides how events are listened to: an event set for each card, because an event of a lost card no longer says whose it is, asked without
waiting whenever telemetry is taken. It must not know what a fault means: `domain.xid` does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from potluck_node.domain.hardware import XidEvent
from potluck_node.probe.nvidia import card_count, card_handle, read_identity
from potluck_node.probe.nvml import CardLostError, DriverUnavailableError, NvmlLibrary, process_library

EVENTS_MAX: Final = 64
"""Of one card taken at one poll; a card in a fault loop must not hold telemetry up."""
_XID_CRITICAL: Final = 0x08
"""nvmlEventTypeXidCriticalError."""


class XidWatcher:
    """Listens from the first poll on; cards that come later are heard after the agent's next start.

    Args:
        library: the driver's library.
        heard: called with each fault, for a log line.
    """

    def __init__(self, library: NvmlLibrary | None = None, heard: Callable[[XidEvent], None] | None = None) -> None:
        self._library = library or process_library()
        self._heard = heard
        self._binding: Any = None
        self._event_sets: list[tuple[str | None, Any]] = []

    def poll(self) -> tuple[XidEvent, ...]:
        """What happened since the last poll. Does not wait, and does not fail: without a driver nothing is heard."""
        try:
            binding = self._library.binding()
        except DriverUnavailableError:
            self._binding = None
            return ()
        if binding is not self._binding:
            self._event_sets = self._registered(binding)
            self._binding = binding
        events = tuple(event for bus_id, event_set in self._event_sets for event in _taken(binding, bus_id, event_set))
        if self._heard is not None:
            for event in events:
                self._heard(event)
        return events

    def _registered(self, binding: Any) -> list[tuple[str | None, Any]]:
        event_sets = []
        for index in range(card_count(self._library)):
            handle = card_handle(self._library, index)
            if handle is None:
                continue
            try:
                bus_id = read_identity(self._library, handle).bus_id
                event_set = binding.nvmlEventSetCreate()
                binding.nvmlDeviceRegisterEvents(handle, _XID_CRITICAL, event_set)
            except (CardLostError, binding.NVMLError):
                # Not every card has events; one that is lost will have none.
                continue
            event_sets.append((bus_id, event_set))
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
