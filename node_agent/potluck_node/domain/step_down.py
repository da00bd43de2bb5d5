"""What an engine that ran out of memory is started with next: one notch less, down to a floor.

Decides the order of the notches. First the share of each card's memory, for that costs nobody an answer; then the slots, halved; then the
context of a slot, halved. An engine that was left with too little for its cache skips the share, for with less it would have less; one
whose cache does not hold a single sequence skips the slots, too. What was reached is a `Ceiling`: it lowers the wishes after it, and never
rises by itself. It is forgotten when what it was measured on changes: the model's files, the engine's version, the cards, or, for an engine
that takes what it finds, the machine. It must not know where ceilings are kept, nor what an engine makes of them.

Memory that others hold is no word about the model: the next starts take what is free now, nothing is remembered, and then it is a crash.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from potluck_node.domain.failures import Shortage
from potluck_protocol.values import DesiredEngine
from potluck_protocol.vllm_words import UTILIZATION_PERCENT_MAX

UTILIZATION_PERCENT_NOTCHES: Final = (UTILIZATION_PERCENT_MAX, 90, 85)
"""Of an engine that begins at the first; one that is planned to begin lower goes down by as much."""
CONTEXT_TOKENS_MIN: Final = 1024
"""With less a chat is over after its first answers; better no replica than that one."""
_NOTCH_PERCENT: Final = 5


@dataclass(frozen=True, slots=True)
class Ceiling:
    """The most that an engine may be started with, as far as it was ever lowered. None: as wished."""

    memory_utilization_percent: int = UTILIZATION_PERCENT_NOTCHES[0]
    """One of the notches."""
    slot_count: int | None = None
    context_length_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What one start takes."""

    memory_utilization_percent: int
    slot_count: int
    context_length_tokens: int

    @property
    def words(self) -> str:
        """For the node's owner and the operator."""
        return f"{self.memory_utilization_percent} % of memory, {self.slot_count} slots of {self.context_length_tokens} tokens"


@dataclass(frozen=True, slots=True)
class Leftover:
    """What others leave of the cards, as the starts since the last crash showed."""

    percent: int
    start_count: int
    """That found less than they were told to take."""


def under(ceiling: Ceiling, slot_count: int, context_length_tokens: int, first_percent: int = UTILIZATION_PERCENT_NOTCHES[0]) -> MemoryPlan:
    """What is wished, as far as the ceiling allows; `first_percent` is the share that an engine without a ceiling would take."""
    lowered_by = UTILIZATION_PERCENT_NOTCHES[0] - ceiling.memory_utilization_percent
    return MemoryPlan(
        memory_utilization_percent=max(1, first_percent - lowered_by),
        slot_count=slot_count if ceiling.slot_count is None else min(slot_count, ceiling.slot_count),
        context_length_tokens=(
            context_length_tokens if ceiling.context_length_tokens is None else min(context_length_tokens, ceiling.context_length_tokens)
        ),
    )


def plan_of(wish: DesiredEngine, ceiling: Ceiling, leftover: Leftover | None = None) -> MemoryPlan:
    """The next start's: it begins at the share that the coordinator's fit found, and at no more than others leave."""
    planned = min(wish.shape.card_facts.memory_utilization_percent or UTILIZATION_PERCENT_MAX, UTILIZATION_PERCENT_MAX)
    plan = under(ceiling, wish.slot_count, wish.context_length_tokens, planned)
    if leftover is not None:
        plan = replace(plan, memory_utilization_percent=min(plan.memory_utilization_percent, leftover.percent))
    if wish.group is None:
        return plan
    # The stages of a group have to agree on what they serve; memory is each node's own.
    return replace(plan, slot_count=wish.slot_count, context_length_tokens=wish.context_length_tokens)


def step_down(ceiling: Ceiling, failed: MemoryPlan, shortage: Shortage) -> Ceiling | None:
    """The next lower ceiling after a start with `failed` ran out of memory; None at the floor, and where others hold the memory."""
    lower = [notch for notch in UTILIZATION_PERCENT_NOTCHES if notch < ceiling.memory_utilization_percent]
    if shortage is Shortage.OTHERS:
        return None
    if lower and shortage is Shortage.TAKEN:
        return replace(ceiling, memory_utilization_percent=lower[0])
    if failed.slot_count > 1 and shortage is not Shortage.SEQUENCE:
        return replace(ceiling, slot_count=failed.slot_count // 2)
    if failed.context_length_tokens > CONTEXT_TOKENS_MIN:
        return replace(ceiling, context_length_tokens=max(CONTEXT_TOKENS_MIN, failed.context_length_tokens // 2))
    return None


def beside_others(earlier: Leftover | None, failed: MemoryPlan, free_percent: int | None) -> Leftover | None:
    """What the next start may take after others held what `failed` was to take; None where it is worth no other start at once.

    Args:
        earlier: what the starts before, since the last crash, showed.
        failed: the start.
        free_percent: of a card, as its engine found it; None: it did not say.
    """
    start_count = 1 if earlier is None else earlier.start_count + 1
    lower_percent = failed.memory_utilization_percent - _NOTCH_PERCENT
    if free_percent is not None and free_percent < failed.memory_utilization_percent:
        lower_percent = free_percent
    if lower_percent < 1 or start_count == len(UTILIZATION_PERCENT_NOTCHES):
        return None
    return Leftover(lower_percent, start_count)
