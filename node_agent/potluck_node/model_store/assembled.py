"""A folder that holds the files of one model and nothing else, for an engine that wants a folder.

Decides how a file gets into it: as a hard link to where it is kept, which takes no room and is the very file that was verified; as a copy
where the disk has no such links or the file lies on another. Never as a symbolic link: what that leads to can become another file. It must
not know why a file is wanted, nor verify it; whoever does looks at it through this folder.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from threading import Event
from typing import Final

from potluck_node.domain.model_source import FolderSource, parse_source
from potluck_node.model_store.verification import PIECE_BYTES, FileMismatchError, StoppedError
from potluck_protocol.values import ModelFile, PinnedFile

_NO_LINK: Final = frozenset({errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS})
"""Another disk, another owner's file under the kernel's `protected_hardlinks`, or a file system without links."""


def set_key(model: ModelFile) -> str:
    """One name for one set of pinned files. Where they are fetched from does not matter, in which folder of the owner's they lie does."""
    lines = sorted(f"{pinned.file_name}\0{pinned.sha256}\0{pinned.size_bytes}" for pinned in model.files)
    place = [model.source] if isinstance(parse_source(model.source), FolderSource) else []
    return hashlib.sha256("\n".join([*lines, *place]).encode()).hexdigest()


def forget_replaced(folder: Path, model: ModelFile, owners: Path) -> None:
    """Takes out of the folder what is no longer what lies in the owner's: the same file, or a copy of it as it is now."""
    for pinned in model.files:
        entry = folder / pinned.file_name
        here, there = _status(entry), _status(owners / pinned.file_name)
        if here is None or (there is not None and _place_or_time(here) & _place_or_time(there)):
            continue
        entry.parent.chmod(0o700)
        entry.unlink()


def check_no_strays(folder: Path, names: Iterable[str]) -> None:
    """Returns when nothing lies in the folder but the names and the folders on the way to them; raises FileMismatchError."""
    wanted = set(names)
    on_the_way = {str(parent) for name in wanted for parent in PurePosixPath(name).parents}
    for root, folders, files in os.walk(folder):
        below = Path(root).relative_to(folder)
        for entries, expected in ((folders, on_the_way), (files, wanted)):
            for entry in entries:
                if str(below / entry) not in expected:
                    raise FileMismatchError(f"{str(below / entry)!r} is in the model's folder, and is none of its files")


def link_into(source: Path, folder: Path, name: str) -> bool:
    """Puts another name for the source's file into the folder; False where this disk cannot, and nothing was put there."""
    target = _open_way(folder, name)
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno in _NO_LINK:
            return False
        raise
    return True


def copy_into(source: Path, folder: Path, pinned: PinnedFile, stop: Event) -> None:
    """Copies no more than the pinned size, with its times; raises StoppedError soon after `stop` is set, with nothing left behind."""
    target = _open_way(folder, pinned.file_name)
    # One byte more than pinned is enough to see that it is another file.
    left_bytes = pinned.size_bytes + 1
    with source.open("rb") as reading, target.open("xb") as writing:
        while not stop.is_set() and (piece := reading.read(min(PIECE_BYTES, left_bytes))):
            writing.write(piece)
            left_bytes -= len(piece)
    if stop.is_set():
        target.unlink()
        raise StoppedError
    shutil.copystat(source, target)
    target.chmod(0o400)


def close(folder: Path) -> None:
    """No engine adds to the folder by mistake."""
    for root, _, _ in os.walk(folder):
        Path(root).chmod(0o500)


def remove(folder: Path) -> None:
    """Removes the folder, closed or not; what cannot be removed stays, as on a disk that fails."""
    with contextlib.suppress(OSError):
        for root, _, _ in os.walk(folder):
            Path(root).chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _place_or_time(status: os.stat_result) -> set[tuple[int, int]]:
    """A link shares the first with its file, a copy the second."""
    return {(status.st_dev, status.st_ino), (status.st_size, status.st_mtime_ns)}


def _open_way(folder: Path, name: str) -> Path:
    way = folder
    for part in (None, *PurePosixPath(name).parent.parts):
        way = way if part is None else way / part
        way.mkdir(mode=0o700, exist_ok=True)
        way.chmod(0o700)
    return folder / name
