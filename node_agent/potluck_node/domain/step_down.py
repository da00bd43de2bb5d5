"""What an engine that ran out of memory is started with next: one notch less, down to a floor.

Decides the order of the notches. First the share of each card's memory, for that costs nobody an answer; then the slots, halved; then the
context of a slot, halved. An engine that was left with too little for its cache skips the share, for with less it would have less; one
whose cache does not hold a single sequence skips the slots, too. What was reached is a `Ceiling`: it lowers the wishes after it, and never
rises by itself. It is forgotten when what it was measured on changes: the model's files, the engine's version, the cards, or, for an engine
that takes what it finds, the machine. It must not know where ceilings are kept, nor what an engine makes of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from potluck_node.domain.failures import Shortage

UTILIZATION_PERCENT_NOTCHES: Final = (95, 90, 85)
"""The rest of a card is for its driver, its screen and what engines do not count."""
CONTEXT_TOKENS_MIN: Final = 1024
"""With less a chat is over after its first answers; better no replica than that one."""


@dataclass(frozen=True, slots=True)
class Ceiling:
    """The most that an engine may be started with, as far as it was ever lowered. None: as wished."""

    memory_utilization_percent: int = UTILIZATION_PERCENT_NOTCHES[0]
    slot_count: int | None = None
    context_length_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What one start takes."""

    memory_utilization_percent: int
    slot_count: int
    context_length_tokens: int


def under(ceiling: Ceiling, slot_count: int, context_length_tokens: int) -> MemoryPlan:
    """What is wished, as far as the ceiling allows."""
    return MemoryPlan(
        memory_utilization_percent=ceiling.memory_utilization_percent,
        slot_count=slot_count if ceiling.slot_count is None else min(slot_count, ceiling.slot_count),
        context_length_tokens=(
            context_length_tokens if ceiling.context_length_tokens is None else min(context_length_tokens, ceiling.context_length_tokens)
        ),
    )


def step_down(ceiling: Ceiling, failed: MemoryPlan, shortage: Shortage) -> Ceiling | None:
    """The next lower ceiling after a start with `failed` ran out of memory; None at the floor."""
    lower = [notch for notch in UTILIZATION_PERCENT_NOTCHES if notch < failed.memory_utilization_percent]
    if lower and shortage is Shortage.TAKEN:
        return replace(ceiling, memory_utilization_percent=lower[0])
    if failed.slot_count > 1 and shortage is not Shortage.SEQUENCE:
        return replace(ceiling, slot_count=failed.slot_count // 2)
    if failed.context_length_tokens > CONTEXT_TOKENS_MIN:
        return replace(ceiling, context_length_tokens=max(CONTEXT_TOKENS_MIN, failed.context_length_tokens // 2))
    return None
