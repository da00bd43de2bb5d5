"""Becoming a node, and the way back for one whose certificate lapsed.

Decides the order of joining: the CA is checked before anything secret leaves the machine, and the folder counts as joined only when all of
it is there. `potluck_protocol.connection` checks the CA, `identity_store` makes the key, `potluck_protocol.identity` the request; it goes
to `EnrolmentService` on the coordinator's grpc port. It must not know the link.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final

import grpc
import grpc.aio

from potluck_node.control import write_control
from potluck_node.domain.rest import NO_WORD, Word
from potluck_node.identity_store import NodeIdentity, StateFolder
from potluck_protocol.channels import CHANNEL_OPTIONS
from potluck_protocol.clock import Clock
from potluck_protocol.connection import ConnectionDocument, Invite, fetch_connection, pinned_url
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.hardware_codec import inventory_message
from potluck_protocol.identity import certificate_request, node_id_of_certificate, node_id_of_public_key, public_key_der
from potluck_protocol.metadata import ERROR_DETAIL
from potluck_protocol.v1 import common_pb2, node_pb2, node_pb2_grpc
from potluck_protocol.values import AccountId, Inventory, NodeId

CALL_LIMIT_SECONDS: Final = 15.0


async def join(
    invite: Invite, folder: StateFolder, *, display_name: str, inventory: Inventory, clock: Clock, first_word: Word = NO_WORD
) -> NodeIdentity:
    """Spends the invite and fills the folder; `first_word` is what its first agent finds that the owner said.

    Raises:
        PotluckError: ALREADY_EXISTS for a folder that has joined and for a key that another person's node uses, INVALID_INVITE,
            INVALID_CERTIFICATE where the coordinator is another one than the invite names, INVALID_REQUEST for a name that will not do,
            COORDINATOR_UNAVAILABLE.
    """
    if folder.joined:
        identity = folder.identity()
        raise PotluckError(
            ErrorCode.ALREADY_EXISTS,
            f"This machine is already node {identity.node_id} of {identity.connection.grpc_target}; nothing was changed. "
            "Run `potluck node run`, or `potluck node leave` before joining another pool.",
        )
    connection = await asyncio.to_thread(fetch_connection, invite.url, invite.ca_hash)
    private_key_pem = folder.made_private_key()
    request = node_pb2.JoinRequest(
        certificate_request_der=certificate_request(private_key_pem),
        token_id=invite.token_id,
        token_secret=invite.token_secret,
        display_name=display_name,
        inventory=inventory_message(inventory),
    )
    async with _channel(connection) as channel:
        try:
            response = await node_pb2_grpc.EnrolmentServiceStub(channel).Join(request, timeout=CALL_LIMIT_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise rpc_failure(error, connection.grpc_target) from None
    node_id = node_id_of_public_key(public_key_der(private_key_pem))
    check_certificate(response.certificate_pem, node_id, clock)
    identity = NodeIdentity(node_id, AccountId(response.owner_account_id), display_name, pinned_url(invite.url, invite.ca_hash), connection)
    folder.write_certificate(response.certificate_pem)
    # Before the identity, with which the folder counts as joined: no join that is cut off leaves a node that serves unasked.
    write_control(folder.path, word=first_word, said_at_unix_ms=clock.unix_ms())
    folder.write_identity(identity)
    return identity


async def renew(identity: NodeIdentity, private_key_pem: bytes, clock: Clock) -> str:
    """A new certificate, PEM, by proof of the enrolled key; raises PotluckError as `join`, INVALID_CERTIFICATE for a node that is out."""
    async with _channel(identity.connection) as channel:
        try:
            response = await node_pb2_grpc.EnrolmentServiceStub(channel).Renew(
                node_pb2.RenewRequest(certificate_request_der=certificate_request(private_key_pem)), timeout=CALL_LIMIT_SECONDS
            )
        except grpc.aio.AioRpcError as error:
            raise rpc_failure(error, identity.connection.grpc_target) from None
    check_certificate(response.certificate_pem, identity.node_id, clock)
    return str(response.certificate_pem)


def check_certificate(certificate_pem: str, node_id: NodeId, clock: Clock) -> None:
    """Refuses a certificate that is not for our key, or that our clock calls not good; raises PotluckError(INVALID_CERTIFICATE)."""
    if node_id_of_certificate(certificate_pem.encode(), clock.unix_ms()) != node_id:
        raise PotluckError(ErrorCode.INVALID_CERTIFICATE, "The coordinator sent a certificate for another node's key.")


def rpc_failure(error: grpc.aio.AioRpcError, target: str) -> PotluckError:
    """What a failed call means, by the coordinator's own detail where it sent one."""
    for key, value in error.trailing_metadata() or ():
        if key == ERROR_DETAIL and isinstance(value, bytes):
            detail = common_pb2.ErrorDetail.FromString(value)
            with contextlib.suppress(ValueError):
                retry_after_seconds = detail.retry_after_ms / 1000 or None
                code, request_id = ErrorCode(detail.code), detail.request_id or None
                return PotluckError(code, detail.message, request_id=request_id, retry_after_seconds=retry_after_seconds)
    if error.code() is grpc.StatusCode.UNAUTHENTICATED:
        text = f"{target} refuses this node's certificate. To come back: a new invite, `potluck node leave`, and `potluck node join`."
        return PotluckError(ErrorCode.INVALID_CERTIFICATE, text)
    if error.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}:
        return no_answer(target, _short(error))
    return PotluckError(ErrorCode.INTERNAL_ERROR, f"{target} answered {error.code().name}: {_short(error)}; its log may say more.")


def no_answer(target: str, reason: str) -> PotluckError:
    """Of a coordinator that is not there."""
    text = (
        f"{target} does not answer ({reason}). On the coordinator's machine `potluck coordinator serve` has to run, "
        "with that port open to others."
    )
    return PotluckError(ErrorCode.COORDINATOR_UNAVAILABLE, text)


def _short(error: grpc.aio.AioRpcError) -> str:
    return (error.details() or error.code().name)[:200]


def _channel(connection: ConnectionDocument) -> grpc.aio.Channel:
    credentials = grpc.ssl_channel_credentials(root_certificates=connection.ca_certificate_pem.encode())
    return grpc.aio.secure_channel(connection.grpc_target, credentials, options=CHANNEL_OPTIONS)
