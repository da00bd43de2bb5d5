"""What the directory does each second: a chore that fails keeps no other from being done, unless the database is away."""

from __future__ import annotations

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from potluck_coordinator.directory import directory as directory_module
from potluck_coordinator.directory.directory import Directory
from potluck_coordinator.domain.ledger import LedgerOutcome, OpenHold
from potluck_coordinator.domain.payees import PayeeShare
from potluck_coordinator.settings import Settings
from potluck_protocol.errors import ErrorCode, PotluckError
from tests.support.books import MovableClock


@pytest.mark.parametrize(
    ("error", "others_are_done"),
    [
        (PotluckError(ErrorCode.INTERNAL_ERROR), True),
        (IntegrityError(None, None, ValueError("refused")), True),
        (PotluckError(ErrorCode.COORDINATOR_UNAVAILABLE), False),
    ],
)
async def test_a_chore_that_fails(tmp_path, monkeypatch, error, others_are_done):
    directory = await Directory.open(Settings(data_dir=tmp_path), MovableClock())
    done = []

    async def fail() -> None:
        raise error

    async def forget_old() -> None:
        done.append("forget_old")

    try:
        monkeypatch.setattr(directory.nodes, "judge_minutes", fail)
        monkeypatch.setattr(directory.lethal, "forget_old", forget_old)
        await directory.do_chores()
        assert done == (["forget_old"] if others_are_done else [])
        monkeypatch.undo()
        await directory.do_chores()
    finally:
        directory.close()


async def test_a_directory_that_has_just_started_gives_gateways_time_to_settle(tmp_path, monkeypatch):
    """It may have been started while the database was away, and then gateways still hold settlements of what ran out meanwhile."""
    clock = MovableClock()
    directory = await Directory.open(Settings(data_dir=tmp_path), clock)
    try:
        epoch = (await directory.pool.register_gateway(0)).epoch
        ann = (await directory.accounts.create_account("ann")).account_id
        ends_at = clock.unix_ms() + 1000
        await directory.ledger.apply([OpenHold("h1", ann, (PayeeShare(ann, 1),), 100, gateway_epoch=epoch, expires_at_unix_ms=ends_at)])
    finally:
        directory.close()
    clock.advance(2)
    directory = await Directory.open(Settings(data_dir=tmp_path), clock)
    try:
        await directory.do_chores()
        assert await _overdue(directory, clock) == ["h1"]
        monkeypatch.setattr(directory_module, "SETTLEMENTS_SECONDS", 0.0)
        await directory.do_chores()
        assert await _overdue(directory, clock) == []
    finally:
        directory.close()


async def test_a_hold_that_the_books_refuse_to_settle_keeps_no_other_open_and_no_gateway_out(tmp_path, monkeypatch):
    monkeypatch.setattr(directory_module, "SETTLEMENTS_SECONDS", 0.0)
    clock = MovableClock()
    directory = await Directory.open(Settings(data_dir=tmp_path), clock)
    try:
        epoch = (await directory.pool.register_gateway(0)).epoch
        accounts = [(await directory.accounts.create_account(name)).account_id for name in ("ann", "bob")]
        ends_at = clock.unix_ms() + 1000
        holds = [
            OpenHold(f"hold of {payer}", payer, (PayeeShare(payer, 1),), 100, gateway_epoch=epoch, expires_at_unix_ms=ends_at)
            for payer in accounts
        ]
        assert set(await directory.ledger.apply(holds)) == {LedgerOutcome.APPLIED}
        # By another hand: what the audit is there to find.
        forget = text("UPDATE ledger_account SET held = 0 WHERE owner_account_id = :payer")
        await directory._store.run(lambda work: work._connection.execute(forget, {"payer": accounts[0]}))
        clock.advance(2)
        await directory.do_chores()
        assert await _overdue(directory, clock) == [f"hold of {accounts[0]}"]
        assert (await directory.pool.register_gateway(0)).epoch > epoch
    finally:
        directory.close()


async def _overdue(directory, clock):
    return await directory._store.run(lambda work: [hold.hold_id for hold in work.holds.overdue(clock.unix_ms(), 10)])
