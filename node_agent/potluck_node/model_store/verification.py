"""Whether a file is the one the catalogue pinned.

Decides when a file has to be hashed again: a file that was hashed once is known by its size, times of change and place on the disk, so a
second start is fast. Any later write brings the full hash back: the kernel itself sets `st_ctime`, and `os.utime` does not reach it. It
must not know where files come from.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from threading import Event
from typing import Final

from potluck_protocol.private_files import write_private

PIECE_BYTES: Final = 1024 * 1024


class StoppedError(Exception):
    """The work was asked to stop."""


class FileMismatchError(Exception):
    """A file that is not what the catalogue says; its text is one line for people."""


def sha256_of(path: Path, stop: Event) -> str:
    """The file's hash, hexadecimal; raises OSError, or StoppedError soon after `stop` is set."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            if stop.is_set():
                raise StoppedError
            digest.update(piece)
    return digest.hexdigest()


class Stamps:
    """What was verified before, one small file for each hash."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def verify(self, path: Path, sha256: str, size_bytes: int, stop: Event) -> None:
        """Returns when the file is the pinned one.

        Raises:
            FileMismatchError: it is another file.
            OSError: it cannot be read.
            StoppedError: `stop` was set.
        """
        present_bytes = path.stat().st_size
        if present_bytes != size_bytes:
            raise FileMismatchError(f"{path.name} has {present_bytes} bytes, and the catalogue says {size_bytes}")
        mark = _mark(path)
        if self._read(sha256) == mark:
            return
        actual = sha256_of(path, stop)
        if actual != sha256:
            raise FileMismatchError(f"{path.name} has the sha256 {actual}, and the catalogue says {sha256}")
        if _mark(path) != mark:
            raise FileMismatchError(f"{path.name} was written to while it was verified")
        self._write(sha256, mark)

    def forget(self, sha256: str) -> None:
        """The file of this hash is gone."""
        with contextlib.suppress(OSError):
            (self._folder / f"{sha256}.json").unlink()

    def _read(self, sha256: str) -> list[object] | None:
        try:
            mark = json.loads((self._folder / f"{sha256}.json").read_bytes())
        except (OSError, ValueError):
            return None
        return mark if isinstance(mark, list) else None

    def _write(self, sha256: str, mark: list[object]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        write_private(self._folder / f"{sha256}.json", json.dumps(mark).encode(), durable=False)


def _mark(path: Path) -> list[object]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev]
