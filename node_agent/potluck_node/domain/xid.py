"""What the driver's fault numbers mean to an owner.

Decides which faults are a program's and which are the card's, its slot's or its power's. Source: NVIDIA's Xid catalogue
(docs.nvidia.com/deploy/xid-errors), whose immediate action for the first kind is to start the program again, and for 79 NVIDIA's advice on
github.com/NVIDIA/open-gpu-kernel-modules/issues/507.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class XidMeaning:
    """One kind of fault."""

    what: str
    of_hardware: bool
    """Whether starting the program again is not enough."""
    fix: str


_PROGRAM: Final = "if it comes again with one model only, report that model; with any, update the driver"
_CARD: Final = "restart the machine; if it comes again, test the card alone in another slot"

XID_MEANINGS: Final = {
    13: XidMeaning("a program's kernel failed", of_hardware=False, fix=_PROGRAM),
    31: XidMeaning("a program touched memory that was not its own", of_hardware=False, fix=_PROGRAM),
    43: XidMeaning("a program's work was stopped after a fault", of_hardware=False, fix=_PROGRAM),
    45: XidMeaning("the work of a program that ended was cleared away", of_hardware=False, fix=_PROGRAM),
    69: XidMeaning("a program sent the card what it does not know", of_hardware=False, fix=_PROGRAM),
    48: XidMeaning("memory error that could not be corrected", of_hardware=True, fix=_CARD),
    61: XidMeaning("a controller inside the card stopped", of_hardware=True, fix=_CARD),
    62: XidMeaning("a controller inside the card halted", of_hardware=True, fix=_CARD),
    74: XidMeaning("NVLink error", of_hardware=True, fix="power off, clean and reseat the NVLink bridge"),
    79: XidMeaning(
        "the card fell off the bus",
        of_hardware=True,
        fix="check its power cables, riser and heat; to tell power from the rest: sudo nvidia-smi -lgc 300,1500",
    ),
    119: XidMeaning(
        "the card's own processor did not answer the driver", of_hardware=True, fix="update the driver and restart the machine"
    ),
    120: XidMeaning("the card's own processor failed", of_hardware=True, fix="update the driver and restart the machine"),
}
UNLISTED: Final = XidMeaning("a fault that this table does not list", of_hardware=False, fix="look the number up in NVIDIA's Xid catalogue")


def meaning(xid: int) -> XidMeaning:
    """What a number says."""
    return XID_MEANINGS.get(xid, UNLISTED)
