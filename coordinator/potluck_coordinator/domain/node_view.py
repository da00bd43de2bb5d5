"""One node as planning sees it: what it has, whose it is, and whether it is there.

These are the words that `planning` and `grouping` share. Decides only what counts for a fact that a node cannot tell now. It must not know
where they were heard.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from potluck_protocol.cards import CardTelemetry
    from potluck_protocol.rest import RestCause
    from potluck_protocol.values import AccountId, EngineStatus, Inventory, NodeId, NodeState, PeerMeasurement


@dataclass(frozen=True, slots=True)
class NodeView:
    """An active node of the pool."""

    node_id: NodeId
    owner_account_id: AccountId
    inventory: Inventory
    """Of its last hello; an empty one for a node that has not connected since it joined."""
    connected: bool
    """A link stands, or broke so lately that its lease does."""
    state: NodeState
    engines: tuple[EngineStatus, ...]
    """As it last reported them; empty while it is not connected."""
    peer_measurements: Mapping[NodeId, PeerMeasurement]
    """What it measured towards others of its site."""
    epoch: int = 0
    """Of its newest session; a new one that follows no restart of the coordinator's means that its agent began anew, or was away."""
    disk_free_bytes: int = 0
    """As it last said; 0: not known."""
    card_foreign_bytes: Mapping[str, int] = field(default_factory=dict)
    """By card uuid: memory that programs of its owner's hold there, as was last known; of a card that is not here nothing ever was."""
    rest_causes: tuple[RestCause, ...] = ()
    """Why it does not serve, as it says."""
    cards_lost: bool = False
    """It has cards, and its driver reaches none of them: no machine without cards, whose engines for cards run on its processor."""


def foreign_bytes_known(before: Mapping[str, int], cards: Sequence[CardTelemetry]) -> Mapping[str, int]:
    """What others than a node's engines hold of its cards, by uuid, after its newest word.

    Where drivers hide processes, as from containers, a node knows this only while none of its engines has the card. What it said last
    stands meanwhile: unknown is neither nothing, nor a reason to move the engine.

    Args:
        before: what was known.
        cards: as the node tells of them now; none at all where it has not looked yet.
    """
    if not cards:
        return before
    told = {card.uuid: before.get(card.uuid) if card.memory_foreign_bytes is None else card.memory_foreign_bytes for card in cards}
    return {uuid: foreign_bytes for uuid, foreign_bytes in told.items() if foreign_bytes}
