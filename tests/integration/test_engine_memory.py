"""Engines that run out of memory: each next start takes less, what was reached is remembered, and below the floor there is a reason."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
from pathlib import Path

import pytest

from potluck_node.ceilings import Ceilings
from potluck_node.domain.step_down import Ceiling
from potluck_node.engines.llamacpp import LlamaCppEngine
from potluck_node.engines.scripted import ScriptedEngine
from potluck_protocol.values import DesiredEngine, EngineState, EngineStatus, FailureKind
from tests.support.engines import MovedClock, Watched, children_of, pinned, running, script_file, supervisor_of, wished
from tests.support.starved_engine import StarvedEngine
from tests.support.tiny_gguf import write_tiny_gguf


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


async def until_settled(node: Watched, clock: MovedClock, engine: DesiredEngine) -> tuple[list[str], EngineStatus]:
    """Lets every pause go by; the last line of each failure on the way, and where the replica stands then."""
    failures: list[str] = []
    settled = {EngineState.READY, EngineState.BACKING_OFF, EngineState.REFUSED}
    async with asyncio.timeout(60):
        while True:
            (status,) = await node.until(lambda statuses: len(statuses) == 1 and statuses[0].state in settled)
            if status.state is not EngineState.BACKING_OFF:
                return failures, status
            failures.append(status.failure.splitlines()[-1])
            clock.now_seconds += 1.0
            node.wish(engine)
            await node.until(lambda statuses: statuses[0].state is not EngineState.BACKING_OFF)


async def test_each_start_takes_less_until_one_fits_and_a_new_agent_starts_there(tmp_path, tiny_gguf):
    engines = {"llamacpp": StarvedEngine(LlamaCppEngine(), fits=(85, 2, 2048))}
    engine = wished(pinned(tiny_gguf), kind="llamacpp", slots=5, context=2048)
    clock = MovedClock()
    async with running(supervisor_of(tmp_path, clock, engines=engines)) as node:
        node.wish(engine)
        failures, status = await until_settled(node, clock, engine)
        assert failures == [
            "out of memory with 95 % of memory, 5 slots of 2048 tokens; next: 90 % of memory, 5 slots of 2048 tokens",
            "out of memory with 90 % of memory, 5 slots of 2048 tokens; next: 85 % of memory, 5 slots of 2048 tokens",
            "out of memory with 85 % of memory, 5 slots of 2048 tokens; next: 85 % of memory, 2 slots of 2048 tokens",
        ]
        assert (status.state, status.failure_kind, status.failure) == (EngineState.READY, None, "")
        assert (status.memory_utilization_percent, status.slot_count, status.context_length_tokens) == (85, 2, 2048)
    async with running(supervisor_of(tmp_path, clock, engines=engines)) as node:
        node.wish(engine)
        assert (await until_settled(node, clock, engine))[0] == [], "it remembers"
        smaller = dataclasses.replace(engine, slot_count=1)
        node.wish(smaller)
        (status,) = await node.until(lambda statuses: bool(statuses) and statuses[0].slot_count == 1)
        assert status.memory_utilization_percent in {0, 85}


async def test_memory_that_others_hold_is_no_word_about_the_model(tmp_path, tiny_gguf):
    """A desktop takes a quarter of the card: the next start takes what is free, nothing is remembered, and the desktop may go again."""
    free = tmp_path / "free"
    free.write_text("78.5")
    engines = {"llamacpp": StarvedEngine(LlamaCppEngine(), fits=(95, 4, 2048), free=free)}
    engine = wished(pinned(tiny_gguf), kind="llamacpp", slots=4, context=2048)
    clock = MovedClock()
    async with running(supervisor_of(tmp_path, clock, engines=engines)) as node:
        node.wish(engine)
        failures, status = await until_settled(node, clock, engine)
        assert failures == ["others hold memory that 95 % of memory, 4 slots of 2048 tokens would take; next: 78 % of memory"]
        assert (status.memory_utilization_percent, status.slot_count, status.context_length_tokens) == (78, 4, 2048)
        assert not list(tmp_path.rglob("ceilings.json")), "others' memory is no ceiling"
    free.write_text("100")
    async with running(supervisor_of(tmp_path, clock, engines=engines)) as node:
        node.wish(engine)
        failures, status = await until_settled(node, clock, engine)
        assert (failures, status.memory_utilization_percent) == ([], 95)


async def test_an_engine_that_has_too_little_beside_others_waits_for_them_as_after_a_crash(tmp_path, tiny_gguf):
    free = tmp_path / "free"
    free.write_text("78.5")
    engines = {"llamacpp": StarvedEngine(LlamaCppEngine(), fits=(60, 4, 2048), free=free)}
    engine = wished(pinned(tiny_gguf), kind="llamacpp", slots=4, context=2048)
    clock = MovedClock()
    async with running(supervisor_of(tmp_path, clock, engines=engines)) as node:
        node.wish(engine)
        failures = []
        for _ in range(10):
            status = await node.until_state(EngineState.BACKING_OFF)
            failures.append(status.failure.splitlines()[-1])
            assert (status.slot_count, status.context_length_tokens) == (4, 2048)
            if len(failures) < 10:
                clock.now_seconds += 40.0
                node.wish(engine)
                await node.until(lambda statuses: statuses[0].state is not EngineState.BACKING_OFF)
        assert ["next: 78 %" in failure for failure in failures] == [True, False] * 5
        assert "5 crashes within 10 minutes" in failures[-1]
        assert not list(tmp_path.rglob("ceilings.json"))


async def test_below_the_floor_it_is_refused_with_a_reason_until_it_is_wished_otherwise(tmp_path, tiny_gguf):
    engines = {"llamacpp": StarvedEngine(LlamaCppEngine(), fits=(85, 1, 512))}
    engine = wished(pinned(tiny_gguf), kind="llamacpp", slots=2, context=2048)
    clock = MovedClock()
    async with running(supervisor_of(tmp_path, clock, engines=engines)) as node:
        node.wish(engine)
        failures, status = await until_settled(node, clock, engine)
        assert [line.partition("next: ")[2] for line in failures] == [
            "90 % of memory, 2 slots of 2048 tokens",
            "85 % of memory, 2 slots of 2048 tokens",
            "85 % of memory, 1 slots of 2048 tokens",
            "85 % of memory, 1 slots of 1024 tokens",
        ]
        assert (status.state, status.failure_kind) == (EngineState.REFUSED, FailureKind.OUT_OF_MEMORY)
        assert status.failure == (
            "out of memory even with 85 % of memory, 1 slots of 1024 tokens; it needs a bigger card, or a smaller model"
        )
        clock.now_seconds += 10_000.0
        node.wish(engine)
        await asyncio.sleep(0.1)
        assert node.supervisor.statuses()[0].state is EngineState.REFUSED
        assert children_of(os.getpid()) == []
        node.wish(dataclasses.replace(engine, context_length_tokens=512))
        assert (await node.until_state(EngineState.READY)).context_length_tokens == 512


async def test_an_engine_that_is_not_told_its_share_skips_those_steps(tmp_path, tiny_gguf):
    class OnItsOwn(StarvedEngine):
        def arguments(self, launch):
            return super().arguments(dataclasses.replace(launch, memory_utilization_percent=0))

    engine = wished(pinned(tiny_gguf), kind="llamacpp", slots=4, context=256)
    clock = MovedClock()
    async with running(supervisor_of(tmp_path, clock, engines={"llamacpp": OnItsOwn(LlamaCppEngine(), fits=(0, 2, 256))})) as node:
        node.wish(engine)
        failures, status = await until_settled(node, clock, engine)
        assert len(failures) == 1
        assert (status.slot_count, status.memory_utilization_percent) == (2, 0)


async def test_an_engine_that_had_served_gives_up_its_share_at_most(tmp_path):
    """A request that brings engines down must not take slots and context from everybody else."""

    class Overfed(ScriptedEngine):
        def arguments(self, launch):
            # Its last words, whatever kills it.
            lines = (
                f"import runpy, sys  # {launch.memory_utilization_percent}",
                "print('std::bad_alloc', file=sys.stderr)",
                "del sys.argv[0]",
                "runpy.run_module(sys.argv[0], run_name='__main__')",
            )
            return ("-c", "\n".join(lines), *ScriptedEngine.arguments(self, launch)[1:])

    engine = wished(pinned(script_file(tmp_path)), slots=2)
    clock = MovedClock()
    async with running(supervisor_of(tmp_path, clock, engines={"scripted": Overfed()})) as node:
        node.wish(engine)
        shares = []
        for _ in range(4):
            status = await node.until_state(EngineState.READY)
            shares.append((status.memory_utilization_percent, status.slot_count))
            os.kill(children_of(os.getpid())[0], signal.SIGSEGV)
            status = await node.until_state(EngineState.BACKING_OFF)
            assert status.failure_kind is FailureKind.OUT_OF_MEMORY
            clock.now_seconds += 10.0
            node.wish(engine)
        assert shares == [(95, 2), (90, 2), (85, 2), (85, 2)]


async def test_cards_are_given_from_an_engines_start_to_its_end(tmp_path):
    engine = wished(pinned(script_file(tmp_path)))
    engine = dataclasses.replace(engine, shape=dataclasses.replace(engine.shape, card_uuids=("GPU-1", "GPU-2")))
    async with running(supervisor_of(tmp_path, MovedClock())) as node:
        given = []
        node.supervisor.on_change(lambda: given.append(node.supervisor.cards_given()))
        assert node.supervisor.cards_given() == frozenset()
        node.wish(engine)
        await node.until_state(EngineState.STARTING)
        assert node.supervisor.cards_given() == {"GPU-1", "GPU-2"}
        await node.until_state(EngineState.READY)
        assert node.supervisor.cards_given() == {"GPU-1", "GPU-2"}
        node.wish()
        await node.until(lambda statuses: not statuses)
        assert (node.supervisor.cards_given(), given[0]) == (frozenset(), frozenset())


def test_a_ceiling_is_forgotten_when_what_it_was_measured_on_changes(tmp_path, tiny_gguf):
    file = pinned(tiny_gguf)
    engine = wished(file, kind="vllm")
    path = tmp_path / "ceilings.json"
    lowered = Ceiling(85, slot_count=2)
    Ceilings(path, "one").lower(engine, "vllm 1", lowered)
    assert (path.stat().st_mode & 0o777) == 0o600
    known = Ceilings(path, "one")
    assert known.of(dataclasses.replace(engine, slot_count=9), "vllm 1") == lowered
    on_card = dataclasses.replace(engine, shape=dataclasses.replace(engine.shape, card_uuids=("GPU-1",)))
    for other in (
        known.of(engine, "vllm 2"),
        known.of(dataclasses.replace(engine, model=dataclasses.replace(file, sha256="0" * 64)), "vllm 1"),
        known.of(on_card, "vllm 1"),
        Ceilings(path, "another").of(engine, "vllm 1"),
    ):
        assert other == Ceiling()
    known.lower(on_card, "vllm 1", Ceiling(90))
    assert Ceilings(path, "another").of(on_card, "vllm 1") == Ceiling(90), "a card is the same in any machine"
    known.lower(engine, "vllm 2", Ceiling(90))
    assert Ceilings(path, "one").of(engine, "vllm 1") == Ceiling()


@pytest.mark.parametrize(
    "content", ["", "{}", "[1]", '[{"subject":{},"ceiling":{}}]', '[{"subject":{"model_id":"a","cards":[]},"ceiling":{"x":1}}]']
)
def test_a_damaged_file_counts_as_none(tmp_path, tiny_gguf, content):
    path = tmp_path / "ceilings.json"
    path.write_text(content)
    engine = wished(pinned(tiny_gguf))
    known = Ceilings(path, "one")
    assert known.of(engine, "1") == Ceiling()
    known.lower(engine, "1", Ceiling(90))
    assert Ceilings(path, "one").of(engine, "1") == Ceiling(90)
    assert len(json.loads(path.read_text())) == 1
