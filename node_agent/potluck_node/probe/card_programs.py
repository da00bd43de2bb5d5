"""Who else computes or draws on a card, by name, for its owner's eyes."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from potluck_node.probe import card_table, nvidia
from potluck_node.probe.nvml import CardLostError, DriverUnavailableError, NvmlLibrary, process_library

NAMES_MAX: Final = 3
NAME_CHARACTERS_MAX: Final = 40


def foreign_program_names(
    card_uuids: Collection[str], own_process_ids: Collection[int], library: NvmlLibrary | None = None
) -> dict[str, tuple[str, ...]]:
    """Of each of these cards the largest programs that are not ours; none where the driver hides them. Blocks; never raises."""
    library = library or process_library()
    found: dict[str, tuple[str, ...]] = {}
    try:
        for index in range(nvidia.card_count(library)):
            handle = nvidia.card_handle(library, index)
            uuid = None if handle is None else library.read(card_table.IDENTITY["uuid"], handle)
            if uuid is not None and uuid in card_uuids:
                processes = nvidia.named(nvidia.read_processes(library, handle, own_process_ids)) or ()
                foreign = sorted((one for one in processes if not one.own), key=lambda one: -(one.memory_bytes or 0))
                found[uuid] = tuple(one.name[:NAME_CHARACTERS_MAX] for one in foreign if one.name)[:NAMES_MAX]
    except (CardLostError, DriverUnavailableError):
        return found
    return found
