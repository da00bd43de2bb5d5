"""`python -m potluck.tethered …`: the `potluck` command as a child that does not outlive its parent.

Decides that the kernel sends SIGTERM to this process when its parent goes, however it went, so that a killed `potluck up` leaves nothing
running. It must not know what the command does. On systems other than Linux the parent's own clearing up is all there is.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import Final

from potluck.command import main

PARENT_VARIABLE: Final = "POTLUCK_PARENT_PID"
_PR_SET_PDEATHSIG: Final = 1


def tie_to_parent() -> None:
    """From now on this process gets SIGTERM when its parent goes; exits at once if it is gone already."""
    parent_pid = int(os.environ.pop(PARENT_VARIABLE))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent_pid:
        sys.exit(1)


if __name__ == "__main__":
    tie_to_parent()
    main()
