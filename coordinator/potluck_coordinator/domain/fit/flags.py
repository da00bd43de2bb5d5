"""How an engine is told to run a shape: its command line and its environment.

Decides the flags. It must not know how processes are started, nor addresses of other boxes: whoever forms a group adds ranks and addresses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from potluck_coordinator.domain.fit.architecture import ModelArchitecture
from potluck_coordinator.domain.fit.interconnect import Link
from potluck_coordinator.domain.fit.load import Load
from potluck_coordinator.domain.fit.memory import CardMemory
from potluck_coordinator.domain.fit.shapes import Shape, ShapeKind, Stage

MARLIN_CAPABILITY_MIN: Final = (8, 0)
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

    llama.cpp's are those of the node's `llamacpp_server`; it spreads layers over all cards that it sees.
    """
    if not load.traits.pages_kv:
        slots: tuple[str, ...] = ("--context", str(load.context_length_tokens), "--slots", str(sequence_count))
        return EngineFlags(slots, _visible_cards(shape))
    arguments: tuple[str, ...] = ("--max-model-len", str(load.context_length_tokens), "--max-num-seqs", str(sequence_count))
    if shape.tensor_parallel > 1:
        arguments += ("--tensor-parallel-size", str(shape.tensor_parallel))
    if len(shape.stages) > 1:
        arguments += ("--pipeline-parallel-size", str(len(shape.stages)))
    if shape.stages[0].cards:
        arguments += _on_cards(architecture, shape, load)
    else:
        arguments += ("--kv-cache-memory-bytes", str(max(card.kv_wanted_bytes for card in memory)))
    return EngineFlags(arguments, _environment(shape))


def _on_cards(architecture: ModelArchitecture, shape: Shape, load: Load) -> tuple[str, ...]:
    capability = min(card.model.compute_capability for stage in shape.stages for card in stage.cards)
    # vLLM takes its share of the whole card and refuses to start where others hold part of it. Rounded down: 0.95 of what CUDA shows.
    share = min(card.usable_bytes / card.model.memory_bytes for stage in shape.stages for card in stage.cards)
    hundredths = int(100 * min(share, load.traits.memory_utilization) + 1e-6)
    arguments: tuple[str, ...] = ("--gpu-memory-utilization", f"{hundredths / 100:.2f}")
    if architecture.quantization.name in {"awq", "gptq"}:
        # Without the word vLLM finds the fast kernels by itself; with the plain one it takes the slow ones.
        suffix = "_marlin" if capability >= MARLIN_CAPABILITY_MIN else ""
        arguments += ("--quantization", architecture.quantization.name + suffix)
    if capability < BFLOAT16_CAPABILITY_MIN:
        arguments += ("--dtype", "half")
    if any(not _may_reduce_itself(stage) for stage in shape.stages):
        arguments += ("--disable-custom-all-reduce",)
    return arguments


def _may_reduce_itself(stage: Stage) -> bool:
    """Whether vLLM's own all-reduce works: between cards that reach each other, more than two of them over NVLink only."""
    if stage.link.kind is Link.PEER:
        return len(stage.cards) <= CUSTOM_ALL_REDUCE_PCIE_CARDS_MAX
    return stage.link.kind in {Link.NONE, Link.NVLINK}


def _environment(shape: Shape) -> tuple[tuple[str, str], ...]:
    environment = list(_visible_cards(shape))
    if any(stage.link.kind is Link.HOST for stage in shape.stages):
        # Where NCCL tries a way that the driver refuses, it hangs at start. A bridge inside the group may still be used.
        bridged = any(stage.link.has_bridge for stage in shape.stages)
        environment.append(("NCCL_P2P_LEVEL", "NVL") if bridged else ("NCCL_P2P_DISABLE", "1"))
    if len(shape.stages) > 1:
        environment.append(("VLLM_PP_LAYER_PARTITION", ",".join(str(stage.layer_count) for stage in shape.stages)))
    return tuple(environment)


def _visible_cards(shape: Shape) -> tuple[tuple[str, str], ...]:
    """The cards of a replica in one box; in a group each box names its own."""
    indices = [index for stage in shape.stages for index in stage.card_indices]
    if shape.kind is ShapeKind.BOXES or not indices:
        return ()
    return (("CUDA_VISIBLE_DEVICES", ",".join(map(str, indices))),)
