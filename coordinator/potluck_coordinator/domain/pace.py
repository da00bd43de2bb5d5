"""How many answers a replica may write at a time, so that each of them still comes at the pace that was promised.

Decides a bound on a batch, by what was learned of the replica's speed: a card that is slow for a while keeps its place in the pool, with
fewer answers at a time, instead of slowing all of them down. An engine offers its slots for the case that it is well; this is never above
them. It must not know how speeds are learned, nor who sets the pace.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from potluck_coordinator.domain.speeds import Speeds

PACE_SHARE: Final = 0.9
"""Of the promised seconds of a token, that a batch is expected to take: answers vary around what is expected."""
STRETCH_MIN: Final = 1.5
"""So many times as long as alone, by its node's word, a token may take whatever is promised. An engine that misses the pace with one answer
misses it with two as well, and two at a time are worth more: what it loses by being slow is placement's to say."""
SLOPE_SECONDS_MIN: Final = 1e-6
"""Of an answer's part in a token's seconds: where it has none, all slots are in pace."""
SAMPLES_MIN: Final = 3
"""Attempts that have to be seen before there is a bound: a guess, or a node's word, is none."""


def slots_in_pace(slot_count: int, speeds: Speeds, weight: float, token_seconds_max: float) -> int:
    """How many of a replica's slots may be taken.

    Args:
        slot_count: that it offers.
        speeds: as learned.
        weight: of these, that is to be believed.
        token_seconds_max: between two tokens of an answer, as the operator promises it.
    """
    if slot_count <= 1 or speeds.decode_sample_count < SAMPLES_MIN:
        return slot_count
    bearable = max(PACE_SHARE * token_seconds_max * weight, STRETCH_MIN * speeds.told_token_seconds)
    if speeds.decode_base_seconds < bearable:
        batch = (bearable - speeds.decode_base_seconds) / max(speeds.decode_each_seconds, SLOPE_SECONDS_MIN)
    else:
        # The line's base has in it what others' prompts cost, and no batch is small enough by it: fewer than there were, then.
        batch = speeds.batch_mean * bearable / speeds.decode_seconds(speeds.batch_mean)
    return slot_count if batch >= slot_count else max(1, int(batch))
