"""A `potluck` child that does not outlive its parent.

Decides that the kernel sends SIGTERM to this process when its parent goes, however it went, so that a killed `potluck up` leaves nothing
running. It must not know what the command does. On systems other than Linux the parent's own clearing up is all there is.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import Final

PARENT_VARIABLE: Final = "POTLUCK_PARENT_PID"
"""Set by a parent that wants its child to end with it."""
_PR_SET_PDEATHSIG: Final = 1


def tie_to_parent() -> None:
    """From now on this process gets SIGTERM when its parent goes, if the parent asked for it; exits at once if it is gone already."""
    parent_pid = os.environ.pop(PARENT_VARIABLE, "")
    if not parent_pid:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if str(os.getppid()) != parent_pid:
        sys.exit(1)
