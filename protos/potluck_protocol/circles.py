"""How often Python looks for circles of garbage in a process that serves.

Decides for processes whose requests leave few circles behind, or none. It must not know what they serve.
"""

from __future__ import annotations

import gc
from typing import Final

YOUNG_OBJECTS_MAX: Final = 10_000
"""Made and not freed, before Python looks for circles among them; by default 700, and looking was a tenth of what a request cost."""


def look_rarely() -> None:
    """To be called when all is imported and built: that stays for good, and need not be looked through again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS_MAX, *gc.get_threshold()[1:])
