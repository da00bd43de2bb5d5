"""The ways to lay a model out over cards: one card, copies, tensor-parallel groups inside a box, stages over cards, groups or boxes.

Decides which there are for a node or a group of nodes, and which cards take which part. It must not know whether a shape fits or how fast
it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from itertools import groupby

from potluck_coordinator.domain.fit.architecture import GIB, ModelArchitecture
from potluck_coordinator.domain.fit.card_groups import LINKS_BEST_FIRST, card_groups
from potluck_coordinator.domain.fit.card_order import CARDS_LOOKED_AT_MAX
from potluck_coordinator.domain.fit.engines import EngineTraits
from potluck_coordinator.domain.fit.hardware import NodeCard, NodeHardware, NodeProcessor
from potluck_coordinator.domain.fit.interconnect import ALONE, GroupLink, group_link


class ShapeKind(StrEnum):
    """What a replica looks like."""

    PROCESSOR = "processor"
    SINGLE = "single card"
    TENSOR = "tensor parallel"
    PIPELINE = "layers over cards"
    BOXES = "pipeline over boxes"


@dataclass(frozen=True, slots=True)
class Stage:
    """The part of a replica that one group of cards holds: some of the layers, each split over all of the group's cards."""

    box_index: int
    card_indices: tuple[int, ...]
    """Of the box's cards; none: its processor."""
    cards: tuple[NodeCard, ...]
    link: GroupLink
    processor: NodeProcessor | None = None
    layer_count: int = 0
    is_first: bool = True
    is_last: bool = True


@dataclass(frozen=True)
class Shape:
    """One way to run a model: `replica_count` copies of the stages, of which the tightest is drawn.

    Without slots, so that cards are counted once: shapes are compared with each other.
    """

    kind: ShapeKind
    stages: tuple[Stage, ...]
    replica_count: int = 1
    between: GroupLink = ALONE
    """What the cards of a box's stages share, where there are several in one box."""

    @property
    def tensor_parallel(self) -> int:
        """Cards of a stage."""
        return max(1, len(self.stages[0].cards))

    @cached_property
    def cards_per_replica(self) -> int:
        """Cards that one copy takes."""
        return sum(len(stage.cards) for stage in self.stages)

    @property
    def label(self) -> str:
        """As people say it: "2 x tensor parallel 2 (NVLink)"."""
        return (f"{self.replica_count} x " if self.replica_count > 1 else "") + self.replica_label

    @property
    def replica_label(self) -> str:
        """The same of one copy."""
        link = self.stages[0].link.kind
        group = f"tensor parallel {self.tensor_parallel} ({link})" if self.tensor_parallel > 1 else "single card"
        layers = "+".join(str(stage.layer_count) for stage in self.stages)
        match self.kind:
            case ShapeKind.PROCESSOR:
                return "processor, no card"
            case ShapeKind.SINGLE | ShapeKind.TENSOR:
                return group
            case ShapeKind.PIPELINE:
                return f"layers over {len(self.stages)} " + (f"cards ({layers})" if self.tensor_parallel == 1 else f"x {group} ({layers})")
            case ShapeKind.BOXES:
                return f"pipeline over {len(self.stages)} boxes ({layers} layers), {group} each"


def groups_of(architecture: ModelArchitecture, boxes: Sequence[NodeHardware], traits: EngineTraits) -> Iterator[Shape]:
    """Every shape that the engine can run on the boxes, smaller replicas first; the stages have no layers yet.

    Several boxes make one group: the model is laid out over all of them.
    """
    if len(boxes) > 1:
        yield from _over_boxes(architecture, boxes, traits)
        return
    box = boxes[0]
    if not box.cards:
        if box.processor is not None:
            yield _shape(ShapeKind.PROCESSOR, (_stage(box, 0, ()),))
        return
    for card_count in range(1, min(len(box.cards), CARDS_LOOKED_AT_MAX) + 1):
        yield from _in_box(architecture, traits, box, card_count)


def tensor_parallel_divides(architecture: ModelArchitecture, traits: EngineTraits, group_size: int) -> bool:
    """Whether a model can be cut into so many slices: its heads evenly, and its KV heads evenly or each onto as many cards.

    That is vLLM's rule (its model executors assert it); llama.cpp's layer split cuts no tensors.
    """
    if group_size == 1:
        return True
    kv_heads = architecture.kv_head_count
    heads_divide = architecture.attention_head_count % group_size == 0 and (kv_heads % group_size == 0 or group_size % kv_heads == 0)
    return traits.splits_tensors and heads_divide and architecture.intermediate_size % group_size == 0


def _in_box(architecture: ModelArchitecture, traits: EngineTraits, box: NodeHardware, card_count: int) -> Iterator[Shape]:
    """Replicas of so many cards each, one shape for every kind of replica, of which the tightest is drawn.

    Tensors are cut over all of a replica's cards, or, where that cannot be (three cards, where the heads are 40; any, with llama.cpp),
    over stages of the widest groups that it can be for, which keeps bridged pairs together.
    """
    size = max(size for size in range(1, card_count + 1) if card_count % size == 0 and tensor_parallel_divides(architecture, traits, size))
    if card_count // size > architecture.layer_count:
        return
    kind = ShapeKind.PIPELINE if size < card_count else ShapeKind.SINGLE if size == 1 else ShapeKind.TENSOR
    replicas = [_Replica.of(box, cards, size) for cards in card_groups(box, card_count)]
    for _, group in groupby(sorted(replicas, key=_likeness), key=_likeness):
        alike = list(group)
        tightest = min(alike, key=_tightness)
        yield replace(_shape(kind, tightest.stages, replica_count=len(alike)), between=tightest.between)


@dataclass(frozen=True, slots=True)
class _Replica:
    stages: tuple[Stage, ...]
    between: GroupLink

    @classmethod
    def of(cls, box: NodeHardware, indices: Sequence[int], stage_size: int) -> _Replica:
        """One replica on those cards."""
        groups = card_groups(box, stage_size, indices)
        return cls(tuple(_stage(box, 0, group) for group in groups), group_link(box, indices) if len(groups) > 1 else ALONE)

    @property
    def cards(self) -> list[NodeCard]:
        return [card for stage in self.stages for card in stage.cards]


def _over_boxes(architecture: ModelArchitecture, boxes: Sequence[NodeHardware], traits: EngineTraits) -> Iterator[Shape]:
    """One stage in each box; all stages have equally many cards, as vLLM wants."""
    if len(boxes) > architecture.layer_count or not traits.pipelines_batches:
        return
    if not any(box.cards for box in boxes):
        if all(box.processor is not None for box in boxes):
            yield _shape(ShapeKind.BOXES, [_stage(box, number, ()) for number, box in enumerate(boxes)])
        return
    for size in range(1, min(CARDS_LOOKED_AT_MAX, *(len(box.cards) for box in boxes)) + 1):
        if tensor_parallel_divides(architecture, traits, size):
            yield _shape(ShapeKind.BOXES, [_stage(box, number, card_groups(box, size)[0]) for number, box in enumerate(boxes)])


def _likeness(replica: _Replica) -> tuple[object, ...]:
    """Replicas that agree in this are copies of each other; a GiB more or less of others' use makes another kind."""
    links = [LINKS_BEST_FIRST.index(link.kind) for link in (replica.between, *(stage.link for stage in replica.stages))]
    cards = [
        sorted((card.model.name, card.usable_bytes // GIB, card.power_limit_watts or 0) for card in stage.cards) for stage in replica.stages
    ]
    return links, cards


def _tightness(replica: _Replica) -> tuple[object, ...]:
    """Of copies, the one with the least memory comes first, then the one with the slowest way between its cards, then in their order."""
    ways = [link.gb_per_second for link in (replica.between, *(stage.link for stage in replica.stages))]
    slots = sorted((card.pcie_generation, card.pcie_width) for card in replica.cards)
    return sorted(card.usable_bytes for card in replica.cards), ways, slots


def _shape(kind: ShapeKind, stages: Sequence[Stage], *, replica_count: int = 1) -> Shape:
    last = len(stages) - 1
    placed = tuple(replace(stage, is_first=number == 0, is_last=number == last) for number, stage in enumerate(stages))
    return Shape(kind, placed, replica_count)


def _stage(box: NodeHardware, box_index: int, group: tuple[int, ...]) -> Stage:
    cards = tuple(box.cards[index] for index in group)
    return Stage(box_index, group, cards, group_link(box, group), None if cards else box.processor)
