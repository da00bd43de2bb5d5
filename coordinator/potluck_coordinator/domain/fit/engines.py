"""What each engine makes of a card: how much of its bandwidth and arithmetic it reaches, and what memory it takes for itself.

Decides the few constants between a roofline and a running engine, each with where it comes from. It must not know models or shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from potluck_coordinator.domain.fit.architecture import GIB, UNQUANTIZED, Quantization
from potluck_coordinator.domain.fit.cards import CardModel, Memory

VLLM: Final = "vllm"
LLAMACPP: Final = "llamacpp"

CONVERTED_TO_GGUF: Final = frozenset({UNQUANTIZED.name, "mxfp4"})
LAYER_CYCLES: Final = 150_000
"""Clock cycles that every layer of a step costs beside reading its weights: a dozen small kernels that follow one another. 106 microseconds
on an A100, 88 on an RTX 3090. That it goes by the clock: club-3090 issue 104, where two RTX 3090 at 705 and 1695 MHz and the same memory
clock differ by 117,000 cycles a layer. Fitted once, to vLLM 0.6.3 on an A100 (Qwen2.5's speed table, which alone would want 190,000) and
llama.cpp of May 2024 on 13 models of card (GPU-Benchmarks-on-LLM-Inference). Newer engines need less, and corrections learn that."""
VLLM_MATMUL_SHARE_HALVED: Final = 0.75
VLLM_MATMUL_SHARE: Final = 0.6
LLAMACPP_TFLOPS_PER_SM_GHZ: Final = 0.50
LLAMACPP_TFLOPS_PER_WATT_MAX: Final = 0.35
LLAMACPP_TFLOPS_PER_SM_GHZ_HBM: Final = 0.87
LLAMACPP_HALF_TFLOPS_PER_SM_GHZ: Final = 0.57
LLAMACPP_HALF_TFLOPS_PER_WATT_MAX: Final = 0.47
LLAMACPP_HALF_TFLOPS_PER_SM_GHZ_HBM: Final = 1.25
"""Of matrix products; see `matmul_tflops`."""
ACTIVATION_MOVE_BYTES: Final = 4
UNPACKING_LAUNCHES_PER_LAYER: Final = 7
"""Kernels that quantised weights take on top: one for each of a layer's seven matrices."""
HOST_LAYER_SECONDS: Final = 30e-6
HOST_GFLOPS_PER_CORE: Final = 20.0
"""A guess for a core with AVX2 and a quantised model; a node's own observations correct it."""
CUDA_CONTEXT_BYTES: Final = int(0.35 * GIB)
"""What a process holds on a card before it has allocated anything: vLLM calls it non-torch memory (0.35 GiB, vLLM issue 10517)."""


@dataclass(frozen=True, slots=True)
class EngineTraits:
    """One engine kind."""

    kind: str
    bandwidth_share: Mapping[Memory, float]
    """Of a memory's nominal bandwidth that reading weights reaches."""
    batch_tokens: int
    """Prompt tokens that go through the model at a time."""
    host_batch_tokens: int
    activation_hidden_vectors: int
    """How many vectors of the hidden size, beside three of the feed-forward layer's, a token holds at the worst moment of a step."""
    activation_value_bytes: int | None
    """Of each of their values; None: the model's own."""
    mask_bytes: int
    """For every token of a batch and every position of the context."""
    logit_copies: int
    """Of the logits of the sequences that are answered, in single precision."""
    graph_bytes: int
    """CUDA graphs and workspaces."""
    group_bytes: int
    """NCCL's buffers on each card of a group."""
    host_process_bytes: int
    """What the engine's processes hold, beside the model and its cache, in a node's memory where they run without a card."""
    memory_utilization: float = 1.0
    """Share of a card that the engine is told it may fill, nominal memory that CUDA shows counted."""
    pipelines_batches: bool = False
    """Whether stages work on different requests at the same time."""
    pages_kv: bool = False
    """Whether sequences share the KV cache token by token, rather than by slots of the full context."""
    splits_tensors: bool = False
    packs_tables_on_processor: bool = False
    """Whether, without a card, it keeps the tables of its words a second time, packed for the processor's matrix products."""
    keeps_embeddings_on_host: bool = False
    """Whether the table from tokens to vectors stays in the box's memory, where it is not the output's table too."""
    quantized_overlaps: bool = True
    """Whether reading 4-bit weights and multiplying by them happen at the same time."""
    hidden_moves: float = 0.0
    """How often a layer carries a value of the hidden size to or from a card's memory beside its products, for every prompt token."""
    wide_moves: float = 0.0
    """The same of the feed-forward layer's values."""
    launches_per_layer: int = 0
    """Kernels that one thread starts for each layer of a prompt's part, on all cards in turn; 0: stages take it one after the other."""


ENGINES: Final = {
    # vLLM: shares fitted to Qwen2.5's speed table (A100, vLLM 0.6.3), which they meet within 14 %. Activations: issue 10517 shows 110 kB a
    # prompt token for Llama 3.1 8B, three times 14336 and three times 4096 in half precision. Batch: vLLM's default for chunked prefill.
    # Utilisation: the first rung of the supervisor's ladder. Graphs: club-3090's boot logs, 0.1 to 0.6 GiB.
    VLLM: EngineTraits(
        kind=VLLM,
        bandwidth_share={Memory.GDDR: 0.90, Memory.HBM: 0.90, Memory.HOST: 0.5},
        batch_tokens=2048,
        host_batch_tokens=2048,
        activation_hidden_vectors=3,
        activation_value_bytes=None,
        mask_bytes=0,
        # They, and what is sampled from.
        logit_copies=2,
        graph_bytes=int(0.3 * GIB),
        group_bytes=int(0.3 * GIB),
        # Of vLLM 0.32 with SmolLM2: 2,426 MiB in its three processes, shared pages counted once, less 257 of weights, 54 of the packed
        # table and 256 of cache.
        host_process_bytes=int(1.82 * GIB),
        memory_utilization=0.95,
        pipelines_batches=True,
        pages_kv=True,
        splits_tensors=True,
        # `vocab_parallel_embedding.py` packs them with `remove_weight=False`; other matrices lose their first form.
        packs_tables_on_processor=True,
    ),
    # llama.cpp: shares fitted to GPU-Benchmarks-on-LLM-Inference (Llama 3 8B and 70B, Q4_K_M and F16, on 31 cards and groups); its
    # matrix-vector kernels leave half of an A100's or H100's HBM idle. Batches are those of the node's llamacpp_server.
    # Activations: the compute buffers that xllamacpp 2026.10 logs for SmolLM2, in batches of 64, 512 and 2048 tokens, are three times 1536
    # and five times 576 values in single precision for every token, and a mask in half precision. Of logits there is a row a slot.
    LLAMACPP: EngineTraits(
        kind=LLAMACPP,
        bandwidth_share={Memory.GDDR: 0.88, Memory.HBM: 0.55, Memory.HOST: 0.5},
        batch_tokens=2048,
        host_batch_tokens=64,
        activation_hidden_vectors=5,
        activation_value_bytes=4,
        mask_bytes=2,
        logit_copies=1,
        graph_bytes=0,
        group_bytes=0,
        # Of xllamacpp 2026.10 with SmolLM2: 192 MiB resident, less 94 of weights, 45 of cache and 2 of activations; and 256 for the prompts
        # that the node's server lets it keep.
        host_process_bytes=GIB // 16 + GIB // 4,
        keeps_embeddings_on_host=True,
        quantized_overlaps=False,
        # Counted in the graph of a Llama layer as llama.cpp had it in May 2024, in single precision. Of the hidden size: two norms and
        # their factors 8, halving the input of six products 9, the output of three in halves and widened 6, positions 2, two sums 6. Of the
        # feed-forward layer: the outputs of gate and up 4, activation 2, their product 3, halving the input of down 1.5. Some is fused now.
        hidden_moves=31,
        wide_moves=10.5,
        # 14 kernels of the same graph that are no products, three for each of seven products, and about eleven of attention. With fewer
        # than 45 a stage of 20 layers of quantised weights would not fill the queue, with more than 51 one in half precision would.
        launches_per_layer=46,
    ),
}


def traits_of(engine_kind: str) -> EngineTraits:
    """The traits of an engine kind; raises ValueError for one that the fit does not model."""
    traits = ENGINES.get(engine_kind)
    if traits is None:
        raise ValueError(f"the fit models {' and '.join(ENGINES)}, not {engine_kind}")
    return traits


def loads(engine_kind: str, quantization: Quantization) -> bool:
    """Whether an engine reads weights that are stored so.

    llama.cpp reads GGUF files alone. Unquantised weights and MXFP4 are converted to those as they are.
    """
    return engine_kind != LLAMACPP or quantization.is_gguf or quantization.name in CONVERTED_TO_GGUF


def matmul_tflops(engine_kind: str, card: CardModel, *, quantized: bool) -> float:
    """Half-precision matrix products a second that an engine sustains on a card, in units of 10^12 operations.

    llama.cpp's products go by the multiprocessors' clock; on Ada chips no further than the board's power lets them. Weights in half
    precision go to cuBLAS as they are; others are unpacked, or multiplied by kernels of llama.cpp's own, which are slower (the prompt
    columns of GPU-Benchmarks-on-LLM-Inference).
    """
    if engine_kind != LLAMACPP:
        return wide_sum_tflops(card)
    clock = card.sm_count * card.boost_ghz
    if card.family.memory is Memory.HBM:
        return (LLAMACPP_TFLOPS_PER_SM_GHZ_HBM if quantized else LLAMACPP_HALF_TFLOPS_PER_SM_GHZ_HBM) * clock
    if quantized:
        return min(LLAMACPP_TFLOPS_PER_SM_GHZ * clock, LLAMACPP_TFLOPS_PER_WATT_MAX * card.board_power_watts)
    return min(LLAMACPP_HALF_TFLOPS_PER_SM_GHZ * clock, LLAMACPP_HALF_TFLOPS_PER_WATT_MAX * card.board_power_watts)


def wide_sum_tflops(card: CardModel) -> float:
    """The same of products that are summed up in single precision: vLLM's, with cuBLAS and Marlin, and those of attention everywhere.

    0.75 of that rate on GeForce cards, whose tensor cores are half asleep then, 0.6 where the full rate meets power and memory first
    (club-3090's prefill rows on two and four RTX 3090).
    """
    share = VLLM_MATMUL_SHARE if card.family.fp32_accumulate_share == 1.0 else VLLM_MATMUL_SHARE_HALVED
    return share * card.fp32_accumulate_tflops


def prefill_share_at(power_limit_watts: int | None, card: CardModel) -> float:
    """How much of its prompt rate a card keeps below its board's power, by the sweep of six RTX 3090 at llmgarage.ai.

    9,893 tokens/s at 350 W, 8,436 at 250, 5,941 at 200, 2,549 at 150.
    """
    return _between(power_limit_watts, card, ((150 / 350, 0.258), (200 / 350, 0.601), (250 / 350, 0.853), (1.0, 1.0)))


def decode_share_at(power_limit_watts: int | None, card: CardModel) -> float:
    """How much of its answer rate a card keeps below its board's power, by the sweep of two RTX 3090 in club-3090 issue 104.

    69.2 tokens/s at 300 W and above, 67.6 at 250, 65.3 at 220, 59.2 at 200, 48.4 at 180. Reading memory takes little power.
    """
    return _between(
        power_limit_watts, card, ((180 / 350, 0.699), (200 / 350, 0.855), (220 / 350, 0.944), (250 / 350, 0.977), (300 / 350, 1.0))
    )


def _between(power_limit_watts: int | None, card: CardModel, points: tuple[tuple[float, float], ...]) -> float:
    """Straight lines between the points; from the first one down to nothing, from the last one on flat."""
    if power_limit_watts is None:
        return 1.0
    limit = power_limit_watts / card.board_power_watts
    below = (0.0, 0.0)
    for point in points:
        if limit <= point[0]:
            return below[1] + (point[1] - below[1]) * max(0.0, limit - below[0]) / (point[0] - below[0])
        below = point
    return 1.0
