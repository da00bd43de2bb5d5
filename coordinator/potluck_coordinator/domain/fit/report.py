"""What the fit answers: every shape with its memory, its rates, a verdict with a reason, and the flags to run it.

Decides the verdict of one shape, and how well it is known. It must not know other shapes; `choice` compares them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from potluck_coordinator.domain.fit.architecture import GIB, ModelArchitecture
from potluck_coordinator.domain.fit.flags import EngineFlags
from potluck_coordinator.domain.fit.load import Load
from potluck_coordinator.domain.fit.memory import CardMemory
from potluck_coordinator.domain.fit.rates import Rates
from potluck_coordinator.domain.fit.shapes import Shape

MEMORY_ERROR_BYTES: Final = int(1.5 * GIB)
"""How far predictions of a whole card were off, club-3090's against its boot logs and ours against the published cases."""
MEMORY_ERROR_SMALL_BYTES: Final = GIB // 4
MEMORY_ERROR_SHARE: Final = 0.1
"""A model of a few hundred megabytes is not off by more than it is big."""
TRUSTED_ERROR_SHARE: Final = 0.35
"""Of the band, once enough nodes have reported."""
RATE_ERROR_SHARE: Final = 0.25
TRUSTED_RATE_ERROR_SHARE: Final = 0.1


class Verdict(StrEnum):
    """Whether a shape runs."""

    FITS = "fits"
    TIGHT = "tight"
    """It fits by less than the error band."""
    DOES_NOT_FIT = "does not fit"
    REFUSED = "refused"
    """It would run, and lose to a smaller or a replicated shape."""


@dataclass(frozen=True, slots=True)
class ShapeFit:
    """One shape's answer. Bytes are of each stage's fullest card; tokens and rates of one replica."""

    shape: Shape
    memory: tuple[CardMemory, ...]
    memory_error_bytes: int
    """Up or down."""
    kv_bytes_per_token: int
    """Of all cards of a replica together, for a token of a sequence at the full context."""
    kv_capacity_tokens: int
    """What the memory has room for."""
    kv_cache_tokens: int
    """What the cache holds that `flags` make: less than there is room for where they name its size."""
    sequences_at_context: int
    """Sequences of the full context that there is room for side by side."""
    rates: Rates
    rate_error_share: float
    """Up or down, of each rate."""
    verdict: Verdict
    reason: str
    flags: EngineFlags

    @property
    def runs(self) -> bool:
        """Whether it is worth starting."""
        return self.verdict in {Verdict.FITS, Verdict.TIGHT}

    @property
    def total_decode(self) -> float:
        """Answer tokens a second of all replicas together, as many sequences at work as fit."""
        return self.shape.replica_count * self.rates.decode_batched


@dataclass(frozen=True, slots=True)
class FitReport:
    """Every shape, the best first."""

    architecture: ModelArchitecture
    engine_kind: str
    context_length_tokens: int
    sequence_count_wanted: int
    shapes: tuple[ShapeFit, ...]
    verdict: Verdict
    reason: str

    @property
    def best(self) -> ShapeFit | None:
        """The shape to run; None where none does."""
        return next((shape for shape in self.shapes if shape.runs), None)


def memory_error_bytes(memory: tuple[CardMemory, ...], *, trusted: bool) -> int:
    """The error band of a shape's memory."""
    needed = max(card.needed_bytes for card in memory)
    band = min(MEMORY_ERROR_BYTES, MEMORY_ERROR_SMALL_BYTES + int(MEMORY_ERROR_SHARE * needed))
    return int(band * TRUSTED_ERROR_SHARE) if trusted else band


def judge(architecture: ModelArchitecture, load: Load, memory: tuple[CardMemory, ...], error_bytes: int) -> tuple[Verdict, str]:
    """A shape's own verdict, and its reason in one line."""
    if load.context_length_tokens > architecture.context_length_max_tokens:
        trained = architecture.context_length_max_tokens
        return Verdict.DOES_NOT_FIT, f"the model was made for {trained:,} tokens of context, not {load.context_length_tokens:,}"
    card = min(memory, key=lambda card: card.spare_bytes)
    usable = f"{gib(card.usable_bytes)} GiB"
    parts = f"{gib(card.weight_bytes)} weights, {gib(card.overhead_bytes)} engine, {gib(card.kv_wanted_bytes)} KV"
    if card.kv_available_bytes <= 0:
        return Verdict.DOES_NOT_FIT, f"weights and engine alone take {gib(card.weight_bytes + card.overhead_bytes)} of {usable}"
    if card.spare_bytes < 0:
        where = "the node" if card.card_index is None else "a card"
        return Verdict.DOES_NOT_FIT, f"{where} would hold {gib(card.needed_bytes)} of {usable}: {parts}"
    if card.spare_bytes < error_bytes:
        margin = f"{gib(card.spare_bytes)} to spare, and predictions err by {gib(error_bytes)}"
        return Verdict.TIGHT, f"{gib(card.needed_bytes)} of {usable}: {parts}; {margin}"
    return Verdict.FITS, f"{gib(card.needed_bytes)} of {usable}: {parts}"


def gib(size_bytes: float) -> str:
    """A size as people read it."""
    return f"{size_bytes / GIB:.1f}"
