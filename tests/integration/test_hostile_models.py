"""A sample of what `tests.chaos.hostile_models` shows in full, and the same folders under the real supervisor."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from potluck_node.engines.base import EngineLaunch
from potluck_node.engines.scripted import ScriptedEngine
from potluck_protocol.clock import SystemClock
from potluck_protocol.values import EngineState
from tests.chaos.hostile_models import report, run
from tests.support.engines import running, supervisor_of, wished
from tests.support.hostile_models import MAKERS, good_model, hostile_cases
from tests.support.tiny_model_folder import SCRIPT

SAMPLE_COUNT = 50
STARTED_COUNT = 25


@pytest.mark.parametrize("seed", [1, 2])
async def test_no_hostile_model_comes_out_of_the_store_and_each_refusal_says_why(tmp_path, monkeypatch, seed):
    monkeypatch.chdir(tmp_path)
    outcomes = await run(tmp_path, SAMPLE_COUNT, seed)
    assert [(outcome.case.kind, outcome.fault, outcome.reason) for outcome in outcomes if outcome.fault] == []
    assert {outcome.case.kind for outcome in outcomes} == set(MAKERS)
    assert " 0 loaded" in report(outcomes)
    assert not list(tmp_path.rglob("potluck-was-here")), "a payload ran"


class FolderEngine(ScriptedEngine):
    """An engine that takes a folder: it says what the script in it says, and counts how often its command was asked for."""

    started = 0

    def arguments(self, launch: EngineLaunch) -> tuple[str, ...]:
        FolderEngine.started += 1
        return super().arguments(replace(launch, model_path=launch.model_path / SCRIPT))


async def test_no_engine_is_started_on_a_hostile_model_and_one_is_on_the_sound_one(tmp_path):
    FolderEngine.started = 0
    async with running(supervisor_of(tmp_path, SystemClock(), engines={"scripted": FolderEngine()})) as node:
        refused: set[EngineState] = set()
        for case in hostile_cases(tmp_path / "cases", STARTED_COUNT, seed=3):
            node.wish(wished(case.model))
            (status,) = await node.until(lambda statuses: len(statuses) == 1 and bool(statuses[0].failure))
            assert status.state in {EngineState.REFUSED, EngineState.BACKING_OFF}, case.kind
            refused.add(status.state)
            node.wish()
            await node.until(lambda statuses: not statuses)
        assert refused == {EngineState.REFUSED, EngineState.BACKING_OFF}, "some are refused by their pins, some by their files"
        assert FolderEngine.started == 0

        node.wish(wished(good_model(tmp_path / "good")))
        async with asyncio.timeout(30):
            await node.until_state(EngineState.READY)
        assert FolderEngine.started > 0, "so the count above would have shown a start"
