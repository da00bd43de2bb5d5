"""What our policy believes, for whoever checks that it keeps nobody waiting without a reason.

Decides nothing: speeds, room and reserves are the live functions' words over what the pool has learned. It must not know slots, which the
check counts itself.
"""

from __future__ import annotations

from potluck_coordinator.domain.admission import Capacity
from potluck_coordinator.domain.catalogue import ServiceTier
from potluck_coordinator.domain.placement import lacks_room
from potluck_coordinator.domain.speeds import Speeds
from potluck_coordinator.domain.tiers import flex_fits
from potluck_coordinator.gateway.model_line import ModelLine
from potluck_coordinator.simulation.asking import Request
from potluck_coordinator.simulation.ours_pool import Pool
from potluck_coordinator.simulation.ours_words import Words, words_of
from potluck_protocol.values import NodeId


class OurBeliefs:
    """Of one gateway.

    Args:
        pool: its nodes.
        line: who waits.
        reserve_percent: what is kept for the default tier.
    """

    def __init__(self, pool: Pool, line: ModelLine, reserve_percent: int) -> None:
        self._pool = pool
        self._line = line
        self._reserve_percent = reserve_percent

    def speeds(self, node_id: NodeId) -> Speeds | None:
        """As learned; None: it is no node of the pool's."""
        return self._pool.speeds(node_id)

    def lacks_room(self, request: Request, node_id: NodeId) -> bool:
        """Whether the request would fill the node's cache."""
        view = self._pool.view(node_id)
        return view is None or lacks_room(view, self._pool.expectations.work(Words(request).live))

    def is_kept_from(self, request: Request, capacity: Capacity, now: float) -> bool:
        """Whether what is free in so much is kept for somebody else: for one that was overtaken too often, or for the better tier."""
        words, held_for = Words(request), self._line.held_for
        if held_for is not None and words_of(held_for).request is not request and self._line.held_from(words.live) is not None:
            return True
        if words.tier is ServiceTier.DEFAULT or words.continued:
            return False
        left = self._line.capacity(capacity, words.tier, self._reserve_percent, now)
        return not flex_fits(left, self._pool.expectations.work(words.live).wanted_tokens)
