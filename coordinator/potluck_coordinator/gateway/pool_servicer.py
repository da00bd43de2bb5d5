"""The pool as people see it: the gRPC side of the directory's node desk.

Decides what of a node is shown to whom: its owner and the operator see everything; others see neither whose it is, nor its cards' uuids,
nor why an engine failed. Revoking a node comes in here as well; `authorisation` keeps it to the operator. It must not know links.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import grpc

from potluck_coordinator.desks import KeyIdentity, NodeDesk, NodeRecord
from potluck_coordinator.gateway.interceptors import caller
from potluck_protocol import codec, engine_codec, hardware_codec
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.v1 import pool_pb2, pool_pb2_grpc
from potluck_protocol.values import AccountId, NodeId

REASON_CHARACTERS_MAX: Final = 500


class PoolServicer(pool_pb2_grpc.PoolServiceServicer):
    """Serves `PoolService`."""

    def __init__(self, desk: NodeDesk) -> None:
        self._desk = desk

    async def ListNodes(  # noqa: N802 - the contract's name
        self, request: pool_pb2.ListNodesRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pool_pb2.ListNodesResponse:
        """Every enrolled node."""
        del request, context
        identity = caller()
        records = await self._desk.list_nodes()
        return pool_pb2.ListNodesResponse(nodes=[_node_message(_as_seen_by(identity, record)) for record in records])

    async def RevokeNode(  # noqa: N802 - the contract's name
        self, request: pool_pb2.RevokeNodeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pool_pb2.RevokeNodeResponse:
        """Shuts a node out for good."""
        del context
        if not request.node_id:
            raise PotluckError(ErrorCode.INVALID_REQUEST, "Name the node to revoke.", param="node_id")
        await self._desk.revoke_node(NodeId(request.node_id), request.reason[:REASON_CHARACTERS_MAX])
        return pool_pb2.RevokeNodeResponse()


def _as_seen_by(identity: KeyIdentity, record: NodeRecord) -> NodeRecord:
    if identity.operator or record.owner_account_id == identity.account_id:
        return record
    cards = tuple(replace(card, uuid="") for card in record.inventory.accelerators)
    return replace(
        record,
        owner_account_id=AccountId(""),
        engines=tuple(replace(status, failure="") for status in record.engines),
        inventory=replace(record.inventory, accelerators=cards),
    )


def _node_message(record: NodeRecord) -> pool_pb2.Node:
    return pool_pb2.Node(
        node_id=record.node_id,
        display_name=record.display_name,
        owner_account_id=record.owner_account_id,
        connection=record.connection,
        state=codec.NODE_STATE_NUMBER[record.state],
        engines=[engine_codec.engine_status_message(status) for status in record.engines],
        inventory=hardware_codec.inventory_message(record.inventory),
        agent_version=record.agent_version,
        up_minutes=record.up_minutes,
        down_minutes=record.down_minutes,
        unknown_minutes=record.unknown_minutes,
        last_seen_at_unix_ms=record.last_seen_at_unix_ms,
    )
