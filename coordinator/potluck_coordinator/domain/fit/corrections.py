"""What nodes observed, and how it bends the predictions.

Decides by the middle of many nodes' ratios of observed to predicted, clipped, and drawn towards one while few nodes have spoken: one node
that lies moves the others' predictions by little. It must not know how predictions are made, or where corrections are kept; they are plain
values that any JSON library writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from statistics import median
from typing import Final, TypeVar

_Value = TypeVar("_Value")

SMOOTHING: Final = 0.3
"""Weight of a node's newest observation against what it said before."""
NODES_REMEMBERED_MAX: Final = 16
"""Of one key and measure; the node heard longest ago makes room."""
KEYS_REMEMBERED_MAX: Final = 4096
"""Of keys and measures together; what changed longest ago makes room."""
PRIOR_NODES: Final = 1
"""The prediction counts as the word of so many nodes."""
RATIO_STEP: Final = 0.01
"""Ratios apply in such steps, far below what predictions err by: an answer of the fit holds until they really change."""
TRUSTED_NODES: Final = 3
"""From so many nodes on one liar cannot be the middle, and the error band narrows."""


class Measure(StrEnum):
    """What is corrected."""

    MEMORY = "memory"
    """Bytes that the engine holds beside its KV cache."""
    KV_TOKENS = "kv_tokens"
    PREFILL = "prefill"
    DECODE = "decode"


RATIO_BOUNDS: Final = {
    Measure.MEMORY: (0.8, 1.25),
    Measure.KV_TOKENS: (0.8, 1.25),
    Measure.PREFILL: (0.6, 1.6),
    Measure.DECODE: (0.6, 1.6),
}
"""An observation further from its prediction than this is of something else than what was predicted, and counts as this much. What decides
whether a model is started at all moves least."""


@dataclass(frozen=True, slots=True)
class CorrectionKey:
    """What shares a correction."""

    card_name: str
    """The fit's own name of the card, or "processor"."""
    engine: str
    """Kind and version: "vllm 0.33.0"."""
    model_id: str
    quantization: str

    def text(self, measure: Measure) -> str:
        """The key and a measure as one string, which a JSON object can be keyed by."""
        return f"{self.card_name}|{self.engine}|{self.model_id}|{self.quantization}|{measure}"


@dataclass(frozen=True, slots=True)
class Observation:
    """What a node saw, beside what had been predicted for it without corrections, in the same unit."""

    key: CorrectionKey
    node_id: str
    measure: Measure
    observed: float
    predicted: float


@dataclass(frozen=True, slots=True)
class Correction:
    """What is known of one measure under one key."""

    ratio: float = 1.0
    """Of observed to predicted, to multiply predictions by."""
    node_count: int = 0

    @property
    def is_trusted(self) -> bool:
        """Whether enough nodes agree that no single one decides."""
        return self.node_count >= TRUSTED_NODES


@dataclass(frozen=True, slots=True)
class Corrections:
    """All that was learned: for each key and measure the nodes' smoothed ratios, those that changed longest ago first."""

    ratios: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def of(self, key: CorrectionKey, measure: Measure) -> Correction:
        """What is known of a measure; a correction that changes nothing where nobody has spoken.

        The middle of the nodes, drawn to the prediction as if that were one node more: the first node alone moves it half of the way.
        """
        return _correction(self.ratios.get(key.text(measure), {}))

    def of_model(self, model_id: str) -> tuple[tuple[str, float, bool], ...]:
        """Everything that bends a model's predictions, in a form to compare and to hash."""
        told = [(text, _correction(ratios)) for text, ratios in sorted(self.ratios.items()) if f"|{model_id}|" in text]
        return tuple((text, correction.ratio, correction.is_trusted) for text, correction in told)


NOTHING_LEARNED: Final = Corrections()


def _correction(ratios: Mapping[str, float]) -> Correction:
    if not ratios:
        return Correction()
    weight = len(ratios) / (len(ratios) + PRIOR_NODES)
    steps = round(weight * (median(ratios.values()) - 1.0) / RATIO_STEP)
    return Correction(1.0 + RATIO_STEP * steps, len(ratios))


def learn(corrections: Corrections, observation: Observation) -> Corrections:
    """The corrections with one observation more; unchanged by one that is no positive number."""
    if not (0 < observation.predicted < float("inf") and 0 < observation.observed < float("inf")):
        return corrections
    lowest, highest = RATIO_BOUNDS[observation.measure]
    ratio = min(highest, max(lowest, observation.observed / observation.predicted))
    text = observation.key.text(observation.measure)
    known = corrections.ratios.get(text, {})
    earlier = known.get(observation.node_id, ratio)
    others = {node_id: said for node_id, said in known.items() if node_id != observation.node_id}
    heard = {**others, observation.node_id: earlier + SMOOTHING * (ratio - earlier)}
    rest = {key: nodes for key, nodes in corrections.ratios.items() if key != text}
    return Corrections(_newest({**rest, text: _newest(heard, NODES_REMEMBERED_MAX)}, KEYS_REMEMBERED_MAX))


def _newest(entries: Mapping[str, _Value], count_max: int) -> dict[str, _Value]:
    return dict(list(entries.items())[-count_max:])
