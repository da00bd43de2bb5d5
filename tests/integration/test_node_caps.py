"""The power caps of a node's cards: whose right sets them, and that none outlives the heat, the engine or the agent that it was set for."""

from __future__ import annotations

import asyncio
import os
import subprocess
import threading
import time
from pathlib import Path

import pytest

from potluck_node import power_caps
from potluck_node.domain.thermal import DWELL_SECONDS, PATIENCE_SECONDS, HeatLimits
from potluck_node.power_caps import REFUSED_SECONDS, CapRefusedError, PowerCaps
from tests.support.hot_node import BELOW_OWNERS, CAP_1, CAP_2, CAP_3, CARD, MADE_FOR, NO_PERMISSION, OWNERS, R, hot_node
from tests.support.node_engine import REPLICA
from tests.support.nvml_dump import set_cap
from tests.support.pool import until


@pytest.mark.parametrize("cap_count", [1, 2, 3])
async def test_a_node_that_ends_gives_every_card_its_cap_back(tmp_path, cap_count):
    """Also where nothing was read since the last step."""
    async with hot_node(tmp_path) as node:
        node.warm(85)
        running = asyncio.create_task(node.heat.run())
        await asyncio.sleep(0)
        await node.capped(running, cap_count)
        assert node.cap_milliwatts == (CAP_1, CAP_2, CAP_3)[cap_count - 1] != node.readings.cards[0].power_limit_milliwatts
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert (node.cap_milliwatts, node.heat._caps.changed) == (MADE_FOR, frozenset())


async def test_a_cap_that_is_on_its_way_when_the_node_ends_is_given_back_too(tmp_path, monkeypatch):
    under_way, may_go_on = threading.Event(), threading.Event()

    def slowly(self: PowerCaps, uuid: str, milliwatts: int) -> None:
        under_way.set()
        assert may_go_on.wait(30)
        at_once(self, uuid, milliwatts)

    at_once = PowerCaps.set
    monkeypatch.setattr(PowerCaps, "set", slowly)
    async with hot_node(tmp_path) as node:
        node.warm(85)
        await node.readings.read()
        running = asyncio.create_task(node.heat.run())
        await asyncio.sleep(0)
        await node.readings.read()
        assert await asyncio.to_thread(under_way.wait, 30)
        running.cancel()
        await asyncio.sleep(0.05)
        may_go_on.set()
        await asyncio.gather(running, return_exceptions=True)
        assert (node.driver.caps_set, node.cap_milliwatts) == ([CAP_1, MADE_FOR], MADE_FOR)


async def test_a_card_that_the_driver_does_not_tell_of_when_the_node_ends_is_given_back_by_the_next(tmp_path):
    async with hot_node(tmp_path) as node:
        await node.look()
        node.warm(85)
        await node.look_for(DWELL_SECONDS)
        assert node.cap_milliwatts == CAP_1
        told = node.driver.devices[0]["nvmlDeviceGetPowerManagementLimit"]
        node.driver.devices[0]["nvmlDeviceGetPowerManagementLimit"] = {"error": 999}
        await asyncio.to_thread(node.heat._caps.give_back)
        assert node.driver.caps_set == [CAP_1], "whose cap it is now nobody can tell"
        node.driver.devices[0]["nvmlDeviceGetPowerManagementLimit"] = told
        node.heat = node.made_heat()
        node.warm(60)
        await node.look()
        assert (node.cap_milliwatts, node.heat._caps.changed) == (MADE_FOR, frozenset())


async def test_an_engine_that_goes_right_after_a_step_leaves_no_cap_behind(tmp_path):
    async with hot_node(tmp_path) as node:
        node.warm(85)
        await node.look()
        assert (node.cap_milliwatts, node.readings.cards[0].power_limit_milliwatts) == (CAP_1, MADE_FOR)
        node.replicas.lives_at = None
        # Of the reading from before the step.
        await node.heat.look()
        assert node.cap_milliwatts == MADE_FOR


async def test_what_a_killed_agent_left_capped_is_given_back_by_the_next(tmp_path):
    async with hot_node(tmp_path, "capped_card") as node:
        found_milliwatts = node.cap_milliwatts
        assert found_milliwatts == OWNERS
        node.warm(85)
        await node.look_for(DWELL_SECONDS)
        assert node.cap_milliwatts == BELOW_OWNERS
        node.heat = node.made_heat()
        node.warm(60)
        await node.look()
        assert node.cap_milliwatts == found_milliwatts
        # After a start of the machine the card has its maker's cap, and that is then what was found.
        node.warm(85)
        await node.look_for(DWELL_SECONDS)
        node.heat = node.made_heat()
        node.cap_milliwatts = MADE_FOR
        node.warm(60)
        await node.look()
        assert node.cap_milliwatts == MADE_FOR


async def test_an_agent_that_is_killed_between_its_note_and_the_next_step_is_known_by_the_step_before(tmp_path, monkeypatch):
    async with hot_node(tmp_path) as node:
        node.warm(85)
        await node.look_for(DWELL_SECONDS)
        assert node.cap_milliwatts == CAP_1

        def killed(*_: object) -> None:
            raise SystemExit

        with monkeypatch.context() as patched:
            patched.setattr(PowerCaps, "_set_directly", killed)
            with pytest.raises(SystemExit):
                node.heat._caps.set(CARD, CAP_2)
        node.heat = node.made_heat()
        node.warm(60)
        await node.look()
        assert (node.cap_milliwatts, node.rung) == (MADE_FOR, R.COOL)


async def test_what_the_owner_lowers_meanwhile_is_not_raised(tmp_path):
    async with hot_node(tmp_path) as node:
        node.warm(85)
        await node.look_for(DWELL_SECONDS)
        assert node.cap_milliwatts == CAP_1
        node.cap_milliwatts = CAP_1 - 50_000
        node.warm(60)
        await node.look_for(PATIENCE_SECONDS * 2)
        assert (node.rung, node.cap_milliwatts, node.driver.caps_set) == (R.COOL, CAP_1 - 50_000, [CAP_1])


async def test_what_the_owner_sets_on_a_hot_card_is_what_it_gets_back(tmp_path):
    async with hot_node(tmp_path) as node:
        node.warm(85)
        await node.look_for(DWELL_SECONDS)
        node.cap_milliwatts = 320_000
        node.warm(80)
        await node.look()
        assert node.cap_milliwatts == CAP_1
        node.warm(60)
        await node.look_for(PATIENCE_SECONDS * 2)
        assert (node.rung, node.cap_milliwatts) == (R.COOL, 320_000)


async def test_a_card_whose_engine_goes_is_its_owners_again(tmp_path):
    async with hot_node(tmp_path) as node:
        node.warm(85)
        await node.look_for(DWELL_SECONDS * 4)
        assert (node.rung, node.cap_milliwatts) == (R.HALF, CAP_3)
        node.replicas.lives_at = None
        await node.look()
        assert (node.rung, node.cap_milliwatts) == (R.COOL, MADE_FOR)


async def test_without_the_right_to_cap_slots_go_first_and_the_right_is_tried_again(tmp_path):
    async with hot_node(tmp_path) as node:
        node.driver.devices[0]["nvmlDeviceSetPowerManagementLimit"] = {"error": NO_PERMISSION}
        node.warm(85)
        await node.look_for(DWELL_SECONDS * 2)
        assert (node.rung, node.cap_milliwatts, node.heat.slots(REPLICA, 8)) == (R.HALF, MADE_FOR, 4)
        assert "Insufficient Permissions" in node.heat.cap_refusal
        del node.driver.devices[0]["nvmlDeviceSetPowerManagementLimit"]
        node.warm(78)
        await node.look_for(REFUSED_SECONDS)
        assert (node.cap_milliwatts, node.heat.cap_refusal) == (CAP_3, "")


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


@pytest.fixture
def owners_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An agent that is not root, with its owner's program: it waits while `held` is there, then writes to `set` what it was told to set."""
    monkeypatch.setattr(os, "geteuid", lambda: 1_000)
    (tmp_path / "bin").mkdir()
    for program, text in (
        ("bin/sudo", '#!/bin/sh\nshift 2\nexec "$@"\n'),
        ("potluck-power-cap", f'#!/bin/sh\nwhile [ -e {tmp_path}/held ]; do sleep 0.05; done\necho "$@" >> {tmp_path}/set\n'),
    ):
        (tmp_path / program).write_text(text)
        (tmp_path / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")

    def refused(*_: object) -> None:
        raise CapRefusedError("no permission")

    def not_ours_to_end(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(PowerCaps, "_set_directly", refused)
    monkeypatch.setattr(subprocess.Popen, "send_signal", not_ours_to_end)
    return tmp_path


async def test_an_agent_that_is_not_root_caps_through_its_owners_program(owners_program):
    async with hot_node(owners_program) as node:
        node.warm(85)
        await node.look()
        assert (node.rung, node.heat.cap_refusal) == (R.CAP_1, "")
        assert (owners_program / "set").read_text() == f"{CARD} {CAP_1}\n"


async def test_a_program_that_sets_the_cap_and_ends_too_late_has_set_it(owners_program, monkeypatch):
    """As a driver under load has it: what was set is ours, and is given back."""
    monkeypatch.setattr(power_caps, "PROGRAM_SECONDS_MAX", 0.3)
    async with hot_node(owners_program) as node:
        (owners_program / "held").touch()
        real = power_caps.run_program

        def set_and_late(program: Path, uuid: str, milliwatts: int, seconds_max: float) -> None:
            node.cap_milliwatts = milliwatts
            real(program, uuid, milliwatts, seconds_max)

        monkeypatch.setattr(power_caps, "run_program", set_and_late)
        node.warm(85)
        await node.look()
        assert (node.cap_milliwatts, node.heat.cap_refusal, node.heat._caps.changed) == (CAP_1, "", {CARD})
        (owners_program / "held").unlink()
        assert until((owners_program / "set").exists, 10)
        node.warm(60)
        await node.look_for(PATIENCE_SECONDS + 30)
        assert (node.cap_milliwatts, node.rung) == (MADE_FOR, R.COOL)


async def test_a_program_that_sets_the_cap_after_it_was_given_up_has_set_it_for_us(owners_program, monkeypatch):
    monkeypatch.setattr(power_caps, "PROGRAM_SECONDS_MAX", 0.3)
    async with hot_node(owners_program) as node:
        (owners_program / "held").touch()
        node.warm(85)
        await node.look()
        assert "has not ended" in node.heat.cap_refusal
        assert (node.cap_milliwatts, node.heat._caps.changed) == (MADE_FOR, {CARD}), "it may yet be set"
        await node.look()
        assert node.rung == R.CAP_1
        await node.look_for(DWELL_SECONDS)
        assert node.rung == R.HALF, "no rung is spent on caps that nobody can set now"
        (owners_program / "held").unlink()
        assert until((owners_program / "set").exists, 10)
        node.cap_milliwatts = CAP_1
        node.heat._caps._unended[CARD].wait(10)
        # The way is open again, and the card cool.
        node.warm(60)
        monkeypatch.setattr(
            power_caps, "run_program", lambda program, uuid, milliwatts, seconds_max: set_cap(node.driver.devices[0], milliwatts)
        )
        await node.look_for(REFUSED_SECONDS + PATIENCE_SECONDS * 4)
        assert (node.cap_milliwatts, node.heat._caps.changed) == (MADE_FOR, frozenset())


async def test_a_program_that_does_not_end_keeps_no_agent_from_its_end_and_is_not_forgotten(owners_program, monkeypatch):
    """A plain user may not end what runs as root."""
    monkeypatch.setattr(power_caps, "PROGRAM_SECONDS_MAX", 0.5)
    (owners_program / "held").touch()
    async with hot_node(owners_program) as node:
        node.warm(85)
        await node.look()
        running = asyncio.create_task(node.heat.run())
        await asyncio.sleep(0)
        began_at = time.monotonic()
        running.cancel()
        await asyncio.wait({running}, timeout=20)
        assert running.done()
        assert time.monotonic() - began_at < 10
        assert CARD in (owners_program / "power_caps.json").read_text()
        process = node.heat._caps._unended[CARD]
        assert process.poll() is None
        (owners_program / "held").unlink()
        assert process.wait(10) == 0
        # It had its way after all. The next agent knows whose cap that is.
        node.cap_milliwatts = CAP_1
        node.heat = node.made_heat()
        node.warm(60)
        monkeypatch.setattr(
            power_caps, "run_program", lambda program, uuid, milliwatts, seconds_max: set_cap(node.driver.devices[0], milliwatts)
        )
        await node.look()
        assert node.cap_milliwatts == MADE_FOR


@pytest.mark.parametrize("missing", ["nvmlDeviceGetPowerManagementLimitConstraints", "nvmlDeviceGetPowerManagementLimit"])
async def test_a_card_whose_caps_the_driver_does_not_tell_is_never_capped(tmp_path, missing):
    async with hot_node(tmp_path) as node:
        node.driver.devices[0][missing] = {"error": 3}
        node.warm(85)
        await node.look()
        assert (node.rung, node.driver.caps_set) == (R.HALF, [])
