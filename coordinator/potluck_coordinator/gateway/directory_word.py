"""What the directory says of replicas and gateways, whichever node it is about: one value, of which every session sees its own part.

Decides nothing. It must not know nodes, nor what follows from a word.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from potluck_coordinator.domain.gateways import link_addresses

if TYPE_CHECKING:
    from collections.abc import Mapping

    from potluck_coordinator.domain.gateways import GatewayRecord
    from potluck_coordinator.pool_snapshot import PoolSnapshot
    from potluck_protocol.values import ReplicaId


@dataclass(frozen=True, slots=True)
class DirectoryWord:
    """As of one snapshot."""

    leaving: frozenset[ReplicaId] = frozenset()
    """They get no new requests."""
    trusted: frozenset[ReplicaId] = frozenset()
    """Where requests may run that demand it."""
    slow: Mapping[ReplicaId, float] = field(default_factory=dict)
    """How much of their speed is to be believed."""
    drained: Mapping[ReplicaId, str] = field(default_factory=dict)
    """Why they get nothing for a while."""
    gateways: Mapping[int, GatewayRecord] = field(default_factory=dict)
    """By epoch."""

    def link_addresses(self, own_epoch: int) -> tuple[str, ...]:
        """What a node that is with the gateway of that epoch is told of all of them."""
        return link_addresses(self.gateways, own_epoch)


NOTHING_SAID: Final = DirectoryWord()


def word_of(snapshot: PoolSnapshot) -> DirectoryWord:
    """The snapshot's."""
    return DirectoryWord(snapshot.leaving, snapshot.trusted_replicas, snapshot.slow_replicas, snapshot.drained_replicas, snapshot.gateways)
