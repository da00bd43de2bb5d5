"""What each owner of a group's nodes earns of an answer: by the weights that their stages read for every token.

Decides on the plan's own figures: the layers of each stage, times their bytes in the pinned files. A token has come through all of them, or
the group is not ready. A member's report of the memory that its engine takes, cache and buffers included, corrects them only where it is
less than the weights alone, and only within a narrow band: it is a node's word about its own pay. It must not know prices.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from potluck_coordinator.domain.payees import PayeeShare, merged

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from potluck_coordinator.domain.grouping.words import Stage
    from potluck_protocol.values import NodeId

BAND_PERCENT: Final = 5
"""How far a member's word lowers its stage's weight: alignment and padding of weights differ by so much, a missing layer by more."""


def stage_weight(known_bytes: int, taken_bytes: int | None) -> int:
    """The bytes that a stage is paid by; 1 at least.

    Args:
        known_bytes: of its weights, as the plan knows them.
        taken_bytes: all that its engine takes, by its node's word; None where the node does not say.
    """
    lowest_bytes = known_bytes * (100 - BAND_PERCENT) // 100
    return max(1, known_bytes if taken_bytes is None else max(lowest_bytes, min(known_bytes, taken_bytes)))


def payee_shares(stages: Sequence[Stage], taken_bytes: Mapping[NodeId, int]) -> tuple[PayeeShare, ...]:
    """The owners' shares of everything the group answers; one owner's stages count together."""
    return merged(
        [PayeeShare(stage.owner_account_id, stage_weight(stage.weight_bytes, taken_bytes.get(stage.node_id))) for stage in stages]
    )
