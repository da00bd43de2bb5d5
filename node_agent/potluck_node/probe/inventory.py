"""Everything the probes found, in one value: for the pool, and for the owner.

Decides that a failing probe costs its own fact only, and how much text a fact may be. For the pool a fact that is missing is 0 or empty, as
the contract has it; for the owner it is None.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Final, TypeVar

import structlog

from potluck_node.domain.hardware import Card, CardPair, Driver, Hardware, Host, joined_pairs, pcie_peer_pairs
from potluck_node.probe import disk, host, kernel_log, nvidia, pci
from potluck_node.probe.nvml import DriverUnavailableError, NvmlLibrary, process_library
from potluck_protocol.values import Accelerator, Inventory

TEXT_CHARACTERS_MAX: Final = 200
"""Of one fact, whatever a kernel or a driver says."""
LINK_LOOKS: Final = 5
LINK_PAUSE_SECONDS: Final = 0.2
"""Together a second: work comes in bursts, and a link speeds up within milliseconds of the first."""
SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108 - a look at how large it is

_Fact = TypeVar("_Fact")
_log = structlog.get_logger()
_failed: set[str] = set()
"""Probes whose failure was logged; a machine without a card would say so at every look."""


def take_inventory(cache_folder: Path, library: NvmlLibrary | None = None) -> Inventory:
    """What this machine has, and what is free where models are kept."""
    nothing = Inventory()
    library = library or process_library()
    driver = _fact("driver", lambda: nvidia.read_driver(library)) or Driver()
    return Inventory(
        operating_system=_text(_fact("operating_system", host.operating_system)),
        cpu_count=_fact("cpu_count", host.cpu_count) or nothing.cpu_count,
        memory_bytes=_fact("memory_bytes", host.memory_bytes) or nothing.memory_bytes,
        disk_free_bytes=_fact("disk_free_bytes", lambda: disk.disk_free_bytes(cache_folder)) or nothing.disk_free_bytes,
        accelerators=_fact("accelerators", lambda: read_accelerators(library)) or nothing.accelerators,
        driver_version=_text(driver.version),
        cuda_version=_text(driver.cuda_version),
    )


def read_accelerators(library: NvmlLibrary) -> tuple[Accelerator, ...]:
    """Every card that can work: one that is lost, or says not what it is, is none. Raises DriverUnavailableError."""
    cards = nvidia.read_cards(library)
    return accelerators(cards, nvidia.read_pairs(library))


def accelerators(cards: Collection[Card], pairs: tuple[CardPair, ...]) -> tuple[Accelerator, ...]:
    """The cards as the contract has them."""
    uuids = {card.index: card.identity.uuid or "" for card in cards}
    bridged, reached = (_peers(uuids, found) for found in (joined_pairs(pairs), pcie_peer_pairs(pairs)))
    return tuple(
        Accelerator(
            name=_text(card.identity.name),
            uuid=_text(card.identity.uuid),
            memory_bytes=card.identity.memory_bytes,
            compute_capability=_text(card.identity.compute_capability),
            pcie_width=card.reading.pcie_width,
            pcie_width_max=card.slot.card_width_max or card.identity.pcie_width_max,
            pcie_generation_max=card.identity.pcie_generation_max,
            power_limit_milliwatts=card.reading.power_limit_milliwatts,
            numa_node=card.slot.numa_node,
            nvlink_peer_uuids=bridged[card.index],
            pcie_peer_uuids=reached[card.index],
        )
        for card in cards
        if not card.lost and card.identity.uuid and card.identity.memory_bytes
    )


def _peers(uuids: dict[int, str], pairs: Collection[tuple[int, int]]) -> dict[int, tuple[str, ...]]:
    """The others' names of each card's pairs, by the card's index."""
    return {
        index: tuple(_text(uuids[second if first == index else first]) for first, second in pairs if index in {first, second})
        for index in uuids
    }


def examine(
    cache_folder: Path,
    *,
    own_process_ids: Collection[int] = (),
    own_card_uuids: Collection[str] = (),
    library: NvmlLibrary | None = None,
    sysfs: Path = pci.SYSFS,
    pause: Callable[[float], None] = time.sleep,
) -> Hardware:
    """Everything for the owner's eyes, at one look of about a second where there are cards. Blocks; never raises.

    Args:
        cache_folder: where models are kept.
        own_process_ids: the agent's and its engines' processes.
        own_card_uuids: the cards that these engines were given.
        library: the driver's library; the process's own if not given.
        sysfs: where the kernel shows its devices.
        pause: waits for so many seconds.
    """
    library = library or process_library()
    driver = nvidia.read_driver(library)
    cards: tuple[Card, ...] = ()
    pairs: tuple[CardPair, ...] = ()
    try:
        if driver.absence is None:
            cards = nvidia.read_cards(library, own_process_ids, sysfs, own_card_uuids=own_card_uuids)
            pairs = nvidia.read_pairs(library)
            for _ in range(LINK_LOOKS - 1 if cards else 0):
                pause(LINK_PAUSE_SECONDS)
                cards = tuple(nvidia.highest_link(library, card) for card in cards)
    except DriverUnavailableError as failure:
        driver = Driver(absence=failure.absence, absence_text=failure.text)
    count = _fact("bus_card_count", lambda: pci.nvidia_card_count(sysfs))
    return Hardware(
        host=read_host(cache_folder),
        driver=Driver(driver.version, driver.cuda_version, driver.absence, driver.absence_text[:TEXT_CHARACTERS_MAX], count),
        cards=cards,
        pairs=pairs,
        xids=_fact("xids", kernel_log.read_xids),
    )


def read_host(cache_folder: Path) -> Host:
    """The machine around the cards."""
    return Host(
        operating_system=_text(_fact("operating_system", host.operating_system)) or None,
        cpu_name=_text(_fact("cpu_name", host.cpu_name)) or None,
        cpu_count=_fact("cpu_count", host.cpu_count),
        memory_bytes=_fact("memory_bytes", host.memory_bytes),
        memory_installed_bytes=_fact("memory_installed_bytes", host.memory_installed_bytes),
        memory_available_bytes=_fact("memory_available_bytes", host.memory_available_bytes),
        disk_free_bytes=_fact("disk_free_bytes", lambda: disk.disk_free_bytes(cache_folder)),
        shared_memory_bytes=_fact("shared_memory_bytes", lambda: shutil.disk_usage(SHARED_MEMORY).total),
        numa_nodes_allowed=_fact("numa_nodes_allowed", host.numa_nodes_allowed),
    )


def _text(text: str | None) -> str:
    return (text or "")[:TEXT_CHARACTERS_MAX]


def _fact(name: str, probe: Callable[[], _Fact]) -> _Fact | None:
    try:
        return probe()
    except Exception as error:  # noqa: BLE001 - drivers and kernels fail in their own ways; none of them may stop the agent
        if name not in _failed:
            _failed.add(name)
            _log.debug("probe_failed", fact=name, reason=f"{type(error).__name__}: {error}")
        return None
