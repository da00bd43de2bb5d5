"""One node as planning sees it: what it has, whose it is, and whether it is there.

Decides nothing; these are the words that `planning` and `grouping` share. It must not know where they were heard.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

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
    """By card uuid: memory that programs of its owner's hold there."""
