"""How one replica of a model would run on what a node has free, or why it would not.

Decides by the fit of the model's architecture; an entry without one is judged by the size of its files. An engine on cards has them to
itself; one without takes its share of the machine's memory, which is all that is known of it. A node's unknown facts rule nothing out, but
a machine of unknown memory is taken for a small one. It must not know deployments, nor what else runs on the node.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import count
from typing import TYPE_CHECKING, Final

from potluck_coordinator.domain.catalogue import ATTACH_KIND
from potluck_coordinator.domain.fit import engines as fit_engines
from potluck_coordinator.domain.fit.architecture import GIB
from potluck_coordinator.domain.fit.cards import CardModel, card_model, unlisted_card
from potluck_coordinator.domain.fit.corrections import NOTHING_LEARNED, Corrections
from potluck_coordinator.domain.fit.fitting import fit
from potluck_coordinator.domain.fit.hardware import (
    PCIE_GENERATION_OF_MEASUREMENTS,
    PCIE_LANES_MAX,
    EngineOffer,
    NodeCard,
    NodeHardware,
    NodeProcessor,
)
from potluck_coordinator.domain.fit.report import Verdict as FitVerdict
from potluck_coordinator.domain.planning.words import Sizing
from potluck_protocol.values import EngineShape

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from potluck_coordinator.domain.catalogue import CatalogueEntry
    from potluck_coordinator.domain.fit.architecture import ModelArchitecture
    from potluck_coordinator.domain.fit.report import FitReport, ShapeFit
    from potluck_coordinator.domain.node_view import NodeView
    from potluck_protocol.values import Accelerator, Inventory

FILES_ALLOWANCE_SHARE: Final = 0.1
FILES_ALLOWANCE_BYTES: Final = GIB // 2
"""What an engine is taken to need beside its files where no architecture says more: half a GiB, and a tenth of the files."""
UNKNOWN_MEMORY_BYTES: Final = GIB
"""What a machine is taken to have whose probe of its memory failed."""
MACHINE_SHARE: Final = 0.8
"""Of a machine's memory, for engines, where its owner names no budget: the rest is the system's."""
HOST_GB_PER_SECOND: Final = 40.0
"""Memory bandwidth of a machine: a guess, of two channels of DDR4, which the rates that nodes observe correct."""
CARD_ENGINES: Final = frozenset({"vllm", "sglang"})
"""Engines that run on cards where a node has some. llama.cpp comes as a wheel for processors."""
CARD_BYTES_MIN: Final = GIB
PCIE_GENERATION_MAX: Final = 7
CPU_COUNT_MAX: Final = 4096
WEIGHT_SUFFIXES: Final = (".safetensors", ".gguf")
KNOWN_SIZES_MAX: Final = 20_000
_card_model = lru_cache(maxsize=256)(card_model)
FIT_KIND: Final = {"vllm": fit_engines.VLLM, "sglang": fit_engines.VLLM, "llamacpp": fit_engines.LLAMACPP}
"""SGLang pages its cache and splits tensors as vLLM does; the fit has one set of figures for both."""


@dataclass(frozen=True, slots=True)
class Room:
    """What of a node is free."""

    card_uuids: frozenset[str]
    memory_bytes: int
    """Of the machine."""

    def holds(self, sizing: Sizing) -> bool:
        """Whether a replica of that size has place here."""
        needed_bytes = 0 if sizing.shape.card_uuids else sizing.shape.memory_bytes
        return self.card_uuids.issuperset(sizing.shape.card_uuids) and needed_bytes <= self.memory_bytes

    def without(self, sizing: Sizing) -> Room:
        """What a replica of that size leaves; below zero where it did not have place."""
        taken_bytes = 0 if sizing.shape.card_uuids else sizing.shape.memory_bytes
        return Room(self.card_uuids.difference(sizing.shape.card_uuids), self.memory_bytes - taken_bytes)

    def with_room_of(self, sizing: Sizing) -> Room:
        """What is free once that replica is gone."""
        freed_bytes = 0 if sizing.shape.card_uuids else sizing.shape.memory_bytes
        return Room(self.card_uuids.union(sizing.shape.card_uuids), self.memory_bytes + freed_bytes)


@dataclass(frozen=True, slots=True)
class Misfit:
    """Why a model does not run on a node."""

    reason: str
    no_engine: bool = False
    """It is not for want of room: the node has no engine for it."""


def whole_room(inventory: Inventory) -> Room:
    """What a node has for engines in all."""
    budget_bytes, known_bytes = max(0, inventory.memory_budget_bytes), max(0, inventory.memory_bytes)
    memory_bytes = budget_bytes or int(known_bytes * MACHINE_SHARE) or UNKNOWN_MEMORY_BYTES
    return Room(frozenset(card.uuid for card in cards_of(inventory)), memory_bytes)


def cards_of(inventory: Inventory) -> tuple[Accelerator, ...]:
    """The node's cards that an engine can use: those with a name of their own, each once."""
    cards = {card.uuid: card for card in reversed(inventory.accelerators) if card.uuid and card.memory_bytes >= CARD_BYTES_MIN}
    return tuple(reversed(cards.values()))


@lru_cache(maxsize=1024)
def demands_of(entry: CatalogueEntry) -> str:
    """Everything of an entry that a replica's size and engine depend on, in short: where it differs, running replicas are sized anew."""
    words = (entry.file, entry.engine_kinds, entry.context_length_tokens, entry.slot_count, entry.architecture, entry.quantization)
    return hashlib.sha256(repr(words).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Sizer:
    """Sizes replicas, each question once: a plan asks the same ones again and again.

    `corrections` are what nodes have observed so far, `versions` what engines a node is taken to have that has not run one yet.
    """

    corrections: Corrections = NOTHING_LEARNED
    versions: tuple[tuple[str, str], ...] = ()
    _numbers: Iterator[int] = field(default_factory=count, repr=False, compare=False)
    _kinds: dict[object, int] = field(default_factory=dict, repr=False, compare=False)
    _known: dict[tuple[str, int, Room], Sizing | Misfit] = field(default_factory=dict, repr=False, compare=False)

    def kind_of(self, node: NodeView) -> int:
        """A number that nodes share on which everything runs alike."""
        likeness = (node.inventory, tuple(sorted(node.card_foreign_bytes.items())), tuple(sorted(engine_versions([node]).items())))
        if likeness not in self._kinds:
            if len(self._kinds) >= KNOWN_SIZES_MAX:
                self._kinds.clear()
            # Never one that an earlier kind had: sizes may be known under it.
            self._kinds[likeness] = next(self._numbers)
        return self._kinds[likeness]

    def size(self, entry: CatalogueEntry, node: NodeView, kind: int, room: Room) -> Sizing | Misfit:
        """The replica that would run in the room, with the first engine of the entry's that the node, of that kind, has and that fits."""
        key = (demands_of(entry), kind, room)
        if key not in self._known:
            if len(self._known) >= KNOWN_SIZES_MAX:
                self._known.clear()
            self._known[key] = self._sized(entry, node, room)
        return self._known[key]

    def _sized(self, entry: CatalogueEntry, node: NodeView, room: Room) -> Sizing | Misfit:
        if entry.attached_name:
            return _attached(entry, node.inventory)
        offered = node.inventory.engine_kinds
        kinds = [kind for kind in entry.engine_kinds if not offered or kind in offered]
        if not kinds:
            wanted, has = " or ".join(entry.engine_kinds), ", ".join(offered)
            return Misfit(f"it needs the engine {wanted}, and the node has {has}", no_engine=True)
        misfits: list[Misfit] = []
        for kind in kinds:
            sized = self._with_engine(entry, kind, node, room)
            if isinstance(sized, Sizing):
                return sized
            misfits.append(sized)
        return misfits[0]

    def _with_engine(self, entry: CatalogueEntry, kind: str, node: NodeView, room: Room) -> Sizing | Misfit:
        architecture = architecture_of(entry)
        if architecture is None or kind not in FIT_KIND:
            return _by_file_size(entry, kind, node.inventory, room)
        on_cards = kind in CARD_ENGINES and bool(cards_of(node.inventory))
        hardware, cards = hardware_of(node, room, on_cards=on_cards, versions=self.versions)
        if on_cards and not cards:
            return Misfit("none of its cards is free")
        # On cards the cache takes all that is left of them, and serves as many sequences as come; elsewhere its size is fixed at the start.
        wanted = 1 if on_cards else entry.slot_count
        while True:
            report = self._fit(architecture, hardware, kind, entry.context_length_tokens, wanted)
            best = _smallest(report)
            if best is not None:
                slot_count = min(entry.slot_count, best.sequences_at_context) if on_cards else wanted
                return _sizing(entry, kind, best, cards, slot_count)
            if wanted == 1:
                return Misfit(report.reason)
            wanted //= 2

    def _fit(self, architecture: ModelArchitecture, hardware: NodeHardware, kind: str, context: int, wanted: int) -> FitReport:
        return fit(
            architecture,
            (hardware,),
            engine_kind=FIT_KIND[kind],
            context_length_tokens=context,
            sequence_count_wanted=wanted,
            corrections=self.corrections,
        )


def _smallest(report: FitReport) -> ShapeFit | None:
    """The shape that takes the fewest cards from others, a safe fit before a tight one; None where none runs."""
    runs = [shape for shape in report.shapes if shape.runs]
    return min(runs, key=lambda fit: (fit.verdict is FitVerdict.TIGHT, fit.shape.cards_per_replica), default=None)


def hardware_of(
    node: NodeView, room: Room, *, on_cards: bool, versions: tuple[tuple[str, str], ...] = ()
) -> tuple[NodeHardware, tuple[str, ...]]:
    """What is free of a node as the fit sees it, and the uuids of its cards in the same order."""
    inventory = node.inventory
    free = [card for card in cards_of(inventory) if card.uuid in room.card_uuids] if on_cards else []
    cards = tuple(_node_card(card, node.card_foreign_bytes.get(card.uuid, 0)) for card in free)
    # A bridge that a node claims between cards which have none would be one of no speed.
    places = {card.uuid: place for place, card in enumerate(free) if cards[place].model.nvlink_gb_per_second > 0}
    pairs = {
        (min(places[card.uuid], places[peer]), max(places[card.uuid], places[peer]))
        for card in free
        for peer in card.nvlink_peer_uuids
        if card.uuid in places and peer in places and peer != card.uuid
    }
    processor = NodeProcessor(max(0, room.memory_bytes), HOST_GB_PER_SECOND, min(CPU_COUNT_MAX, max(1, inventory.cpu_count)))
    hardware = NodeHardware(
        cards=cards,
        nvlink_pairs=tuple(sorted(pairs)),
        processor=processor,
        engines=tuple(EngineOffer(kind, version) for kind, version in (dict(versions) | engine_versions([node])).items()),
    )
    return hardware, tuple(card.uuid for card in free)


def engine_versions(nodes: Iterable[NodeView]) -> dict[str, str]:
    """Of the engines that nodes have told of, by the fit's kind; of several the last one in the order of the alphabet.

    Corrections are kept by them.
    """
    told = sorted((FIT_KIND.get(status.engine_kind, ""), status.engine_version) for node in nodes for status in node.engines)
    return {kind: version for kind, version in told if kind and version}


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


@lru_cache(maxsize=1024)
def architecture_of(entry: CatalogueEntry) -> ModelArchitecture | None:
    """The entry's, under the entry's name and with the exact size of its weights."""
    if entry.architecture is None or entry.file is None:
        return None
    weight_bytes = sum(file.size_bytes for file in entry.file.files if file.file_name.endswith(WEIGHT_SUFFIXES))
    known_bytes = entry.architecture.weight_bytes_of_files or weight_bytes
    return replace(entry.architecture, model_id=entry.model_id, weight_bytes_of_files=known_bytes or None)


def _attached(entry: CatalogueEntry, inventory: Inventory) -> Sizing | Misfit:
    if entry.attached_name not in inventory.attached_model_names:
        return Misfit(f"its owner runs no engine of his own that serves {entry.attached_name}", no_engine=True)
    return Sizing(ATTACH_KIND, EngineShape(), entry.slot_count, entry.context_length_tokens, 1.0)


def _by_file_size(entry: CatalogueEntry, kind: str, inventory: Inventory, room: Room) -> Sizing | Misfit:
    """Without an architecture: all files in memory, and an allowance; on cards, on as many as that takes."""
    assert entry.file is not None, "an entry without files is never sized"
    needed_bytes = int(entry.file.total_bytes * (1 + FILES_ALLOWANCE_SHARE)) + FILES_ALLOWANCE_BYTES
    if kind in CARD_ENGINES and cards_of(inventory):
        free = [card for card in cards_of(inventory) if card.uuid in room.card_uuids]
        return _on_fewest_cards(entry, kind, needed_bytes, sorted(free, key=lambda card: (-card.memory_bytes, card.uuid)))
    if needed_bytes > room.memory_bytes:
        free_gib = max(0, room.memory_bytes) / GIB
        return Misfit(f"it needs {needed_bytes / GIB:.1f} GiB with an allowance, and {free_gib:.1f} GiB are there for engines")
    shape = EngineShape(quantization=entry.quantization, memory_bytes=needed_bytes)
    return Sizing(kind, shape, entry.slot_count, entry.context_length_tokens, 1.0)


def _on_fewest_cards(entry: CatalogueEntry, kind: str, needed_bytes: int, cards: Sequence[Accelerator]) -> Sizing | Misfit:
    count = 1
    while count <= len(cards):
        each_bytes = min(card.memory_bytes for card in cards[:count])
        if count * each_bytes >= needed_bytes:
            uuids = tuple(card.uuid for card in cards[:count])
            shape = EngineShape(uuids, tensor_parallel_size=count, quantization=entry.quantization, memory_bytes=each_bytes)
            return Sizing(kind, shape, entry.slot_count, entry.context_length_tokens, 1.0)
        count *= 2
    free_bytes = sum(card.memory_bytes for card in cards)
    return Misfit(f"it needs {needed_bytes / GIB:.1f} GiB with an allowance, and {len(cards)} free cards have {free_bytes / GIB:.1f} GiB")


def _sizing(entry: CatalogueEntry, kind: str, best: ShapeFit, cards: Sequence[str], slot_count: int) -> Sizing:
    uuids = tuple(cards[index] for stage in best.shape.stages for index in stage.card_indices)
    fullest = max(best.memory, key=lambda memory: memory.needed_bytes)
    shape = EngineShape(
        card_uuids=uuids,
        tensor_parallel_size=best.shape.tensor_parallel,
        quantization=entry.quantization,
        kv_cache_bytes=0 if uuids or kind not in CARD_ENGINES else fullest.kv_wanted_bytes,
        memory_bytes=fullest.usable_bytes if uuids else fullest.needed_bytes,
    )
    return Sizing(kind, shape, slot_count, entry.context_length_tokens, best.rates.decode_batched)
