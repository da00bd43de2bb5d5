"""Machines with less memory than this one: control groups of the kernel, made by the test and removed by it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path("/sys/fs/cgroup")
_VERSION_1 = ROOT / "memory"


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """One group."""

    folder: Path

    @property
    def wrap(self) -> tuple[str, ...]:
        """What to put before a command so that it, and all that it starts, runs within the limit."""
        return ("sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.folder / "cgroup.procs"))

    @property
    def out_of_memory_kill_count(self) -> int:
        """Processes that the kernel has killed here."""
        for name in ("memory.events.local", "memory.events", "memory.oom_control"):
            for line in _lines(self.folder / name):
                key, _, value = line.partition(" ")
                if key == "oom_kill":
                    return int(value)
        raise AssertionError(f"the kernel does not count what it kills in {self.folder}")


def available() -> bool:
    """Whether this process may make such groups."""
    try:
        with memory_limit("probe", 1 << 30):
            return True
    except OSError:
        return False


@contextmanager
def memory_limit(name: str, limit_bytes: int) -> Iterator[MemoryLimit]:
    """A group of this process's own; what still runs in it at the end of the block is killed.

    Raises:
        OSError: the kernel has no such groups, or this process may not make one.
    """
    folder = _new_folder(f"potluck-{os.getpid()}-{name}")
    try:
        file = folder / ("memory.limit_in_bytes" if folder.is_relative_to(_VERSION_1) else "memory.max")
        file.write_text(str(limit_bytes))
        yield MemoryLimit(folder)
    finally:
        _empty(folder)
        folder.rmdir()


def _new_folder(name: str) -> Path:
    if (_VERSION_1 / "memory.limit_in_bytes").exists():
        folder = _VERSION_1 / name
    else:
        (ROOT / "cgroup.subtree_control").write_text("+memory")
        folder = ROOT / name
    folder.mkdir()
    return folder


def _empty(folder: Path) -> None:
    for _ in range(100):
        pids = [int(line) for line in _lines(folder / "cgroup.procs")]
        if not pids:
            return
        for pid in pids:
            with suppress(psutil.NoSuchProcess):
                psutil.Process(pid).kill()
        time.sleep(0.05)


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []
