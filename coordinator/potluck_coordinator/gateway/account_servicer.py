"""People's credits, keys and join tokens, and the operator's audit: the gRPC side of the directory's accounts and ledger desks.

Decides whose keys and tokens a caller may revoke, that no key but the operator's makes one that outlives it, and that one with quotas makes
none; which account any other call is about says `authorisation.account_for`. Names, other lifetimes and money are the desks' to judge.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Final

import grpc

from potluck_coordinator.desks import AccountRecord, Accounts, JoinTokenRecord, KeyIdentity, KeyRecord, Ledger, Progress
from potluck_coordinator.domain.quotas import KeyQuotas
from potluck_coordinator.gateway.authorisation import account_for
from potluck_coordinator.gateway.interceptors import caller
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.v1 import account_pb2, account_pb2_grpc
from potluck_protocol.values import AccountId, KeyPrefix, TokenId

KEY_NAME_DEFAULT: Final = "key"
STATEMENT_LINES_DEFAULT: Final = 50

_Context = grpc.aio.ServicerContext[Any, Any]


class AccountServicer(account_pb2_grpc.AccountServiceServicer):
    """Serves `AccountService`."""

    def __init__(self, accounts: Accounts, ledger: Ledger) -> None:
        self._accounts = accounts
        self._ledger = ledger

    async def GetBalance(  # noqa: N802 - the contract's name, as for every method here
        self, request: account_pb2.GetBalanceRequest, context: _Context
    ) -> account_pb2.GetBalanceResponse:
        """What an account has, holds and earned."""
        del context
        balance = await self._ledger.balance(account_for(caller(), request.account_id))
        return account_pb2.GetBalanceResponse(
            account_id=balance.account_id,
            available_micro_credits=balance.available_micro_credits,
            held_micro_credits=balance.held_micro_credits,
            earned_micro_credits=balance.earned_micro_credits,
        )

    async def ListStatement(  # noqa: N802
        self, request: account_pb2.ListStatementRequest, context: _Context
    ) -> account_pb2.ListStatementResponse:
        """The newest postings of an account."""
        del context
        limit = max(request.limit, 0) or STATEMENT_LINES_DEFAULT
        lines = await self._ledger.statement(account_for(caller(), request.account_id), limit)
        return account_pb2.ListStatementResponse(
            lines=[
                account_pb2.StatementLine(
                    transaction_id=line.transaction_id,
                    kind=line.kind,
                    amount_micro_credits=line.amount_micro_credits,
                    created_at_unix_ms=line.created_at_unix_ms,
                    ledger_account_kind=line.ledger_account_kind,
                )
                for line in lines
            ]
        )

    async def ClaimEarnings(  # noqa: N802
        self, request: account_pb2.ClaimEarningsRequest, context: _Context
    ) -> account_pb2.ClaimEarningsResponse:
        """Moves what an account's nodes earned to where it can be spent."""
        del context
        claimed = await self._ledger.claim_earnings(account_for(caller(), request.account_id), request.claim_id)
        return account_pb2.ClaimEarningsResponse(claimed_micro_credits=claimed)

    async def CreateKey(  # noqa: N802
        self, request: account_pb2.CreateKeyRequest, context: _Context
    ) -> account_pb2.CreateKeyResponse:
        """A new API key; its secret is in this answer only. None outlives the key that asks for it, but for the operator's word."""
        del context
        identity = _unbounded()
        account_id = account_for(identity, request.account_id)
        record, secret = await self._accounts.create_key(
            account_id,
            request.name or KEY_NAME_DEFAULT,
            request.lifetime_seconds,
            ends_by_unix_ms=0 if identity.operator else identity.expires_at_unix_ms,
            quotas=KeyQuotas(
                request.quotas.requests_per_day,
                request.quotas.tokens_per_day,
                request.quotas.concurrent_max,
                request.quotas.spend_micro_credits_per_day,
            ),
        )
        return account_pb2.CreateKeyResponse(key=_key_message(record), secret=secret)

    async def ListKeys(  # noqa: N802
        self, request: account_pb2.ListKeysRequest, context: _Context
    ) -> account_pb2.ListKeysResponse:
        """An account's keys, by prefix."""
        del context
        records = await self._accounts.list_keys(account_for(caller(), request.account_id))
        return account_pb2.ListKeysResponse(keys=[_key_message(record) for record in records])

    async def SetKeyQuotas(  # noqa: N802
        self, request: account_pb2.SetKeyQuotasRequest, context: _Context
    ) -> account_pb2.SetKeyQuotasResponse:
        """Changes those bounds of a key that the request names; requests that run are not touched."""
        del context
        _unbounded()
        # What is not set is not in the list, and a bound of 0 that is set is.
        changes = {field.name: value for field, value in request.ListFields() if field.name != "key_prefix"}
        record = await self._accounts.set_key_quotas(KeyPrefix(request.key_prefix), _owner_scope(), changes)
        return account_pb2.SetKeyQuotasResponse(key=_key_message(record))

    async def RevokeKey(  # noqa: N802
        self, request: account_pb2.RevokeKeyRequest, context: _Context
    ) -> account_pb2.RevokeKeyResponse:
        """Ends a key for good."""
        del context
        await self._accounts.revoke_key(KeyPrefix(request.key_prefix), _owner_scope())
        return account_pb2.RevokeKeyResponse()

    async def CreateJoinToken(  # noqa: N802
        self, request: account_pb2.CreateJoinTokenRequest, context: _Context
    ) -> account_pb2.CreateJoinTokenResponse:
        """A single-use token; the client makes an invite of it, because it knows the URL and the CA's hash."""
        del context
        account_id = account_for(caller(), request.account_id)
        record, secret = await self._accounts.create_join_token(account_id, request.lifetime_seconds)
        return account_pb2.CreateJoinTokenResponse(token=_token_message(record), secret=secret)

    async def ListJoinTokens(  # noqa: N802
        self, request: account_pb2.ListJoinTokensRequest, context: _Context
    ) -> account_pb2.ListJoinTokensResponse:
        """An account's join tokens and what became of them."""
        del context
        records = await self._accounts.list_join_tokens(account_for(caller(), request.account_id))
        return account_pb2.ListJoinTokensResponse(tokens=[_token_message(record) for record in records])

    async def RevokeJoinToken(  # noqa: N802
        self, request: account_pb2.RevokeJoinTokenRequest, context: _Context
    ) -> account_pb2.RevokeJoinTokenResponse:
        """Makes an unspent token worthless."""
        del context
        await self._accounts.revoke_join_token(TokenId(request.token_id), _owner_scope())
        return account_pb2.RevokeJoinTokenResponse()

    async def CreateAccount(  # noqa: N802
        self, request: account_pb2.CreateAccountRequest, context: _Context
    ) -> account_pb2.CreateAccountResponse:
        """A new person, with the pool's grant."""
        del context
        record = await self._accounts.create_account(request.name)
        return account_pb2.CreateAccountResponse(account=_account_message(record))

    async def ListAccounts(  # noqa: N802
        self, request: account_pb2.ListAccountsRequest, context: _Context
    ) -> account_pb2.ListAccountsResponse:
        """Everyone."""
        del request, context
        records = await self._accounts.list_accounts()
        return account_pb2.ListAccountsResponse(accounts=[_account_message(record) for record in records])

    async def AuditLedger(  # noqa: N802
        self, request: account_pb2.AuditLedgerRequest, context: _Context
    ) -> account_pb2.AuditLedgerResponse:
        """Derives every balance anew from the postings."""
        del request, context
        report = await self._ledger.audit()
        if isinstance(report, Progress):
            return account_pb2.AuditLedgerResponse(progress=report.words)
        return account_pb2.AuditLedgerResponse(
            findings=report.findings,
            account_count=report.account_count,
            transaction_count=report.transaction_count,
            posting_count=report.posting_count,
            open_hold_count=report.open_hold_count,
            issued_micro_credits=report.issued_micro_credits,
        )


def _owner_scope() -> AccountId | None:
    """Whose things may be revoked: the caller's own, or anyone's (None) by the operator."""
    identity = caller()
    return None if identity.operator else identity.account_id


def _unbounded() -> KeyIdentity:
    """The caller, if its key has no bounds, which it could shed by another key; the operator's word stands in any case."""
    identity = caller()
    if identity.quotas.any and not identity.operator:
        words = "This API key has quotas, so that it makes and changes no keys; use one that has none."
        raise PotluckError(ErrorCode.PERMISSION_DENIED, words)
    return identity


def _key_message(record: KeyRecord) -> account_pb2.ApiKey:
    return account_pb2.ApiKey(
        key_prefix=record.key_prefix,
        account_id=record.account_id,
        name=record.name,
        created_at_unix_ms=record.created_at_unix_ms,
        expires_at_unix_ms=record.expires_at_unix_ms,
        revoked=record.revoked,
        operator=record.operator,
        quotas=account_pb2.KeyQuotas(**asdict(record.quotas)),
    )


def _token_message(record: JoinTokenRecord) -> account_pb2.JoinToken:
    return account_pb2.JoinToken(
        token_id=record.token_id,
        account_id=record.account_id,
        created_at_unix_ms=record.created_at_unix_ms,
        expires_at_unix_ms=record.expires_at_unix_ms,
        used_by_node_id=record.used_by_node_id or "",
        revoked=record.revoked,
    )


def _account_message(record: AccountRecord) -> account_pb2.Account:
    return account_pb2.Account(
        account_id=record.account_id, name=record.name, operator=record.operator, created_at_unix_ms=record.created_at_unix_ms
    )
