"""What is remembered of a card whose power cap the agent changed, and what the cap that is in force says about it.

Decides when a card is its owner's again: where the driver says that it has what it was found with, or something that this agent never asked
for. Until then nothing is forgotten, whatever a call that set a cap said of itself. It must not know how a cap is read or set.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

SAME_MILLIWATTS: Final = 1_000
"""Drivers round."""


@dataclass(frozen=True, slots=True)
class ChangedCap:
    """Of a card that may have another cap than its owner gave it."""

    found_milliwatts: int
    """Before."""
    ours_milliwatts: tuple[int, ...]
    """What this agent, or one before it, may have put in force, each once, the newest last."""


def same(one_milliwatts: int, other_milliwatts: int) -> bool:
    """Whether two caps are one, but for rounding."""
    return abs(one_milliwatts - other_milliwatts) < SAME_MILLIWATTS


def with_try(changed: ChangedCap | None, found_milliwatts: int, milliwatts: int) -> ChangedCap:
    """To be kept before a cap is set: from then on it may be in force, and so may those before it."""
    if changed is None:
        return ChangedCap(found_milliwatts, (milliwatts,))
    others = tuple(ours for ours in changed.ours_milliwatts if ours != milliwatts)
    return replace(changed, ours_milliwatts=(*others, milliwatts))


def is_ours(changed: ChangedCap | None, now_milliwatts: int) -> bool:
    """Whether the cap in force may be one that this agent set."""
    return changed is not None and any(same(ours, now_milliwatts) for ours in changed.ours_milliwatts)


def seen(changed: ChangedCap | None, now_milliwatts: int | None, *, unended: bool = False) -> ChangedCap | None:
    """What is left to remember after the driver was asked; None: the card is as its owner wants it.

    Args:
        changed: what was remembered.
        now_milliwatts: the cap in force; None where the driver does not say.
        unended: whether something that was started to set a cap is still at work, and may yet do it.
    """
    if changed is None or now_milliwatts is None or unended:
        return changed
    if same(now_milliwatts, changed.found_milliwatts) or not is_ours(changed, now_milliwatts):
        return None
    return replace(changed, ours_milliwatts=(now_milliwatts,))
