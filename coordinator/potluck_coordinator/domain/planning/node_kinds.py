"""A node's hardware and engines as planning sees them, and what two nodes share on which everything runs alike.

Decides which of a node's words make sense, what of its memory engines may have, and what differences between two nodes are none. It must
not know models, deployments, nor what runs on a node.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from potluck_coordinator.domain.fit import engines as fit_engines
from potluck_coordinator.domain.fit.architecture import GIB
from potluck_coordinator.domain.fit.cards import CardModel, card_model, unlisted_card
from potluck_coordinator.domain.fit.hardware import (
    PCIE_GENERATION_OF_MEASUREMENTS,
    PCIE_LANES_MAX,
    EngineOffer,
    NodeCard,
    NodeHardware,
    NodeProcessor,
)
from potluck_protocol.values import Accelerator, EngineState, Inventory

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from potluck_coordinator.domain.node_view import NodeView
    from potluck_coordinator.domain.planning.words import Sizing
    from potluck_protocol.values import EngineStatus

UNKNOWN_MEMORY_BYTES: Final = GIB
"""What a machine is taken to have whose probe of its memory failed."""
MACHINE_SHARE: Final = 0.8
"""Of a machine's memory, for engines, where its owner names no budget: the rest is the system's."""
MEMORY_STEP_BYTES: Final = GIB // 16
"""What two machines of one kind differ by, and what a desktop holds of a card more or less from one report to the next, is none."""
HOST_GB_PER_SECOND: Final = 40.0
"""Memory bandwidth of a machine: a guess, of two channels of DDR4, which the rates that nodes observe correct."""
CARD_BYTES_MIN: Final = GIB
PCIE_GENERATION_MAX: Final = 7
CPU_COUNT_MAX: Final = 4096
FIT_KIND: Final = {"vllm": fit_engines.VLLM, "sglang": fit_engines.VLLM, "llamacpp": fit_engines.LLAMACPP}
"""SGLang pages its cache and splits tensors as vLLM does; the fit has one set of figures for both."""
_card_model = lru_cache(maxsize=256)(card_model)


@dataclass(frozen=True, slots=True)
class Room:
    """What of a node is free."""

    card_uuids: frozenset[str]
    memory_bytes: int
    """Of the machine."""

    def holds(self, sizing: Sizing) -> bool:
        """Whether a replica of that size has place here."""
        return self.card_uuids.issuperset(sizing.shape.card_uuids) and _machine_bytes(sizing) <= self.memory_bytes

    def without(self, sizing: Sizing) -> Room:
        """What a replica of that size leaves; below zero where it did not have place."""
        return Room(self.card_uuids.difference(sizing.shape.card_uuids), self.memory_bytes - _machine_bytes(sizing))

    def with_room_of(self, sizing: Sizing) -> Room:
        """What is free once that replica is gone."""
        return Room(self.card_uuids.union(sizing.shape.card_uuids), self.memory_bytes + _machine_bytes(sizing))


def _machine_bytes(sizing: Sizing) -> int:
    """What a replica of that size takes of the machine's memory."""
    return 0 if sizing.shape.card_uuids else sizing.shape.memory_bytes


Free = tuple[int, int]
"""A room in the words of a kind of node: its free cards as bits, the first of them the lowest, and bytes of the machine's memory."""


@dataclass(frozen=True, slots=True)
class NodeKind:
    """One node as its kind goes: on nodes of the same number everything runs alike."""

    number: int
    """The sizer's own."""
    machine_number: int
    """The same for what runs without cards."""
    card_uuids: tuple[str, ...]
    """The node's own, in the order in which its kind counts them."""
    whole_room: Room
    model: NodeView = field(repr=False)
    """The one node of the kind that questions are answered with; its cards are called by their places."""

    def free(self, room: Room) -> Free:
        """A room of the node."""
        return sum(1 << place for place, uuid in enumerate(self.card_uuids) if uuid in room.card_uuids), room.memory_bytes

    def in_places(self, room: Room) -> Room:
        """A room of the node, as one of `model`."""
        places = (str(place) for place, uuid in enumerate(self.card_uuids) if uuid in room.card_uuids)
        return Room(frozenset(places), room.memory_bytes)

    def own(self, sizing: Sizing) -> Sizing:
        """A sizing of the kind, on the node's own cards."""
        shape = sizing.shape
        if not shape.card_uuids:
            return sizing
        return replace(sizing, shape=replace(shape, card_uuids=tuple(self.card_uuids[int(place)] for place in shape.card_uuids)))


def holds(free: Free, sizing: Sizing) -> bool:
    """Whether a replica that is sized for the kind has place in a room of the kind."""
    bits, memory_bytes = free
    return all(bits >> int(place) & 1 for place in sizing.shape.card_uuids) and (
        bool(sizing.shape.card_uuids) or sizing.shape.memory_bytes <= memory_bytes
    )


def whole_room(inventory: Inventory) -> Room:
    """What a node has for engines in all."""
    budget_bytes, known_bytes = max(0, inventory.memory_budget_bytes), max(0, inventory.memory_bytes)
    share_bytes = int(known_bytes * MACHINE_SHARE)
    if share_bytes > MEMORY_STEP_BYTES:
        share_bytes -= share_bytes % MEMORY_STEP_BYTES
    return Room(frozenset(card.uuid for card in cards_of(inventory)), budget_bytes or share_bytes or UNKNOWN_MEMORY_BYTES)


def cards_of(inventory: Inventory) -> tuple[Accelerator, ...]:
    """The node's cards that an engine can use: those with a name of their own, each once."""
    cards = {card.uuid: card for card in reversed(inventory.accelerators) if card.uuid and card.memory_bytes >= CARD_BYTES_MIN}
    return tuple(reversed(cards.values()))


def model_node(node: NodeView) -> NodeView:
    """The node with only that of it which sizes depend on, its cards called by their places."""
    inventory, cards = node.inventory, cards_of(node.inventory)
    places = {card.uuid: str(place) for place, card in enumerate(cards)}
    accelerators = tuple(
        Accelerator(
            name=card.name,
            uuid=places[card.uuid],
            memory_bytes=card.memory_bytes,
            compute_capability=card.compute_capability,
            pcie_width_max=card.pcie_width_max,
            pcie_generation_max=card.pcie_generation_max,
            power_limit_milliwatts=card.power_limit_milliwatts,
            nvlink_peer_uuids=tuple(sorted(places[peer] for peer in card.nvlink_peer_uuids if peer in places)),
            pcie_peer_uuids=tuple(sorted(places[peer] for peer in card.pcie_peer_uuids if peer in places)),
        )
        for card in cards
    )
    return replace(
        node,
        engines=(),
        peer_measurements={},
        inventory=Inventory(
            cpu_count=inventory.cpu_count,
            accelerators=accelerators,
            engine_kinds=inventory.engine_kinds,
            attached_model_names=inventory.attached_model_names,
        ),
        card_foreign_bytes={places[uuid]: foreign_bytes for uuid, foreign_bytes in foreign_steps(node)},
    )


def foreign_steps(node: NodeView) -> tuple[tuple[str, int], ...]:
    """What the owner's programs hold of which card, by uuid, in steps."""
    held = node.card_foreign_bytes
    return tuple((card.uuid, in_steps(held[card.uuid])) for card in cards_of(node.inventory) if held.get(card.uuid, 0) > 0)


def in_steps(memory_bytes: int) -> int:
    """Rounded up."""
    return -(-memory_bytes // MEMORY_STEP_BYTES) * MEMORY_STEP_BYTES


def hardware_of(
    node: NodeView, room: Room, *, on_cards: bool, engine_kind: str = "", engine_version: str = ""
) -> tuple[NodeHardware, tuple[str, ...]]:
    """What is free of a node as the fit sees it with that engine on it, and the uuids of its cards in the same order."""
    inventory = node.inventory
    free = [card for card in cards_of(inventory) if card.uuid in room.card_uuids] if on_cards else []
    cards = tuple(_node_card(card, node.card_foreign_bytes.get(card.uuid, 0)) for card in free)
    # A bridge that a node claims between cards which have none would be one of no speed.
    with_bridge = {card.uuid: place for place, card in enumerate(free) if cards[place].model.nvlink_gb_per_second > 0}
    every = {card.uuid: place for place, card in enumerate(free)}
    processor = NodeProcessor(max(0, room.memory_bytes), HOST_GB_PER_SECOND, min(CPU_COUNT_MAX, max(1, inventory.cpu_count)))
    hardware = NodeHardware(
        cards=cards,
        nvlink_pairs=_pairs(with_bridge, {card.uuid: card.nvlink_peer_uuids for card in free}),
        pcie_peer_pairs=_pairs(every, {card.uuid: card.pcie_peer_uuids for card in free}),
        processor=processor,
        engines=(EngineOffer(FIT_KIND[engine_kind], engine_version, engine_kind),) if engine_kind in FIT_KIND else (),
    )
    return hardware, tuple(card.uuid for card in free)


def _pairs(places: Mapping[str, int], peers: Mapping[str, tuple[str, ...]]) -> tuple[tuple[int, int], ...]:
    """By their places, the pairs of which one names the other; those without a place left out."""
    known = {(places[uuid], places[peer]) for uuid, named in peers.items() for peer in named if uuid in places and peer in places}
    return tuple(sorted({(min(pair), max(pair)) for pair in known if pair[0] != pair[1]}))


def engine_versions(statuses: Iterable[EngineStatus]) -> dict[str, str]:
    """The version of each engine that most of these replicas answer with; of equally many the newest, by its numbers, then by its name.

    Corrections are kept by them.
    """
    counts = Counter(
        (status.engine_kind, status.engine_version)
        for status in statuses
        if status.state is EngineState.READY and status.engine_kind in FIT_KIND and status.engine_version
    )
    told = sorted((count, _version_numbers(version), version, kind) for (kind, version), count in counts.items())
    return {kind: version for *_, version, kind in told}


def _version_numbers(version: str) -> tuple[int, ...]:
    return tuple(int(digits) for digits in re.findall(r"[0-9]{1,9}", version))


def _node_card(card: Accelerator, foreign_bytes: int) -> NodeCard:
    """The card with what of its node's words makes sense: no node keeps others from being planned for."""
    model = _card_model(card.name) or _unknown_card(card)
    usable_bytes = min(model.memory_bytes, card.memory_bytes) - max(0, foreign_bytes)
    watts = (card.power_limit_milliwatts or 0) // 1000
    return NodeCard(
        model,
        memory_usable_bytes=max(0, usable_bytes),
        power_limit_watts=watts if watts > 0 else None,
        pcie_width=min(PCIE_LANES_MAX, max(1, card.pcie_width_max or PCIE_LANES_MAX)),
        pcie_generation=min(PCIE_GENERATION_MAX, max(1, card.pcie_generation_max or PCIE_GENERATION_OF_MEASUREMENTS)),
    )


def _unknown_card(card: Accelerator) -> CardModel:
    """A card that the fit has no figures for: its memory is known, its speed is guessed low."""
    major, _, minor = card.compute_capability.partition(".")
    capability = (int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else (7, 5)
    return unlisted_card(card.name, card.memory_bytes, capability)
