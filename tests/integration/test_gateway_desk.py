"""Several gateways at the directory's desks: numbers, epochs, what ends with whom, and who is told of it."""

from __future__ import annotations

import asyncio

import pytest

from potluck_coordinator.directory.directory import Directory
from potluck_coordinator.domain.gateways import SILENCE_SECONDS_MAX
from potluck_coordinator.domain.idempotency import KeyState, KeyUse
from potluck_coordinator.domain.ledger import LedgerOutcome, MarkDelivered, OpenHold, SettleHold
from potluck_coordinator.domain.payees import PayeeShare
from potluck_coordinator.gateway.gateway import Gateway, ReplacedError
from potluck_coordinator.node_reports import NodeReport
from potluck_coordinator.pool_snapshot import PoolSnapshot
from potluck_coordinator.settings import Settings
from potluck_protocol.clock import SystemClock
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import NodeId, NodeState, RequestId
from tests.support.books import MovableClock

APPLIED, CONFLICT = LedgerOutcome.APPLIED, LedgerOutcome.CONFLICT


class Pool:
    """A directory for two gateways, started again and again on one folder."""

    def __init__(self, folder, clock) -> None:
        self.folder = folder
        self.clock = clock

    async def start(self, gateways: int = 2) -> None:
        settings = Settings(data_dir=self.folder, gateways=gateways)
        self.directory = await Directory.open(settings, self.clock)
        self.person = (await self.directory.accounts.list_accounts())[0].account_id

    async def begin(self, number: int) -> int:
        """A gateway that registers and opens its ports."""
        epoch = (await self.directory.pool.register_gateway(number)).epoch
        await self.directory.pool.announce_gateway(epoch, f"peer:{number}", f"host:{8000 + number}")
        return epoch

    async def apply(self, *commands):
        return await self.directory.ledger.apply(commands)

    def hold(self, hold_id: str, epoch: int) -> OpenHold:
        return OpenHold(hold_id, self.person, (PayeeShare(self.person, 1),), 100, self.clock.unix_ms() + 3_600_000, epoch)

    async def seen(self) -> dict[int, str]:
        """What gateways read of each other."""
        snapshot = PoolSnapshot().with_news(await self.directory.pool.watch(0))
        return {record.number: record.link_address for record in snapshot.gateways.values()}

    async def report(self, epoch: int) -> None:
        await self.directory.nodes.report([], {}, gateway_epoch=epoch)
        self.directory._gateways.look()


@pytest.fixture
async def pool(tmp_path):
    pool = Pool(tmp_path, MovableClock())
    await pool.start()
    yield pool
    pool.directory.close()


async def test_a_number_begins_anew_and_the_others_go_on(pool):
    first, second = await pool.begin(0), await pool.begin(1)
    assert await pool.apply(pool.hold("a", first), pool.hold("b", second), MarkDelivered("a", 10)) == (APPLIED,) * 3
    third = await pool.begin(0)
    assert first < second < third
    assert await pool.apply(pool.hold("c", first)) == (CONFLICT,), "a ghost's last words"
    assert await pool.apply(SettleHold("a", 10), SettleHold("a", 99)) == (APPLIED, CONFLICT), "it was settled at its mark"
    assert await pool.apply(SettleHold("b", 50), pool.hold("d", second), pool.hold("e", third)) == (APPLIED,) * 3
    assert (await pool.directory.ledger.audit()).open_hold_count == 2


async def test_a_replaced_gateway_is_told_so(pool):
    ghost = await pool.begin(0)
    await pool.begin(0)
    with pytest.raises(PotluckError) as told:
        await pool.report(ghost)
    assert told.value.code is ErrorCode.ALREADY_EXISTS
    with pytest.raises(PotluckError) as told:
        await pool.directory.pool.announce_gateway(ghost, "", "host:1")
    assert told.value.code is ErrorCode.ALREADY_EXISTS


@pytest.mark.parametrize("number", [-1, 2])
async def test_there_are_no_more_gateways_than_the_operator_runs(pool, number):
    with pytest.raises(PotluckError) as refused:
        await pool.begin(number)
    assert refused.value.code is ErrorCode.INVALID_REQUEST


async def test_gateways_read_of_those_whose_ports_are_open_and_that_speak(pool):
    await pool.directory.pool.register_gateway(0)
    assert await pool.seen() == {}
    first, second = await pool.begin(0), await pool.begin(1)
    assert await pool.seen() == {0: "host:8000", 1: "host:8001"}
    pool.clock.advance(SILENCE_SECONDS_MAX - 1)
    await pool.report(second)
    pool.clock.advance(1)
    await pool.report(second)
    assert await pool.seen() == {1: "host:8001"}
    assert await pool.apply(pool.hold("still", first)) == (APPLIED,), "it may only be cut off"
    await pool.report(first)
    assert await pool.seen() == {0: "host:8000", 1: "host:8001"}


async def test_a_directory_that_starts_anew_knows_them_from_the_books(pool):
    first, second = await pool.begin(0), await pool.begin(1)
    await pool.apply(pool.hold("a", first), pool.hold("b", second))
    pool.directory.close()
    await pool.start()
    assert await pool.seen() == {0: "host:8000", 1: "host:8001"}
    assert await pool.apply(pool.hold("c", first), pool.hold("d", second)) == (APPLIED, APPLIED)
    pool.directory.close()
    await pool.start(gateways=1)
    assert await pool.seen() == {0: "host:8000"}
    assert await pool.apply(pool.hold("e", first), pool.hold("f", second)) == (APPLIED, CONFLICT)
    assert (await pool.directory.ledger.audit()).open_hold_count == 3, "what the one that is not run any more left open is settled"


async def test_an_idempotency_key_is_in_flight_while_its_gateway_lives(pool):
    first, second = await pool.begin(0), await pool.begin(1)

    def use(claim_id: str, epoch: int) -> KeyUse:
        return KeyUse(pool.person, b"k" * 32, b"body", RequestId("r"), claim_id, epoch)

    claim = pool.directory.idempotency.claim
    assert await claim(use("1", first)) is None
    assert (await claim(use("2", second))).state is KeyState.CLAIMED
    third = await pool.begin(0)
    for epoch in (second, third):
        assert (await claim(use("3", epoch))).state is KeyState.ABANDONED


async def test_a_gateway_whose_number_was_given_away_ends(tmp_path):
    settings = Settings(data_dir=tmp_path, http_port=0, grpc_port=0, link_port=0)
    directory = await Directory.open(settings, SystemClock())
    gateway = Gateway(settings, directory, SystemClock())
    try:
        await gateway.start()
        await directory.pool.register_gateway(0)
        with pytest.raises(ReplacedError):
            await asyncio.wait_for(gateway.run(), 5)
    finally:
        await gateway.stop()
        directory.close()


async def test_a_gateway_that_waited_for_a_plan_was_not_silent(pool, monkeypatch):
    first, second = await pool.begin(0), await pool.begin(1)

    async def long_plan() -> None:
        pool.clock.advance(SILENCE_SECONDS_MAX)

    monkeypatch.setattr(pool.directory.nodes, "refresh", long_plan)
    report = NodeReport(NodeId("new"), 1, 0.0, False, NodeState.SERVING, ())
    await pool.directory.nodes.report([report], {}, gateway_epoch=second)
    await pool.report(first)
    assert await pool.seen() == {0: "host:8000", 1: "host:8001"}
