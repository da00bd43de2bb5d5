"""What a stage's cards, or its box's processor, deliver to an engine: bytes, operations, and time that each layer costs anyway.

Decides by the slowest card of a group. It must not know models.
"""

from __future__ import annotations

from dataclasses import dataclass

from potluck_coordinator.domain.fit.cards import CardModel, Memory
from potluck_coordinator.domain.fit.engines import (
    HOST_GFLOPS_PER_CORE,
    HOST_LAYER_SECONDS,
    LAYER_CYCLES,
    EngineTraits,
    decode_share_at,
    matmul_tflops,
    prefill_share_at,
    wide_sum_tflops,
)
from potluck_coordinator.domain.fit.shapes import Stage


@dataclass(frozen=True, slots=True)
class StageSpeed:
    """Of all cards of a stage together."""

    bytes_per_second: float
    nominal_bytes_per_second: float
    flops_quantized: float
    """Of products by quantised weights."""
    flops_half: float
    """By weights in half precision."""
    flops_attention: float
    peak_flops: float
    layer_seconds: float
    quantized_overlaps: bool


def stage_speed(stage: Stage, traits: EngineTraits) -> StageSpeed:
    """The speed of a stage; raises ValueError for one that has neither cards nor a processor."""
    count = len(stage.cards)
    if stage.cards:
        nominal = count * min(card.model.bandwidth_gb_per_second for card in stage.cards) * 1e9
        power = min(decode_share_at(card.power_limit_watts, card.model) for card in stage.cards)
        quantized, half, attention = (
            min(rate * prefill_share_at(card.power_limit_watts, card.model) for card, rate in zip(stage.cards, rates, strict=True))
            for rates in zip(*(_tflops(card.model, traits) for card in stage.cards), strict=True)
        )
        read = min(traits.bandwidth_share[card.model.family.memory] * card.model.bandwidth_gb_per_second for card in stage.cards)
        return StageSpeed(
            bytes_per_second=count * read * power * 1e9,
            nominal_bytes_per_second=nominal,
            flops_quantized=count * quantized * 1e12,
            flops_half=count * half * 1e12,
            flops_attention=count * attention * 1e12,
            peak_flops=count * min(card.model.peak_tflops for card in stage.cards) * 1e12,
            layer_seconds=max(LAYER_CYCLES / (card.model.boost_ghz * 1e9) for card in stage.cards),
            quantized_overlaps=traits.quantized_overlaps,
        )
    if stage.processor is None:
        raise ValueError("a stage needs a card or a processor")
    nominal = stage.processor.bandwidth_gb_per_second * 1e9
    flops = stage.processor.core_count * HOST_GFLOPS_PER_CORE * 1e9
    read = traits.bandwidth_share[Memory.HOST] * nominal
    return StageSpeed(read, nominal, flops, flops, flops, flops, HOST_LAYER_SECONDS, traits.quantized_overlaps)


def _tflops(card: CardModel, traits: EngineTraits) -> tuple[float, float, float]:
    """Of products by quantised weights, by weights in half precision, and of attention."""
    packed, half = (matmul_tflops(traits.kind, card, quantized=quantized) for quantized in (True, False))
    return packed, half, wide_sum_tflops(card)
