"""Everything the probes found, in one value.

Decides that a failing probe costs its own fact only, which is then 0 or empty, and how much text a fact may be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final, TypeVar

import structlog

from potluck_node.probe import disk, host, nvidia
from potluck_protocol.values import Accelerator, Inventory

TEXT_CHARACTERS_MAX: Final = 200
"""Of one fact, whatever a kernel or a driver says."""

_Fact = TypeVar("_Fact")
_log = structlog.get_logger()
_failed: set[str] = set()
"""Probes whose failure was logged; a machine without a card would say so at every look."""


def take_inventory(cache_folder: Path) -> Inventory:
    """What this machine has, and what is free where models are kept."""
    nothing = Inventory()
    return Inventory(
        operating_system=_fact("operating_system", host.operating_system, nothing.operating_system)[:TEXT_CHARACTERS_MAX],
        cpu_count=_fact("cpu_count", host.cpu_count, nothing.cpu_count),
        memory_bytes=_fact("memory_bytes", host.memory_bytes, nothing.memory_bytes),
        disk_free_bytes=_fact("disk_free_bytes", lambda: disk.disk_free_bytes(cache_folder), nothing.disk_free_bytes),
        accelerators=tuple(_bounded(card) for card in _fact("accelerators", nvidia.accelerators, nothing.accelerators)),
    )


def _bounded(card: Accelerator) -> Accelerator:
    return replace(card, name=card.name[:TEXT_CHARACTERS_MAX], uuid=card.uuid[:TEXT_CHARACTERS_MAX])


def _fact(name: str, probe: Callable[[], _Fact], unknown: _Fact) -> _Fact:
    try:
        return probe()
    except Exception as error:  # noqa: BLE001 - drivers and kernels fail in their own ways; none of them may stop the agent
        if name not in _failed:
            _failed.add(name)
            _log.debug("probe_failed", fact=name, reason=f"{type(error).__name__}: {error}")
        return unknown
