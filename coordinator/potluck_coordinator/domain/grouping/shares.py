"""What each owner of a group's nodes earns of an answer: by the weights that their stages read for every token.

Decides on what each stage's engine has counted while it loaded, kept within a narrow band around what the plan knows of it from the pinned
files; without a count the plan's figure stands. A token has come through all stages, or the group is not ready. The count is a node's word
about its own pay: so it moves a share as far as files and engines may differ (norms, scales, padding), and less than a layer would.

The time that a stage works is no measure: an engine that waits for its neighbour turns in a loop, on processors and on cards, and who is
slow would earn more. Nor is the memory that it takes: cache and buffers fill what is there. It must not know prices.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from potluck_coordinator.domain.payees import PayeeShare, merged

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from potluck_coordinator.domain.grouping.words import Stage
    from potluck_protocol.values import NodeId

BAND_PERCENT: Final = 5
"""How far a count moves its stage's weight, up or down: a lie gets 105/95 of the honest share at most."""


def stage_weight(planned_bytes: int, counted_bytes: int | None) -> int:
    """The bytes that a stage is paid by; 1 at least.

    Args:
        planned_bytes: of its weights, as the plan knows them from the files.
        counted_bytes: as its engine counted them; None where it did not.
    """
    lowest_bytes = planned_bytes * (100 - BAND_PERCENT) // 100
    highest_bytes = planned_bytes * (100 + BAND_PERCENT) // 100
    return max(1, planned_bytes if counted_bytes is None else max(lowest_bytes, min(highest_bytes, counted_bytes)))


def payee_shares(stages: Sequence[Stage], counted_bytes: Mapping[NodeId, int]) -> tuple[PayeeShare, ...]:
    """The owners' shares of everything the group answers; one owner's stages count together."""
    return merged(
        [PayeeShare(stage.owner_account_id, stage_weight(stage.weight_bytes, counted_bytes.get(stage.node_id))) for stage in stages]
    )
