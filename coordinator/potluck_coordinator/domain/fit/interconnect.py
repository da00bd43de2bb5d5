"""How long cards wait for each other: all-reduces inside a tensor-parallel group, and hops between the stages of a pipeline.

Decides times from links that were measured elsewhere. It must not know models: it is given sizes.

Sources: club-3090, docs/PCIE_P2P.md, measured between two RTX 3090 on PCIe 4.0 x16: copies through host memory 11.28 GB/s and 15.23
microseconds, with peer-to-peer 27.12 GB/s and 1.01 microseconds. The ring's 2 (n - 1) steps: NCCL's documentation of bus bandwidth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import combinations
from typing import Final

from potluck_coordinator.domain.fit.hardware import PCIE_GENERATION_OF_MEASUREMENTS, PCIE_LANES_MAX, BoxLink, NodeCard, NodeHardware

ALL_REDUCE_START_SECONDS: Final = 8e-6
"""Launch and meeting point of one all-reduce, however fast its link: two cards with NVLink need about 10 microseconds for a small one."""
HOST_STAGED_STEP_SECONDS: Final = 8e-6
"""One ring step through host memory. About half of a measured copy: NCCL keeps its buffers mapped. With it, four RTX 3090 without
peer-to-peer come out 20 % below club-3090 issue 1028. What that report allows at the most, and what follows for splits: docs/fit.md."""
PEER_STEP_SECONDS: Final = 1.01e-6
HOST_COPY_SECONDS: Final = 15.23e-6
HOST_STAGED_GB_PER_SECOND: Final = 11.28
PEER_GB_PER_SECOND: Final = 27.12
NVLINK_SHARE: Final = 0.8
"""Of a bridge's nominal rate that a ring reaches."""


class Link(StrEnum):
    """The slowest way between two cards of a group."""

    NONE = "none"
    NVLINK = "NVLink"
    PEER = "PCIe peer-to-peer"
    HOST = "PCIe through host memory"


@dataclass(frozen=True, slots=True)
class GroupLink:
    """The slowest link of a tensor-parallel group."""

    kind: Link
    gb_per_second: float
    step_seconds: float
    has_bridge: bool = False
    """Whether some pair of the group has NVLink."""


ALONE: Final = GroupLink(Link.NONE, 1.0, 0.0)


def group_link(box: NodeHardware, indices: Sequence[int]) -> GroupLink:
    """What the cards of one group share. NVLink counts where every pair has it; one pair without makes the ring wait for PCIe.

    A bridge between cards of which the fit knows no NVLink counts as none.
    """
    cards = [box.cards[index] for index in indices]
    if len(cards) < 2:
        return ALONE
    pairs = list(combinations(indices, 2))
    bridges = [_bridge_gb_per_second(box, first, second) for first, second in pairs] if box.nvlink_pairs else [0.0] * len(pairs)
    if all(bridges):
        return GroupLink(Link.NVLINK, NVLINK_SHARE * min(bridges), PEER_STEP_SECONDS, has_bridge=True)
    share = min(map(_pcie_share, cards))
    if all(bridge or box.are_pcie_peers(first, second) for bridge, (first, second) in zip(bridges, pairs, strict=True)):
        return GroupLink(Link.PEER, share * PEER_GB_PER_SECOND, PEER_STEP_SECONDS, any(bridges))
    return GroupLink(Link.HOST, share * HOST_STAGED_GB_PER_SECOND, HOST_STAGED_STEP_SECONDS, any(bridges))


def all_reduce_seconds(link: GroupLink, card_count: int, size_bytes: float) -> float:
    """A ring of n cards takes 2 (n - 1) steps, in which every card passes 2 (n - 1) / n of the data on."""
    if card_count < 2:
        return 0.0
    steps = 2 * (card_count - 1)
    return ALL_REDUCE_START_SECONDS + steps * link.step_seconds + steps / card_count * size_bytes / (link.gb_per_second * 1e9)


def hop_inside_seconds(senders: Sequence[NodeCard], size_bytes: float) -> float:
    """From one stage to the next in the same box, through host memory; as fast as the slowest slot of the stage's cards."""
    return HOST_COPY_SECONDS + size_bytes / (min(map(_pcie_share, senders)) * HOST_STAGED_GB_PER_SECOND * 1e9)


def hop_between_seconds(link: BoxLink, size_bytes: float) -> float:
    """From one box to the next: one way of the round trip, and the data."""
    return link.round_trip_ms / 2000 + size_bytes / (link.bandwidth_gbit_per_second * 1e9 / 8)


def _bridge_gb_per_second(box: NodeHardware, first: int, second: int) -> float:
    return min(box.cards[index].model.nvlink_gb_per_second for index in (first, second)) if box.is_bridged(first, second) else 0.0


def _pcie_share(card: NodeCard) -> float:
    """Of the slot in which the links were measured: PCIe doubles with every generation."""
    return card.pcie_width / PCIE_LANES_MAX * 2.0 ** (card.pcie_generation - PCIE_GENERATION_OF_MEASUREMENTS)
