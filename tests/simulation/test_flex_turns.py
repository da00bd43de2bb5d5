"""In the simulator, too, nobody waits for nothing behind a flex request that is too large for what is left to flex."""

from __future__ import annotations

import pytest

from potluck_coordinator.simulation import ours
from potluck_coordinator.simulation.engine_model import EngineModel
from potluck_coordinator.simulation.invariants import Invariant
from potluck_coordinator.simulation.scenario import NodeClass, Scenario, Users
from potluck_coordinator.simulation.world import World

CHATS = Users("chats", 1, requests_per_second=0.2, prompt_tokens=50, answer_tokens=50, tier="default")
BOOKS = Users("books", 2, requests_per_second=0.6, prompt_tokens=2000, prompt_spread=0.1, answer_tokens=300)
NOTES = Users("notes", 2, requests_per_second=1.0, prompt_tokens=60, answer_tokens=150)


def played(seed: int) -> World:
    nodes = (NodeClass("node", 1, EngineModel(8000, 0.02, 0.001, kv_tokens=8000), slot_count=24, context_tokens=4096),)
    world = World(Scenario("two tiers", "", 180 / 3600, nodes, (CHATS, BOOKS, NOTES), queue_wait_seconds=30), "ours", seed)
    world.run()
    return world


def test_a_turn_that_ends_with_the_first_that_is_too_large_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    worlds = [played(seed) for seed in range(3)]
    assert not any(world.invariants.break_count for world in worlds)

    # The turn of flex ends with the first that is too large for what is left, as if slots were lacking.
    monkeypatch.setattr(ours, "flex_lacks_slots", lambda _: True)
    worlds = [played(seed) for seed in range(3)]
    assert {found for world in worlds for found in world.invariants.counts} == {Invariant.IDLE_WHILE_WAITING}
