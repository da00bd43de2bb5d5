"""How one replica of a model would run on what a node has free, or why it would not.

Decides by the fit of the model's architecture; an entry without one is judged by the size of its files. An engine on cards has them to
itself; one without takes its share of the machine's memory, which is all that is known of it. A node's unknown facts rule nothing out, but
a machine of unknown memory is taken for a small one. Nodes of equal hardware and engines are of one kind, and each question is answered
once for all of them. It must not know deployments, nor what else runs on the node.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import count
from typing import TYPE_CHECKING, Any, Final, TypeVar

from potluck_coordinator.domain.catalogue import ATTACH_KIND
from potluck_coordinator.domain.fit.architecture import GIB
from potluck_coordinator.domain.fit.card_groups import card_groups
from potluck_coordinator.domain.fit.corrections import NOTHING_LEARNED, Corrections
from potluck_coordinator.domain.fit.fitting import fit
from potluck_coordinator.domain.fit.flags import card_facts, engine_shape
from potluck_coordinator.domain.fit.interconnect import group_link
from potluck_coordinator.domain.fit.report import Verdict as FitVerdict
from potluck_coordinator.domain.fit.shapes import Stage
from potluck_coordinator.domain.planning.node_kinds import (
    FIT_KIND,
    NodeKind,
    Room,
    cards_of,
    foreign_steps,
    hardware_of,
    model_node,
    whole_room,
)
from potluck_coordinator.domain.planning.words import Sizing
from potluck_protocol.values import EngineShape

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from potluck_coordinator.domain.catalogue import CatalogueEntry
    from potluck_coordinator.domain.fit.architecture import ModelArchitecture
    from potluck_coordinator.domain.fit.hardware import NodeHardware
    from potluck_coordinator.domain.fit.report import FitReport, ShapeFit
    from potluck_coordinator.domain.node_view import NodeView
    from potluck_coordinator.domain.planning.node_kinds import Free
    from potluck_protocol.values import Inventory, NodeId

FILES_ALLOWANCE_SHARE: Final = 0.1
FILES_ALLOWANCE_BYTES: Final = GIB // 2
"""What an engine is taken to need beside its files where no architecture says more: half a GiB, and a tenth of the files."""
CARD_ENGINES: Final = frozenset({"vllm", "sglang"})
"""Engines that run on cards where a node has some. llama.cpp comes as a wheel for processors."""
STAGES_IN_BOX_ENGINES: Final = frozenset({"vllm"})
"""Engines that a node starts with layers over several of its cards."""
WEIGHT_SUFFIXES: Final = (".safetensors", ".gguf")
KNOWN_MAX: Final = 100_000
"""Answers, and nodes."""
_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class Misfit:
    """Why a model does not run on a node."""

    reason: str
    no_engine: bool = False
    """It is not for want of room: the node has no engine for it."""


@lru_cache(maxsize=1024)
def demands_of(entry: CatalogueEntry) -> str:
    """Everything of an entry that a replica's size and engine depend on, in short: where it differs, running replicas are sized anew."""
    words = (entry.file, entry.engine_kinds, entry.context_length_tokens, entry.slot_count, entry.architecture, entry.quantization)
    return _digest(words)[:16]


@dataclass(frozen=True, slots=True)
class Sizer:
    """Sizes replicas, each question once for all nodes of a kind.

    `corrections` are what nodes have observed so far, `versions` of which version each kind of engine is taken to be. When they change
    (`learning`), only the answers that they change are forgotten.
    """

    corrections: Corrections = NOTHING_LEARNED
    versions: tuple[tuple[str, str], ...] = ()
    _numbers: Iterator[int] = field(default_factory=count, repr=False, compare=False)
    """None is given twice: sizes may be known under it."""
    _nodes: dict[NodeId, tuple[object, NodeKind]] = field(default_factory=dict, repr=False, compare=False)
    """By what each was when last asked about: no node takes more than one place, whatever it says."""
    _kinds: dict[str, int] = field(default_factory=dict, repr=False, compare=False)
    _questions: dict[object, int] = field(default_factory=dict, repr=False, compare=False)
    _known: dict[tuple[int, int, Free, int], Sizing | Misfit] = field(default_factory=dict, repr=False, compare=False)
    _others: dict[object, Any] = field(default_factory=dict, repr=False, compare=False)

    def learning(self, corrections: Corrections, versions: tuple[tuple[str, str], ...]) -> Sizer:
        """The sizer that knows these; itself where they are what it knows."""
        known = (self.corrections, self.versions)
        return self if (corrections, versions) == known else replace(self, corrections=corrections, versions=versions)

    def kind_of(self, node: NodeView) -> NodeKind:
        """The node as its kind goes."""
        told = (node.inventory, foreign_steps(node), node.cards_lost, self.versions)
        before, kind = self._nodes.get(node.node_id, (None, None))
        if kind is None or before != told:
            kind = self._kind(node)
            self._nodes.pop(node.node_id, None)
            _known_or(self._nodes, node.node_id, lambda: (told, kind))
        return kind

    def question(self, entry: CatalogueEntry) -> int:
        """A number for everything that an entry's size depends on, whichever node it is for; `size_on_kind` wants it."""
        asked = (demands_of(entry), entry.model_id, self.corrections.of_model(entry.model_id))
        return _known_or(self._questions, asked, self._numbers.__next__)

    def size(self, entry: CatalogueEntry, kind: NodeKind, room: Room) -> Sizing | Misfit:
        """The replica that would run in a room of the node, with the first engine of the entry's that it has and that fits."""
        sized = self.size_on_kind(entry, self.question(entry), kind, kind.free(room))
        return kind.own(sized) if isinstance(sized, Sizing) else sized

    def size_on_kind(self, entry: CatalogueEntry, question: int, kind: NodeKind, free: Free, slot_count_least: int = 1) -> Sizing | Misfit:
        """The same for any node of the kind, and for so many slots at the least, which may take more cards than one does.

        The cards of its shape are places ("0", "1") in the kind's order.
        """
        on_cards = any(engine in CARD_ENGINES for engine in entry.engine_kinds) and bool(kind.card_uuids)
        on_machine = not on_cards or any(engine not in CARD_ENGINES for engine in entry.engine_kinds)
        needed = (free[0] if on_cards else 0, free[1] if on_machine else 0)
        key = (question, kind.number if on_cards else kind.machine_number, needed, slot_count_least)
        sized = self._known.get(key)
        if sized is None:
            places = frozenset(str(place) for place in range(needed[0].bit_length()) if needed[0] >> place & 1)
            sized = _known_or(self._known, key, lambda: self._sized(entry, kind.model, Room(places, needed[1]), slot_count_least))
        return sized

    def known(self, key: object, make: Callable[[], _Value]) -> _Value:
        """What else is made of numbers of kinds and questions, which are in the key, and of nothing that changes under them."""
        found: _Value = _known_or(self._others, key, make)
        return found

    def _kind(self, node: NodeView) -> NodeKind:
        model = model_node(node)
        of_all = (node.cards_lost, self.versions)
        likeness = (model.inventory, tuple(model.card_foreign_bytes.items()), of_all)
        machine = (replace(model.inventory, accelerators=()), (), of_all)
        number, machine_number = (_known_or(self._kinds, _digest(alike), self._numbers.__next__) for alike in (likeness, machine))
        return NodeKind(number, machine_number, tuple(card.uuid for card in cards_of(node.inventory)), whole_room(node.inventory), model)

    def _sized(self, entry: CatalogueEntry, node: NodeView, room: Room, slot_count_least: int) -> Sizing | Misfit:
        if entry.attached_name:
            return _attached(entry, node.inventory)
        offered = node.inventory.engine_kinds
        kinds = [kind for kind in entry.engine_kinds if not offered or kind in offered]
        if not kinds:
            wanted, has = " or ".join(entry.engine_kinds), ", ".join(offered)
            return Misfit(f"it needs the engine {wanted}, and the node has {has}", no_engine=True)
        if node.cards_lost and not (kinds := [kind for kind in kinds if kind not in CARD_ENGINES]):
            return Misfit("its driver reaches none of its cards")
        misfits: list[Misfit] = []
        for kind in kinds:
            try:
                sized = self._with_engine(entry, kind, node, room, slot_count_least)
            except (ArithmeticError, ValueError) as error:
                # One entry of figures that make no sense together must not keep the others from being planned.
                sized = Misfit(f"its size cannot be computed: {error}")
            if isinstance(sized, Sizing):
                return sized
            misfits.append(sized)
        return misfits[0]

    def _with_engine(self, entry: CatalogueEntry, kind: str, node: NodeView, room: Room, slot_count_least: int) -> Sizing | Misfit:
        architecture = architecture_of(entry)
        if architecture is None or kind not in FIT_KIND:
            return _by_file_size(entry, kind, node, room)
        on_cards = kind in CARD_ENGINES and bool(cards_of(node.inventory))
        hardware, cards = hardware_of(node, room, on_cards=on_cards, engine_kind=kind, engine_version=dict(self.versions).get(kind, ""))
        if on_cards and not cards:
            return Misfit("none of its cards is free")
        # On cards the cache takes all that is left of them, and serves as many sequences as come; elsewhere its size is fixed at the start.
        wanted = slot_count_least if on_cards else max(slot_count_least, entry.slot_count)
        stages = kind in STAGES_IN_BOX_ENGINES
        while True:
            report = self._fit(architecture, hardware, kind, entry, wanted, stages_in_box=stages)
            best = _smallest(report)
            if best is not None:
                slot_count = min(entry.slot_count, best.sequences_at_context) if on_cards else wanted
                return _sizing(entry, kind, best, cards, slot_count)
            if wanted == slot_count_least:
                break
            wanted = max(slot_count_least, wanted // 2)
        if on_cards and not stages and (staged := self._fit(architecture, hardware, kind, entry, wanted, stages_in_box=True).best):
            return Misfit(f"{report.reason}; it would fit with {staged.shape.label}, and {kind} is not started so inside one node")
        return Misfit(report.reason)

    def _fit(
        self, architecture: ModelArchitecture, hardware: NodeHardware, kind: str, entry: CatalogueEntry, wanted: int, *, stages_in_box: bool
    ) -> FitReport:
        return fit(
            architecture,
            (hardware,),
            engine_kind=FIT_KIND[kind],
            context_length_tokens=entry.context_length_tokens,
            sequence_count_wanted=wanted,
            corrections=self.corrections,
            sequence_count_max=max(1, entry.slot_count),
            stages_in_box=stages_in_box,
        )


def _digest(words: object) -> str:
    """In short, so that what is kept under it takes no more room than that."""
    return hashlib.sha256(repr(words).encode(errors="backslashreplace")).hexdigest()


def _known_or(known: dict[_Key, _Value], key: _Key, make: Callable[[], _Value]) -> _Value:
    """What is known, else what is made then; where too much is known, all of it is forgotten."""
    found = known.get(key)
    if found is None:
        if len(known) >= KNOWN_MAX:
            known.clear()
        found = known[key] = make()
    return found


def _smallest(report: FitReport) -> ShapeFit | None:
    """The shape that takes the fewest cards from others, a safe fit before a tight one; None where none runs."""
    runs = [shape for shape in report.shapes if shape.runs]
    return min(runs, key=lambda fit: (fit.verdict is FitVerdict.TIGHT, fit.shape.cards_per_replica), default=None)


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


def _by_file_size(entry: CatalogueEntry, kind: str, node: NodeView, room: Room) -> Sizing | Misfit:
    """Without an architecture: all files in memory, and an allowance; on cards, on as many as that takes."""
    assert entry.file is not None, "an entry without files is never sized"
    needed_bytes = int(entry.file.total_bytes * (1 + FILES_ALLOWANCE_SHARE)) + FILES_ALLOWANCE_BYTES
    if kind in CARD_ENGINES and cards_of(node.inventory):
        return _on_fewest_cards(entry, kind, needed_bytes, *hardware_of(node, room, on_cards=True))
    if needed_bytes > room.memory_bytes:
        free_gib = max(0, room.memory_bytes) / GIB
        return Misfit(f"it needs {needed_bytes / GIB:.1f} GiB with an allowance, and {free_gib:.1f} GiB are there for engines")
    shape = EngineShape(quantization=entry.quantization, memory_bytes=needed_bytes)
    return Sizing(kind, shape, entry.slot_count, entry.context_length_tokens, 1.0)


def _on_fewest_cards(entry: CatalogueEntry, kind: str, needed_bytes: int, box: NodeHardware, uuids: Sequence[str]) -> Sizing | Misfit:
    count = 1
    # The largest cards come first, and of equally large ones those that are joined best.
    while groups := card_groups(box, count):
        for chosen in groups:
            each_bytes = min(box.cards[index].usable_bytes for index in chosen)
            if count * each_bytes >= needed_bytes:
                stage = Stage(0, chosen, tuple(box.cards[index] for index in chosen), group_link(box, chosen))
                shape = EngineShape(
                    card_uuids=tuple(uuids[index] for index in chosen),
                    tensor_parallel_size=count,
                    quantization=entry.quantization,
                    memory_bytes=each_bytes,
                    card_facts=card_facts([stage], [each_bytes]),
                )
                return Sizing(kind, shape, entry.slot_count, entry.context_length_tokens, 1.0)
        count *= 2
    free_bytes = sum(card.usable_bytes for card in box.cards)
    return Misfit(
        f"it needs {needed_bytes / GIB:.1f} GiB with an allowance, and {len(box.cards)} free cards have {free_bytes / GIB:.1f} GiB"
    )


def _sizing(entry: CatalogueEntry, kind: str, best: ShapeFit, cards: Sequence[str], slot_count: int) -> Sizing:
    shape = engine_shape(best.shape, best.memory, cards, pages_kv=kind in CARD_ENGINES, quantization=entry.quantization)
    return Sizing(kind, shape, slot_count, entry.context_length_tokens, best.rates.decode_batched)
