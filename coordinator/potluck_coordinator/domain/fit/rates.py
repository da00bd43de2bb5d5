"""How fast a shape reads prompts and writes answers.

Decides by a roofline with two corrections: what an engine reaches of it, and what every layer and every meeting of cards costs on top. It
must not know whether the shape fits.

Sources: the roofline model of Williams, Waterman and Patterson (2009); one answer token reads all weights and the sequence's keys and
values once (Pope et al., "Efficiently scaling transformer inference", section 2). Constants and where they come from: `engines`,
`interconnect`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Final

from potluck_coordinator.domain.fit.architecture import ModelArchitecture
from potluck_coordinator.domain.fit.engines import ACTIVATION_MOVE_BYTES, UNPACKING_LAUNCHES_PER_LAYER, EngineTraits
from potluck_coordinator.domain.fit.hardware import BoxLink
from potluck_coordinator.domain.fit.interconnect import all_reduce_seconds, hop_between_seconds, hop_inside_seconds
from potluck_coordinator.domain.fit.load import Load
from potluck_coordinator.domain.fit.memory import kv_share
from potluck_coordinator.domain.fit.prompt_parts import seconds_of_parts
from potluck_coordinator.domain.fit.shapes import Shape, ShapeKind, Stage
from potluck_coordinator.domain.fit.stage_speed import StageSpeed, stage_speed

BATCH_SEQUENCES_MAX: Final = 32
"""Beyond it a card of the RTX 3090's class multiplies longer than it reads, and an answer crawls."""
ALL_REDUCES_PER_LAYER: Final = 2
HALF_PRECISION_BITS: Final = 16
EXPERT_FILL_TOKENS: Final = 60
EXPERT_FILL_MIN: Final = 0.25
EXPERT_FILL_MAX: Final = 0.58
"""Experts' matrices are small and each meets few of a batch's tokens. Fitted to gpt-oss 20B on an RTX 3090 in batches of 1 to 512 tokens
(llama.cpp pull request 20586) and on an RTX 4090 in batches of 1024 to 4096 (15631), and to Qwen3 30B-A3B in batches of 2 to 64 (15631 and
20905); below the minimum other kernels take over."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Of one replica, in tokens a second, over sequences that are half full: an answer's average over its life."""

    prefill: float
    """Of a prompt that fills the context. Where one thread feeds several cards, they work on different parts of it at the same time; stages
    with a process each are counted one after the other, as for a prompt of one part."""
    decode_single: float
    """One sequence alone."""
    decode_batched: float
    """All of `batched_sequence_count` sequences together."""
    batched_sequence_count: int
    roofline_single: float
    """What one sequence could reach if memory were read at its nominal rate and nothing else took time."""
    roofline_batched: float
    roofline_prefill: float
    """What prompts could reach if the tensor cores never waited."""


@dataclass(frozen=True, slots=True)
class _Pass:
    """So many tokens of so many sequences, each over so many past tokens, through the model once."""

    tokens: int
    sequences: int
    past: float


def rates_of(architecture: ModelArchitecture, shape: Shape, load: Load, sequence_count: int, link: BoxLink) -> Rates:
    """The rates of a shape with so many sequences at work, whether or not it fits."""
    past = load.context_length_tokens / 2
    speeds = [stage_speed(stage, load.traits) for stage in shape.stages]
    replica = _Replica(architecture, shape, speeds, load.traits, link)
    part = _Pass(load.batch_tokens(on_processor=not shape.stages[0].cards), 1, past)
    single = _Pass(1, 1, past)
    return Rates(
        prefill=replica.prompts(part, ceil(load.context_length_tokens / part.tokens)),
        decode_single=1 / (sum(replica.steps(single)) + sum(replica.hops(single))),
        decode_batched=replica.batched(sequence_count, past),
        batched_sequence_count=sequence_count,
        roofline_single=1 / sum(replica.bare_reads(single)),
        roofline_batched=replica.batched_bound(sequence_count, past),
        roofline_prefill=replica.prompts_bound(past),
    )


@dataclass(frozen=True, slots=True)
class _Replica:
    architecture: ModelArchitecture
    shape: Shape
    speeds: list[StageSpeed]
    traits: EngineTraits
    link: BoxLink

    def steps(self, work: _Pass) -> list[float]:
        """Seconds that each stage takes for a pass."""
        return [self._step(stage, speed, work) for stage, speed in zip(self.shape.stages, self.speeds, strict=True)]

    def hops(self, work: _Pass) -> list[float]:
        """Seconds from each stage to the next, and from the last back to the first with the token that was chosen; 0 for one stage."""
        if len(self.shape.stages) == 1:
            return [0.0]
        size = float(work.tokens * self.architecture.hidden_size * self.architecture.dtype_bytes)
        sizes = [*([size] * (len(self.shape.stages) - 1)), 0.0]
        if self.shape.kind is ShapeKind.BOXES:
            return [hop_between_seconds(self.link, data) for data in sizes]
        return [hop_inside_seconds(stage.cards, data) for stage, data in zip(self.shape.stages, sizes, strict=True)]

    def prompts(self, part: _Pass, part_count: int) -> float:
        """Tokens a second of a prompt of so many parts; cards that one thread feeds read different parts at the same time."""
        steps, hops = self.steps(part), self.hops(part)
        if not self.traits.launches_per_layer:
            return part.tokens / (sum(steps) + sum(hops[:-1]))
        each = self.traits.launches_per_layer + (UNPACKING_LAUNCHES_PER_LAYER if self._is_quantized else 0)
        launches = [stage.layer_count * each for stage in self.shape.stages]
        return part_count * part.tokens / seconds_of_parts(steps, hops, launches, part_count)

    def prompts_bound(self, past: float) -> float:
        """The roofline of `prompts`."""
        products = self.bare_products(_Pass(1, 0, past))
        return 1 / (max(products) if self.traits.launches_per_layer else sum(products))

    def batched(self, sequence_count: int, past: float) -> float:
        """Tokens a second of all sequences; stages that work at the same time take as long as the slowest, once for each part."""
        part = self._part(sequence_count)
        work = _Pass(part, part, past)
        steps, hops = self.steps(work), self.hops(work)
        slowest = max(step + hop for step, hop in zip(steps, hops, strict=True))
        through = sum(steps) + sum(hops)
        return sequence_count / (max(ceil(sequence_count / part) * slowest, through) if part < sequence_count else through)

    def batched_bound(self, sequence_count: int, past: float) -> float:
        """The roofline of `batched`."""
        part = self._part(sequence_count)
        reads = self.bare_reads(_Pass(part, part, past))
        return part / max(reads) if part < sequence_count else sequence_count / sum(reads)

    def bare_reads(self, work: _Pass) -> list[float]:
        """Seconds that each stage reads for, at the memory's nominal rate."""
        return [
            (self._weight_bytes(stage, work) + self._kv_bytes(stage, work)) / speed.nominal_bytes_per_second
            for stage, speed in zip(self.shape.stages, self.speeds, strict=True)
        ]

    def bare_products(self, work: _Pass) -> list[float]:
        """Seconds that each stage multiplies for, at the tensor cores' peak."""
        return [self._flops(stage, work) / speed.peak_flops for stage, speed in zip(self.shape.stages, self.speeds, strict=True)]

    def _part(self, sequence_count: int) -> int:
        return ceil(sequence_count / len(self.shape.stages)) if self.traits.pipelines_batches else sequence_count

    def _step(self, stage: Stage, speed: StageSpeed, work: _Pass) -> float:
        weights = self._weight_bytes(stage, work) / speed.bytes_per_second
        kv = self._kv_bytes(stage, work) / speed.bytes_per_second
        flops = speed.flops_quantized if self._is_quantized else speed.flops_half
        attention = work.tokens * self._attention_flops(stage, work)
        products = (self._flops(stage, work) - attention + self._flops_in_vain(stage, work)) / flops + attention / speed.flops_attention
        overlaps = speed.quantized_overlaps or not self._is_quantized
        size = float(work.tokens * self.architecture.hidden_size * self.architecture.dtype_bytes)
        meeting = ALL_REDUCES_PER_LAYER * all_reduce_seconds(stage.link, max(1, len(stage.cards)), size)
        layers = stage.layer_count * (speed.layer_seconds + meeting)
        moves = self._moves(stage, work) / speed.bytes_per_second
        return kv + (max(weights, products) if overlaps else weights + products) + moves + layers

    @property
    def _is_quantized(self) -> bool:
        return self.architecture.quantization.bits_per_weight < HALF_PRECISION_BITS

    def _moves(self, stage: Stage, work: _Pass) -> float:
        """Bytes of activations that kernels other than products carry through a card's memory; a processor's caches hold them."""
        if not stage.cards:
            return 0.0
        hidden, wide = self.architecture.hidden_size, self.architecture.wide_values_per_token
        values = self.traits.hidden_moves * hidden + self.traits.wide_moves * wide
        return work.tokens * stage.layer_count * values * ACTIVATION_MOVE_BYTES

    def _weight_bytes(self, stage: Stage, work: _Pass) -> float:
        """Of the table of embeddings a step reads a few rows; the output's table it reads whole."""
        table = self.architecture.embedding_bytes if stage.is_last else 0.0
        return stage.layer_count * self.architecture.layer_read_bytes(work.tokens) + table

    def _kv_bytes(self, stage: Stage, work: _Pass) -> float:
        copies = kv_share(self.architecture, stage) * max(1, len(stage.cards))
        return work.sequences * self.architecture.sequence_kv_bytes(work.past) * copies

    def _flops_in_vain(self, stage: Stage, work: _Pass) -> float:
        """What kernels multiply beside an expert's few tokens."""
        return work.tokens * stage.layer_count * self.architecture.layer_expert_flops_per_token * (1 / self._fill(work) - 1)

    def _fill(self, work: _Pass) -> float:
        """Of an expert's kernel, what its tokens fill: with n of them it takes as long as with n + EXPERT_FILL_TOKENS."""
        architecture = self.architecture
        each = work.tokens * architecture.experts_per_token / max(1, architecture.expert_count)
        return min(EXPERT_FILL_MAX, max(EXPERT_FILL_MIN, each / (each + EXPERT_FILL_TOKENS)))

    def _flops(self, stage: Stage, work: _Pass) -> float:
        """Logits are taken for the last token of each sequence only."""
        token = stage.layer_count * self.architecture.layer_flops_per_token + self._attention_flops(stage, work)
        return work.tokens * token + (work.sequences * 2.0 * self.architecture.embedding_parameters if stage.is_last else 0.0)

    def _attention_flops(self, stage: Stage, work: _Pass) -> float:
        """Of one token over the past, in the stage's layers with attention over all of it."""
        attending = stage.layer_count * self.architecture.growing_layer_count / self.architecture.layer_count
        return attending * self.architecture.attention_flops(work.past)
