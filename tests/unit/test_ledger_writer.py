"""How money events leave the gateway: batched, in order, again after a loss, and never stopped by one of them."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import pytest

from potluck_coordinator.domain.ledger import LedgerOutcome, OpenHold, SettleHold
from potluck_coordinator.gateway import ledger_writer
from potluck_coordinator.gateway.ledger_writer import LedgerWriter
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import AccountId


class Ledger:
    def __init__(self):
        self.batches = []
        self.unavailable_times = 0
        self.poison = None

    async def apply(self, commands):
        await asyncio.sleep(0)
        if self.unavailable_times:
            self.unavailable_times -= 1
            raise PotluckError(ErrorCode.COORDINATOR_UNAVAILABLE)
        if any(command.hold_id == self.poison for command in commands):
            raise PotluckError(ErrorCode.INTERNAL_ERROR)
        self.batches.append([command.hold_id for command in commands])
        return tuple(LedgerOutcome.APPLIED for _ in commands)


@asynccontextmanager
async def writing():
    ledger = Ledger()
    writer = LedgerWriter(ledger, lambda _: None)
    running = asyncio.ensure_future(writer.run())
    try:
        yield ledger, writer
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_what_gathers_during_a_commit_leaves_together_and_in_order():
    async with writing() as (ledger, writer):
        futures = [writer.submit(SettleHold("first", 1))]
        await asyncio.sleep(0)
        futures += [writer.submit(SettleHold(f"{number}", 1)) for number in range(5)]
        assert await asyncio.gather(*futures) == [LedgerOutcome.APPLIED] * 6
        assert [hold_id for batch in ledger.batches for hold_id in batch] == ["first", "0", "1", "2", "3", "4"]
        assert len(ledger.batches) <= 2
        assert await writer.drain(1)


async def test_a_ledger_that_is_away_delays_and_loses_nothing(monkeypatch):
    monkeypatch.setattr(ledger_writer, "RETRY_SECONDS", 0)
    async with writing() as (ledger, writer):
        ledger.unavailable_times = 3
        assert await writer.submit(SettleHold("a", 1)) is LedgerOutcome.APPLIED
        assert ledger.batches == [["a"]]


async def test_one_command_that_cannot_be_applied_does_not_stop_the_others():
    async with writing() as (ledger, writer):
        ledger.poison = "bad"
        futures = [writer.submit(SettleHold(hold_id, 1)) for hold_id in ("a", "bad", "b")]
        assert await asyncio.gather(*futures) == [LedgerOutcome.APPLIED, LedgerOutcome.CONFLICT, LedgerOutcome.APPLIED]


async def test_new_holds_are_refused_once_too_much_waits_and_settlements_never(monkeypatch):
    monkeypatch.setattr(ledger_writer, "QUEUE_LENGTH_MAX", 1)
    writer = LedgerWriter(Ledger(), lambda _: None)  # not running: nothing leaves
    hold = OpenHold("a", AccountId("payer"), AccountId("payee"), 1, 1, 1)
    writer.submit(hold)
    with pytest.raises(PotluckError) as failure:
        writer.submit(hold)
    assert failure.value.code is ErrorCode.COORDINATOR_UNAVAILABLE
    writer.submit(SettleHold("a", 1))
    assert not await writer.drain(0.01)
