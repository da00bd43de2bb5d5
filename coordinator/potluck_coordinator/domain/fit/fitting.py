"""The fit: can this model run on this hardware, in which shape, how fast, and with which flags.

Decides by asking memory, rates and corrections for every shape, and `choice` for the best. The planner and the command line both ask it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from potluck_coordinator.domain.fit.architecture import ModelArchitecture
from potluck_coordinator.domain.fit.choice import chosen
from potluck_coordinator.domain.fit.corrections import NOTHING_LEARNED, CorrectionKey, Corrections, Measure
from potluck_coordinator.domain.fit.engines import traits_of
from potluck_coordinator.domain.fit.flags import flags_of
from potluck_coordinator.domain.fit.hardware import BoxLink, NodeHardware
from potluck_coordinator.domain.fit.layout import laid_out
from potluck_coordinator.domain.fit.load import Load
from potluck_coordinator.domain.fit.memory import CardMemory, kv_capacity_tokens, kv_told_tokens, shape_memory
from potluck_coordinator.domain.fit.rates import BATCH_SEQUENCES_MAX, Rates, rates_of
from potluck_coordinator.domain.fit.report import (
    RATE_ERROR_SHARE,
    TRUSTED_RATE_ERROR_SHARE,
    FitReport,
    ShapeFit,
    Verdict,
    judge,
    memory_error_bytes,
)
from potluck_coordinator.domain.fit.shapes import Shape, ShapeKind, groups_of

PROCESSOR: Final = "processor"


def fit(
    architecture: ModelArchitecture,
    boxes: Sequence[NodeHardware],
    *,
    engine_kind: str,
    context_length_tokens: int,
    sequence_count_wanted: int,
    corrections: Corrections = NOTHING_LEARNED,
    link: BoxLink | None = None,
    memory_utilization: float | None = None,
    batch_tokens: int | None = None,
    sequence_count_max: int = BATCH_SEQUENCES_MAX,
    stages_in_box: bool = True,
) -> FitReport:
    """Every shape of a model on a box, or on a group of boxes.

    Args:
        architecture: the model.
        boxes: one box, or all boxes of a group, which then form one pipeline.
        engine_kind: "vllm" or "llamacpp".
        context_length_tokens: of each sequence, prompt and answer together.
        sequence_count_wanted: how many of them at a time, at the least.
        corrections: what nodes have observed.
        link: what was measured between the boxes; a gigabit LAN where nothing was.
        memory_utilization: the share of a card that the engine may take, where the supervisor had to step down; None: the engine's first.
        batch_tokens: prompt tokens that go through the model at a time; None: as many as the engine takes by itself.
        sequence_count_max: the slots that the engine is started with where its cache holds more sequences: rates of a batch are of no more.
        stages_in_box: whether it may be started with layers over several cards of one box; a node starts not every engine so.

    Raises:
        ValueError: no box, an engine kind that the fit does not model, or a wish for less than one token of one sequence.
    """
    if not boxes:
        raise ValueError("the fit needs a box")
    traits = traits_of(engine_kind)
    if memory_utilization is not None:
        traits = replace(traits, memory_utilization=memory_utilization)
    if batch_tokens is not None:
        traits = replace(traits, batch_tokens=batch_tokens, host_batch_tokens=batch_tokens)
    load = Load(traits, context_length_tokens, sequence_count_wanted)
    question = _Question(architecture, boxes, load, corrections, link or BoxLink(), min(BATCH_SEQUENCES_MAX, sequence_count_max))
    able = (shape for shape in groups_of(architecture, boxes, load.traits) if stages_in_box or shape.kind is not ShapeKind.PIPELINE)
    shapes = [laid_out(architecture, shape, load) for shape in able]
    fits = chosen([question.answer(shape) for shape in shapes])
    verdict, reason = _verdict(fits)
    return FitReport(architecture, engine_kind, context_length_tokens, sequence_count_wanted, fits, verdict, reason)


def correction_key(architecture: ModelArchitecture, boxes: Sequence[NodeHardware], shape: Shape, engine_kind: str) -> CorrectionKey:
    """Under what observations of a shape are kept; of unlike cards the slowest's name stands for all."""
    cards = [card.model for stage in shape.stages for card in stage.cards]
    name = min(cards, key=lambda model: (model.bandwidth_gb_per_second, model.name)).name if cards else PROCESSOR
    engine = boxes[shape.stages[0].box_index].engine_text(engine_kind)
    return CorrectionKey(name, engine, architecture.model_id, architecture.quantization.name)


@dataclass(frozen=True, slots=True)
class _Question:
    architecture: ModelArchitecture
    boxes: Sequence[NodeHardware]
    load: Load
    corrections: Corrections
    link: BoxLink
    sequence_count_max: int

    def answer(self, shape: Shape) -> ShapeFit:
        """One shape, judged by itself."""
        architecture, load = self.architecture, self.load
        key = correction_key(architecture, self.boxes, shape, load.traits.kind)
        learned = {measure: self.corrections.of(key, measure) for measure in Measure}
        bare = shape_memory(architecture, shape, load)
        memory = tuple(_corrected(card, learned[Measure.MEMORY].ratio) for card in bare)
        # The cache is what the rest of the memory leaves: a node that shows both has shown one thing, which must not count twice.
        room = bare if learned[Measure.KV_TOKENS].node_count else memory
        tokens = int(kv_capacity_tokens(architecture, shape, room, load) * learned[Measure.KV_TOKENS].ratio)
        sequences = tokens // load.context_length_tokens
        error_bytes = memory_error_bytes(memory, trusted=learned[Measure.MEMORY].is_trusted or learned[Measure.KV_TOKENS].is_trusted)
        verdict, reason = judge(architecture, load, memory, error_bytes)
        if verdict is not Verdict.DOES_NOT_FIT and sequences < load.sequence_count:
            verdict = Verdict.DOES_NOT_FIT
            reason = f"nodes report room for {tokens:,} tokens, which is {sequences} of {load.sequence_count} sequences"
        told_tokens = kv_told_tokens(architecture, shape, memory, load)
        # A cache that is told its size is made for as many sequences as were asked for; one that fills a card serves as many as come.
        at_a_time = load.sequence_count if told_tokens is not None else max(load.sequence_count, min(self.sequence_count_max, sequences))
        rates = rates_of(architecture, shape, load, at_a_time, self.link)
        trusted_rates = learned[Measure.PREFILL].is_trusted and learned[Measure.DECODE].is_trusted
        return ShapeFit(
            shape=shape,
            memory=memory,
            memory_error_bytes=error_bytes,
            kv_bytes_per_token=int(architecture.sequence_kv_bytes(load.context_length_tokens) / load.context_length_tokens),
            kv_capacity_tokens=tokens,
            kv_cache_tokens=tokens if told_tokens is None else min(told_tokens, tokens),
            sequences_at_context=sequences,
            rates=_corrected_rates(rates, learned[Measure.PREFILL].ratio, learned[Measure.DECODE].ratio),
            rate_error_share=TRUSTED_RATE_ERROR_SHARE if trusted_rates else RATE_ERROR_SHARE,
            verdict=verdict,
            reason=reason,
            flags=flags_of(architecture, shape, load, memory, at_a_time),
        )


def _corrected(card: CardMemory, ratio: float) -> CardMemory:
    """The difference goes to the overhead: how big weights are is known, and what the engine takes beside them is not."""
    fixed = card.weight_bytes + card.overhead_bytes
    return replace(card, overhead_bytes=max(0, int(fixed * ratio) - card.weight_bytes))


def _corrected_rates(rates: Rates, prefill_ratio: float, decode_ratio: float) -> Rates:
    """No observation lifts a rate above the roofline."""
    return replace(
        rates,
        prefill=min(rates.roofline_prefill, rates.prefill * prefill_ratio),
        decode_single=min(rates.roofline_single, rates.decode_single * decode_ratio),
        decode_batched=min(rates.roofline_batched, rates.decode_batched * decode_ratio),
    )


def _verdict(fits: Sequence[ShapeFit]) -> tuple[Verdict, str]:
    if not fits:
        return Verdict.DOES_NOT_FIT, "the engine has no shape for this hardware"
    best = fits[0]
    if best.runs:
        return best.verdict, f"{best.shape.label}: {best.reason}"
    nearest = max(fits, key=lambda fit: min(card.spare_bytes for card in fit.memory))
    return Verdict.DOES_NOT_FIT, f"{nearest.shape.label}: {nearest.reason}"
