"""What nodes are told of their leases: in the welcome, and in the answers to heartbeats.

Decides which heartbeats are answered and what period and lease an idle node is told, by `domain.nodes` and `domain.beat_period`. A new
period goes along with an answer that is due in any case. It must not know what follows from a silence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from potluck_coordinator.domain.beat_period import idle_period_seconds, terms
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
        """What idle nodes are told now for whom nobody waits."""

    def adapt(self, node_count: int, load: float) -> None:
        """To so many nodes, and the share of a core that this process spends; called each second."""
        self.idle_seconds = idle_period_seconds(node_count, load, self._limits)

    def welcome(self, session: NodeSession, link_addresses: tuple[str, ...]) -> Welcome:
        """The answer to a hello, which came just now."""
        idle_seconds, lease_seconds = self._terms(session)
        session.granted = session.granted.at_welcome(idle_seconds, lease_seconds, session.heartbeat_at)
        return Welcome(
            protocol_version=PROTOCOL_VERSION,
            epoch=session.epoch,
            lease_ttl_ms=int(lease_seconds * 1000),
            heartbeat_busy_ms=int(self._limits.heartbeat_busy_seconds * 1000),
            heartbeat_idle_ms=int(idle_seconds * 1000),
            desired=session.desired,
            resume_points={attempt_id: relay.resume_point for attempt_id, relay in session.attempts.items() if not relay.over},
            link_addresses=link_addresses,
            takes_brief_heartbeats=True,
        )

    def renew_if_due(self, session: NodeSession, now: float) -> bool:
        """Puts the answer to a heartbeat into the node's outbox, where it needs one; whether it did."""
        idle_seconds, lease_seconds = self._terms(session)
        if session.outbox is None or not renewal_is_due(
            session.granted,
            lease_seconds,
            now,
            self._limits,
            is_busy=bool(session.attempts),
            counts_by_number=session.counts_by_number,
        ):
            return False
        session.granted = session.granted.at_renewal(idle_seconds, lease_seconds, now)
        session.outbox.renew_lease(session.epoch, int(lease_seconds * 1000), int(idle_seconds * 1000), session.beat_number)
        return True

    def _terms(self, session: NodeSession) -> tuple[float, float]:
        return terms(self.idle_seconds, self._limits, is_awaited=bool(session.attempts) or session.is_in_group)
