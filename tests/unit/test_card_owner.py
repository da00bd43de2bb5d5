"""What is the owner's of a card: the limit for engines, who else is on it, and what is left there of engines that ended."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from potluck_node.domain.card_limit import capped, card_percents_max
from potluck_node.domain.plan import Fetch, LocalLimits, Refuse, plan, under_card_limit
from potluck_node.probe.card_programs import foreign_program_names
from potluck_node.probe.engine_remains import children_of_this_process, remains_of
from potluck_node.probe.nvml import NvmlLibrary
from potluck_protocol.values import (
    Accelerator,
    CardFacts,
    DesiredEngine,
    DesiredState,
    EngineShape,
    Inventory,
    ModelFile,
    ModelId,
    ReplicaId,
)
from tests.support.nvml_dump import DumpedDriver, load_dump
from tests.support.visited_agent import UUID, VisitedCard

GIB = 1 << 30
CARDS = (Accelerator("a 3090", "GPU-a", 24 * GIB), Accelerator("a small one", "GPU-b", 8 * GIB))
FILE = ModelFile(ModelId("m"), "path:/models", "m.gguf", "0" * 64, 1)


def wish(*card_uuids: str, memory_bytes: int = 4 * GIB, percent: int = 0) -> DesiredEngine:
    facts = CardFacts(memory_utilization_percent=percent)
    shape = EngineShape(card_uuids=card_uuids, tensor_parallel_size=max(1, len(card_uuids)), memory_bytes=memory_bytes, card_facts=facts)
    return DesiredEngine(ReplicaId("r"), FILE, "vllm", 2, 1024, shape)


def limits(bytes_max: int | None) -> LocalLimits:
    return LocalLimits(frozenset({"vllm"}), card_memory_bytes_max=bytes_max, card_percents_max=card_percents_max(CARDS, bytes_max))


def test_the_pool_sees_cards_with_no_more_memory_than_the_owner_lets_engines_take():
    inventory = Inventory(accelerators=CARDS)
    assert capped(inventory, None) == inventory
    assert [card.memory_bytes for card in capped(inventory, 12 * GIB).accelerators] == [12 * GIB, 8 * GIB]
    assert capped(inventory, 12 * GIB) == replace(inventory, accelerators=(replace(CARDS[0], memory_bytes=12 * GIB), CARDS[1]))


@pytest.mark.parametrize(
    ("bytes_max", "cards", "percent", "told"),
    [
        (None, ("GPU-a",), 95, 95),
        (12 * GIB, ("GPU-a",), 95, 50),
        (12 * GIB, ("GPU-a",), 0, 50),
        (12 * GIB, ("GPU-a",), 40, 40),
        (12 * GIB, ("GPU-b",), 95, 95),
        (12 * GIB, ("GPU-a", "GPU-b"), 95, 50),
        (1, ("GPU-a",), 95, 1),
        (12 * GIB, (), 0, 0),
    ],
)
def test_no_engine_is_started_with_more_of_a_card_than_the_owner_allows(bytes_max, cards, percent, told):
    (engine,) = under_card_limit(DesiredState(1, (wish(*cards, percent=percent),)), limits(bytes_max)).engines
    assert engine.shape.card_facts.memory_utilization_percent == told


@pytest.mark.parametrize(
    ("bytes_max", "cards", "memory_bytes", "refused"),
    [
        (12 * GIB, ("GPU-a",), 12 * GIB, False),
        (12 * GIB, ("GPU-a",), 12 * GIB + 1, True),
        (None, ("GPU-a",), 24 * GIB, False),
        (12 * GIB, (), 20 * GIB, False),
    ],
)
def test_a_coordinator_that_wishes_more_of_a_card_is_refused_and_told_why(bytes_max, cards, memory_bytes, refused):
    (action,) = plan(DesiredState(1, (wish(*cards, memory_bytes=memory_bytes),)), {}, limits(bytes_max), 0.0).actions
    assert isinstance(action, Refuse if refused else Fetch)
    assert not refused or "card_memory_bytes_max" in action.reason


def test_the_owner_is_told_which_programs_hold_a_card_and_never_our_own():
    driver = DumpedDriver(load_dump("memory_held_by_others"))
    with subprocess.Popen(["sleep", "60"]) as program:
        try:
            driver.devices[0]["nvmlDeviceGetComputeRunningProcesses_v3"] = [
                {"pid": program.pid, "usedGpuMemory": 6 * GIB},
                {"pid": os.getpid(), "usedGpuMemory": 9 * GIB},
            ]
            names = foreign_program_names([UUID], {os.getpid()}, NvmlLibrary(lambda: driver))
            assert names == {UUID: ("sleep",)}
            assert foreign_program_names(["GPU-other"], (), NvmlLibrary(lambda: driver)) == {}
        finally:
            program.kill()
    hidden = DumpedDriver(load_dump("processes_hidden"))
    assert foreign_program_names([UUID], (), NvmlLibrary(lambda: hidden)) == {UUID: ()}
    assert foreign_program_names([UUID], (), NvmlLibrary(lambda: DumpedDriver(load_dump("driver_not_loaded")))) == {}


def test_an_engine_is_gone_when_its_process_is_and_the_card_no_longer_counts_it(tmp_path: Path):
    driver = VisitedCard(tmp_path / "visitor.json")
    library = NvmlLibrary(lambda: driver)
    with subprocess.Popen(["sleep", "60"]) as program:
        child = psutil.Process(program.pid)
        assert child in children_of_this_process()
        assert remains_of([child], library) == (program.pid,)
        program.kill()
        program.wait()
    assert remains_of([child], library) == ()
    # The driver may still be taking it down.
    (tmp_path / "visitor.json").write_text(f'{{"pid": {program.pid}, "bytes": 1}}')
    assert remains_of([child], library) == (program.pid,)


def test_one_that_ended_and_that_nobody_has_waited_for_holds_nothing():
    program = subprocess.Popen(["true"])
    child = psutil.Process(program.pid)
    try:
        while child.status() != psutil.STATUS_ZOMBIE:
            pass
        assert remains_of([child], NvmlLibrary(lambda: DumpedDriver(load_dump("driver_not_loaded")))) == ()
    finally:
        program.wait()
