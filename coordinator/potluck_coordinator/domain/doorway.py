"""How many nodes may stand at the door: who comes while too many wait is told when to come again.

Decides by how many wait. Those that wait are let in many at a time, so that waiting costs next to nothing, and each one sent away dials and
shakes hands once more: the bound is there for memory, and for a coordinator that is slower than its nodes are patient. It must not know
links or clocks.
"""

from __future__ import annotations

from typing import Final

WAITING_MAX: Final = 2048
COME_AGAIN_SECONDS: Final = 5.0
"""Agents add as much again by chance, so that not all come together."""


def come_again_seconds(waiting_count: int) -> float | None:
    """When one more should come again; None: it may wait here."""
    return None if waiting_count < WAITING_MAX else COME_AGAIN_SECONDS
