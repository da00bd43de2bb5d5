"""What nodes of one site are told to measure each other by.

Decides the secret of each pair: two nodes get the same one, nobody else can know it, and it lasts as long as this process.
`domain.grouping` says who measures whom. It must not know what they find.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Mapping, Sequence

from potluck_coordinator.domain.node_view import NodeView
from potluck_protocol.values import NodeId, Peer

_KEY_BYTES = 32


class PeerSecrets:
    """Makes the peers of nodes out of pairs."""

    def __init__(self) -> None:
        self._key = secrets.token_bytes(_KEY_BYTES)

    def peers(self, pairs: Sequence[tuple[NodeId, NodeId]], nodes: Mapping[NodeId, NodeView]) -> dict[NodeId, tuple[Peer, ...]]:
        """Of each node that is in a pair, those it is to measure; the first of a pair dials."""
        peers: dict[NodeId, list[Peer]] = {}
        for first, second in pairs:
            secret = hmac.digest(self._key, f"{first}\0{second}".encode(), "sha256")
            for own, other, dial in ((first, second, True), (second, first, False)):
                offer = nodes[other].inventory.group_offer
                if offer is not None:
                    peers.setdefault(own, []).append(Peer(other, offer.address, offer.measuring_port, secret, dial))
        return {node_id: tuple(named) for node_id, named in peers.items()}
