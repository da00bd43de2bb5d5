"""How the cards are now, for every few heartbeats.

Decides which facts travel. It must not know how often it is asked: it takes some milliseconds a card and waits for nothing.
"""

from __future__ import annotations

from collections.abc import Collection

from potluck_node.domain.hardware import CardProcess, CardReading, foreign_bytes
from potluck_node.probe import card_table
from potluck_node.probe.nvidia import card_count, card_handle, read_processes, read_reading
from potluck_node.probe.nvml import CardLostError, DriverUnavailableError, NvmlLibrary, process_library
from potluck_protocol.values import CardTelemetry


def card_telemetry(own_process_ids: Collection[int] = (), library: NvmlLibrary | None = None) -> tuple[CardTelemetry, ...]:
    """Every card that the driver shows, or showed this process before, lost ones marked; empty without a driver. Blocks; never raises.

    Args:
        own_process_ids: the agent's and its engines' processes, children too; memory of any other is foreign.
        library: the driver's library; the process's own if not given.
    """
    library = library or process_library()
    try:
        cards = (_card(library, index, own_process_ids) for index in range(card_count(library)))
        return tuple(card for card in cards if card is not None)
    except DriverUnavailableError:
        return ()


def _card(library: NvmlLibrary, index: int, own_process_ids: Collection[int]) -> CardTelemetry | None:
    handle = card_handle(library, index)
    if handle is None:
        return _lost(library, index)
    try:
        uuid = library.read(card_table.IDENTITY["uuid"], handle)
        if uuid is None:
            return None
        library.uuids[index] = uuid
        reading = read_reading(library, handle)
        return _telemetry(uuid, reading, read_processes(library, handle, own_process_ids))
    except CardLostError:
        return _lost(library, index)


def _lost(library: NvmlLibrary, index: int) -> CardTelemetry | None:
    """Without a name there is nothing to say: a card that was lost before this process began is for the doctor to find."""
    uuid = library.uuids.get(index)
    return None if uuid is None else CardTelemetry(uuid, lost=True)


def _telemetry(uuid: str, reading: CardReading, processes: tuple[CardProcess, ...] | None) -> CardTelemetry:
    return CardTelemetry(
        uuid=uuid,
        temperature_celsius=reading.temperature_celsius,
        power_milliwatts=reading.power_milliwatts,
        power_limit_milliwatts=reading.power_limit_milliwatts,
        memory_used_bytes=reading.memory_used_bytes,
        memory_foreign_bytes=foreign_bytes(reading.memory_used_bytes, processes),
        utilization_percent=reading.utilization_percent,
        throttle_reasons=tuple(reason.value for reason in reading.throttle_reasons or ()),
    )
