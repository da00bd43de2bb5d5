"""Which folder an agent keeps its models in: the cache, or one below it while another agent of this machine has the cache.

Decides that no two agents ever share one: each makes room and clears away by its own wishes alone, and would take the other's files. It
must not know what is kept there.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from potluck_protocol.errors import ErrorCode, PotluckError

AGENTS_MAX: Final = 64
"""On one cache at the same time."""
_LOCK: Final = "lock"


@contextmanager
def own_folder(cache: Path) -> Iterator[Path]:
    """Holds a folder for this process: the cache, else `agent-2` in it, else `agent-3`, and so on.

    Raises:
        PotluckError: ALREADY_EXISTS where all of them are taken.
        OSError: the cache cannot be written.
    """
    for folder in (cache, *(cache / f"agent-{number}" for number in range(2, AGENTS_MAX + 1))):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            continue
        try:
            yield folder
        finally:
            os.close(descriptor)
        return
    text = f"{AGENTS_MAX} agents keep their models in {cache}; stop one, or give this one a folder of its own with --cache-dir."
    raise PotluckError(ErrorCode.ALREADY_EXISTS, text)
