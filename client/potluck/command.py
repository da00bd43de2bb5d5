"""Where the `potluck` command is entered.

Decides what Ctrl-C does to a command that is still being imported, which takes most of a second, what gRPC reads when it is imported, and
that no other file ever stands where a standard stream would. It imports nothing heavy before that is settled, and must not know the
sub-commands; `commands.root` does.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Final, NoReturn

# Before the first import of grpc, which reads it then. What grpc has to say of a lost connection is in the errors; its raw log lines are
# not for people. Child processes inherit it.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
# Its older loop reads a socket in the thread that waits for it; the newer one hands each message through one thread more. One message each
# way, with TLS, took 97 instead of 164 us, and two thirds of the processor time (1.85.1, 2026-11-23).
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")

STANDARD_DESCRIPTOR_MAX: Final = 2
"""Standard error's; input and output have the two before it."""
EXIT_INTERRUPTED: Final = 128 + signal.SIGINT
"""What a shell reports of a command that Ctrl-C ended."""


def main() -> NoReturn:
    """Runs the command line of this process and exits with its code."""
    _keep_standard_places()
    # A shell without job control ignores SIGINT for what it starts in the background; that stays so.
    interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    try:
        if interruptible:
            signal.signal(signal.SIGINT, _end_at_once)
        from potluck.commands.root import build_app, run  # noqa: PLC0415 - what takes long, and what Ctrl-C may end

        app = build_app(sys.argv[1] if len(sys.argv) > 1 else None)
        if interruptible:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        run(app)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


def _keep_standard_places() -> None:
    """Opens nothing where a standard stream is closed. Else the next file gets its number, or an event loop's own, which ends us."""
    descriptor = os.open(os.devnull, os.O_RDWR)
    while descriptor <= STANDARD_DESCRIPTOR_MAX:
        os.set_inheritable(descriptor, True)
        descriptor = os.open(os.devnull, os.O_RDWR)
    os.close(descriptor)


def _end_at_once(_number: int, _frame: object) -> NoReturn:
    """Without an exception, which libraries catch, or report with a traceback, where it meets their imports. Nothing is under way yet."""
    os._exit(EXIT_INTERRUPTED)
