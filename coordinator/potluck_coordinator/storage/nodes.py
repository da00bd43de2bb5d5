"""Enrolled nodes, as rows.

Decides which status may follow which: a node leaves and comes back, and is revoked from either, for good. Epochs only grow. Trust ends with
membership: who comes back, perhaps under another owner, is trusted anew or not. It must not know who may enrol, revoke or trust.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Any, Final

import msgspec
import sqlalchemy
from sqlalchemy import Row
from sqlmodel import Session, case, col, delete, select, update

from potluck_coordinator.storage.bulk import Change
from potluck_coordinator.storage.tables import NodeRow, TrustedNodeRow
from potluck_protocol.values import AccountId, Inventory, NodeId

_SAW: Final = Change(
    "node",
    ("node_id", "text"),
    {"seen_at": "bigint"},
    {"last_seen_at_unix_ms": "given.seen_at"},
    only_where="last_seen_at_unix_ms < given.seen_at",
)
_TABLE: Final = NodeRow.__table__  # type: ignore[attr-defined]
_ALL: Final[Any] = sqlalchemy.select(_TABLE).order_by(_TABLE.c.enrolled_at_unix_ms, _TABLE.c.node_id)
INVENTORIES_MAX: Final = 16_384
"""Whose text is remembered as a value: about 1 KB each."""


class NodeStatus(StrEnum):
    """Whether a node's key still opens anything."""

    ACTIVE = "active"
    REVOKED = "revoked"
    LEFT = "left"


@dataclass(frozen=True, slots=True)
class EnrolledNode:
    """One node as the books know it."""

    node_id: NodeId
    owner_account_id: AccountId
    display_name: str
    public_key_spki: bytes
    status: NodeStatus
    status_reason: str
    epoch: int
    """Of its last session; 0 before the first."""
    inventory: Inventory
    agent_version: str
    enrolled_at_unix_ms: int
    last_seen_at_unix_ms: int


class NodeRepository:
    """The tables `node` and `trusted_node`."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def add(self, node: EnrolledNode) -> None:
        self._session.add(
            NodeRow(
                node_id=node.node_id,
                owner_account_id=node.owner_account_id,
                display_name=node.display_name,
                public_key_spki=node.public_key_spki,
                status=node.status,
                status_reason=node.status_reason,
                epoch=node.epoch,
                inventory=_inventory_json(node.inventory),
                agent_version=node.agent_version,
                enrolled_at_unix_ms=node.enrolled_at_unix_ms,
                last_seen_at_unix_ms=node.last_seen_at_unix_ms,
            )
        )
        self._session.flush()

    def get(self, node_id: NodeId) -> EnrolledNode | None:
        row = self._session.get(NodeRow, node_id)
        return None if row is None else _node(row)

    def list_all(self) -> tuple[EnrolledNode, ...]:
        """Every node that ever enrolled, in the order of their coming."""
        # Columns, not rows of the session's: thousands are read for each plan.
        return tuple(_node(row) for row in self._session.exec(_ALL))

    def come_back(self, node_id: NodeId, owner_account_id: AccountId, display_name: str, inventory: Inventory) -> bool:
        """Makes a node that left active again, perhaps under another owner; False for one that did not leave."""
        statement = (
            update(NodeRow)
            .where(col(NodeRow.node_id) == node_id, col(NodeRow.status) == NodeStatus.LEFT)
            .values(
                status=NodeStatus.ACTIVE,
                status_reason="",
                owner_account_id=owner_account_id,
                display_name=display_name,
                inventory=_inventory_json(inventory),
            )
        )
        return self._session.exec(statement).rowcount == 1

    def end(self, node_id: NodeId, status: NodeStatus, reason: str) -> bool:
        """Takes the node out of the pool; a node that left may still be revoked. False where that changes nothing."""
        before = [NodeStatus.ACTIVE] if status is NodeStatus.LEFT else [NodeStatus.ACTIVE, NodeStatus.LEFT]
        statement = (
            update(NodeRow)
            .where(col(NodeRow.node_id) == node_id, col(NodeRow.status).in_(before))
            .values(status=status, status_reason=reason)
        )
        self.distrust(node_id)
        return self._session.exec(statement).rowcount == 1

    def trusted(self) -> frozenset[NodeId]:
        """Those that the operator trusts."""
        return frozenset(NodeId(node_id) for node_id in self._session.exec(select(TrustedNodeRow.node_id)))

    def trust(self, node_id: NodeId, now_unix_ms: int) -> None:
        """Notes the operator's word; said again, the first date stands."""
        if self._session.get(TrustedNodeRow, node_id) is None:
            self._session.add(TrustedNodeRow(node_id=node_id, trusted_at_unix_ms=now_unix_ms))
            self._session.flush()

    def distrust(self, node_id: NodeId) -> None:
        """Takes the word back; nothing is wrong where there is none."""
        self._session.exec(delete(TrustedNodeRow).where(col(TrustedNodeRow.node_id) == node_id))

    def active_among(self, node_ids: Collection[NodeId]) -> frozenset[NodeId]:
        """Those of them that are active."""
        found = select(NodeRow.node_id).where(col(NodeRow.node_id).in_(node_ids), col(NodeRow.status) == NodeStatus.ACTIVE)
        return frozenset(NodeId(node_id) for node_id in self._session.exec(found))

    def begin_sessions(self, said: Mapping[NodeId, tuple[Inventory, str]], now_unix_ms: int) -> Mapping[NodeId, EnrolledNode]:
        """Gives each that is active an epoch higher than any before, and keeps what its hello says of itself; the others are missing."""
        active = col(NodeRow.node_id).in_(said), col(NodeRow.status) == NodeStatus.ACTIVE
        seen_at = case((col(NodeRow.last_seen_at_unix_ms) < now_unix_ms, now_unix_ms), else_=col(NodeRow.last_seen_at_unix_ms))
        self._session.exec(update(NodeRow).where(*active).values(epoch=col(NodeRow.epoch) + 1, last_seen_at_unix_ms=seen_at))
        rows = self._session.exec(select(NodeRow).where(*active)).all()
        for row in rows:
            inventory, agent_version = said[NodeId(row.node_id)]
            # A row that stays as it is costs no statement.
            row.inventory, row.agent_version = _inventory_json(inventory), agent_version
        self._session.flush()
        return {NodeId(row.node_id): _node(row) for row in rows}

    def saw(self, node_ids: Collection[NodeId], now_unix_ms: int) -> None:
        """Keeps when the nodes were last heard of; that time never goes back."""
        _SAW.run(self._session.connection(), [(node_id, now_unix_ms) for node_id in node_ids])


def _inventory_json(inventory: Inventory) -> str:
    return msgspec.json.encode(inventory).decode()


@lru_cache(INVENTORIES_MAX)
def _inventory(text: str) -> Inventory:
    return msgspec.json.decode(text, type=Inventory)


def _node(row: NodeRow | Row[Any]) -> EnrolledNode:
    return EnrolledNode(
        node_id=NodeId(row.node_id),
        owner_account_id=AccountId(row.owner_account_id),
        display_name=row.display_name,
        public_key_spki=row.public_key_spki,
        status=NodeStatus(row.status),
        status_reason=row.status_reason,
        epoch=row.epoch,
        inventory=_inventory(row.inventory),
        agent_version=row.agent_version,
        enrolled_at_unix_ms=row.enrolled_at_unix_ms,
        last_seen_at_unix_ms=row.last_seen_at_unix_ms,
    )
