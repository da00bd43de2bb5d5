"""Keeps requests that may have killed an engine apart from each other, and those that did from every engine.

Decides what becomes of a request that `culprits` suspects: it runs, but never on a node where another suspect does, so that the next death
tells which of them it was; those that only ran beside it are answered, and cleared by that. It must not know how a death is noticed:
`links` hears of it from the node.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from potluck_protocol.errors import ErrorCode, PotluckError

if TYPE_CHECKING:
    from potluck_protocol.culprits import Culprits
    from potluck_protocol.values import AttemptId, Endpoint, NodeId


class Quarantine:
    """The suspects of one gateway, at work.

    Args:
        culprits: who was with engines that died.
    """

    def __init__(self, culprits: Culprits) -> None:
        self._culprits = culprits
        self._nodes: dict[AttemptId, NodeId] = {}

    def check(self, endpoint: Endpoint, body: bytes) -> None:
        """Lets a request pass, or raises PotluckError(REQUEST_REFUSED)."""
        if self._culprits.has_any and self._culprits.is_refused(self._culprits.fingerprint(endpoint, body)):
            raise PotluckError(ErrorCode.REQUEST_REFUSED)

    def shunned(self, endpoint: Endpoint, body: bytes) -> frozenset[NodeId]:
        """Where a request may not run now."""
        return frozenset(self._nodes.values()) if self._nodes and self._suspects(endpoint, body) else frozenset()

    def begin(self, attempt_id: AttemptId, node_id: NodeId, endpoint: Endpoint, body: bytes) -> None:
        """An attempt starts."""
        if self._suspects(endpoint, body):
            self._nodes[attempt_id] = node_id

    def end(self, attempt_id: AttemptId, endpoint: Endpoint, body: bytes, *, answered: bool) -> None:
        """An attempt is over; `answered` in full, by an engine that lived to count its tokens."""
        self._nodes.pop(attempt_id, None)
        if answered and self._culprits.has_any:
            self._culprits.clear(self._culprits.fingerprint(endpoint, body))

    def _suspects(self, endpoint: Endpoint, body: bytes) -> bool:
        return self._culprits.has_any and self._culprits.is_suspect(self._culprits.fingerprint(endpoint, body))
