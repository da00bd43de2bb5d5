"""Nodes that this gateway lets go, so that they link to another one.

Decides whom: nodes with nothing to do for this gateway, of any number of them those that were linked last. How many, the directory says.
They go with a goodbye, upon which agents dial another gateway first. It must not know why there are too many, nor who takes them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from potluck_protocol.values import GoodbyeReason

if TYPE_CHECKING:
    from potluck_coordinator.gateway.links import Links

_log = structlog.get_logger()
WORDS = "Another gateway of this pool has room for this node."


def let_go(links: Links, count: int) -> int:
    """Lets so many nodes go, or as many as have nothing to do; how many went."""
    idle = [session for session in reversed(links.sessions) if not session.attempts][:count]
    for session in idle:
        links.close(session, GoodbyeReason.COORDINATOR_STOPPING, GoodbyeReason.COORDINATOR_STOPPING, WORDS)
    if idle:
        _log.info("nodes_let_go", node_count=len(idle), left_count=len(links))
    return len(idle)


def leave(links: Links, count: int) -> None:
    """So many nodes more begin nothing new from now on, those first that have nothing to do."""
    staying = [session for session in links.sessions if not session.is_leaving]
    for session in sorted(staying, key=lambda session: len(session.attempts))[:count]:
        session.is_leaving = True
        links.node_changed(session.node_id)


def let_leavers_go(links: Links) -> None:
    """Lets those go that have nothing left to do."""
    for session in links.sessions:
        if session.is_leaving and not session.attempts:
            links.close(session, GoodbyeReason.COORDINATOR_STOPPING, GoodbyeReason.COORDINATOR_STOPPING, WORDS)
