"""The machine itself: its operating system, processors, memory and processes."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

import psutil

from potluck_node.probe.control_groups import ControlGroups


def operating_system() -> str:
    """Such as "Linux 6.8 x86_64"."""
    return f"{platform.system()} {platform.release().split('-')[0]} {platform.machine()}"


def cpu_name(information: Path = Path("/proc/cpuinfo")) -> str:
    """Such as "AMD EPYC 7302 16-Core Processor"; raises OSError, LookupError."""
    for line in information.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    raise LookupError("the kernel does not name the processor")


def cpu_count(groups: ControlGroups | None = None) -> int:
    """Processors that this process may use; a container often has fewer than the machine, or the time of fewer."""
    allowed = len(_allowed_processors()) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0
    share = (groups or ControlGroups()).processor_limit()
    return allowed if share is None else min(allowed, max(1, int(share)))


def memory_bytes(groups: ControlGroups | None = None) -> int:
    """Memory of the machine, or the part of it that this process may use."""
    limit_bytes = (groups or ControlGroups()).memory_limit_bytes()
    installed_bytes = memory_installed_bytes()
    return installed_bytes if limit_bytes is None else min(installed_bytes, limit_bytes)


def memory_installed_bytes() -> int:
    """Memory of the machine, whoever may use it."""
    return int(psutil.virtual_memory().total)


def memory_available_bytes(groups: ControlGroups | None = None) -> int:
    """Memory that a new process could take."""
    free_bytes = (groups or ControlGroups()).memory_free_bytes()
    available_bytes = int(psutil.virtual_memory().available)
    return available_bytes if free_bytes is None else min(available_bytes, free_bytes)


def process_tree(pid: int) -> frozenset[int]:
    """A process and all its descendants."""
    try:
        return frozenset({pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))})
    except psutil.Error:
        return frozenset({pid})


def numa_nodes_allowed(root: Path = Path("/sys/devices/system/node")) -> tuple[int, ...]:
    """The memory nodes that have a processor which this process may use; raises OSError."""
    allowed = _allowed_processors()
    return tuple(
        sorted(
            int(node.name.removeprefix("node"))
            for node in root.iterdir()
            if re.fullmatch(r"node\d+", node.name) and allowed & _listed((node / "cpulist").read_text())
        )
    )


def _allowed_processors() -> set[int]:
    return os.sched_getaffinity(0)


def _listed(text: str) -> set[int]:
    """The numbers in the kernel's "0-7,16-23"."""
    numbers: set[int] = set()
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            numbers.update(range(int(first), int(last or first) + 1))
    return numbers
