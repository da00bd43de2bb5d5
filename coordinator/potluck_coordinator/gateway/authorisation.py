"""Who may call what: the one table of every gRPC method and every HTTP route.

Decides the audience of each call, and which account a call may be about. It must not know how a credential is checked: the edges establish
a `KeyIdentity`, or of a node its certificate and what the directory says of it, and ask here whether that is enough. A method without a
row is refused, and fails the start.
"""

from __future__ import annotations

from collections.abc import Collection
from enum import StrEnum
from typing import Final

from potluck_coordinator.desks import KeyIdentity
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.v1 import account_pb2, gateway_pb2, inference_pb2, node_pb2, pool_pb2
from potluck_protocol.values import AccountId


class Audience(StrEnum):
    """Who a call is for."""

    ANYONE = "anyone"
    """No credential is looked at."""
    JOINER = "joiner"
    """No credential beside the message: it carries a join token, or a request signed by an enrolled key, for the directory to judge."""
    NODE = "node"
    """A certificate of this pool's CA, of a node that is enrolled now: one that left, was revoked, or was never entered in the books is
    none, whatever was signed for it. API keys count for nothing here."""
    GATEWAY = "gateway"
    """A certificate of this pool's CA, of a gateway that is one of the coordinator's now."""
    USER = "user"
    """A good API key. About one's own account; the operator's key may name another."""
    OPERATOR = "operator"
    """An operator's API key."""


UNIDENTIFIED: Final = frozenset({Audience.ANYONE, Audience.JOINER})
"""Callers of whom the edges know nothing."""

RPC_AUDIENCE: Final[dict[str, Audience]] = {
    "/potluck_protocol.v1.EnrolmentService/Join": Audience.JOINER,
    "/potluck_protocol.v1.EnrolmentService/Renew": Audience.JOINER,
    "/potluck_protocol.v1.NodeService/Link": Audience.NODE,
    "/potluck_protocol.v1.NodeService/MeasureUpload": Audience.NODE,
    "/potluck_protocol.v1.NodeService/MeasureDownload": Audience.NODE,
    "/potluck_protocol.v1.GatewayService/Forward": Audience.GATEWAY,
    "/potluck_protocol.v1.InferenceService/Generate": Audience.USER,
    "/potluck_protocol.v1.InferenceService/ListModels": Audience.USER,
    "/potluck_protocol.v1.AccountService/GetBalance": Audience.USER,
    "/potluck_protocol.v1.AccountService/ListStatement": Audience.USER,
    "/potluck_protocol.v1.AccountService/ClaimEarnings": Audience.USER,
    "/potluck_protocol.v1.AccountService/CreateKey": Audience.USER,
    "/potluck_protocol.v1.AccountService/ListKeys": Audience.USER,
    "/potluck_protocol.v1.AccountService/RevokeKey": Audience.USER,
    "/potluck_protocol.v1.AccountService/SetKeyQuotas": Audience.USER,
    "/potluck_protocol.v1.AccountService/CreateJoinToken": Audience.USER,
    "/potluck_protocol.v1.AccountService/ListJoinTokens": Audience.USER,
    "/potluck_protocol.v1.AccountService/RevokeJoinToken": Audience.USER,
    "/potluck_protocol.v1.AccountService/CreateAccount": Audience.OPERATOR,
    "/potluck_protocol.v1.AccountService/ListAccounts": Audience.OPERATOR,
    "/potluck_protocol.v1.AccountService/AuditLedger": Audience.OPERATOR,
    "/potluck_protocol.v1.PoolService/ListNodes": Audience.USER,
    "/potluck_protocol.v1.PoolService/RevokeNode": Audience.OPERATOR,
    "/potluck_protocol.v1.PoolService/SetNodeTrust": Audience.OPERATOR,
    "/potluck_protocol.v1.PoolService/AddModel": Audience.OPERATOR,
    "/potluck_protocol.v1.PoolService/RemoveModel": Audience.OPERATOR,
    "/potluck_protocol.v1.PoolService/GetModel": Audience.USER,
    "/potluck_protocol.v1.PoolService/Deploy": Audience.OPERATOR,
    "/potluck_protocol.v1.PoolService/Undeploy": Audience.OPERATOR,
    "/potluck_protocol.v1.PoolService/ListDeployments": Audience.USER,
    "/potluck_protocol.v1.PoolService/ExplainDeployment": Audience.OPERATOR,
    "/potluck_protocol.v1.PoolService/GetTiers": Audience.USER,
    "/potluck_protocol.v1.PoolService/ExplainRequest": Audience.USER,
    "/potluck_protocol.v1.PoolService/ExplainWaiting": Audience.USER,
    "/potluck_protocol.v1.PoolService/ExplainNode": Audience.USER,
}

HTTP_ROUTES: Final[dict[tuple[str, str], Audience]] = {
    ("GET", "/v1/models"): Audience.USER,
    ("GET", "/v1/models/{model_id}"): Audience.USER,
    ("POST", "/v1/chat/completions"): Audience.USER,
    ("POST", "/v1/completions"): Audience.USER,
    ("POST", "/v1/embeddings"): Audience.USER,
    ("GET", "/pool/v1/connection"): Audience.ANYONE,
    ("GET", "/health"): Audience.ANYONE,
    ("GET", "/ready"): Audience.ANYONE,
    ("GET", "/metrics"): Audience.OPERATOR,
}

_CONTRACT: Final = (account_pb2, gateway_pb2, inference_pb2, node_pb2, pool_pb2)


def contract_methods() -> frozenset[str]:
    """The full name of every method of the contract, as gRPC spells it."""
    return frozenset(
        f"/{service.full_name}/{method.name}"
        for module in _CONTRACT
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    )


def check_table() -> None:
    """Called at start; raises RuntimeError unless every method of the contract has a row, and every row a method."""
    methods = contract_methods()
    if missing := sorted(methods - RPC_AUDIENCE.keys()):
        raise RuntimeError(f"authorisation.RPC_AUDIENCE has no row for {', '.join(missing)}; decide who may call it")
    if surplus := sorted(RPC_AUDIENCE.keys() - methods):
        raise RuntimeError(f"authorisation.RPC_AUDIENCE has rows for methods that do not exist: {', '.join(surplus)}")


def require(identity: KeyIdentity, audience: Audience) -> None:
    """Lets a key pass where its bearer belongs to the audience; raises PotluckError(PERMISSION_DENIED) otherwise."""
    if audience in UNIDENTIFIED or audience is Audience.USER:
        return
    if audience is Audience.OPERATOR and identity.operator:
        return
    needed = "the operator's key" if audience is Audience.OPERATOR else "a node's certificate"
    raise PotluckError(ErrorCode.PERMISSION_DENIED, f"This call needs {needed}.")


def require_node(outcast_reason: str | None, *, is_enrolled: bool) -> None:
    """Lets a node pass whose certificate is good, or raises PotluckError(INVALID_CERTIFICATE).

    Args:
        outcast_reason: why it is no longer welcome, "" where nobody said; None for one that was not put out.
        is_enrolled: whether the books have it as an active node.
    """
    if outcast_reason is None and is_enrolled:
        return
    words = f" ({outcast_reason})" if outcast_reason else ""
    raise PotluckError(
        ErrorCode.INVALID_CERTIFICATE, f"This node is no longer part of the pool{words}; ask the pool's operator for a new invite."
    )


def require_gateway(epoch: int, epochs_now: Collection[int]) -> None:
    """Lets a gateway pass that is one of the coordinator's, or raises PotluckError(INVALID_CERTIFICATE)."""
    if epoch not in epochs_now:
        raise PotluckError(ErrorCode.INVALID_CERTIFICATE, "This gateway is not one of the coordinator's any more.")


def account_for(identity: KeyIdentity, requested_account_id: str) -> AccountId:
    """The account a call is about: the caller's own where none is named.

    Raises:
        PotluckError: PERMISSION_DENIED where another's is named with a key that is not the operator's.
    """
    if requested_account_id in {"", identity.account_id}:
        return identity.account_id
    if not identity.operator:
        raise PotluckError(ErrorCode.PERMISSION_DENIED, "Naming another's account needs the operator's key.", param="account_id")
    return AccountId(requested_account_id)
