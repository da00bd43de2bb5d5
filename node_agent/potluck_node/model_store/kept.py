"""The files that this node fetched and keeps: where each lies, and which of them make room for others.

Decides that the longest unused goes first, and nothing that is wished. It must not know where files come from, nor whether they are right.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import structlog

from potluck_node.model_store import assembled
from potluck_node.model_store.download import FetchFailedError, folder_bytes
from potluck_node.model_store.verification import Stamps
from potluck_protocol.private_files import sync_to_disk
from potluck_protocol.values import ModelFile, PinnedFile

_log = structlog.get_logger()


class KeptFiles:
    """The cache folder, as `store` describes it.

    Args:
        folder: the cache; made 0700 where it is missing.
        stamps: when each file was last used.
        disk_budget_bytes: for everything kept; None: as much as is free.
        free_bytes: what is free on a folder's disk.
    """

    def __init__(self, folder: Path, stamps: Stamps, *, disk_budget_bytes: int | None, free_bytes: Callable[[Path], int]) -> None:
        self._models, self._staging = folder / "models", folder / "staging"
        self.folders, self.borrowed = folder / "folders", folder / "borrowed"
        self._stamps = stamps
        self._disk_budget_bytes = disk_budget_bytes
        self._free_bytes = free_bytes
        for each in (folder, self._models, self._staging, self.folders, self.borrowed):
            each.mkdir(mode=0o700, parents=True, exist_ok=True)

    def home(self, pinned: PinnedFile) -> tuple[Path, str]:
        """The folder in which a file of this hash is kept, and its name there."""
        return self._models / pinned.sha256, Path(pinned.file_name).name

    def find(self, pinned: PinnedFile) -> Path | None:
        """The file, kept under this name; a model that calls the same bytes otherwise shares them."""
        folder, name = self.home(pinned)
        if (folder / name).is_file():
            return folder / name
        others = [path for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
        if not others or not assembled.link_into(others[0], folder, name):
            return None
        return folder / name

    def staging(self, pinned: PinnedFile) -> Path:
        """Where the file is fetched into."""
        folder = self._staging / pinned.sha256
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder

    def take_in(self, fetched: Path, pinned: PinnedFile) -> Path:
        """Moves a whole file to where it is kept; what was staged for it is gone."""
        folder, name = self.home(pinned)
        fetched.chmod(0o400)
        sync_to_disk(fetched)
        folder.mkdir(mode=0o700, exist_ok=True)
        fetched.replace(folder / name)
        sync_to_disk(folder)
        return folder / name

    def unstage(self, pinned: PinnedFile) -> None:
        """What was staged for the file is of no use any more."""
        shutil.rmtree(self._staging / pinned.sha256, ignore_errors=True)

    def drop(self, sha256: str) -> None:
        """The file of this hash goes."""
        self._stamps.forget(sha256)
        shutil.rmtree(self._models / sha256, ignore_errors=True)
        shutil.rmtree(self._staging / sha256, ignore_errors=True)

    def forget_borrowed(self, wished: frozenset[ModelFile]) -> None:
        """Links to the owner's files go as soon as no model that is wished has them: they would keep the bytes of files deleted since."""
        keys = {assembled.set_key(model) for model in wished}
        for folder in self.borrowed.iterdir():
            if folder.name not in keys:
                assembled.remove(folder)

    def make_room(self, missing: Sequence[PinnedFile], wished: frozenset[ModelFile], *, factor: float) -> None:
        """Drops what may be dropped, the longest unused first, until the files fit.

        Args:
            missing: what is to come.
            wished: models whose files stay.
            factor: the free space that fetching takes, in sizes of the files.

        Raises:
            FetchFailedError: they do not fit.
        """
        kept = {pinned.sha256 for model in wished for pinned in model.files} | {pinned.sha256 for pinned in missing}
        for staged in self._staging.iterdir():
            if staged.name not in kept:
                shutil.rmtree(staged, ignore_errors=True)
        size_bytes = sum(pinned.size_bytes for pinned in missing)
        while missing:
            staged_bytes = sum(folder_bytes(self._staging / pinned.sha256) for pinned in missing)
            missing_bytes = int(size_bytes * factor) - staged_bytes - self._free_bytes(self._models)
            if self._disk_budget_bytes is not None:
                missing_bytes = max(missing_bytes, self._taken_bytes() + size_bytes - self._disk_budget_bytes)
            if missing_bytes <= 0:
                return
            if not self._drop_one(kept, wished):
                in_use = ", and every model kept there is in use" if any(self._models.iterdir()) else ""
                raise FetchFailedError(
                    f"{missing[0].file_name} does not fit: {missing_bytes} bytes of disk are missing{in_use}; "
                    "free some, or give the node another --cache-dir"
                )

    def _drop_one(self, kept: set[str], wished: frozenset[ModelFile]) -> bool:
        """Folders first: they are made again in no time, and hold the files in them on the disk."""
        keys = {assembled.set_key(model) for model in wished}
        idle = [folder for folder in self.folders.iterdir() if folder.name not in keys]
        if idle:
            for folder in idle:
                assembled.remove(folder)
            return True
        droppable = [path.name for path in self._models.iterdir() if path.name not in kept]
        if not droppable:
            return False
        oldest = min(droppable, key=self._stamps.used_at)
        _log.info("model_dropped", sha256=oldest, reason="room for another")
        self.drop(oldest)
        return True

    def _taken_bytes(self) -> int:
        """Every file once, whatever its names; in a folder of links only what has no other name, and so is a copy."""
        sizes: dict[tuple[int, int], int] = {}
        for top in (self._models, self.folders, self.borrowed):
            for root, _, names in os.walk(top):
                for name in names:
                    status = (Path(root) / name).lstat()
                    if top is self._models or status.st_nlink == 1:
                        sizes[status.st_dev, status.st_ino] = status.st_size
        return sum(sizes.values())
