"""Who has a coordinator's data folder: one process at a time.

Decides by a lock that ends with its process. It must not know what is done in the folder.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from potluck_protocol.errors import ErrorCode, PotluckError

if TYPE_CHECKING:
    from potluck_coordinator.settings import Settings


def unusable(folder: Path, error: OSError) -> PotluckError:
    """What to say of a folder that cannot be made, read or written."""
    return PotluckError(
        ErrorCode.COORDINATOR_UNAVAILABLE, f"Cannot use the data folder {folder}: {error.strerror}; choose another with --data-dir."
    )


@contextmanager
def locked(settings: Settings) -> Iterator[None]:
    """Holds the data folder, which is there, for this process; raises PotluckError(COORDINATOR_UNAVAILABLE) where a coordinator has it."""
    try:
        lock = settings.lock_file.open("a")
    except OSError as error:
        raise unusable(settings.data_dir, error) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise PotluckError(
                ErrorCode.COORDINATOR_UNAVAILABLE,
                f"Another coordinator runs on {settings.data_dir}; stop it first, or name another folder with --data-dir.",
            ) from error
        yield
