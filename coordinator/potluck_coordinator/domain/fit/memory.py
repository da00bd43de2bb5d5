"""What every card of a shape must hold, and what is left for keys and values.

Decides by arithmetic: weights, activations, the engine's own, and the KV cache in what remains. It must not know speed or verdicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Final

from potluck_coordinator.domain.fit.architecture import ModelArchitecture
from potluck_coordinator.domain.fit.engines import CUDA_CONTEXT_BYTES
from potluck_coordinator.domain.fit.load import Load
from potluck_coordinator.domain.fit.shapes import Shape, Stage

LOGIT_BYTES: Final = 4
KV_BLOCK_TOKENS_ON_PROCESSOR: Final = 128
"""vLLM's block on a processor; on a card it is 16, too little to matter."""
SLOT_TOKENS_STEP: Final = 256
"""llama.cpp makes a slot's cache a multiple of it; the few MB more are within the error of a prediction."""


@dataclass(frozen=True, slots=True)
class CardMemory:
    """One card of a replica, or its box's own memory, in bytes."""

    box_index: int
    card_index: int | None
    usable_bytes: int
    """What the engine may take: the card's share of it that the engine is told, or the node's budget."""
    weight_bytes: int
    """Tables that the engine keeps twice are counted twice."""
    overhead_bytes: int
    """Activations of a step, logits, CUDA's context, graphs, communication buffers; without a card the engine's processes."""
    kv_wanted_bytes: int
    """Keys and values of the wanted sequences at the full context."""

    @property
    def kv_available_bytes(self) -> int:
        """What weights and overhead leave; below zero by as much as they are too big."""
        return self.usable_bytes - self.weight_bytes - self.overhead_bytes

    @property
    def needed_bytes(self) -> int:
        """All that the wish takes on this card."""
        return self.weight_bytes + self.overhead_bytes + self.kv_wanted_bytes

    @property
    def spare_bytes(self) -> int:
        """What the wish leaves free; below zero by as much as it does not fit."""
        return self.usable_bytes - self.needed_bytes


def stage_memory(architecture: ModelArchitecture, stage: Stage, load: Load) -> CardMemory:
    """Of the fullest card of a stage, which all others of the stage resemble."""
    traits = load.traits
    slices = max(1, len(stage.cards))
    wanted = kv_wanted_bytes(architecture, load, on_processor=not stage.cards)
    return CardMemory(
        box_index=stage.box_index,
        card_index=stage.card_indices[0] if stage.card_indices else None,
        usable_bytes=_usable_bytes(stage, load),
        weight_bytes=int(_stage_weight_bytes(architecture, stage, load) / slices),
        overhead_bytes=int(activation_bytes(architecture, stage, load))
        + (CUDA_CONTEXT_BYTES + traits.graph_bytes if stage.cards else traits.host_process_bytes)
        + (traits.group_bytes if slices > 1 else 0),
        kv_wanted_bytes=ceil(wanted * kv_share(architecture, stage)),
    )


def shape_memory(architecture: ModelArchitecture, shape: Shape, load: Load) -> tuple[CardMemory, ...]:
    """One entry for every stage: its fullest card."""
    return tuple(stage_memory(architecture, stage, load) for stage in shape.stages)


def kv_wanted_bytes(architecture: ModelArchitecture, load: Load, *, on_processor: bool) -> float:
    """Keys and values of all wanted sequences at the full context, over all layers and cards.

    Where vLLM pages them on a processor: in whole blocks, and one that it keeps as the empty one (`block_pool.py`). A byte less than the
    blocks of one sequence, and it does not start.
    """
    if not (on_processor and load.traits.pages_kv):
        return load.sequence_count * architecture.sequence_kv_bytes(load.context_length_tokens)
    block = KV_BLOCK_TOKENS_ON_PROCESSOR
    paged_tokens = ceil(load.context_length_tokens / block) * block
    return load.sequence_count * architecture.sequence_kv_bytes(paged_tokens) + block * architecture.kv_bytes_per_layer_token * (
        architecture.growing_layer_count
    )


def kv_share(architecture: ModelArchitecture, stage: Stage) -> float:
    """Of a sequence's keys and values, what one card of a stage keeps: its layers', its heads'; more cards than KV heads keep copies."""
    return stage.layer_count / architecture.layer_count / min(max(1, len(stage.cards)), architecture.kv_head_count)


def activation_bytes(architecture: ModelArchitecture, stage: Stage, load: Load) -> float:
    """What one step over a full batch of prompt tokens needs beside weights and KV.

    For every token of the batch gate, up and their product, a few vectors of the hidden size, and its row of the attention mask; on the
    last stage the logits of the sequences that are answered, in as many copies as the engine keeps.
    """
    traits = load.traits
    slices = max(1, len(stage.cards))
    wide = 3 * architecture.intermediate_size * max(1, architecture.experts_per_token) / slices
    values = (wide + traits.activation_hidden_vectors * architecture.hidden_size) * (
        traits.activation_value_bytes or architecture.dtype_bytes
    )
    logits = traits.logit_copies * LOGIT_BYTES * load.sequence_count * architecture.vocabulary_size / slices if stage.is_last else 0
    return load.batch_tokens(on_processor=not stage.cards) * (values + traits.mask_bytes * load.context_length_tokens) + logits


def kv_capacity_tokens(architecture: ModelArchitecture, shape: Shape, memory: tuple[CardMemory, ...], load: Load) -> int:
    """Tokens that one replica has room for, full sequences side by side: what vLLM, which fills its cards, logs at start."""
    return _tokens_in([card.kv_available_bytes for card in memory], architecture, shape, load)


def kv_told_tokens(architecture: ModelArchitecture, shape: Shape, memory: tuple[CardMemory, ...], load: Load) -> int | None:
    """Tokens of the cache whose size the flags name; None where the engine is not told one, and takes all the room there is."""
    if not load.traits.pages_kv:
        return load.sequence_count * ceil(load.context_length_tokens / SLOT_TOKENS_STEP) * SLOT_TOKENS_STEP
    if any(stage.cards for stage in shape.stages):
        return None
    return _tokens_in([card.kv_wanted_bytes for card in memory], architecture, shape, load)


def _tokens_in(cache_bytes: Sequence[int], architecture: ModelArchitecture, shape: Shape, load: Load) -> int:
    """Of full sequences side by side, in so many bytes on each stage's fullest card."""
    per_token = architecture.sequence_kv_bytes(load.context_length_tokens) / load.context_length_tokens
    room = [
        size / (per_token * kv_share(architecture, stage)) if per_token else float("inf")
        for size, stage in zip(cache_bytes, shape.stages, strict=True)
    ]
    return max(0, int(min(*room, 2.0**53)))


def kv_tokens_on_processor(architecture: ModelArchitecture, space_bytes: int, layer_count: int | None = None) -> int:
    """Tokens that vLLM's KV cache of `space_bytes` holds on a processor, in whole blocks, for a stage of `layer_count` layers (all).

    `space_bytes` is VLLM_CPU_KVCACHE_SPACE in GiB, or `--kv-cache-memory-bytes`: vLLM divides it by a block's bytes over all layers
    (`kv_cache_utils.py`), and logs the product as "CPU KV cache size".
    """
    layers = architecture.growing_layer_count if layer_count is None else layer_count
    block_bytes = KV_BLOCK_TOKENS_ON_PROCESSOR * layers * architecture.kv_bytes_per_layer_token
    return int(space_bytes // block_bytes) * KV_BLOCK_TOKENS_ON_PROCESSOR


def _stage_weight_bytes(architecture: ModelArchitecture, stage: Stage, load: Load) -> float:
    """The layers, the table of the embeddings on the first stage, the output's on the last; tied ones are on both."""
    tied = architecture.tie_word_embeddings
    first = stage.is_first and not (load.traits.keeps_embeddings_on_host and stage.cards and not (tied and stage.is_last))
    tables = 1 if tied and first and stage.is_last else int(first) + int(stage.is_last)
    copies = 2 if load.traits.packs_tables_on_processor and not stage.cards else 1
    return stage.layer_count * architecture.layer_bytes + tables * copies * architecture.embedding_bytes


def _usable_bytes(stage: Stage, load: Load) -> int:
    if not stage.cards:
        return stage.processor.memory_budget_bytes if stage.processor else 0
    told = min(card.model.memory_bytes for card in stage.cards) * load.traits.memory_utilization
    # An engine that is told a share does not start where less than it is free once its own context is there.
    context_bytes = CUDA_CONTEXT_BYTES if load.traits.memory_utilization < 1 else 0
    return max(0, min(int(told), *(card.usable_bytes - context_bytes for card in stage.cards)))
