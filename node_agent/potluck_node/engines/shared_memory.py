"""A launcher's own folder, and in it the names of the memory that its engine's processes share, so that none of it stays.

Named shared memory is a file of /dev/shm, and stays when nobody is left to unlink it: SIGKILL to all of an engine's processes is enough.
Decides what is provably an engine's: what a process of its group has mapped, and what was not there before the engine was. It is written
down as it is seen, by name, device and inode, in a folder whose record the launcher keeps locked for as long as it lives. Where the lock is
free the launcher is dead, however it died, and the next launcher or the agent frees what the record says. It must not know what an engine
keeps there, nor end processes.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Final

FOLDER_PREFIX: Final = "potluck-engine-"
RECORD_NAME: Final = "shared-memory"
RECORD_BYTES_MAX: Final = 1024 * 1024
_SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108 - where Linux keeps it, not a place for files
_BOOT: Final = Path("/proc/sys/kernel/random/boot_id")
_INODE_COLUMN: Final = 4
"""Of /proc/PID/maps. It says which file is meant; of a semaphore, the path there is a name that it had for a moment."""


@dataclass(frozen=True, slots=True)
class _Segment:
    name: str
    device: int
    inode: int


class EngineFolder:
    """Made before the engine is, and removed after it; only the user may look into it."""

    def __init__(self) -> None:
        self._not_ours = {segment.inode for segment in _segments()}
        self._noted: dict[int, _Segment] = {}
        """By inode."""
        self.path = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX))
        draft = self.path / "draft"
        # Unbuffered: a signal's handler may write here in the middle of a write.
        self._record = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._record, fcntl.LOCK_EX)
        self._write(_boot())
        # Under its name it is locked from its first moment on.
        draft.rename(self.path / RECORD_NAME)

    def note(self, process_ids: Iterable[int]) -> None:
        """What these processes share now belongs to the engine."""
        inodes = _mapped_inodes(process_ids) - self._not_ours - self._noted.keys()
        for segment in _segments() if inodes else ():
            if segment.inode in inodes:
                self._noted[segment.inode] = segment
                self._write(json.dumps(astuple(segment)))

    def remove(self) -> None:
        """Frees what was noted; the engine is gone."""
        _free(tuple(self._noted.values()))
        shutil.rmtree(self.path, ignore_errors=True)

    def _write(self, line: str) -> None:
        # On a full disk the engine is still cleaned up after, only not if this process is killed.
        with contextlib.suppress(OSError):
            os.write(self._record, line.encode() + b"\n")


def free_what_the_dead_left() -> None:
    """Frees the memory, and removes the folders, of this user's launchers that did not live to do it."""
    for folder in Path(tempfile.gettempdir()).glob(f"{FOLDER_PREFIX}*"):
        # What others made to look like a record is none; of one that another process is removing too, nothing is left to do.
        with contextlib.suppress(OSError):
            status = folder.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
                continue
            with os.fdopen(os.open(folder / RECORD_NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)) as record:
                fcntl.flock(record, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: it lives
                boot, *lines = record.read(RECORD_BYTES_MAX).split("\n")
                if boot == _boot():
                    _free(_noted_in(lines))
                shutil.rmtree(folder, ignore_errors=True)


def _noted_in(lines: Iterable[str]) -> Iterator[_Segment]:
    for line in lines:
        with contextlib.suppress(ValueError, TypeError):  # the last one may have been cut off
            yield _Segment(*json.loads(line))


def _free(segments: Iterable[_Segment]) -> None:
    wanted = set(segments)
    for segment in _segments() if wanted else ():
        if segment in wanted:
            with contextlib.suppress(OSError):
                (_SHARED_MEMORY / segment.name).unlink()


def _segments() -> Iterator[_Segment]:
    """Everything of this user's there is; nothing where the system keeps shared memory elsewhere."""
    with contextlib.suppress(OSError), os.scandir(_SHARED_MEMORY) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                status = entry.stat(follow_symlinks=False)
                if stat.S_ISREG(status.st_mode) and status.st_uid == os.getuid():
                    yield _Segment(entry.name, status.st_dev, status.st_ino)


def _mapped_inodes(process_ids: Iterable[int]) -> set[int]:
    found: set[int] = set()
    for process_id in process_ids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{process_id}/maps").read_text().splitlines():
                if f"{_SHARED_MEMORY}/" in line:
                    found.add(int(line.split()[_INODE_COLUMN]))
    return found


def _boot() -> str:
    """Which start of the machine this is: what is shared does not outlive it, and the folder may."""
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return ""
