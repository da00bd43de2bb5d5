"""What a node has to run a model on: cards, how they are joined, and what its processor can do without any.

Decides nothing but which pairs of cards have a bridge. It must not know models or engines beyond their names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from potluck_coordinator.domain.fit.cards import CardModel

PCIE_LANES_MAX: Final = 16
PCIE_GENERATION_OF_MEASUREMENTS: Final = 4


@dataclass(frozen=True)
class NodeCard:
    """One card of a node. Without slots, so that its room is worked out once."""

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

    @cached_property
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
    told_kind: str = ""
    """Its own name, where the fit has one set of figures for several engines; "" stands for `kind`."""


@dataclass(frozen=True)
class NodeHardware:
    """One box. Without slots, so that its pairs are looked through once: a node may tell of thousands."""

    cards: tuple[NodeCard, ...] = ()
    nvlink_pairs: tuple[tuple[int, int], ...] = ()
    """Indices into `cards`, where a bridge is in place and the driver uses it."""
    pcie_peer_pairs: tuple[tuple[int, int], ...] = ()
    """The same, where the driver lets two cards write to each other over PCIe. Stock GeForce drivers do not."""
    processor: NodeProcessor | None = None
    engines: tuple[EngineOffer, ...] = ()

    def __post_init__(self) -> None:
        count = len(self.cards)
        for kind, pairs in (("NVLink", self.nvlink_pairs), ("PCIe", self.pcie_peer_pairs)):
            for first, second in pairs:
                if first == second or not (0 <= first < count and 0 <= second < count):
                    raise ValueError(f"{kind} pair {first}-{second} names no two of the {count} cards")

    def __hash__(self) -> int:
        return self._hash

    def is_bridged(self, first: int, second: int) -> bool:
        """Whether two cards have NVLink between them."""
        return (first, second) in self._bridged

    def are_pcie_peers(self, first: int, second: int) -> bool:
        """Whether two cards pass data on over PCIe without the machine's memory between."""
        return (first, second) in self._peers

    @cached_property
    def _hash(self) -> int:
        return hash((self.cards, self.nvlink_pairs, self.pcie_peer_pairs, self.processor, self.engines))

    @cached_property
    def _bridged(self) -> frozenset[tuple[int, int]]:
        return _both_ways(self.nvlink_pairs)

    @cached_property
    def _peers(self) -> frozenset[tuple[int, int]]:
        return _both_ways(self.pcie_peer_pairs)

    def engine_text(self, kind: str) -> str:
        """Name and version of the engine of the kind that would run; the kind alone where the node does not say."""
        told = (f"{offer.told_kind or kind} {offer.version}".strip() for offer in self.engines if offer.kind == kind)
        return next(told, kind)


@dataclass(frozen=True, slots=True)
class BoxLink:
    """What agents measured between two boxes of one group."""

    round_trip_ms: float = 0.5
    bandwidth_gbit_per_second: float = 1.0


def _both_ways(pairs: Sequence[tuple[int, int]]) -> frozenset[tuple[int, int]]:
    return frozenset(pairs) | frozenset((second, first) for first, second in pairs)
