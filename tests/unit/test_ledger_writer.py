"""How money events leave the gateway: batched, in order, again after a loss, and never stopped by one of them."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import pytest
import uvloop

from potluck_coordinator.domain.ledger import LedgerOutcome, MarkDelivered, OpenHold, SettleHold
from potluck_coordinator.domain.payees import PayeeShare
from potluck_coordinator.gateway import ledger_writer
from potluck_coordinator.gateway.ledger_writer import LedgerWriter
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import AccountId


class Ledger:
    def __init__(self):
        self.batches = []
        self.kinds = []
        self.commands = []
        self.unavailable_times = 0
        self.poison = None
        self.answers = asyncio.Event()
        self.answers.set()
        self.poor_until_settled = ""

    async def apply(self, commands):
        await asyncio.sleep(0)
        await self.answers.wait()
        if self.unavailable_times:
            self.unavailable_times -= 1
            raise PotluckError(ErrorCode.COORDINATOR_UNAVAILABLE)
        if any(command.hold_id == self.poison for command in commands):
            raise PotluckError(ErrorCode.INTERNAL_ERROR)
        self.batches.append([command.hold_id for command in commands])
        self.commands += commands
        self.kinds.append([type(command) for command in commands])
        return tuple(self._outcome_of(command) for command in commands)

    def _outcome_of(self, command):
        if isinstance(command, SettleHold) and command.hold_id == self.poor_until_settled:
            self.poor_until_settled = ""
        poor = isinstance(command, OpenHold) and self.poor_until_settled
        return LedgerOutcome.INSUFFICIENT_CREDITS if poor else LedgerOutcome.APPLIED


def hold(hold_id):
    return OpenHold(hold_id, AccountId("payer"), (PayeeShare(AccountId("payee"), 1),), 1, 1, 1)


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


async def test_a_hold_leaves_at_once_and_settlements_wait_for_company(monkeypatch):
    monkeypatch.setattr(ledger_writer, "COMPANY_SECONDS", 3600)
    async with writing() as (ledger, writer):
        settled = [writer.submit(SettleHold(f"{number}", 1)) for number in range(3)]
        assert not await writer.drain(0.01)
        assert await writer.submit(hold("new")) is LedgerOutcome.APPLIED
        assert ledger.batches == [["new"]]
        writer._company_is_over()
        assert await asyncio.gather(*settled) == [LedgerOutcome.APPLIED] * 3
        assert ledger.batches == [["new"], ["0", "1", "2"]]
        assert await writer.drain(1)


async def test_after_several_holds_the_next_ones_leave_together_with_all_that_waits(monkeypatch):
    monkeypatch.setattr(ledger_writer, "COMPANY_SECONDS", 3600)
    monkeypatch.setattr(ledger_writer, "HOLD_COMPANY_SECONDS", 3600)
    async with writing() as (ledger, writer):
        await asyncio.gather(*(writer.submit(hold(f"{number}")) for number in range(2)))
        later = [writer.submit(hold("next")), writer.submit(SettleHold("0", 1)), writer.submit(hold("last"))]
        assert not await writer.drain(0.01)
        assert ledger.batches == [["0", "1"]]
        writer._company_is_over()
        assert await asyncio.wait_for(asyncio.gather(*later), 5) == [LedgerOutcome.APPLIED] * 3
        assert ledger.batches == [["0", "1"], ["next", "0", "last"]]
        assert await writer.drain(1)


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_company_that_is_over_this_very_moment_is_over(monkeypatch, loop):
    monkeypatch.setattr(ledger_writer, "HOLD_COMPANY_SECONDS", 0.0004)

    async def run():
        async with writing() as (ledger, writer):
            for _ in range(20):
                first = [writer.submit(hold(f"{number}")) for number in range(2)]
                await asyncio.sleep(0)  # their commit is on its way
                await asyncio.wait_for(asyncio.gather(*first, *(writer.submit(hold(f"{number}")) for number in range(2, 5))), 5)
            assert sorted(hold_id for batch in ledger.batches for hold_id in batch) == sorted("01234" * 20)

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(run())


async def test_after_a_hold_that_left_alone_the_next_leaves_at_once(monkeypatch):
    monkeypatch.setattr(ledger_writer, "HOLD_COMPANY_SECONDS", 3600)
    async with writing() as (ledger, writer):
        for number in range(3):
            assert await asyncio.wait_for(writer.submit(hold(f"{number}")), 5) is LedgerOutcome.APPLIED
        assert ledger.batches == [["0"], ["1"], ["2"]]


async def test_holds_that_fill_a_commit_wait_for_nothing(monkeypatch):
    monkeypatch.setattr(ledger_writer, "HOLD_COMPANY_SECONDS", 3600)
    monkeypatch.setattr(ledger_writer, "BATCH_LENGTH_MAX", 3)
    async with writing() as (ledger, writer):
        for _ in range(2):
            await asyncio.wait_for(asyncio.gather(*(writer.submit(hold(f"{number}")) for number in range(3))), 5)
        assert ledger.batches == [["0", "1", "2"]] * 2


async def test_a_hold_that_lacks_credits_is_tried_once_more_behind_the_settlement_that_frees_them(monkeypatch):
    monkeypatch.setattr(ledger_writer, "COMPANY_SECONDS", 3600)
    async with writing() as (ledger, writer):
        ledger.poor_until_settled = "old"
        writer.submit(SettleHold("old", 1))
        assert await asyncio.wait_for(writer.submit(hold("new")), 5) is LedgerOutcome.APPLIED
        assert ledger.batches == [["new"], ["old", "new"]]
        assert await writer.drain(1)


async def test_what_comes_during_a_commit_is_not_forgotten_when_its_time_is_over_then(monkeypatch):
    monkeypatch.setattr(ledger_writer, "COMPANY_SECONDS", 3600)
    async with writing() as (ledger, writer):
        first = writer.submit(SettleHold("first", 1))
        writer._company_is_over()
        await asyncio.sleep(0)  # its commit is on its way
        second = writer.submit(SettleHold("second", 1))
        writer._company_is_over()
        assert await asyncio.wait_for(asyncio.gather(first, second), 5) == [LedgerOutcome.APPLIED] * 2
        assert ledger.batches == [["first"], ["second"]]
        assert await writer.drain(1)


async def test_while_the_ledger_says_nothing_nobody_new_waits_for_it(monkeypatch):
    monkeypatch.setattr(ledger_writer, "SILENCE_SECONDS_MAX", -1)  # it has been silent for too long, as soon as something waits
    async with writing() as (ledger, writer):
        ledger.answers.clear()
        waiting = writer.submit(hold("sent"))
        await asyncio.sleep(0)
        for refuse in (writer.check, lambda: writer.submit(hold("new"))):
            with pytest.raises(PotluckError) as refused:
                refuse()
            assert (refused.value.code, refused.value.retry_after_seconds) == (ErrorCode.COORDINATOR_UNAVAILABLE, 2)
        settled = writer.submit(SettleHold("old", 1))
        ledger.answers.set()
        assert await asyncio.gather(waiting, settled) == [LedgerOutcome.APPLIED] * 2, "what became of these only the ledger knows"
        assert await writer.submit(hold("new")) is LedgerOutcome.APPLIED


async def test_a_hold_that_lacks_credits_all_the_same_is_refused(monkeypatch):
    monkeypatch.setattr(ledger_writer, "COMPANY_SECONDS", 3600)
    async with writing() as (ledger, writer):
        ledger.poor_until_settled = "never settled"
        assert await asyncio.wait_for(writer.submit(hold("new")), 5) is LedgerOutcome.INSUFFICIENT_CREDITS
        assert await asyncio.wait_for(writer.submit(hold("newer")), 5) is LedgerOutcome.INSUFFICIENT_CREDITS
        assert ledger.batches == [["new"], ["new"], ["newer"], ["newer"]]
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


async def test_once_the_ledger_has_failed_for_two_seconds_holds_are_refused_until_it_answers_again(monkeypatch):
    monkeypatch.setattr(ledger_writer, "RETRY_SECONDS", 0)
    monkeypatch.setattr(ledger_writer, "HOLD_PATIENCE_SECONDS", 0.05)
    async with writing() as (ledger, writer):
        ledger.unavailable_times = 2**31
        settled, waiting = writer.submit(SettleHold("runs", 7)), writer.submit(hold("waits"))
        with pytest.raises(PotluckError, match="Nothing was charged") as refused:
            await asyncio.wait_for(waiting, 5)
        assert (refused.value.code, refused.value.retry_after_seconds) == (ErrorCode.COORDINATOR_UNAVAILABLE, 2)
        for refuse in (writer.check, lambda: writer.submit(hold("new"))):
            with pytest.raises(PotluckError, match="Nothing was charged"):
                refuse()
        ledger.unavailable_times = 0
        assert await asyncio.wait_for(settled, 5) is LedgerOutcome.APPLIED
        # The one that waited may have been opened, for all that the gateway knows.
        assert ledger.batches == [["runs", "waits"]]
        assert ledger.kinds == [[SettleHold, SettleHold]]
        assert await writer.submit(hold("newer")) is LedgerOutcome.APPLIED


async def test_a_ledger_that_nothing_waits_for_is_asked_whether_it_is_back(monkeypatch):
    monkeypatch.setattr(ledger_writer, "RETRY_SECONDS", 0)
    monkeypatch.setattr(ledger_writer, "HOLD_PATIENCE_SECONDS", 0)
    async with writing() as (ledger, writer):
        ledger.unavailable_times = 1
        with pytest.raises(PotluckError):
            await writer.submit(hold("waits"))
        ledger.batches.clear()
        while writer._failing_since is not None:
            await asyncio.sleep(0)
        writer.check()


async def test_a_mark_takes_the_place_of_the_one_that_waits_but_not_of_one_on_its_way(monkeypatch):
    monkeypatch.setattr(ledger_writer, "COMPANY_SECONDS", 3600)
    async with writing() as (ledger, writer):
        marked = [writer.submit(MarkDelivered("a", number)) for number in range(1, 100)]
        writer.submit(MarkDelivered("b", 1))
        assert len(writer._waiting) == 2
        writer._company_is_over()
        await asyncio.sleep(0)  # their commit is on its way
        later = writer.submit(MarkDelivered("a", 100))
        assert await asyncio.gather(*marked) == [LedgerOutcome.APPLIED] * 99
        writer._company_is_over()
        assert await later is LedgerOutcome.APPLIED
        assert ledger.commands == [MarkDelivered("a", 99), MarkDelivered("b", 1), MarkDelivered("a", 100)]
        assert not writer._marks


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
