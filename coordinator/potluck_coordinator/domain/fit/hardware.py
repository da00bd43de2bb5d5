"""What a node has to run a model on: cards, how they are joined, and what its processor can do without any.

Decides nothing but which pairs of cards have a bridge. It must not know models or engines beyond their names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from potluck_coordinator.domain.fit.cards import CardModel

PCIE_LANES_MAX: Final = 16
PCIE_GENERATION_OF_MEASUREMENTS: Final = 4


@dataclass(frozen=True, slots=True)
class NodeCard:
    """One card of a node."""

    model: CardModel
    memory_usable_bytes: int | None = None
    """What is left beside others' use and the owner's limit; None: all that CUDA shows."""
    power_limit_watts: int | None = None
    """The enforced limit; None: the board's own."""
    pcie_width: int = PCIE_LANES_MAX
    pcie_generation: int = PCIE_GENERATION_OF_MEASUREMENTS

    def __post_init__(self) -> None:
        if self.pcie_width < 1 or self.pcie_generation < 1 or (self.power_limit_watts is not None and self.power_limit_watts < 1):
            raise ValueError("a card has at least one PCIe lane and one watt")

    @property
    def usable_bytes(self) -> int:
        """Memory that an engine may fill."""
        return self.model.memory_bytes if self.memory_usable_bytes is None else min(self.memory_usable_bytes, self.model.memory_bytes)


@dataclass(frozen=True, slots=True)
class NodeProcessor:
    """A node's processor, for engines that run without a card."""

    memory_budget_bytes: int
    bandwidth_gb_per_second: float
    core_count: int


@dataclass(frozen=True, slots=True)
class EngineOffer:
    """An engine kind that a node can run, and the version it would run."""

    kind: str
    version: str = ""


@dataclass(frozen=True, slots=True)
class NodeHardware:
    """One box."""

    cards: tuple[NodeCard, ...] = ()
    nvlink_pairs: tuple[tuple[int, int], ...] = ()
    """Indices into `cards`, where a bridge is in place and the driver uses it."""
    pcie_peer_to_peer: bool = False
    """Whether the driver lets cards write to each other over PCIe. Stock GeForce drivers do not."""
    processor: NodeProcessor | None = None
    engines: tuple[EngineOffer, ...] = ()

    def __post_init__(self) -> None:
        for first, second in self.nvlink_pairs:
            if first == second or not {first, second} <= set(range(len(self.cards))):
                raise ValueError(f"NVLink pair {first}-{second} names no two of the {len(self.cards)} cards")

    def is_bridged(self, first: int, second: int) -> bool:
        """Whether two cards have NVLink between them."""
        return (first, second) in self.nvlink_pairs or (second, first) in self.nvlink_pairs

    def engine_version(self, kind: str) -> str:
        """Of the engine that would run; "" where the node does not say."""
        return next((offer.version for offer in self.engines if offer.kind == kind), "")


@dataclass(frozen=True, slots=True)
class BoxLink:
    """What agents measured between two boxes of one group."""

    round_trip_ms: float = 0.5
    bandwidth_gbit_per_second: float = 1.0
