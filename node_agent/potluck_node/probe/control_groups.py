"""The control groups that this process lives in, and what they leave it of the machine.

A container, a systemd unit or a batch system limits memory and processor time by them; what the machine has beyond is not this node's.
Reads both versions of the kernel's interface, and every group from the process's own up to the root: the tightest limit holds. It must
not know engines.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_ROOT: Final = Path("/sys/fs/cgroup")
_MEMBERSHIP: Final = Path("/proc/self/cgroup")
_UNLIMITED_BYTES: Final = 1 << 60
"""Version 1 writes "no limit" as the greatest number that it has, rounded to a page."""
_MEMORY_FILES: Final = (
    ("memory.max", "memory.current", "inactive_file"),
    # Not a wall, but who goes beyond it is slowed down until nothing moves; systemd's MemoryHigh= sets it.
    ("memory.high", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""By version: the limit, what is used, and the part of this, in `memory.stat`, that the kernel takes back when memory is wanted."""
_KILL_FILES: Final = ("memory.events", "memory.oom_control")
"""By version: what the kernel killed here for want of memory, the group's or the whole machine's."""


@dataclass(frozen=True, slots=True)
class ControlGroups:
    """Where to read.

    Attributes:
        root: where the kernel's interface is mounted.
        membership: which groups this process is in.
    """

    root: Path = _ROOT
    membership: Path = _MEMBERSHIP

    def memory_limit_bytes(self) -> int | None:
        """The most memory that this process and its neighbours in a group may use together; None: no group says."""
        return min((limit for limit, _ in self._memory()), default=None)

    def memory_free_bytes(self) -> int | None:
        """What is left of it; None: no group has a limit."""
        return min((max(0, limit - held) for limit, held in self._memory()), default=None)

    def processor_limit(self) -> float | None:
        """Seconds of processor time a second; None: no group has a limit."""
        return min((share for folder in self._folders("cpu") if (share := _processor_share(folder)) is not None), default=None)

    def memory_kill_count(self) -> int | None:
        """How many processes the kernel has killed for want of memory in the nearest group that counts them; None: none does."""
        counts = (_statistic(folder / name, "oom_kill") for folder in self._folders("memory") for name in _KILL_FILES)
        return next((count for count in counts if count is not None), None)

    def _memory(self) -> Iterator[tuple[int, int]]:
        for folder in self._folders("memory"):
            for limit_file, used_file, reclaimable in _MEMORY_FILES:
                limit_bytes = _number(folder / limit_file)
                if limit_bytes is not None and 0 <= limit_bytes < _UNLIMITED_BYTES:
                    held_bytes = (_number(folder / used_file) or 0) - (_statistic(folder / "memory.stat", reclaimable) or 0)
                    yield limit_bytes, max(0, held_bytes)

    def _folders(self, controller: str) -> Iterator[Path]:
        # A group may have any name that a folder may have.
        for line in _text(self.membership).split("\n"):
            fields = line.split(":", 2)
            if len(fields) != 3:
                continue
            _, controllers, path = fields
            if controllers and controller not in controllers.split(","):
                continue
            mount = self.root / controller if controllers else self.root
            # A container may be told the path that its group has outside: then only the mount itself is there, and is its own.
            folder = Path(os.path.normpath(mount / path.lstrip("/")))
            yield from (place for place in (folder, *folder.parents) if place.is_relative_to(mount))


def _processor_share(folder: Path) -> float | None:
    quota, _, period = _text(folder / "cpu.max").partition(" ")
    if not quota:
        quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
    # "max" in version 2, and -1 in version 1, say that there is none.
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() and int(period) else None


def _statistic(file: Path, name: str) -> int | None:
    for line in _text(file).splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.isdecimal():
            return int(value)
    return None


def _number(file: Path) -> int | None:
    text = _text(file)
    return int(text) if text.isdecimal() else None


def _text(file: Path) -> str:
    """What the file says; "" where there is none, as in the root of version 2."""
    try:
        return os.fsdecode(file.read_bytes()).strip("\n")
    except OSError:
        return ""
