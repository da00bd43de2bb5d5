"""What the coordinator's fit tells a node of the cards of an engine.

Decides nothing; these are the words. No text of a coordinator's becomes a flag or a variable of an engine: facts travel, and each side
makes the same flags of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class PeerAccess(StrEnum):
    """By which ways the cards of an engine may reach each other's memory."""

    ANY = "any"
    """Whatever the driver says."""
    BRIDGES = "bridges"
    """NVLink bridges only: over PCIe the driver refuses it, and NCCL hangs at start where it tries."""
    NONE = "none"
    """Everything goes through the machine's memory."""


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What the coordinator's fit knows of the cards of an engine. `vllm_words` alone makes flags of them."""

    memory_utilization_percent: int = 0
    """How much of what CUDA shows of each card the engine may begin with; 0: not said."""
    half_precision: bool = False
    """A card among them cannot calculate in bfloat16."""
    without_custom_all_reduce: bool = False
    """The cards do not reach each other as the engine's own all-reduce wants it."""
    peer_access: PeerAccess = PeerAccess.ANY


NOTHING_KNOWN: Final = CardFacts()
