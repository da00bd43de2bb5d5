"""NVIDIA cards, one by one: what they are, how they are, how they are joined, who uses them.

Decides which facts are looked at together, and that a lost card is one card lost and not the look. It must not know what a good value is,
nor how a fact is called: `card_table` has that.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import psutil

from potluck_node.domain.hardware import Card, CardIdentity, CardPair, CardProcess, CardReading, Driver, NvLink
from potluck_node.probe import card_table, pci
from potluck_node.probe.nvml import CardLostError, DriverUnavailableError, NvmlLibrary, Probe

CARDS_MAX: Final = 64
"""Looked at, whatever the driver counts."""


def read_driver(library: NvmlLibrary) -> Driver:
    """The driver's versions, or why there is none."""
    try:
        return Driver(**_facts(library, card_table.DRIVER))
    except DriverUnavailableError as failure:
        return Driver(absence=failure.absence, absence_text=failure.text)


def read_cards(
    library: NvmlLibrary,
    own_process_ids: Collection[int] = (),
    sysfs: Path = pci.SYSFS,
    *,
    own_card_uuids: Collection[str] = (),
) -> tuple[Card, ...]:
    """Every card with all its facts.

    Args:
        library: the driver's library.
        own_process_ids: the agent's and its engines' processes; any other is foreign.
        sysfs: where the kernel shows its devices.
        own_card_uuids: the cards that the agent's engines were given.

    Raises:
        DriverUnavailableError: there is no driver.
    """
    cards = (_card(library, index, own_process_ids, sysfs) for index in range(card_count(library)))
    return tuple(replace(card, engine_here=card.identity.uuid in own_card_uuids) for card in cards)


def card_count(library: NvmlLibrary) -> int:
    """How many cards the driver shows, lost ones too; raises DriverUnavailableError."""
    return min(CARDS_MAX, library.read(card_table.CARD_COUNT) or 0)


def read_pairs(library: NvmlLibrary) -> tuple[CardPair, ...]:
    """What the driver grants between every two cards it reaches; raises DriverUnavailableError."""
    handles = [(index, handle) for index in range(card_count(library)) if (handle := card_handle(library, index)) is not None]
    pairs = []
    for (first, first_handle), (second, second_handle) in itertools.combinations(handles, 2):
        try:
            pairs.append(CardPair(first, second, **_facts(library, card_table.PAIR, first_handle, second_handle)))
        except CardLostError:
            continue
    return tuple(pairs)


def card_handle(library: NvmlLibrary, index: int) -> Any:
    """What the driver calls a card; None for one that it no longer reaches."""
    binding = library.binding()
    try:
        return binding.nvmlDeviceGetHandleByIndex(index)
    except Exception:  # noqa: BLE001 - a card that fell off the bus has no handle, and drivers say so in several ways
        return None


def read_reading(library: NvmlLibrary, handle: Any) -> CardReading:
    """How a card is now; raises CardLostError, DriverUnavailableError."""
    return CardReading(**_facts(library, card_table.READING, handle))


def read_identity(library: NvmlLibrary, handle: Any) -> CardIdentity:
    """What a card is; raises CardLostError, DriverUnavailableError."""
    return CardIdentity(**_facts(library, card_table.IDENTITY, handle))


def read_heat_limits(library: NvmlLibrary, handle: Any) -> CardIdentity:
    """Of what a card is, what its heat is judged by; raises CardLostError, DriverUnavailableError."""
    return CardIdentity(**_facts(library, card_table.HEAT, handle))


def read_processes(library: NvmlLibrary, handle: Any, own_process_ids: Collection[int]) -> tuple[CardProcess, ...] | None:
    """Who holds memory of a card, each process once; None where the driver does not say. Raises CardLostError, DriverUnavailableError."""
    lists = _facts(library, card_table.PROCESSES, handle)
    if all(entries is None for entries in lists.values()):
        return None
    found: dict[int, CardProcess] = {}
    for kind, entries in lists.items():
        for entry in entries or ():
            pid = int(entry.pid)
            # One that computes and draws is in both lists, with the same memory.
            found.setdefault(pid, card_table.card_process(entry, kind, own=pid in own_process_ids))
    return tuple(found[pid] for pid in sorted(found))


def highest_link(library: NvmlLibrary, card: Card) -> Card:
    """The card with the fastest link seen by now and the load of that moment, after one more look."""
    handle = None if card.lost else card_handle(library, card.index)
    if handle is None:
        return card
    try:
        facts = _facts(library, card_table.LINK, handle)
    except CardLostError:
        return card
    before = (card.reading.utilization_percent or 0, card.reading.pcie_generation or 0)
    now = (facts["utilization_percent"] or 0, facts["pcie_generation"] or 0)
    return replace(card, reading=replace(card.reading, **facts)) if now > before else card


def _card(library: NvmlLibrary, index: int, own_process_ids: Collection[int], sysfs: Path) -> Card:
    identity = CardIdentity()
    handle = card_handle(library, index)
    if handle is None:
        return Card(index, CardIdentity(uuid=library.uuids.get(index)), lost=True)
    try:
        identity = read_identity(library, handle)
        if identity.uuid is not None:
            library.uuids[index] = identity.uuid
        return Card(
            index,
            identity,
            read_reading(library, handle),
            pci.read_slot(identity.bus_id, sysfs),
            _nvlinks(library, handle),
            named(read_processes(library, handle, own_process_ids)),
        )
    except CardLostError:
        return Card(index, identity, lost=True)


def _nvlinks(library: NvmlLibrary, handle: Any) -> tuple[NvLink, ...]:
    links = []
    for port in range(card_table.NVLINK_PORTS_MAX):
        active = library.read(card_table.nvlink_active(port), handle)
        if active is None:
            break
        links.append(NvLink(active, library.read(card_table.nvlink_remote(port), handle) if active else None))
    return tuple(links)


def named(processes: tuple[CardProcess, ...] | None) -> tuple[CardProcess, ...] | None:
    """With the names of their programs, where the system tells them."""
    return None if processes is None else tuple(replace(process, name=_process_name(process.pid)) for process in processes)


def _process_name(pid: int) -> str:
    try:
        return psutil.Process(pid).name()
    except (psutil.Error, ValueError):
        return ""


def _facts(library: NvmlLibrary, table: Mapping[str, Probe], *subjects: Any) -> dict[str, Any]:
    return {name: library.read(probe, *subjects) for name, probe in table.items()}
