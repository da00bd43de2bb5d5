"""The ways to lay a model out over cards: one card, copies, tensor-parallel groups inside a box, stages over groups or boxes.

Decides which there are for a node or a group of nodes, and which cards take which part. It must not know whether a shape fits or how fast
it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import groupby
from typing import Final

from potluck_coordinator.domain.fit.architecture import GIB, ModelArchitecture
from potluck_coordinator.domain.fit.engines import EngineTraits
from potluck_coordinator.domain.fit.hardware import NodeCard, NodeHardware, NodeProcessor
from potluck_coordinator.domain.fit.interconnect import GroupLink, Link, group_link


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


@dataclass(frozen=True, slots=True)
class Shape:
    """One way to run a model: `replica_count` copies of the stages, of which the tightest is drawn."""

    kind: ShapeKind
    stages: tuple[Stage, ...]
    replica_count: int = 1

    @property
    def tensor_parallel(self) -> int:
        """Cards of a stage."""
        return max(1, len(self.stages[0].cards))

    @property
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
                return f"layers over {len(self.stages)} cards ({layers})"
            case ShapeKind.BOXES:
                return f"pipeline over {len(self.stages)} boxes ({layers} layers), {group} each"


_LINKS_BEST_FIRST: Final = (Link.NONE, Link.NVLINK, Link.PEER, Link.HOST)


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
    for group_size in range(1, len(box.cards) + 1):
        if tensor_parallel_divides(architecture, traits, group_size):
            yield from _copies(box, card_groups(box, group_size))
    if not traits.splits_tensors:
        yield from _layer_splits(architecture, box)


def tensor_parallel_divides(architecture: ModelArchitecture, traits: EngineTraits, group_size: int) -> bool:
    """Whether a model can be cut into so many slices: its heads evenly, and its KV heads evenly or each onto as many cards.

    That is vLLM's rule (its model executors assert it); llama.cpp's layer split cuts no tensors.
    """
    if group_size == 1:
        return True
    kv_heads = architecture.kv_head_count
    heads_divide = architecture.attention_head_count % group_size == 0 and (kv_heads % group_size == 0 or group_size % kv_heads == 0)
    return traits.splits_tensors and heads_divide and architecture.intermediate_size % group_size == 0


def card_groups(box: NodeHardware, group_size: int) -> tuple[tuple[int, ...], ...]:
    """As many disjoint groups as there are, those joined best first: bridged pairs stay together, and like cards with like."""
    order: list[int] = []
    for first, second in sorted(box.nvlink_pairs):
        if first not in order and second not in order:
            order += [first, second]
    rest = [index for index in range(len(box.cards)) if index not in order]
    order += sorted(rest, key=lambda index: (box.cards[index].model.name, -box.cards[index].usable_bytes, index))
    groups = [tuple(sorted(order[start : start + group_size])) for start in range(0, len(order) - group_size + 1, group_size)]
    return tuple(sorted(groups, key=lambda group: (_LINKS_BEST_FIRST.index(group_link(box, group).kind), group)))


def _copies(box: NodeHardware, groups: Sequence[tuple[int, ...]]) -> Iterator[Shape]:
    """A replica on each group, one shape for every kind of group."""
    kind = ShapeKind.SINGLE if len(groups[0]) == 1 else ShapeKind.TENSOR
    for _, alike in groupby(sorted((_stage(box, 0, group) for group in groups), key=_likeness), key=_likeness):
        stages = sorted(alike, key=lambda stage: min(card.usable_bytes for card in stage.cards))
        yield _shape(kind, stages[:1], replica_count=len(stages))


def _layer_splits(architecture: ModelArchitecture, box: NodeHardware) -> Iterator[Shape]:
    """For engines that cut no tensors: layers over two cards and more of the box."""
    stages = [_stage(box, 0, group) for group in card_groups(box, 1)]
    for stage_count in range(2, min(len(stages), architecture.layer_count) + 1):
        yield _shape(ShapeKind.PIPELINE, stages[:stage_count], replica_count=len(stages) // stage_count)


def _over_boxes(architecture: ModelArchitecture, boxes: Sequence[NodeHardware], traits: EngineTraits) -> Iterator[Shape]:
    """One stage in each box; all stages have equally many cards, as vLLM wants."""
    if len(boxes) > architecture.layer_count or not traits.pipelines_batches:
        return
    if not any(box.cards for box in boxes):
        if all(box.processor is not None for box in boxes):
            yield _shape(ShapeKind.BOXES, [_stage(box, number, ()) for number, box in enumerate(boxes)])
        return
    for size in range(1, min(len(box.cards) for box in boxes) + 1):
        if tensor_parallel_divides(architecture, traits, size):
            yield _shape(ShapeKind.BOXES, [_stage(box, number, card_groups(box, size)[0]) for number, box in enumerate(boxes)])


def _likeness(stage: Stage) -> tuple[object, ...]:
    """Groups that agree in this are copies of each other; a GiB more or less of others' use makes another kind."""
    cards = sorted((card.model.name, card.usable_bytes // GIB, card.power_limit_watts or 0) for card in stage.cards)
    return (_LINKS_BEST_FIRST.index(stage.link.kind), cards)


def _shape(kind: ShapeKind, stages: Sequence[Stage], *, replica_count: int = 1) -> Shape:
    last = len(stages) - 1
    placed = tuple(replace(stage, is_first=number == 0, is_last=number == last) for number, stage in enumerate(stages))
    return Shape(kind, placed, replica_count)


def _stage(box: NodeHardware, box_index: int, group: tuple[int, ...]) -> Stage:
    cards = tuple(box.cards[index] for index in group)
    return Stage(box_index, group, cards, group_link(box, group), None if cards else box.processor)
