"""Every call the SDK makes, as a value: the method, the message, and how its reply is read.

Decides how arguments become messages and messages become results, and which model answers who named none (`choose_model`): once, for the
synchronous and the asynchronous client. It must not know channels, threads or loops: `transport` carries the calls out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Generic, TypeVar

from google.protobuf.message import Message

from potluck.errors import error_of_protocol, pool_error
from potluck.results import (
    AccountInfo,
    Audit,
    Credits,
    JoinTokenInfo,
    KeyInfo,
    KeyQuotas,
    ModelInfo,
    NodeInfo,
    Progress,
    Secret,
    StatementEntry,
)
from potluck_protocol.codec import node_state_from_number, rest_causes_from_numbers
from potluck_protocol.engine_codec import ENDPOINT_NUMBER, endpoint_from_number, engine_status_value
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.hardware_codec import card_telemetries_value, inventory_value
from potluck_protocol.v1 import account_pb2, inference_pb2, pool_pb2
from potluck_protocol.values import AccountId, Endpoint, KeyPrefix, ModelId, NodeId, TokenId

Reply = TypeVar("Reply", bound=Message)
Result = TypeVar("Result")

_ACCOUNTS: Final = "/potluck_protocol.v1.AccountService/"
_INFERENCE: Final = "/potluck_protocol.v1.InferenceService/"
POOL_SERVICE: Final = "/potluck_protocol.v1.PoolService/"
GENERATE_METHOD: Final = _INFERENCE + "Generate"


@dataclass(frozen=True, slots=True)
class Call(Generic[Reply, Result]):
    """One unary call."""

    method: str
    request: Message
    reply_type: type[Reply]
    read: Callable[[Reply], Result]
    repeatable: bool = True
    """Whether making the call twice is as good as once, so that it may be tried again after an unclear failure."""


def read_reply(call: Call[Reply, Result], reply: Reply) -> Result:
    """The call's result; a reply this version cannot read raises a `PoolError`."""
    try:
        return call.read(reply)
    except PotluckError as error:
        raise error_of_protocol(error) from error


def generate_request(
    endpoint: Endpoint, model: ModelId, fields: Mapping[str, Any], *, stream: bool, trusted_only: bool = False
) -> inference_pb2.GenerateRequest:
    """The request of one inference; fields whose value is None are left out.

    Raises:
        InvalidRequestError: a field cannot be written as JSON.
    """
    body = {"model": model, **{name: value for name, value in fields.items() if value is not None}}
    if stream:
        body["stream"] = True
    try:
        body_json = json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise pool_error(ErrorCode.INVALID_REQUEST, f"A field of the request cannot be written as JSON: {error}") from error
    return inference_pb2.GenerateRequest(endpoint=ENDPOINT_NUMBER[endpoint], body_json=body_json, trusted_only=trusted_only)


def choose_model(models: Sequence[ModelInfo], endpoint: Endpoint) -> ModelId:
    """The model for a caller who named none: the first that is ready for the endpoint, else the first that will be.

    Raises:
        ModelNotFoundError: no model of the pool has the endpoint.
    """
    able = [model for model in models if endpoint in model.endpoints]
    if not able:
        raise pool_error(ErrorCode.MODEL_NOT_FOUND, f"No model of this pool answers {endpoint.value}; see `potluck models`.")
    return next((model for model in able if model.ready_replica_count), able[0]).model_id


def list_models(*, with_offers: bool = False) -> Call[inference_pb2.ListModelsResponse, tuple[ModelInfo, ...]]:
    """The models that can be served; with offers, also those whose files are not pinned yet."""
    return Call(
        _INFERENCE + "ListModels",
        inference_pb2.ListModelsRequest(with_offers=with_offers),
        inference_pb2.ListModelsResponse,
        lambda reply: tuple(_model(message) for message in reply.models),
    )


def list_nodes() -> Call[pool_pb2.ListNodesResponse, tuple[NodeInfo, ...]]:
    return Call(
        POOL_SERVICE + "ListNodes",
        pool_pb2.ListNodesRequest(),
        pool_pb2.ListNodesResponse,
        lambda reply: tuple(_node(message) for message in reply.nodes),
    )


def revoke_node(node_id: NodeId, reason: str) -> Call[pool_pb2.RevokeNodeResponse, None]:
    request = pool_pb2.RevokeNodeRequest(node_id=node_id, reason=reason)
    return Call(POOL_SERVICE + "RevokeNode", request, pool_pb2.RevokeNodeResponse, read_nothing)


def set_node_trust(node_id: NodeId, *, trusted: bool) -> Call[pool_pb2.SetNodeTrustResponse, None]:
    """The operator's word; said again it changes nothing."""
    request = pool_pb2.SetNodeTrustRequest(node_id=node_id, trusted=trusted)
    return Call(POOL_SERVICE + "SetNodeTrust", request, pool_pb2.SetNodeTrustResponse, read_nothing)


def get_balance(account_id: AccountId | None = None) -> Call[account_pb2.GetBalanceResponse, Credits]:
    return Call(
        _ACCOUNTS + "GetBalance",
        account_pb2.GetBalanceRequest(account_id=account_id or ""),
        account_pb2.GetBalanceResponse,
        lambda reply: Credits(
            AccountId(reply.account_id), reply.available_micro_credits, reply.held_micro_credits, reply.earned_micro_credits
        ),
    )


def list_statement(limit: int, account_id: AccountId | None = None) -> Call[account_pb2.ListStatementResponse, tuple[StatementEntry, ...]]:
    return Call(
        _ACCOUNTS + "ListStatement",
        account_pb2.ListStatementRequest(account_id=account_id or "", limit=limit),
        account_pb2.ListStatementResponse,
        lambda reply: tuple(
            StatementEntry(line.transaction_id, line.kind, line.amount_micro_credits, line.created_at_unix_ms, line.ledger_account_kind)
            for line in reply.lines
        ),
    )


def claim_earnings(claim_id: str, account_id: AccountId | None = None) -> Call[account_pb2.ClaimEarningsResponse, int]:
    """The micro-credits moved; the same claim_id moves them once."""
    return Call(
        _ACCOUNTS + "ClaimEarnings",
        account_pb2.ClaimEarningsRequest(account_id=account_id or "", claim_id=claim_id),
        account_pb2.ClaimEarningsResponse,
        lambda reply: reply.claimed_micro_credits,
    )


def create_key(
    name: str, lifetime_seconds: int = 0, account_id: AccountId | None = None, quotas: Mapping[str, int] = MappingProxyType({})
) -> Call[account_pb2.CreateKeyResponse, Secret]:
    """A new key; `quotas` are some of `KeyQuotas`, by name."""
    request = account_pb2.CreateKeyRequest(
        account_id=account_id or "", name=name, lifetime_seconds=lifetime_seconds, quotas=account_pb2.KeyQuotas(**quotas)
    )
    return Call(
        _ACCOUNTS + "CreateKey",
        request,
        account_pb2.CreateKeyResponse,
        lambda reply: Secret(reply.key.key_prefix, reply.secret),
        repeatable=False,
    )


def list_keys(account_id: AccountId | None = None) -> Call[account_pb2.ListKeysResponse, tuple[KeyInfo, ...]]:
    return Call(
        _ACCOUNTS + "ListKeys",
        account_pb2.ListKeysRequest(account_id=account_id or ""),
        account_pb2.ListKeysResponse,
        lambda reply: tuple(_key(message) for message in reply.keys),
    )


def set_key_quotas(key_prefix: KeyPrefix, quotas: Mapping[str, int]) -> Call[account_pb2.SetKeyQuotasResponse, KeyInfo]:
    """Changes those of `KeyQuotas` that are named."""
    request = account_pb2.SetKeyQuotasRequest(key_prefix=key_prefix, **quotas)
    return Call(_ACCOUNTS + "SetKeyQuotas", request, account_pb2.SetKeyQuotasResponse, lambda reply: _key(reply.key))


def revoke_key(key_prefix: KeyPrefix) -> Call[account_pb2.RevokeKeyResponse, None]:
    return Call(_ACCOUNTS + "RevokeKey", account_pb2.RevokeKeyRequest(key_prefix=key_prefix), account_pb2.RevokeKeyResponse, read_nothing)


def create_join_token(
    lifetime_seconds: int = 0, account_id: AccountId | None = None
) -> Call[account_pb2.CreateJoinTokenResponse, tuple[JoinTokenInfo, Secret]]:
    return Call(
        _ACCOUNTS + "CreateJoinToken",
        account_pb2.CreateJoinTokenRequest(account_id=account_id or "", lifetime_seconds=lifetime_seconds),
        account_pb2.CreateJoinTokenResponse,
        lambda reply: (_join_token(reply.token), Secret(reply.token.token_id, reply.secret)),
        repeatable=False,
    )


def list_join_tokens(account_id: AccountId | None = None) -> Call[account_pb2.ListJoinTokensResponse, tuple[JoinTokenInfo, ...]]:
    return Call(
        _ACCOUNTS + "ListJoinTokens",
        account_pb2.ListJoinTokensRequest(account_id=account_id or ""),
        account_pb2.ListJoinTokensResponse,
        lambda reply: tuple(_join_token(message) for message in reply.tokens),
    )


def revoke_join_token(token_id: TokenId) -> Call[account_pb2.RevokeJoinTokenResponse, None]:
    request = account_pb2.RevokeJoinTokenRequest(token_id=token_id)
    return Call(_ACCOUNTS + "RevokeJoinToken", request, account_pb2.RevokeJoinTokenResponse, read_nothing)


def create_account(name: str) -> Call[account_pb2.CreateAccountResponse, AccountInfo]:
    return Call(
        _ACCOUNTS + "CreateAccount",
        account_pb2.CreateAccountRequest(name=name),
        account_pb2.CreateAccountResponse,
        lambda reply: _account(reply.account),
        repeatable=False,
    )


def list_accounts() -> Call[account_pb2.ListAccountsResponse, tuple[AccountInfo, ...]]:
    return Call(
        _ACCOUNTS + "ListAccounts",
        account_pb2.ListAccountsRequest(),
        account_pb2.ListAccountsResponse,
        lambda reply: tuple(_account(message) for message in reply.accounts),
    )


def audit_ledger() -> Call[account_pb2.AuditLedgerResponse, Audit | Progress]:
    return Call(
        _ACCOUNTS + "AuditLedger",
        account_pb2.AuditLedgerRequest(),
        account_pb2.AuditLedgerResponse,
        lambda reply: Progress(reply.progress) if reply.progress else _audit(reply),
    )


def _audit(reply: account_pb2.AuditLedgerResponse) -> Audit:
    return Audit(
        findings=tuple(reply.findings),
        account_count=reply.account_count,
        transaction_count=reply.transaction_count,
        posting_count=reply.posting_count,
        open_hold_count=reply.open_hold_count,
        issued_micro_credits=reply.issued_micro_credits,
    )


def read_nothing(_reply: Message) -> None:
    """Of a reply that says no more than that it was done."""


def _model(message: inference_pb2.Model) -> ModelInfo:
    return ModelInfo(
        model_id=ModelId(message.model_id),
        context_length_tokens=message.context_length_tokens,
        prompt_price_micro_credits_per_token=message.prompt_price_micro_credits_per_token,
        completion_price_micro_credits_per_token=message.completion_price_micro_credits_per_token,
        ready_replica_count=message.ready_replica_count,
        created_at_unix_seconds=message.created_at_unix_seconds,
        licence=message.licence,
        endpoints=tuple(endpoint_from_number(number) for number in message.endpoints),
        offered_repository=message.offered_repository,
    )


def _node(message: pool_pb2.Node) -> NodeInfo:
    return NodeInfo(
        node_id=NodeId(message.node_id),
        display_name=message.display_name,
        owner_account_id=AccountId(message.owner_account_id) if message.owner_account_id else None,
        connection=message.connection,
        state=node_state_from_number(message.state),
        engines=tuple(engine_status_value(engine) for engine in message.engines),
        inventory=inventory_value(message.inventory),
        agent_version=message.agent_version,
        up_minutes=message.up_minutes,
        down_minutes=message.down_minutes,
        unknown_minutes=message.unknown_minutes,
        last_seen_at_unix_ms=message.last_seen_at_unix_ms,
        cards=card_telemetries_value(message.cards),
        rest_causes=rest_causes_from_numbers(message.rest_causes),
        trusted=message.trusted,
    )


def _key(message: account_pb2.ApiKey) -> KeyInfo:
    return KeyInfo(
        key_prefix=KeyPrefix(message.key_prefix),
        account_id=AccountId(message.account_id),
        name=message.name,
        created_at_unix_ms=message.created_at_unix_ms,
        expires_at_unix_ms=message.expires_at_unix_ms,
        revoked=message.revoked,
        operator=message.operator,
        quotas=KeyQuotas(
            message.quotas.requests_per_day,
            message.quotas.tokens_per_day,
            message.quotas.concurrent_max,
            message.quotas.spend_micro_credits_per_day,
        ),
    )


def _join_token(message: account_pb2.JoinToken) -> JoinTokenInfo:
    return JoinTokenInfo(
        token_id=TokenId(message.token_id),
        account_id=AccountId(message.account_id),
        created_at_unix_ms=message.created_at_unix_ms,
        expires_at_unix_ms=message.expires_at_unix_ms,
        used_by_node_id=NodeId(message.used_by_node_id) if message.used_by_node_id else None,
        revoked=message.revoked,
    )


def _account(message: account_pb2.Account) -> AccountInfo:
    return AccountInfo(AccountId(message.account_id), message.name, message.operator, message.created_at_unix_ms)
