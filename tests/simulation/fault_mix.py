"""A small world in which everything goes wrong: for the invariants, many seeds of it."""

from __future__ import annotations

from potluck_coordinator.simulation.engine_model import EngineModel
from potluck_coordinator.simulation.scenario import Churn, Faults, Line, NodeClass, Scenario, Users
from potluck_coordinator.simulation.world import World

FAULTS = Faults(
    deaths_per_hour=60,
    freezes_per_hour=90,
    freeze_seconds=14,
    cuts_per_hour=200,
    cut_seconds=2,
    garbled_per_hour=60,
    slow_per_hour=60,
    slow_seconds=30,
    skewed_share=0.5,
    coordinator_restarts_per_hour=12,
    coordinator_restart_seconds=4,
)


def fault_mix(seconds: float = 90.0) -> Scenario:
    """Six homes for a minute and a half, with more faults than a week of a real pool has."""
    engine = EngineModel(2500, 0.02, 0.001, kv_tokens=8000, restart_seconds=8)
    steady = NodeClass("steady", 3, engine, slot_count=5)
    homes = NodeClass("home", 3, engine, line=Line(60, 0.6, 3), churn=Churn(session_hours=0.02, away_hours=0.005), slot_count=5)
    chats = Users("chats", 3, sessions_per_hour=800, turns_mean=3, think_seconds=4, prompt_tokens=200, answer_tokens=200)
    batch = Users("batch", 2, requests_per_second=0.6, prompt_tokens=500, answer_tokens=300, tier="default", shared_prefix_tokens=128)
    return Scenario("fault-mix", "", seconds / 3600, (steady, homes), (chats, batch), FAULTS, queue_wait_seconds=10)


def world(seed: int, policy: str = "ours", seconds: float = 90.0) -> World:
    return World(fault_mix(seconds), policy, seed)
