"""A node whose card gets hot: what it reads, what it takes back, what it sets, and what it gives again."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from potluck_node.attempts import Attempts
from potluck_node.domain.rest import Posture
from potluck_node.domain.thermal import DRAIN_SECONDS, DWELL_SECONDS, PATIENCE_SECONDS, HeatLimits
from potluck_node.domain.thermal_ladder import ThermalRung
from potluck_node.engine_session import engine_session
from potluck_node.heat import Heat
from potluck_node.power_caps import REFUSED_SECONDS, PowerCaps
from potluck_node.probe.nvml import NvmlLibrary
from potluck_node.readings import Readings
from potluck_node.replicas import Residence
from potluck_protocol.values import NodeState, RestCause
from tests.support.node_engine import REPLICA, FixedReplicas
from tests.support.nvml_dump import DumpedDriver, load_dump

CARD = "GPU-00000000-0000-4000-8000-000000000000"
NO_PERMISSION = 4
NO_LIMITS = HeatLimits()
R = ThermalRung


class HandClock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.seconds = 1_000.0

    def monotonic_seconds(self) -> float:
        return self.seconds

    def unix_ms(self) -> int:
        return int(self.seconds * 1000)


class HotNode:
    """Real readings, caps and attempts over a driver that answers from a dump."""

    def __init__(self, dump: str, folder: Path, http: Any, limits: HeatLimits, slot_count: int) -> None:
        self.folder = folder
        self.limits = limits
        self.clock = HandClock()
        self.driver = DumpedDriver(load_dump(dump))
        self.library = NvmlLibrary(lambda: self.driver)
        self.replicas = FixedReplicas("http://127.0.0.1:9", slot_count)
        self.replicas.lives_at = Residence(os.getpid(), tuple(device["nvmlDeviceGetUUID"] for device in self.driver.devices))
        self.attempts = Attempts(
            replicas=self.replicas,
            http=http,
            clock=self.clock,
            node_state=lambda: NodeState.SERVING,
            slot_count_max=None,
            slots_now=lambda replica_id, count: self.heat.slots(replica_id, count),  # noqa: PLW0108 - it is made below
        )
        self.readings = Readings(self.replicas, http, heard=lambda _: None, library=self.library)
        self.changes = 0
        self.heat = self.made_heat()

    def made_heat(self) -> Heat:
        """Another is made as by an agent that starts anew."""
        caps = PowerCaps(self.folder / "power_caps.json", self.clock, self.library, program=self.folder / "potluck-power-cap")
        heat = Heat(readings=self.readings, replicas=self.replicas, caps=caps, limits=self.limits, clock=self.clock)
        heat.changed = self.count
        return heat

    def count(self) -> None:
        self.changes += 1

    def warm(self, celsius: int, index: int = 0, **facts: object) -> None:
        self.driver.devices[index]["nvmlDeviceGetTemperatureV"] = celsius
        self.driver.devices[index].update(facts)

    async def look(self, seconds: float = 5.0) -> None:
        self.clock.seconds += seconds
        await self.readings.read()
        await self.heat.look()

    async def look_for(self, seconds: float) -> None:
        for _ in range(int(seconds / 5)):
            await self.look()

    @property
    def cap_milliwatts(self) -> int:
        return self.driver.devices[0]["nvmlDeviceGetEnforcedPowerLimit"]

    @property
    def rung(self) -> int:
        return self.heat.cards()[0].thermal_rung


@asynccontextmanager
async def hot_node(
    folder: Path,
    dump: str = "healthy_3090",
    limits: HeatLimits = NO_LIMITS,
    slot_count: int = 8,
) -> AsyncIterator[HotNode]:
    async with engine_session() as http:
        yield HotNode(dump, folder, http, limits, slot_count)


async def test_a_hot_card_loses_power_step_by_step_then_slots_and_gets_them_back_in_the_reverse_order(tmp_path):
    async with hot_node(tmp_path) as node:
        await node.look_for(30)
        assert (node.cap_milliwatts, node.heat.slots(REPLICA, 8), node.driver.caps_set) == (350_000, 8, [])
        node.warm(85)
        await node.look_for(DWELL_SECONDS * 6)
        assert node.driver.caps_set == [280_000, 250_000, 220_000]
        assert (node.rung, node.heat.slots(REPLICA, 8), node.changes) == (R.ONE, 1, 6)
        node.warm(60)
        await node.look_for(PATIENCE_SECONDS * 6 + 30)
        assert node.driver.caps_set == [280_000, 250_000, 220_000, 250_000, 280_000, 350_000]
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
        assert (node.rung, node.cap_milliwatts) == (R.PAUSE, 350_000)
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


async def test_a_node_that_ends_gives_every_card_its_cap_back(tmp_path):
    async with hot_node(tmp_path) as node:
        node.warm(85)
        running = asyncio.create_task(node.heat.run())
        await asyncio.sleep(0)
        for _ in range(20):
            node.clock.seconds += 5
            await node.readings.read()
            await asyncio.sleep(0.02)
        assert node.cap_milliwatts < 350_000
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert node.cap_milliwatts == 350_000


async def test_what_a_killed_agent_left_capped_is_given_back_by_the_next(tmp_path):
    async with hot_node(tmp_path, "capped_card") as node:
        found_milliwatts = node.cap_milliwatts
        assert found_milliwatts == 280_000, "its owner's"
        node.warm(85)
        await node.look_for(DWELL_SECONDS)
        assert node.cap_milliwatts == 250_000
        node.heat = node.made_heat()
        node.warm(60)
        await node.look()
        assert node.cap_milliwatts == found_milliwatts
        # After a start of the machine the card has its maker's cap, and that is then what was found.
        node.warm(85)
        await node.look_for(DWELL_SECONDS)
        node.heat = node.made_heat()
        node.driver.devices[0]["nvmlDeviceGetEnforcedPowerLimit"] = 350_000
        node.warm(60)
        await node.look()
        assert node.cap_milliwatts == 350_000


async def test_what_the_owner_lowers_meanwhile_is_not_raised(tmp_path):
    async with hot_node(tmp_path) as node:
        node.warm(85)
        await node.look_for(DWELL_SECONDS)
        assert node.cap_milliwatts == 280_000
        node.driver.devices[0]["nvmlDeviceGetEnforcedPowerLimit"] = 200_000
        node.warm(60)
        await node.look_for(PATIENCE_SECONDS * 2)
        assert (node.rung, node.cap_milliwatts, node.driver.caps_set) == (R.COOL, 200_000, [280_000])


async def test_a_card_whose_engine_goes_is_its_owners_again(tmp_path):
    async with hot_node(tmp_path) as node:
        node.warm(85)
        await node.look_for(DWELL_SECONDS * 4)
        assert (node.rung, node.cap_milliwatts) == (R.HALF, 220_000)
        node.replicas.lives_at = None
        await node.look()
        assert (node.rung, node.cap_milliwatts) == (R.COOL, 350_000)


@pytest.mark.parametrize(("watts", "expected"), [(300, 300_000), (250, 250_000), (60, 100_000), (900, 350_000)])
async def test_the_owners_watts_hold_while_an_engine_has_the_card(tmp_path, watts, expected):
    async with hot_node(tmp_path, limits=HeatLimits(power_limit_milliwatts=watts * 1000)) as node:
        await node.look()
        assert node.cap_milliwatts == expected
        node.replicas.lives_at = None
        await node.look()
        assert node.cap_milliwatts == 350_000


async def test_the_owners_degrees_are_kept(tmp_path):
    async with hot_node(tmp_path, limits=HeatLimits(temperature_celsius_max=70)) as node:
        node.warm(70)
        await node.look()
        assert (node.rung, node.heat.lines()[0].limit_celsius) == (R.CAP_1, 70)


async def test_without_the_right_to_cap_slots_go_first_and_the_right_is_tried_again(tmp_path):
    async with hot_node(tmp_path) as node:
        node.driver.devices[0]["nvmlDeviceSetPowerManagementLimit"] = {"error": NO_PERMISSION}
        node.warm(85)
        await node.look_for(DWELL_SECONDS * 2)
        assert (node.rung, node.cap_milliwatts, node.heat.slots(REPLICA, 8)) == (R.HALF, 350_000, 4)
        assert "Insufficient Permissions" in node.heat.cap_refusal
        del node.driver.devices[0]["nvmlDeviceSetPowerManagementLimit"]
        node.warm(78)
        await node.look_for(REFUSED_SECONDS)
        assert (node.cap_milliwatts, node.heat.cap_refusal) == (220_000, "")


async def test_an_agent_that_is_not_root_takes_slots_and_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1_000)
    async with hot_node(tmp_path) as node:
        await node.look()
        assert node.heat.cap_refusal == "", "nobody has called for a cap"
        node.warm(85)
        await node.look_for(DWELL_SECONDS)
        assert (node.rung, node.heat.slots(REPLICA, 8), node.driver.caps_set) == (R.HALF, 4, [])
        assert node.heat.cap_refusal == "the agent is not root, and there is no /usr/local/sbin/potluck-power-cap for it"
    async with hot_node(tmp_path, limits=HeatLimits(power_limit_milliwatts=250_000)) as node:
        await node.look()
        assert node.heat.cap_refusal, "its owner has"


async def test_an_agent_that_is_not_root_caps_through_its_owners_program(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1_000)
    (tmp_path / "bin").mkdir()
    for program, text in (
        ("bin/sudo", '#!/bin/sh\nshift 2\nexec "$@"\n'),
        ("potluck-power-cap", f'#!/bin/sh\necho "$@" >> {tmp_path}/set\n'),
    ):
        (tmp_path / program).write_text(text)
        (tmp_path / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    async with hot_node(tmp_path) as node:
        node.driver.devices[0]["nvmlDeviceSetPowerManagementLimit"] = {"error": NO_PERMISSION}
        node.warm(85)
        await node.look()
        assert (node.rung, node.heat.cap_refusal) == (R.CAP_1, "")
        assert (tmp_path / "set").read_text() == f"{CARD} 280000\n"


@pytest.mark.parametrize("missing", ["nvmlDeviceGetPowerManagementLimitConstraints", "nvmlDeviceGetEnforcedPowerLimit"])
async def test_a_card_whose_caps_the_driver_does_not_tell_is_never_capped(tmp_path, missing):
    async with hot_node(tmp_path) as node:
        node.driver.devices[0][missing] = {"error": 3}
        node.warm(85)
        await node.look()
        assert (node.rung, node.driver.caps_set) == (R.HALF, [])


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
