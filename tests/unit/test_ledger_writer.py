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
        self.kinds = []
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
        self.kinds.append([type(command) for command in commands])
        return tuple(LedgerOutcome.APPLIED for _ in commands)


def hold(hold_id):
    return OpenHold(hold_id, AccountId("payer"), AccountId("payee"), 1, 1, 1)


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


async def test_a_hold_leaves_at_once_with_what_waits_before_it_and_settlements_wait_for_company(monkeypatch):
    monkeypatch.setattr(ledger_writer, "COMPANY_SECONDS", 3600)
    async with writing() as (ledger, writer):
        settled = [writer.submit(SettleHold(f"{number}", 1)) for number in range(3)]
        assert not await writer.drain(0.01)
        assert ledger.batches == []
        assert await writer.submit(hold("new")) is LedgerOutcome.APPLIED
        assert ledger.batches == [["0", "1", "2", "new"]]  # what they free may be what the hold needs
        assert all(future.done() for future in settled)
        assert await writer.drain(1)


@pytest.mark.parametrize("batch_length_max", [1, 2, 3, 256])
@pytest.mark.parametrize("away_times", [0, 1])
async def test_no_settlement_overtakes_its_own_hold(monkeypatch, batch_length_max, away_times):
    monkeypatch.setattr(ledger_writer, "BATCH_LENGTH_MAX", batch_length_max)
    monkeypatch.setattr(ledger_writer, "COMPANY_SECONDS", 0)
    monkeypatch.setattr(ledger_writer, "RETRY_SECONDS", 0)
    async with writing() as (ledger, writer):
        ledger.unavailable_times = away_times
        futures = []
        for number in range(7):
            futures += [writer.submit(hold(f"{number}")), writer.submit(SettleHold(f"{number}", 1))]
            await asyncio.sleep(0)
        await asyncio.gather(*futures)
        sent = [hold_id for batch in ledger.batches for hold_id in batch]
        assert sorted(sent) == sorted(2 * [f"{number}" for number in range(7)])
        kinds = [kind for batch in ledger.kinds for kind in batch]
        for number in range(7):
            of_one = [kind for kind, hold_id in zip(kinds, sent, strict=True) if hold_id == f"{number}"]
            assert of_one == [OpenHold, SettleHold]
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
    writer.submit(hold("a"))
    with pytest.raises(PotluckError) as failure:
        writer.submit(hold("a"))
    assert failure.value.code is ErrorCode.COORDINATOR_UNAVAILABLE
    writer.submit(SettleHold("a", 1))
    assert not await writer.drain(0.01)
