"""Ends a child process when its parent dies, however the parent died.

The parent holds the child's stdin open and never writes; the kernel closes it with the parent. A thread waits for that end. On Linux the
kernel is asked for a signal as well, because native code that holds the interpreter's lock (a model being loaded) keeps the thread from
running.

It must not know what the child does.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import runpy
import signal
import sys
import threading
from typing import Final

PARENT_GONE_EXIT_STATUS: Final = 75
_PR_SET_PDEATHSIG: Final = 1
_READ_BYTES: Final = 4096


def exit_with_parent() -> None:
    """From now on, this process exits when its stdin ends or its parent dies."""
    threading.Thread(target=_exit_at_end_of_stdin, name="lifeline", daemon=True).start()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _exit_at_end_of_stdin() -> None:
    with contextlib.suppress(OSError):
        while os.read(0, _READ_BYTES):
            pass
    os._exit(PARENT_GONE_EXIT_STATUS)


def main() -> None:
    """`python -m potluck_node.lifeline MODULE ARGUMENT…` runs another package's module so that it dies with its parent."""
    exit_with_parent()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
