"""How a box becomes a node: the gRPC side of the directory's enrolment desk.

A certificate that still holds is renewed over the link (`link_servicer`); one that lapsed or was refused, here. Decides only what is too
large to look at. It must not know tokens or certificates; the desk judges both.
"""

from __future__ import annotations

from typing import Any, Final

import grpc

from potluck_coordinator.desks import EnrolmentDesk
from potluck_protocol import hardware_codec
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.v1 import node_pb2, node_pb2_grpc
from potluck_protocol.values import TokenId

JOIN_BYTES_MAX: Final = 64 * 1024
"""A request, a token and an inventory; anyone may send one. What is stored of the inventory has the codec's own bounds."""


class EnrolmentServicer(node_pb2_grpc.EnrolmentServiceServicer):
    """Serves `EnrolmentService`."""

    def __init__(self, desk: EnrolmentDesk) -> None:
        self._desk = desk

    async def Join(  # noqa: N802 - the contract's name
        self, request: node_pb2.JoinRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> node_pb2.JoinResponse:
        """Spends a join token on a certificate."""
        del context
        _check_size(request.ByteSize())
        enrolment = await self._desk.join(
            request.certificate_request_der,
            TokenId(request.token_id),
            request.token_secret,
            request.display_name,
            hardware_codec.inventory_value(request.inventory),
        )
        return node_pb2.JoinResponse(
            node_id=enrolment.node_id, certificate_pem=enrolment.certificate_pem, owner_account_id=enrolment.owner_account_id
        )

    async def Renew(  # noqa: N802 - the contract's name
        self, request: node_pb2.RenewRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> node_pb2.RenewResponse:
        """A fresh certificate for an enrolled key."""
        del context
        _check_size(request.ByteSize())
        _, certificate_pem = await self._desk.renew(request.certificate_request_der)
        return node_pb2.RenewResponse(certificate_pem=certificate_pem)


def _check_size(byte_count: int) -> None:
    if byte_count > JOIN_BYTES_MAX:
        raise PotluckError(ErrorCode.REQUEST_TOO_LARGE, f"An enrolment request has at most {JOIN_BYTES_MAX} bytes.")
