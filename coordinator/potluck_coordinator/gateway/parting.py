"""Nodes that this gateway lets go, so that they link to another one.

Decides whom: nodes with nothing to do for this gateway, of any number of them those that were linked last. How many, the directory says.
They go with a goodbye, upon which agents dial another gateway first. It must not know why there are too many, nor who takes them.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

import structlog

from potluck_protocol.values import GoodbyeReason

if TYPE_CHECKING:
    from potluck_coordinator.gateway.links import Links

_log = structlog.get_logger()
WORDS = "Another gateway of this pool has room for this node."


def leave(links: Links) -> None:
    """From now on nothing new is begun on any node of this gateway."""
    links.word = replace(links.word, everyone_leaves=True)
    for session in links.sessions:
        session.word = links.word
        links.node_changed(session.node_id)


def let_go(links: Links, count: int) -> int:
    """Lets so many nodes go, or as many as have nothing to do; how many went."""
    idle = [session for session in reversed(links.sessions) if not session.attempts]
    for session in islice(idle, count):
        links.close(session, GoodbyeReason.COORDINATOR_STOPPING, GoodbyeReason.COORDINATOR_STOPPING, WORDS)
    let_go_count = min(count, len(idle))
    if let_go_count:
        _log.info("nodes_let_go", node_count=let_go_count, left_count=len(links))
    return let_go_count
