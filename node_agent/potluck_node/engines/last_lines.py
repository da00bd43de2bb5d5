"""What engines that had served wrote last, kept for their owner's eyes, where he asked for it.

Decides where such lines lie: in one file for each kind of engine, replaced at its next failure, and gone if it said nothing then. They may
quote requests, so nobody is told more than the file's name, and without the owner's setting there is none. It must not know processes, nor
why an engine failed.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

import structlog

from potluck_protocol.private_files import write_private

FOLDER_NAME: Final = "engine-lines"
"""In the node's state folder, and gone with it."""

_log = structlog.get_logger()


def keep(folder: Path, kind: str, text: str) -> None:
    """Puts the last lines of an engine (0600) in the place of those that were there; a disk that cannot take them is logged."""
    path = folder / f"{kind}.txt"
    try:
        if not text.strip():
            path.unlink(missing_ok=True)
            return
        folder.mkdir(mode=0o700, exist_ok=True)
        write_private(path, text.encode() + b"\n", durable=False)
    except OSError as error:
        _log.warning("engine_lines_not_kept", path=str(path), reason=error.strerror or type(error).__name__)
    else:
        _log.warning("engine_lines_kept", path=str(path))


def kept(state_folder: Path) -> list[Path]:
    """The files that are there."""
    return sorted((state_folder / FOLDER_NAME).glob("*.txt"))


def forget(state_folder: Path) -> None:
    """Removes all: the owner does not want any."""
    shutil.rmtree(state_folder / FOLDER_NAME, ignore_errors=True)
