"""A whole world against what must be true of any: conservation of tokens, and Little's law."""

from __future__ import annotations

from statistics import fmean

import pytest

from potluck_coordinator.simulation.asking import Outcome
from potluck_coordinator.simulation.engine_model import EngineModel
from potluck_coordinator.simulation.scenario import NodeClass, Scenario, Users
from potluck_coordinator.simulation.world import World

ENGINE = EngineModel(2500, 0.02, 0.001, kv_tokens=40_000)


def calm_world(policy: str, rate: float, hours: float) -> World:
    users = Users("people", 5, requests_per_second=rate, retries_max=0, for_seconds=hours * 3600 - 200)
    return World(Scenario("calm", "", hours, (NodeClass("n", 3, ENGINE, slot_count=30),), (users,)), policy, 1)


@pytest.mark.parametrize("policy", ["round-robin", "ours"])
def test_every_token_that_an_engine_made_reached_a_client_and_was_paid_for_once(policy: str) -> None:
    world = calm_world(policy, 1.5, 0.2)
    figures = world.run()

    assert {request.outcome for request in world.requests} == {Outcome.SERVED}
    assert figures.made_tokens == figures.answer_tokens == sum(request.answer_tokens for request in world.requests)
    prompts = sum(request.prompt_tokens for request in world.requests)
    assert sum(node.counts.read_tokens + node.counts.hit_tokens for node in world.nodes) == pytest.approx(prompts)
    paid = -sum(amount for account, amount in world.coordinator.books._balances.items() if account == "issuer")
    assert paid == 5 * 10**12
    assert sum(world.coordinator.books._balances.values()) == 0
    assert world.coordinator.books.open_count == 0


def test_requests_in_the_pool_are_arrivals_times_their_stay() -> None:
    """Little's law, of which the world knows nothing."""
    hours = 0.6
    world = calm_world("round-robin", 2.0, hours)
    world.run()
    began, ended = 300.0, hours * 3600 - 300
    inside = [look.open_count for look in world.looks if began <= look.at_seconds < ended]
    arrived = [request for request in world.requests if began <= request.arrived_at < ended]
    stay = fmean(request.ended_at - request.arrived_at for request in arrived)

    assert fmean(inside) == pytest.approx(len(arrived) / (ended - began) * stay, rel=0.05)


def test_a_better_line_and_a_faster_card_are_noticed() -> None:
    slow, fast = EngineModel(800, 0.05, 0.002, 40_000), EngineModel(3000, 0.015, 0.0005, 40_000)
    users = (Users("people", 5, requests_per_second=1.0, retries_max=0),)
    found = [World(Scenario("one", "", 0.1, (NodeClass("n", 2, engine),), users), "ours", 1).run() for engine in (slow, fast)]

    assert (found[0].first_token_seconds.p50 or 0) > 2 * (found[1].first_token_seconds.p50 or 0)
    assert (found[0].token_seconds.p50 or 0) > 2 * (found[1].token_seconds.p50 or 0)


def test_a_prompt_that_no_context_takes_is_refused_at_once_and_one_that_a_larger_takes_goes_there() -> None:
    small, large = EngineModel(2500, 0.02, 0.001, kv_tokens=600), EngineModel(2500, 0.02, 0.001, kv_tokens=40_000)
    users = Users("people", 5, requests_per_second=0.3, prompt_tokens=1000, prompt_spread=1.0, answer_tokens_max=400, retries_max=3)
    nodes = (NodeClass("small", 2, small), NodeClass("large", 1, large, slot_count=30, context_tokens=2000))
    for policy in ("ours", "round-robin"):
        world = World(Scenario("two", "", 0.2, nodes, (users,), queue_wait_seconds=60), policy, 1)
        figures = world.run()
        too_long = [request for request in world.requests if request.outcome is Outcome.TOO_LONG]

        assert figures.too_long_count == len(too_long) > 10
        assert all(request.ended_at == request.arrived_at for request in too_long if request.prompt_tokens >= 2000)
        assert all(not request.delivered_tokens for request in too_long)
        assert not figures.breaks
        # Who balances by counts alone sends to engines what these refuse.
        assert min(request.prompt_tokens for request in too_long) >= (2000 if policy == "ours" else 600)
        served = [request for request in world.requests if request.outcome is Outcome.SERVED]
        cut = [request for request in served if request.delivered_tokens < request.answer_tokens]
        assert all(request.prompt_tokens + request.delivered_tokens in {600, 2000} for request in cut)
