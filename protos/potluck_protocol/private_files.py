"""The small files that both sides keep: keys, certificates, states.

Decides that a reader finds such a file whole or not at all, that only its owner is one, and what counts as damaged. It must not know what
is in it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from pathlib import Path
from typing import Any


def write_private(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Puts a file (0600) in the place of whatever was there, in one step.

    Args:
        path: where; its folder exists.
        content: all of it.
        durable: the file outlives a power cut once this returns. False for what means nothing after a crash.

    Raises:
        OSError: the folder cannot be written, or the disk is full; what was there still is.
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            if os.geteuid() == 0:
                # A command under sudo: the file is of those whose folder it is, or they could not read it. A container may not know them.
                folder = path.parent.stat()
                with contextlib.suppress(OSError):
                    os.fchown(descriptor, folder.st_uid, folder.st_gid)
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    if durable:
        sync_to_disk(path.parent)


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON, or nested deeper than the parser goes; for people, without the file's name.
    """
    try:
        return json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None


def sync_to_disk(path: Path) -> None:
    """Makes a file, or a folder's list of names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
