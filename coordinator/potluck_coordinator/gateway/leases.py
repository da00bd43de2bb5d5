"""What nodes are told of their leases: in the welcome, and in the answers to heartbeats.

Decides which heartbeats are answered and what period an idle node is told, by `domain.nodes` and `domain.beat_period`. A new period goes
along with an answer that is due in any case. It must not know what follows from a silence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from potluck_coordinator.domain.beat_period import idle_period_seconds
from potluck_coordinator.domain.nodes import renewal_is_due
from potluck_protocol.values import Welcome
from potluck_protocol.version import PROTOCOL_VERSION

if TYPE_CHECKING:
    from potluck_coordinator.domain.nodes import LivenessLimits
    from potluck_coordinator.gateway.node_session import NodeSession


class Leases:
    """Of one gateway's nodes.

    Args:
        limits: the lease and its companions.
    """

    def __init__(self, limits: LivenessLimits) -> None:
        self._limits = limits
        self.idle_seconds = limits.heartbeat_idle_seconds
        """What idle nodes are told now."""

    @property
    def ttl_ms(self) -> int:
        """What each renewal grants."""
        return int(self._limits.lease_ttl_seconds * 1000)

    def adapt(self, node_count: int, load: float) -> None:
        """To so many nodes, and the share of a core that this process spends; called each second."""
        self.idle_seconds = idle_period_seconds(node_count, load, self._limits)

    def welcome(self, session: NodeSession, link_addresses: tuple[str, ...]) -> Welcome:
        """The answer to a hello."""
        session.idle_seconds = self.idle_seconds
        return Welcome(
            protocol_version=PROTOCOL_VERSION,
            epoch=session.epoch,
            lease_ttl_ms=self.ttl_ms,
            heartbeat_busy_ms=int(self._limits.heartbeat_busy_seconds * 1000),
            heartbeat_idle_ms=int(self.idle_seconds * 1000),
            desired=session.desired,
            resume_points={attempt_id: relay.resume_point for attempt_id, relay in session.attempts.items() if not relay.over},
            link_addresses=link_addresses,
            takes_brief_heartbeats=True,
        )

    def renew_if_due(self, session: NodeSession, now: float) -> None:
        """The answer to a heartbeat, where it needs one."""
        if session.outbox is None or not renewal_is_due(
            session.renewed_at,
            now,
            self._limits,
            is_busy=bool(session.attempts),
            idle_seconds=session.idle_seconds,
            counts_by_number=session.counts_by_number,
        ):
            return
        # A node beats in its old period until it has read the new one: the longer of the two is what it may take.
        told_before, session.told_idle_seconds = session.told_idle_seconds, self.idle_seconds
        session.idle_seconds = max(told_before, self.idle_seconds)
        session.renewed_at = now
        session.outbox.renew_lease(session.epoch, self.ttl_ms, int(self.idle_seconds * 1000), session.beat_number)
