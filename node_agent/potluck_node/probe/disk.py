"""The disk that models are kept on."""

from __future__ import annotations

import shutil
from pathlib import Path


def disk_free_bytes(folder: Path) -> int:
    """Free space where a folder is, or will be: its nearest parent that exists answers for it."""
    present = folder.absolute()
    while not present.exists():
        present = present.parent
    return shutil.disk_usage(present).free
