"""The machine itself: its operating system, processors and memory."""

from __future__ import annotations

import os
import platform

import psutil


def operating_system() -> str:
    """Such as "Linux 6.8 x86_64"."""
    return f"{platform.system()} {platform.release().split('-')[0]} {platform.machine()}"


def cpu_count() -> int:
    """Processors that this process may use; a container often has fewer than the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0


def memory_bytes() -> int:
    """Memory of the machine."""
    return int(psutil.virtual_memory().total)
