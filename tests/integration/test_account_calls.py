"""What the account calls leave to the directory's desks, and the one thing they add: whose key asked."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest

from potluck_coordinator.directory import ledger
from potluck_coordinator.directory.bootstrap import OPERATOR_ACCOUNT_ID
from potluck_coordinator.domain.ledger import OpenHold, SettleHold
from potluck_coordinator.domain.payees import PayeeShare
from potluck_coordinator.domain.quotas import KeyQuotas
from potluck_protocol.metadata import ERROR_DETAIL
from potluck_protocol.v1 import account_pb2, account_pb2_grpc, common_pb2
from tests.support.open_pool import open_pool


def detail_of(error: grpc.aio.AioRpcError) -> common_pb2.ErrorDetail:
    raw = dict(error.trailing_metadata() or ()).get(ERROR_DETAIL, b"")
    assert isinstance(raw, bytes)
    return common_pb2.ErrorDetail.FromString(raw)


async def test_a_key_makes_none_that_outlives_it_unless_it_is_the_operators(tmp_path: Path) -> None:
    async with open_pool(tmp_path) as pool, pool.grpc_channel() as channel:
        stub = account_pb2_grpc.AccountServiceStub(channel)
        user, _ = await pool.user_key("user")
        for account_id in (user, OPERATOR_ACCOUNT_ID):
            _, key = await pool.directory.accounts.create_key(account_id, "for an hour", 3600)
            metadata = (("authorization", f"Bearer {key}"),)
            for lifetime_seconds in (0, 7200):
                asked = stub.CreateKey(account_pb2.CreateKeyRequest(lifetime_seconds=lifetime_seconds), metadata=metadata)
                if account_id == OPERATOR_ACCOUNT_ID:
                    await asked
                    continue
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await asked
                assert detail_of(refused.value).code == "invalid_request"
                assert detail_of(refused.value).param == "lifetime_seconds"
            shorter = await stub.CreateKey(account_pb2.CreateKeyRequest(lifetime_seconds=60), metadata=metadata)
            assert shorter.key.expires_at_unix_ms > 0


async def test_a_key_with_quotas_makes_and_changes_no_keys(tmp_path: Path) -> None:
    async with open_pool(tmp_path) as pool, pool.grpc_channel() as channel:
        stub = account_pb2_grpc.AccountServiceStub(channel)
        user, unbounded = await pool.user_key("user")
        record, bounded = await pool.directory.accounts.create_key(user, "bounded", 0, quotas=KeyQuotas(requests_per_day=5))
        metadata = (("authorization", f"Bearer {bounded}"),)
        for asked in (
            stub.CreateKey(account_pb2.CreateKeyRequest(), metadata=metadata),
            stub.SetKeyQuotas(account_pb2.SetKeyQuotasRequest(key_prefix=record.key_prefix, requests_per_day=0), metadata=metadata),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await asked
            assert detail_of(refused.value).code == "permission_denied"
        changing = account_pb2.SetKeyQuotasRequest(key_prefix=record.key_prefix, requests_per_day=0, concurrent_max=3)
        changed = await stub.SetKeyQuotas(changing, metadata=(("authorization", f"Bearer {unbounded}"),))
        assert changed.key.quotas == account_pb2.KeyQuotas(concurrent_max=3)


async def test_bounds_on_statements_and_claims_are_the_desks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "STATEMENT_LINES_MAX", 3)
    monkeypatch.setattr(ledger, "CLAIM_ID_CHARACTERS_MAX", 100)
    async with open_pool(tmp_path) as pool, pool.grpc_channel() as channel:
        stub = account_pb2_grpc.AccountServiceStub(channel)
        user, key = await pool.user_key("user")
        metadata = (("authorization", f"Bearer {key}"),)
        holds = [OpenHold(f"h{number}", user, (PayeeShare(user, 1),), 1, 1, 1) for number in range(5)]
        await pool.directory.ledger.apply([*holds, *(SettleHold(hold.hold_id, 1) for hold in holds)])
        for limit, line_count in ((-1, 3), (0, 3), (2, 2), (1000, 3)):
            answer = await stub.ListStatement(account_pb2.ListStatementRequest(limit=limit), metadata=metadata)
            assert len(answer.lines) == line_count
        await stub.ClaimEarnings(account_pb2.ClaimEarningsRequest(claim_id="c" * 100), metadata=metadata)
        for claim_id in ("", "c" * 101):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.ClaimEarnings(account_pb2.ClaimEarningsRequest(claim_id=claim_id), metadata=metadata)
            assert detail_of(refused.value).param == "claim_id"
