"""Who earns by an answer: the owners of a shard group's nodes by their shares, or the owner of the one node that gave it."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from potluck_coordinator.desk_socket import DeskClient, DeskServer, RemoteDirectory
from potluck_coordinator.domain.ledger import LedgerOutcome, MarkDelivered, SettleHold
from potluck_coordinator.domain.payees import PayeeShare
from potluck_coordinator.pool_snapshot import PoolSnapshot
from potluck_protocol.clock import SystemClock
from potluck_protocol.errors import ErrorCode, PotluckError
from tests.support.books import open_hold
from tests.support.coordinator import replace_gateway_in_books
from tests.support.request_path import DONE, USAGE_EVENT, begin, first_of, pool, read_all, settled_balance, token

PRICE = 10 * 1 + 2 * 4
"""Of `USAGE_EVENT`'s tokens."""


@asynccontextmanager
async def shared_pool(folder, weights=(2, 1), **changes):
    """A pool whose one replica is published as the work of two other owners."""
    async with pool(folder, **changes) as (coordinator, node):
        owners = [(await coordinator.directory.accounts.create_account(name)).account_id for name in ("ann", "bob")]
        payees = tuple(PayeeShare(owner, weight) for owner, weight in zip(owners, weights, strict=True))
        await publish(coordinator, {node.status.replica_id: payees})
        yield coordinator, node, owners


async def publish(coordinator, replica_payees):
    """As the directory does; returns once the gateway follows."""
    coordinator.directory.pool._board.publish(replica_payees=replica_payees)
    async with asyncio.timeout(5):
        while coordinator.gateway._snapshot.replica_payees != replica_payees:
            await asyncio.sleep(0.01)


async def answered(coordinator, node, number=0):
    answer, start = await begin(coordinator, node, number)
    await node.chunk(start.attempt_id, 1, token("two") + USAGE_EVENT + DONE)
    await node.end(start.attempt_id, 2)
    await read_all(answer)
    assert answer.charge_micro_credits == PRICE
    await settled_balance(coordinator)
    return start.attempt_id


async def lines_of(coordinator, account_id, attempt_id):
    """What a statement says of one payment: (account, micro-credits)."""
    lines = await coordinator.directory.ledger.statement(account_id, 0)
    return [(line.ledger_account_kind, line.amount_micro_credits) for line in lines if line.transaction_id == f"settle:{attempt_id}"]


async def test_the_owners_of_a_group_earn_by_their_shares_which_sum_to_the_price(tmp_path):
    async with shared_pool(tmp_path) as (coordinator, node, owners):
        attempt_id = await answered(coordinator, node)
        operator = (await coordinator.directory.accounts.list_accounts())[0].account_id
        assert await lines_of(coordinator, operator, attempt_id) == [("spending", -PRICE)]  # the leader's owner earns nothing by it
        assert [await lines_of(coordinator, owner, attempt_id) for owner in owners] == [[("earnings", 12)], [("earnings", 6)]]


async def test_shares_and_the_pools_fee_sum_to_the_price(tmp_path):
    async with shared_pool(tmp_path, fee_basis_points=5000) as (coordinator, node, owners):
        attempt_id = await answered(coordinator, node)
        earned = [await lines_of(coordinator, owner, attempt_id) for owner in owners]
        assert earned == [[("earnings", 6)], [("earnings", 3)]]  # of 18 the pool keeps 9


async def test_a_replica_without_shares_earns_for_its_nodes_owner(tmp_path):
    async with shared_pool(tmp_path) as (coordinator, node, owners):
        await publish(coordinator, {"another replica": (PayeeShare(owners[0], 1),)})
        await answered(coordinator, node)
        assert (await settled_balance(coordinator)).earned_micro_credits == PRICE
        await publish(coordinator, {node.status.replica_id: (PayeeShare(owners[1], 1),)})
        await answered(coordinator, node, 1)
        assert (await settled_balance(coordinator)).earned_micro_credits == PRICE
        assert (await coordinator.directory.ledger.balance(owners[1])).earned_micro_credits == PRICE


async def test_shares_are_those_of_the_moment_when_the_request_was_dispatched(tmp_path):
    async with shared_pool(tmp_path) as (coordinator, node, owners):
        answer, start = await begin(coordinator, node)
        await publish(coordinator, {})
        await node.chunk(start.attempt_id, 1, token("two") + USAGE_EVENT + DONE)
        await node.end(start.attempt_id, 2)
        await read_all(answer)
        await settled_balance(coordinator)
        assert [await lines_of(coordinator, owner, start.attempt_id) for owner in owners] == [[("earnings", 12)], [("earnings", 6)]]


async def test_a_gateway_that_died_pays_a_groups_owners_at_its_last_mark(tmp_path):
    async with shared_pool(tmp_path) as (coordinator, node, owners):
        answer, start = await begin(coordinator, node)
        assert await first_of(answer) == token("one")
        assert await coordinator.directory.ledger.apply([MarkDelivered(start.attempt_id, 9)]) == (LedgerOutcome.APPLIED,)
        await replace_gateway_in_books(coordinator)
        await settled_balance(coordinator)
        assert [await lines_of(coordinator, owner, start.attempt_id) for owner in owners] == [[("earnings", 6)], [("earnings", 3)]]
        await answer.close()


async def test_a_share_of_nobody_is_refused_before_the_client_sees_anything(tmp_path):
    async with shared_pool(tmp_path) as (coordinator, node, owners):
        await publish(coordinator, {node.status.replica_id: (PayeeShare(owners[0], 1), PayeeShare("nobody", 1))})
        with pytest.raises(PotluckError) as refused:
            await begin(coordinator, node)
        assert refused.value.code is ErrorCode.COORDINATOR_UNAVAILABLE
        assert (await settled_balance(coordinator)).available_micro_credits == 1000 * 1_000_000


async def test_shares_cross_the_desk_socket(tmp_path):
    folder = Path(tempfile.mkdtemp(prefix="plk"))  # short, as the system's bound on such names asks for
    async with shared_pool(tmp_path) as (coordinator, node, owners):
        server = DeskServer(coordinator.directory, folder / "desks")
        await server.start()
        try:
            remote = RemoteDirectory(DeskClient(folder / "desks").call, SystemClock())
            snapshot = PoolSnapshot().with_news(await remote.pool.watch(0))
            payees = snapshot.replica_payees[node.status.replica_id]
            assert payees == (PayeeShare(owners[0], 2), PayeeShare(owners[1], 1))
            operator = (await remote.accounts.list_accounts())[0].account_id
            hold = open_hold("h1", payer=operator, payees={share.account_id: share.weight for share in payees}, epoch=1)
            assert await remote.ledger.apply([hold, SettleHold("h1", 60)]) == (LedgerOutcome.APPLIED,) * 2
            assert [(await remote.ledger.balance(owner)).earned_micro_credits for owner in owners] == [38, 19]
        finally:
            await server.stop()
            shutil.rmtree(folder)
