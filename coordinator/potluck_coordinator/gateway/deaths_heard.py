"""How many of the deaths that a node tells of the directory is told of: a word costs the node nothing, and the directory a write.

Decides nothing: the bound is `domain.lethal`'s. It must not know what died of what.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from potluck_coordinator.domain.lethal import DEATHS_HEARD_SECONDS, is_heard

if TYPE_CHECKING:
    from potluck_protocol.values import NodeId

_log = structlog.get_logger()


class DeathsHeard:
    """Lone deaths that the directory was told of, lately."""

    def __init__(self) -> None:
        self._at: dict[NodeId, list[float]] = {}

    def hears(self, node_id: NodeId, now: float) -> bool:
        """Whether the directory is told of one more on this node; if so it counts."""
        recent = {known_id: [at for at in times if now - at < DEATHS_HEARD_SECONDS] for known_id, times in self._at.items()}
        self._at = {known_id: times for known_id, times in recent.items() if times}
        heard_at = self._at.setdefault(node_id, [])
        if not is_heard(heard_at, now):
            _log.warning("lone_death_not_heard", node_id=node_id, heard_count=len(heard_at))
            return False
        heard_at.append(now)
        return True
