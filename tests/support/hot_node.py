"""A node whose card gets hot, without the rest of the node: real readings, caps and attempts over a driver that answers from a dump."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from potluck_node.attempts import Attempts
from potluck_node.domain.thermal import HeatLimits
from potluck_node.domain.thermal_ladder import PowerRange, ThermalRung, caps_milliwatts
from potluck_node.engine_exchange import EngineConnections
from potluck_node.engine_session import engine_session
from potluck_node.heat import Heat
from potluck_node.power_caps import PowerCaps
from potluck_node.probe.nvml import NvmlLibrary
from potluck_node.readings import Readings
from potluck_node.replicas import Residence
from potluck_protocol.values import NodeState
from tests.support.node_engine import FixedReplicas
from tests.support.nvml_dump import DumpedDriver, load_dump, set_cap

CARD = "GPU-00000000-0000-4000-8000-000000000000"
NO_PERMISSION = 4
NO_LIMITS = HeatLimits()
R = ThermalRung
MADE_FOR = 350_000
"""Milliwatts, of the dump's card."""
CAP_1, CAP_2, CAP_3 = caps_milliwatts(PowerRange(100_000, MADE_FOR, 385_000), None).values()
OWNERS = 280_000
"""Of the dump `capped_card`."""
BELOW_OWNERS = next(iter(caps_milliwatts(PowerRange(100_000, MADE_FOR, 365_000, OWNERS), None).values()))


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
            connections=EngineConnections(),
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
        return self.driver.devices[0]["nvmlDeviceGetPowerManagementLimit"]

    @cap_milliwatts.setter
    def cap_milliwatts(self, milliwatts: int) -> None:
        """By somebody else than the agent."""
        set_cap(self.driver.devices[0], milliwatts)

    def run_program(self, _program: Path, uuid: str, milliwatts: int, _seconds_max: float) -> None:
        """In the place of the owner's: does at once what it is told."""
        assert uuid == CARD
        self.cap_milliwatts = milliwatts

    async def capped(self, running: asyncio.Task[None], count: int = 1) -> None:
        """Reads as the agent does, until so many caps were set; the last reading was taken before the last of them."""
        for _ in range(200):
            if len(self.driver.caps_set) >= count:
                return
            self.clock.seconds += 5
            await self.readings.read()
            await asyncio.sleep(0.02)
        raise AssertionError(f"{self.driver.caps_set} after 200 readings; {running}")

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
