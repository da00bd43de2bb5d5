"""What is left of engines that were stopped: processes that live, or that a card's driver still lists."""

from __future__ import annotations

import os
from collections.abc import Collection

import psutil

from potluck_node.probe import nvidia
from potluck_node.probe.nvml import CardLostError, DriverUnavailableError, NvmlLibrary, process_library


def children_of_this_process() -> tuple[psutil.Process, ...]:
    """Everything that this process started and that lives, with what it started in turn. Blocks; never raises."""
    try:
        return tuple(psutil.Process(os.getpid()).children(recursive=True))
    except psutil.Error:
        return ()


def remains_of(processes: Collection[psutil.Process], library: NvmlLibrary | None = None) -> tuple[int, ...]:
    """Those of the processes that are not gone yet with all they held, by their ids. Blocks; never raises.

    One that has ended and that nobody has waited for holds nothing. A process of the same number that came later is another one.
    """
    living = {process.pid for process in processes if _lives(process)}
    gone = {process.pid for process in processes} - living
    return tuple(sorted(living | _listed(gone, library or process_library())))


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True


def _listed(process_ids: Collection[int], library: NvmlLibrary) -> set[int]:
    """Those that a card's driver still counts among the holders of its memory."""
    found: set[int] = set()
    try:
        for index in range(nvidia.card_count(library) if process_ids else 0):
            handle = nvidia.card_handle(library, index)
            if handle is not None:
                holders = nvidia.read_processes(library, handle, process_ids) or ()
                found.update(holder.pid for holder in holders if holder.own and holder.memory_bytes != 0)
    except (CardLostError, DriverUnavailableError):
        return found
    return found
