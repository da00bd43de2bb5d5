"""What ends a command that holds something: whichever signal it is, it ends as Ctrl-C does, so that what is half made is cleared away.

Decides which signals these are. It must not know what is cleared away.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block by KeyboardInterrupt."""
    # What is ignored stays so: `nohup` asks for an end that no closed terminal brings.
    heard = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, signal.default_int_handler) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
