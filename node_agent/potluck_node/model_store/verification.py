"""Whether a file is the one the catalogue pinned, and whether its content was found good.

Decides when a file has to be hashed again: one that was hashed once is known by its size, times of change and place on the disk, so a
second start is fast. Any later write brings the full hash back: the kernel itself sets `st_ctime`, and `os.utime` does not reach it. So
does a write through another hard link, for the links of a file share all that. A link that comes or goes looks the same, and another agent
of this machine may make one at any time: a file that changed while it was hashed is hashed again, a few times, and only its bytes count.
What the same bytes have passed under the same name, they have passed for good. Only a plain file can be the pinned one: what a symbolic
link, a device or a pipe leads to may be another thing a moment later.

It must not know where files come from, nor what is looked for in them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Event
from typing import Final

from potluck_protocol.private_files import read_json, write_private

PIECE_BYTES: Final = 1024 * 1024
TRIES_MAX: Final = 5
"""For a file that changes while it is looked at. Each agent that shares it links it once, and a file that is written to does not end."""
_KINDS: Final = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFBLK: "a device",
    stat.S_IFCHR: "a device",
}


NAMES_KEPT: Final = 16
CHECKS_KEPT: Final = 16
"""What a catalogue that calls its files otherwise every day leaves behind is bounded."""


class StoppedError(Exception):
    """The work was asked to stop."""


class FileMismatchError(Exception):
    """A file that is not what the catalogue says; its text is one line for people."""


class NotPlainError(FileMismatchError):
    """What should be a file is a link, a folder, a device or a pipe."""


def check_plain(root: Path, file_name: str) -> None:
    """Returns when the name leads to a plain file without a symbolic link on its way from `root`; raises NotPlainError, OSError.

    `root` itself is the owner's choice, and may be reached by links.
    """
    path = root
    for part in Path(file_name).parts:
        path /= part
        mode = path.lstat().st_mode
        wanted = stat.S_ISREG if path == root / file_name else stat.S_ISDIR
        if not wanted(mode):
            kind = _KINDS.get(stat.S_IFMT(mode), "a file")
            raise NotPlainError(f"{path.relative_to(root)} is {kind}, and only plain files are loaded: put the file itself in its place")


def sha256_of(path: Path, stop: Event) -> str:
    """The file's hash, hexadecimal; raises OSError, or StoppedError soon after `stop` is set."""
    digest = hashlib.sha256()
    # Neither a link is followed nor a pipe waited for that took the file's place just now.
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:  # noqa: PTH123 - flags
        while piece := file.read(PIECE_BYTES):
            if stop.is_set():
                raise StoppedError
            digest.update(piece)
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class _Stamp:
    mark: list[int]
    """The file as it was when its hash was right."""
    checks: list[str]
    """The checks that these bytes have passed."""


_NEVER: Final = _Stamp([], [])


class Stamps:
    """What was verified before: one small file for each hash, in it a stamp for each name that a file of this hash goes by."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def verify(self, root: Path, file_name: str, sha256: str, size_bytes: int, stop: Event) -> None:
        """Returns when the file is the pinned one.

        Raises:
            FileMismatchError: it is another file, or none, or changed again and again.
            OSError: it cannot be read.
            StoppedError: `stop` was set.
        """
        check_plain(root, file_name)
        path = root / file_name
        stamp = self._read(sha256).get(file_name, _NEVER)
        for _ in range(TRIES_MAX):
            mark = _mark(path)
            if mark[0] != size_bytes:
                raise FileMismatchError(f"{path.name} has {mark[0]} bytes, and the catalogue says {size_bytes}")
            if stamp.mark == mark:
                return
            actual = sha256_of(path, stop)
            if actual != sha256:
                raise FileMismatchError(f"{path.name} has the sha256 {actual}, and the catalogue says {sha256}")
            if _mark(path) == mark:
                # The same bytes under the same name: what they passed before, they pass.
                self._write(sha256, file_name, replace(stamp, mark=mark))
                return
        raise FileMismatchError(f"{path.name} was written to whenever it was verified, {TRIES_MAX} times")

    def has_passed(self, file_name: str, sha256: str, check: str) -> bool:
        """Whether a file of these bytes has passed the check under this name."""
        return check in self._read(sha256).get(file_name, _NEVER).checks

    def note_passed(self, root: Path, file_name: str, sha256: str, check: str) -> bool:
        """The file has passed; False, and nothing is noted, where it changed since it was verified."""
        stamp = self._read(sha256).get(file_name, _NEVER)
        if stamp.mark != _mark(root / file_name):
            return False
        self._write(sha256, file_name, replace(stamp, checks=[*stamp.checks, check][-CHECKS_KEPT:]))
        return True

    def note_use(self, sha256: str) -> None:
        """The file is used now; see `used_at`."""
        os.utime(self._folder / f"{sha256}.json")

    def used_at(self, sha256: str) -> float:
        """When the file was last used, in seconds of the disk's clock; 0 where that is not known."""
        try:
            return (self._folder / f"{sha256}.json").stat().st_mtime
        except OSError:
            return 0.0

    def forget(self, sha256: str) -> None:
        """The file of this hash is gone."""
        with contextlib.suppress(OSError):
            (self._folder / f"{sha256}.json").unlink()

    def _read(self, sha256: str) -> dict[str, _Stamp]:
        try:
            stamps = read_json(self._folder / f"{sha256}.json")
            return {name: _Stamp(**stamp) for name, stamp in stamps.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def _write(self, sha256: str, file_name: str, stamp: _Stamp) -> None:
        others = {name: other for name, other in self._read(sha256).items() if name != file_name}
        latest = dict([*others.items(), (file_name, stamp)][-NAMES_KEPT:])
        content = json.dumps({name: asdict(each) for name, each in latest.items()}).encode()
        self._folder.mkdir(parents=True, exist_ok=True)
        write_private(self._folder / f"{sha256}.json", content, durable=False)


def _mark(path: Path) -> list[int]:
    status = path.lstat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev]
