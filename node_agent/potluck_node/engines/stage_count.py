"""The weights that a stage of a group has loaded: where its workers leave their counts, and what they come to.

Decides only the form: a folder with a file of each worker's, named by its process, with the bytes that it loaded (`within_vllm` writes it).
Workers count when they have loaded, which for a stage that follows is after it was announced. It must not know what the count is for.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Final

FOLDER_NAME: Final = "weights"
"""In the engine's own folder."""
VARIABLE: Final = "POTLUCK_STAGE_WEIGHTS"
"""Tells the workers the folder."""
BYTES_MAX: Final = 1 << 50
"""A thousand TiB: what is more is no count."""


def counted_bytes(folder: Path) -> int | None:
    """All workers' counts so far; None where there is none."""
    counts = []
    with contextlib.suppress(OSError):
        for counted in folder.iterdir():
            if counted.name.isdigit():
                with contextlib.suppress(ValueError):
                    counts.append(int(counted.read_text()))
    total_bytes = sum(counts)
    return total_bytes if 0 < total_bytes <= BYTES_MAX else None
