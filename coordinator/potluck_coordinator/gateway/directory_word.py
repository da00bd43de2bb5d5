"""What the directory says of replicas, whichever node they are on: one value, of which every session sees its own part.

Decides nothing. It must not know nodes, nor what follows from a word.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

    from potluck_coordinator.desks import PoolSnapshot
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


NOTHING_SAID: Final = DirectoryWord()


def word_of(snapshot: PoolSnapshot) -> DirectoryWord:
    """The snapshot's."""
    return DirectoryWord(snapshot.leaving, snapshot.trusted_replicas, snapshot.slow_replicas, snapshot.drained_replicas)
