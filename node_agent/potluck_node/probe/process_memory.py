"""What processes hold of the machine's memory."""

from __future__ import annotations

from collections.abc import Collection

import psutil


def resident_bytes(process_ids: Collection[int]) -> int | None:
    """What these processes hold together; None where the system hides it, or none of them lives. Blocks; never raises.

    A page that several processes share counts in parts (Linux's "proportional set size"), so that a model which two of them have mapped
    counts once. Elsewhere only what is a process's own counts. Walking the page tables takes some milliseconds for each GiB.
    """
    found: list[int] = []
    for pid in process_ids:
        try:
            told = psutil.Process(pid).memory_full_info()
        except psutil.NoSuchProcess:
            continue
        except (psutil.Error, OSError):
            return None
        found.append(int(getattr(told, "pss", told.uss)))
    return sum(found) if found else None
