"""How the cards are now, for every few heartbeats.

Decides which facts travel. It must not know how often it is asked: it takes some milliseconds a card and waits for nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from potluck_node.domain.hardware import CardIdentity, CardReading, foreign_bytes, held_bytes
from potluck_node.domain.thermal import throttle_point_celsius
from potluck_node.probe import card_table
from potluck_node.probe.nvidia import card_count, card_handle, read_heat_limits, read_processes, read_reading
from potluck_node.probe.nvml import CardLostError, DriverUnavailableError, NvmlLibrary, process_library
from potluck_node.probe.xid import XidCount
from potluck_protocol.cards import CardTelemetry


def card_telemetry(
    own_process_ids: Collection[int] = (),
    library: NvmlLibrary | None = None,
    faults: Mapping[str, XidCount] | None = None,
    *,
    own_card_uuids: Collection[str] = (),
) -> tuple[CardTelemetry, ...]:
    """Every card that the driver shows, or showed this process before, lost ones marked; empty without a driver. Blocks; never raises.

    Args:
        own_process_ids: the agent's and its engines' processes, children too; memory of any other is foreign.
        library: the driver's library; the process's own if not given.
        faults: what was heard of cards, by uuid.
        own_card_uuids: the cards that these engines were given: of memory there nothing is foreign before the driver names one of ours.
    """
    library = library or process_library()
    try:
        cards = (_card(library, index, own_process_ids, own_card_uuids) for index in range(card_count(library)))
        return tuple(_with_faults(card, (faults or {}).get(card.uuid)) for card in cards if card is not None)
    except DriverUnavailableError:
        return ()


def with_foreign_bytes_known(cards: tuple[CardTelemetry, ...], before: tuple[CardTelemetry, ...]) -> tuple[CardTelemetry, ...]:
    """The cards, with what others held of each when that could last be told, where it cannot be told now.

    Where drivers hide processes, as from containers, it can be told only while none of this node's engines has the card. The node remembers
    it, for whoever is told may have begun anew since then; and a node that begins anew has no engine yet.
    """
    known = {card.uuid: card.memory_foreign_bytes for card in before}
    return tuple(
        replace(card, memory_foreign_bytes=known.get(card.uuid)) if card.memory_foreign_bytes is None and not card.lost else card
        for card in cards
    )


def card_bytes_held(card_uuids: Collection[str], process_ids: Collection[int], library: NvmlLibrary | None = None) -> int | None:
    """What these processes hold of these cards together; None where the driver does not say so of each card. Blocks; never raises.

    In a container the driver may name processes by numbers that are not the container's: then none of them is found, and that is None.
    """
    library = library or process_library()
    held: dict[str, int | None] = {}
    try:
        for index in range(card_count(library)):
            handle = card_handle(library, index)
            uuid = None if handle is None else library.read(card_table.IDENTITY["uuid"], handle)
            if uuid is not None and uuid in card_uuids:
                held[uuid] = held_bytes(read_processes(library, handle, process_ids))
    except (CardLostError, DriverUnavailableError):
        return None
    known = [held_of_card for held_of_card in held.values() if held_of_card]
    return sum(known) if known and len(known) == len(card_uuids) else None


def _with_faults(card: CardTelemetry, faults: XidCount | None) -> CardTelemetry:
    return card if faults is None else replace(card, newest_xid=faults.newest_xid, xid_count=faults.count)


def _card(library: NvmlLibrary, index: int, own_process_ids: Collection[int], own_card_uuids: Collection[str]) -> CardTelemetry | None:
    handle = card_handle(library, index)
    if handle is None:
        return _lost(library, index)
    try:
        uuid = library.read(card_table.IDENTITY["uuid"], handle)
        if uuid is None:
            return None
        library.uuids[index] = uuid
        reading, limits = read_reading(library, handle), read_heat_limits(library, handle)
        processes = read_processes(library, handle, own_process_ids)
        return _telemetry(uuid, reading, limits, foreign_bytes(reading.memory_used_bytes, processes, engine_here=uuid in own_card_uuids))
    except CardLostError:
        return _lost(library, index)


def _lost(library: NvmlLibrary, index: int) -> CardTelemetry | None:
    """Without a name there is nothing to say: a card that was lost before this process began is for the doctor to find."""
    uuid = library.uuids.get(index)
    return None if uuid is None else CardTelemetry(uuid, lost=True)


def _telemetry(uuid: str, reading: CardReading, limits: CardIdentity, held_by_others_bytes: int | None) -> CardTelemetry:
    return CardTelemetry(
        uuid=uuid,
        temperature_celsius=reading.temperature_celsius,
        power_milliwatts=reading.power_milliwatts,
        power_limit_milliwatts=reading.power_limit_milliwatts,
        memory_used_bytes=reading.memory_used_bytes,
        memory_foreign_bytes=held_by_others_bytes,
        utilization_percent=reading.utilization_percent,
        throttle_reasons=tuple(reason.value for reason in reading.throttle_reasons or ()),
        throttle_point_celsius=throttle_point_celsius(limits, reading),
        power_limit_min_milliwatts=limits.power_limit_min_milliwatts,
        power_limit_default_milliwatts=limits.power_limit_default_milliwatts,
        power_limit_max_milliwatts=limits.power_limit_max_milliwatts,
    )
