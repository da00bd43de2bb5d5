"""What an engine is told to run a shape: the facts that travel to a node, and its command line and environment.

Decides the facts; `vllm_words`, which nodes have too, makes vLLM's flags of them, so that what is printed is what runs. It must not know
how processes are started, nor addresses of other boxes: whoever forms a group adds ranks and addresses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from potluck_coordinator.domain.fit.architecture import ModelArchitecture
from potluck_coordinator.domain.fit.engines import traits_of
from potluck_coordinator.domain.fit.interconnect import ALONE, GroupLink, Link
from potluck_coordinator.domain.fit.load import Load
from potluck_coordinator.domain.fit.memory import CardMemory
from potluck_coordinator.domain.fit.shapes import Shape, ShapeKind, Stage
from potluck_protocol.card_facts import NOTHING_KNOWN, CardFacts, PeerAccess
from potluck_protocol.values import EngineShape
from potluck_protocol.vllm_words import UTILIZATION_PERCENT_MAX, shape_arguments, shape_variables

HALF_PRECISION_BYTES: Final = 2
PARTS_AT_A_TIME: Final = 4
"""Of a prompt, that llama.cpp has buffers for (`GGML_SCHED_MAX_COPIES`)."""
BFLOAT16_CAPABILITY_MIN: Final = (8, 0)
CUSTOM_ALL_REDUCE_PCIE_CARDS_MAX: Final = 2
"""Beyond it vLLM's own all-reduce wants NVLink between all pairs (`custom_all_reduce.py`)."""


@dataclass(frozen=True, slots=True)
class EngineFlags:
    """Of one replica; on a pipeline over boxes, of every stage alike but for its cards."""

    arguments: tuple[str, ...]
    environment: tuple[tuple[str, str], ...]


def flags_of(architecture: ModelArchitecture, shape: Shape, load: Load, memory: tuple[CardMemory, ...], sequence_count: int) -> EngineFlags:
    """The flags that run the shape with the wished context and `sequence_count` sequences at a time.

    llama.cpp's are those of the node's `llamacpp_server`, which leaves cards alone; on cards they are those of llama.cpp's own
    `llama-server`, which a node may adopt. Cards go by their places.
    """
    last = max((index for stage in shape.stages for index in stage.card_indices), default=-1)
    told = engine_shape(
        shape, memory, [str(index) for index in range(last + 1)], pages_kv=load.traits.pages_kv, quantization=architecture.quantization.name
    )
    over_boxes = shape.kind is ShapeKind.BOXES
    # In a group each box names its own cards.
    layer_counts = tuple(stage.layer_count for stage in shape.stages) if over_boxes else ()
    variables = shape_variables(told, layer_counts)
    if over_boxes:
        variables.pop("CUDA_VISIBLE_DEVICES", None)
    if not load.traits.pages_kv:
        return _llamacpp_flags(architecture, shape, load, variables, sequence_count)
    arguments = shape_arguments(
        told,
        context_length_tokens=load.context_length_tokens,
        slot_count=sequence_count,
        memory_utilization_percent=told.card_facts.memory_utilization_percent or UTILIZATION_PERCENT_MAX,
        group_layer_counts=layer_counts,
    )
    return EngineFlags((*arguments, *_vllm_wishes(architecture, load)), tuple(variables.items()))


def _vllm_wishes(architecture: ModelArchitecture, load: Load) -> tuple[str, ...]:
    """What a node is never told, and an owner may ask of his own server."""
    own_batch = load.traits.batch_tokens != traits_of(load.traits.kind).batch_tokens
    return (
        *(("--max-num-batched-tokens", str(load.traits.batch_tokens)) if own_batch else ()),
        *(("--kv-cache-dtype", "fp8") if architecture.kv_dtype_bytes < HALF_PRECISION_BYTES else ()),
    )


def _llamacpp_flags(
    architecture: ModelArchitecture, shape: Shape, load: Load, variables: Mapping[str, str], sequence_count: int
) -> EngineFlags:
    context, slots = load.context_length_tokens, str(sequence_count)
    cards = variables.get("CUDA_VISIBLE_DEVICES")
    if cards is None:
        return EngineFlags(("--context", str(context), "--slots", slots), ())
    part = load.batch_tokens()
    # Several cards work on several parts of a prompt, if they are handed them at once.
    batch = part if len(shape.stages) == 1 else max(part, min(PARTS_AT_A_TIME * part, context * sequence_count))
    split = ",".join(str(stage.layer_count) for stage in shape.stages)
    return EngineFlags(
        (
            *("--ctx-size", str(context * sequence_count), "--parallel", slots),
            *("--batch-size", str(batch), "--ubatch-size", str(part), "--n-gpu-layers", "999"),
            *(("--tensor-split", split) if len(shape.stages) > 1 else ()),
            *(("--cache-type-k", "q8_0", "--cache-type-v", "q8_0") if architecture.kv_dtype_bytes < HALF_PRECISION_BYTES else ()),
        ),
        (("CUDA_VISIBLE_DEVICES", cards),),
    )


def engine_shape(
    shape: Shape, memory: tuple[CardMemory, ...], card_names: Sequence[str], *, pages_kv: bool, quantization: str
) -> EngineShape:
    """What a node is told of one replica, or of a group's first stage.

    Args:
        shape: with the layers of its stages.
        memory: of each stage's fullest card.
        card_names: of the box's cards, in the order of the shape's indices.
        pages_kv: whether the engine shares one cache among all sequences.
        quantization: as the catalogue calls it.
    """
    stages = shape.stages[:1] if shape.kind is ShapeKind.BOXES else shape.stages
    names = tuple(card_names[index] for stage in stages for index in stage.card_indices)
    fullest = max(memory, key=lambda card: card.needed_bytes)
    facts = card_facts(shape.stages, [card.usable_bytes for card in memory], between=shape.between) if names else NOTHING_KNOWN
    return EngineShape(
        card_uuids=names,
        tensor_parallel_size=shape.tensor_parallel,
        quantization=quantization,
        # On cards the cache takes what is left of them.
        kv_cache_bytes=0 if names or not pages_kv else max(card.kv_wanted_bytes for card in memory),
        memory_bytes=fullest.usable_bytes if names else fullest.needed_bytes,
        card_facts=facts,
        stage_layer_counts=tuple(stage.layer_count for stage in stages) if shape.kind is ShapeKind.PIPELINE else (),
    )


def card_facts(stages: Sequence[Stage], usable_bytes: Sequence[int], *, between: GroupLink = ALONE) -> CardFacts:
    """What all stages of a replica are told of their cards.

    Args:
        stages: all of them.
        usable_bytes: of each stage's fullest card.
        between: what the cards of all stages in one box share.
    """
    cards = [card for stage in stages for card in stage.cards]
    # vLLM takes its share of the whole card and refuses to start where others hold part of it. Rounded down, so that it is there.
    share = min(size / min(card.model.memory_bytes for card in stage.cards) for stage, size in zip(stages, usable_bytes, strict=True))
    percent = max(1, min(UTILIZATION_PERCENT_MAX, int(100 * share + 1e-6)))
    by_host = [link for link in (between, *(stage.link for stage in stages)) if link.kind is Link.HOST]
    bridged = any(link.has_bridge for link in by_host)
    return CardFacts(
        memory_utilization_percent=percent,
        half_precision=min(card.model.compute_capability for card in cards) < BFLOAT16_CAPABILITY_MIN,
        without_custom_all_reduce=not all(_may_reduce_itself(stage) for stage in stages),
        peer_access=PeerAccess.ANY if not by_host else PeerAccess.BRIDGES if bridged else PeerAccess.NONE,
    )


def stage_facts(stages: Sequence[Stage], usable_bytes: Sequence[int]) -> tuple[CardFacts, ...]:
    """The same for each stage of a group: alike, but that each takes of its own cards what is there."""
    alike = card_facts(stages, usable_bytes)
    own = (card_facts([stage], [size]).memory_utilization_percent for stage, size in zip(stages, usable_bytes, strict=True))
    return tuple(replace(alike, memory_utilization_percent=percent) for percent in own)


def _may_reduce_itself(stage: Stage) -> bool:
    """Whether vLLM's own all-reduce works: between cards that reach each other, more than two of them over NVLink only."""
    if stage.link.kind is Link.PEER:
        return len(stage.cards) <= CUSTOM_ALL_REDUCE_PCIE_CARDS_MAX
    return stage.link.kind in {Link.NONE, Link.NVLINK}
