"""Faults of cards that the kernel's log still holds.

Decides which lines count and how much of the log is read. It must not know what a fault means: `domain.xid` does.

The log reaches back to the start of the machine, or to where it ran over. Reading it needs a right that users often lack.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from potluck_node.domain.hardware import XidEvent

KERNEL_LOG: Final = Path("/dev/kmsg")
RECORDS_MAX: Final = 50_000
"""Read at one look; kernels keep fewer."""
_RECORD_BYTES_MAX: Final = 8 * 1024
"""The kernel refuses to give a record to a reader with less room."""
_XID: Final = re.compile(r"NVRM: Xid \((?:PCI:)?([0-9a-fA-F]{4}:[0-9a-fA-F]{2}:[0-9a-fA-F]{2})[^)]*\): (\d{1,4})\b")


def xid_events(lines: Iterable[str]) -> tuple[XidEvent, ...]:
    """The faults in a log, oldest first, as in "NVRM: Xid (PCI:0000:01:00): 79, pid=1, name=x, GPU has fallen off the bus."."""
    return tuple(XidEvent(int(found[2]), f"{found[1].lower()}.0") for line in lines if (found := _XID.search(line)))


def read_xids(log: Path = KERNEL_LOG) -> tuple[XidEvent, ...]:
    """The faults since the machine was started; raises OSError where the log may not be read."""
    return xid_events(_records(log))


def _records(log: Path) -> Iterator[str]:
    descriptor = os.open(log, os.O_RDONLY | os.O_NONBLOCK)
    try:
        for _ in range(RECORDS_MAX):
            try:
                record = os.read(descriptor, _RECORD_BYTES_MAX)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.EPIPE:
                    raise
                # The record was overwritten before it was read; the next read gives the oldest that is left.
                continue
            if not record:
                return
            yield record.decode(errors="replace")
    finally:
        os.close(descriptor)
