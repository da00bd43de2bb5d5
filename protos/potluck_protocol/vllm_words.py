"""What vLLM is told of the shape that it runs in, as flags and variables.

Decides them once for both sides: `potluck fit` prints them, and a node starts engines with them. They are made of numbers and of words
known here; what of a wish would make others is refused. It must not know files, addresses, ports, nor which start of several it is.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Final

from potluck_protocol.card_facts import PeerAccess

if TYPE_CHECKING:
    from potluck_protocol.values import EngineShape

UTILIZATION_PERCENT_MAX: Final = 95
"""Of what CUDA shows of a card: the rest is for its driver, its screen and what engines do not count."""
PROCESSOR_CACHE_BYTES: Final = 1024**3
"""For keys and values without cards, where nobody says: vLLM's own choice is nearly all of the machine's memory."""
MADE_WHILE_LOADING: Final = frozenset({"fp8", "fp8_per_tensor", "fp8_per_block", "int8_per_channel_weight_only", "mxfp8"})
"""Quantisations that vLLM makes of unquantised files. Those of quantised files (AWQ, GPTQ, …) it reads from them, and picks the fastest
kernel by itself; named, it would keep to that kernel."""
CARDS_MAX: Final = 64
LAYERS_MAX: Final = 1024

_CARD_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9/_-]{0,95}")
"""NVML's, or a place: "GPU-4b1e…", "0"."""


def shape_refusal(shape: EngineShape) -> str:
    """Why no engine is started in such a shape, whatever a coordinator wishes; empty where one may be."""
    percent, card_count, size = shape.card_facts.memory_utilization_percent, len(shape.card_uuids), shape.tensor_parallel_size
    if not 0 <= percent <= UTILIZATION_PERCENT_MAX:
        return f"{percent} % of a card's memory is no share of it; {UTILIZATION_PERCENT_MAX} % are the most"
    if card_count > CARDS_MAX or any(not _CARD_NAME.fullmatch(name) for name in shape.card_uuids):
        return "its cards are not named as cards are"
    if not 1 <= size <= CARDS_MAX or card_count % size:
        return f"{card_count} cards cannot be groups of {size}"
    counts = shape.stage_layer_counts
    if counts and (len(counts) * size != card_count or not all(1 <= count <= LAYERS_MAX for count in counts)):
        return f"{card_count} cards in groups of {size} cannot hold {len(counts)} stages of layers"
    if shape.kv_cache_bytes < 0 or shape.memory_bytes < 0:
        return "it is given less than no memory"
    return ""


def shape_arguments(
    shape: EngineShape,
    *,
    context_length_tokens: int,
    slot_count: int,
    memory_utilization_percent: int,
    group_layer_counts: tuple[int, ...] = (),
) -> tuple[str, ...]:
    """The flags of one engine, or of one stage of a group.

    Args:
        shape: how it is spread; one that is not refused.
        context_length_tokens: of one sequence, prompt and answer together.
        slot_count: sequences at a time.
        memory_utilization_percent: of each card; without cards, of what the cache would get, where less than the most.
        group_layer_counts: of each stage of the group, by rank.
    """
    stage_count = len(group_layer_counts) or max(1, len(shape.card_uuids) // shape.tensor_parallel_size)
    return (
        *("--max-model-len", str(context_length_tokens), "--max-num-seqs", str(slot_count)),
        *(("--tensor-parallel-size", str(shape.tensor_parallel_size)) if shape.tensor_parallel_size > 1 else ()),
        *(("--pipeline-parallel-size", str(stage_count)) if stage_count > 1 else ()),
        *(("--quantization", shape.quantization) if shape.quantization in MADE_WHILE_LOADING else ()),
        *(
            _on_cards(shape, memory_utilization_percent)
            if shape.card_uuids
            else _on_processors(shape, memory_utilization_percent, is_stage=bool(group_layer_counts))
        ),
    )


def shape_variables(shape: EngineShape, group_layer_counts: tuple[int, ...] = ()) -> dict[str, str]:
    """What vLLM and NCCL find of it in their environment."""
    told = {}
    if shape.card_uuids:
        told["CUDA_VISIBLE_DEVICES"] = ",".join(shape.card_uuids)
    # Where NCCL tries a way that the driver refuses, it hangs at start. A bridge among the cards may still be used.
    if shape.card_facts.peer_access is PeerAccess.BRIDGES:
        told["NCCL_P2P_LEVEL"] = "NVL"
    if shape.card_facts.peer_access is PeerAccess.NONE:
        told["NCCL_P2P_DISABLE"] = "1"
    if layer_counts := group_layer_counts or shape.stage_layer_counts:
        told["VLLM_PP_LAYER_PARTITION"] = ",".join(map(str, layer_counts))
    return told


def processor_cache_bytes(shape: EngineShape, memory_utilization_percent: int) -> int:
    """Memory for keys and values without cards: as planned, and less by the same share as what is taken of cards."""
    planned_bytes = shape.kv_cache_bytes or PROCESSOR_CACHE_BYTES
    return planned_bytes * min(memory_utilization_percent, UTILIZATION_PERCENT_MAX) // UTILIZATION_PERCENT_MAX


def _on_cards(shape: EngineShape, memory_utilization_percent: int) -> tuple[str, ...]:
    return (
        *("--gpu-memory-utilization", f"{memory_utilization_percent / 100:.2f}"),
        *(("--dtype", "half") if shape.card_facts.half_precision else ()),
        *(("--disable-custom-all-reduce",) if shape.card_facts.without_custom_all_reduce else ()),
    )


def _on_processors(shape: EngineShape, memory_utilization_percent: int, *, is_stage: bool) -> tuple[str, ...]:
    # Nothing is compiled: it takes a minute, wants a C++ compiler, and words its answers differently. A stage's buffers are made by the
    # warm-up, which vLLM leaves out when it is eager; traced and not compiled it warms up, and answers the same as eager.
    eager = ("--compilation-config", json.dumps({"mode": 2, "backend": "eager"})) if is_stage else ("--enforce-eager",)
    return ("--kv-cache-memory-bytes", str(processor_cache_bytes(shape, memory_utilization_percent)), *eager)
