"""A node whose card gets hot: what it reads, what it takes back, what it sets, and what it gives again."""

from __future__ import annotations

import os

import pytest

from potluck_node.domain.rest import Posture
from potluck_node.domain.thermal import DRAIN_SECONDS, DWELL_SECONDS, PATIENCE_SECONDS, HeatLimits
from potluck_node.heat_words import card_words
from potluck_node.replicas import Residence
from potluck_protocol.rest import RestCause
from tests.support.hot_node import CAP_1, CAP_2, CAP_3, MADE_FOR, R, hot_node
from tests.support.node_engine import REPLICA
from tests.support.nvml_dump import NOT_SUPPORTED


async def test_a_hot_card_loses_power_step_by_step_then_slots_and_gets_them_back_in_the_reverse_order(tmp_path):
    async with hot_node(tmp_path) as node:
        await node.look_for(30)
        assert (node.cap_milliwatts, node.heat.slots(REPLICA, 8), node.driver.caps_set) == (MADE_FOR, 8, [])
        node.warm(85)
        await node.look_for(DWELL_SECONDS * 6)
        assert node.driver.caps_set == [CAP_1, CAP_2, CAP_3]
        assert (node.rung, node.heat.slots(REPLICA, 8), node.changes) == (R.ONE, 1, 6)
        node.warm(60)
        await node.look_for(PATIENCE_SECONDS * 6 + 30)
        assert node.driver.caps_set == [CAP_1, CAP_2, CAP_3, CAP_2, CAP_1, MADE_FOR]
        assert (node.rung, node.heat.slots(REPLICA, 8), node.changes) == (R.COOL, 8, 12)


async def test_a_replica_takes_no_more_than_the_slots_that_are_left_to_it(tmp_path):
    async with hot_node(tmp_path, slot_count=4) as node:
        node.warm(85)
        await node.look_for(DWELL_SECONDS * 5)
        assert (node.rung, node.heat.slots(REPLICA, 4)) == (R.QUARTER, 1)
        assert node.attempts._refusal(REPLICA) == ""
        node.attempts._running[REPLICA] = 1
        assert node.attempts._refusal(REPLICA) == "all 1 slots of the replica are taken"


async def test_a_card_that_stays_too_hot_without_work_puts_the_node_to_rest_until_it_is_cool(tmp_path):
    async with hot_node(tmp_path, slot_count=1) as node:
        node.warm(90)
        await node.look_for(DWELL_SECONDS * 4)
        assert (node.rung, node.heat.slots(REPLICA, 1), node.heat.reasons()) == (R.DRAIN, 0, ())
        await node.look_for(DRAIN_SECONDS)
        (reason,) = node.heat.reasons()
        assert (reason.cause, reason.posture) == (RestCause.HEAT, Posture.HAND_OVER)
        # The engine is stopped, and the card's cap is its owner's again at once.
        node.replicas.lives_at = None
        await node.look_for(10)
        assert (node.rung, node.cap_milliwatts) == (R.PAUSE, MADE_FOR)
        node.warm(50)
        await node.look_for(PATIENCE_SECONDS + 10)
        assert (node.rung, node.heat.reasons()) == (R.DRAIN, ())


async def test_a_hot_card_rests_alone_while_another_works(tmp_path):
    async with hot_node(tmp_path, "two_memory_nodes") as node:
        node.warm(90, index=1)
        await node.look_for(DWELL_SECONDS * 7 + DRAIN_SECONDS + 10)
        assert [card.thermal_rung for card in node.heat.cards()] == [R.COOL, R.PAUSE]
        assert (node.heat.slots(REPLICA, 8), node.heat.reasons()) == (0, ()), "a replica over both has what the hotter one leaves"
        node.replicas.lives_at = Residence(os.getpid(), (node.driver.devices[0]["nvmlDeviceGetUUID"],))
        assert node.heat.slots(REPLICA, 8) == 8


async def test_a_silent_card_stays_where_it_is_beside_one_that_cools_and_the_owner_is_told(tmp_path):
    async with hot_node(tmp_path, "two_memory_nodes") as node:
        node.warm(90, index=0)
        node.warm(90, index=1)
        await node.look_for(DWELL_SECONDS * 7 + DRAIN_SECONDS + 10)
        assert [reason.words for reason in node.heat.reasons()] == ["lets its cards cool, which stayed too hot without work"]
        for function in ("nvmlDeviceGetTemperatureV", "nvmlDeviceGetTemperature"):
            node.driver.devices[1][function] = {"error": NOT_SUPPORTED}
        await node.look_for(PATIENCE_SECONDS * 4)
        assert "waits for the driver to tell their temperature again" in node.heat.reasons()[0].words
        node.warm(50)
        await node.look_for(PATIENCE_SECONDS * 9)
        assert [card.thermal_rung for card in node.heat.cards()] == [R.COOL, R.PAUSE]
        assert (node.heat.slots(REPLICA, 8), node.heat.reasons()) == (0, ())
        assert "temperature unknown, gets 190 W and no work until it is known to be cooler" in card_words(node.heat.lines()[1])
        node.warm(50, index=1)
        await node.look_for(PATIENCE_SECONDS * 9)
        assert (node.heat.slots(REPLICA, 8), node.heat.cards()[1].thermal_rung) == (8, R.COOL)


async def test_a_lost_card_gets_no_work_and_is_no_reason_for_the_node_to_rest(tmp_path):
    async with hot_node(tmp_path) as node:
        await node.look()
        node.driver.devices[0]["lost"] = True
        await node.look()
        assert (node.heat.cards()[0].lost, node.rung, node.heat.slots(REPLICA, 8), node.heat.reasons()) == (True, R.PAUSE, 0, ())


async def test_a_card_slowed_down_by_its_own_protection_takes_no_more_work_at_once_and_its_seconds_are_told(tmp_path):
    async with hot_node(tmp_path, "hot_card") as node:
        await node.look()
        assert (node.rung, node.heat.slots(REPLICA, 8)) == (R.DRAIN, 0)
        await node.look()
        assert node.heat.cards()[0].throttle_seconds == node.heat.lines()[0].throttle_seconds == 5.0


@pytest.mark.parametrize(("watts", "expected"), [(300, 300_000), (250, 250_000), (60, 100_000), (900, MADE_FOR)])
async def test_the_owners_watts_hold_while_an_engine_has_the_card(tmp_path, watts, expected):
    async with hot_node(tmp_path, limits=HeatLimits(power_limit_milliwatts=watts * 1000)) as node:
        await node.look()
        assert node.cap_milliwatts == expected
        node.replicas.lives_at = None
        await node.look()
        assert node.cap_milliwatts == MADE_FOR


async def test_the_owners_degrees_are_kept(tmp_path):
    async with hot_node(tmp_path, limits=HeatLimits(temperature_celsius_max=70)) as node:
        node.warm(70)
        await node.look()
        assert (node.rung, node.heat.lines()[0].limit_celsius) == (R.CAP_1, 70)


async def test_a_server_that_its_owner_shares_gets_fewer_requests_and_keeps_its_power(tmp_path):
    async with hot_node(tmp_path) as node:
        node.replicas.lives_at, node.replicas.engine_kind = None, "attach"
        node.warm(85)
        await node.look_for(DWELL_SECONDS)
        assert (node.rung, node.heat.slots(REPLICA, 8), node.driver.caps_set) == (R.HALF, 4, [])


async def test_an_engine_without_cards_is_left_alone(tmp_path):
    async with hot_node(tmp_path) as node:
        node.replicas.lives_at = Residence(os.getpid())
        node.warm(95)
        await node.look_for(600)
        assert (node.rung, node.heat.slots(REPLICA, 8), node.driver.caps_set) == (R.COOL, 8, [])
