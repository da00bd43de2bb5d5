"""Which CUDA an engine's environment was built for, by the file in which PyTorch wrote that down.

Decides where that stands. It must not import the engine, nor run its interpreter, nor know what a driver has to offer.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

_BUILT_FOR: Final = re.compile(r"^cuda\b[^=\n]*=\s*(?:None|['\"](?P<version>\d{1,3}(?:\.\d{1,3}){0,2})['\"])", re.MULTILINE)


def cuda_of(python: Path) -> str | None:
    """Such as "13.0", of the environment of an interpreter; empty: it was built without CUDA; None: nothing there tells."""
    try:
        for told in python.parent.parent.glob("lib*/python3*/site-packages/torch/version.py"):
            if found := _BUILT_FOR.search(told.read_text(errors="replace")):
                return found["version"] or ""
    except OSError:
        pass
    return None
