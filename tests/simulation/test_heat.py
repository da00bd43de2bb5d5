"""Heat by its closed form, what a watt is worth, and the live policy over modelled cards."""

from __future__ import annotations

import math

import pytest

from potluck_coordinator.simulation.card_model import Cards
from potluck_coordinator.simulation.engine_model import EngineModel
from potluck_coordinator.simulation.heat import HeatModel, clock_share, governed_watts, speed_shares
from potluck_coordinator.simulation.node_side import LiveCardPolicy
from potluck_coordinator.simulation.scenario import NodeClass, Scenario, Users
from potluck_coordinator.simulation.world import World

ENGINE = EngineModel(2500, 0.02, 0.001, 40_000)


def warmed(cards: Cards, seconds: float, busy_share: float = 1.0, began_at: float = 0.0) -> float:
    now = began_at
    while now < began_at + seconds:
        now += 5.0
        cards.look(5.0, busy_share, now, reading=False, agent_looks=True)
    return now


def test_a_card_goes_to_its_balance_by_its_time_constant() -> None:
    model = HeatModel(ambient_celsius=20, celsius_per_watt=0.1, time_constant_seconds=100, throttle_celsius=200)
    cards = Cards(model, 8, None, power_is_set=True)
    assert cards.celsius == pytest.approx(23.0)
    warmed(cards, 100)
    balance = 20 + 0.1 * 0.85 * 350
    assert cards.celsius == pytest.approx(balance + (23.0 - balance) / math.e, abs=0.01)
    warmed(cards, 2000)
    assert cards.celsius == pytest.approx(balance, abs=0.01)
    warmed(cards, 2000, busy_share=0.0)
    assert cards.celsius == pytest.approx(23.0, abs=0.01)


def test_power_costs_reading_prompts_more_than_writing_answers() -> None:
    shares = {watts: speed_shares(HeatModel(), watts) for watts in (350, 250, 200, 150)}
    assert shares[350] == (1.0, 1.0)
    # The measured points of the sweep.
    assert shares[200] == (pytest.approx(0.6005, abs=1e-3), pytest.approx(0.9408, abs=1e-3))
    assert shares[150] == (pytest.approx(0.2577, abs=1e-3), pytest.approx(0.8623, abs=1e-3))
    assert shares[250][0] > shares[200][0] > shares[150][0]


def test_the_governor_takes_clock_away_above_its_limit_and_no_more_than_forty_percent() -> None:
    model = HeatModel()
    assert clock_share(model, 82.9) == 1.0
    assert clock_share(model, 84.0) == pytest.approx(0.8)
    assert clock_share(model, 85.0) == pytest.approx(0.6)
    assert clock_share(model, 95.0) == pytest.approx(0.6)
    assert governed_watts(model, 350, 85.0) == pytest.approx(200, abs=1)


def test_a_hot_case_throttles_without_an_agent_and_not_with_the_live_policy() -> None:
    heat = HeatModel(ambient_celsius=30, celsius_per_watt=0.13, case_celsius_per_watt=0.09, case_time_constant_seconds=600)
    bare = Cards(heat, 16, None, power_is_set=True)
    warmed(bare, 7200)
    looked_after = Cards(heat, 16, LiveCardPolicy(NodeClass("n", 1, ENGINE, heat, slot_count=16)), power_is_set=True)
    warmed(looked_after, 7200)

    assert bare.throttled_seconds > 3600
    assert bare.celsius_max > 83.5
    assert looked_after.throttled_seconds <= 60
    assert looked_after.orders.cap_watts < 350


def test_orders_come_back_when_the_card_is_cool_again() -> None:
    heat = HeatModel(ambient_celsius=35, celsius_per_watt=0.16)
    cards = Cards(heat, 16, LiveCardPolicy(NodeClass("n", 1, ENGINE, heat, slot_count=16)), power_is_set=True)
    now = warmed(cards, 1200)
    assert cards.orders.cap_watts < 350
    warmed(cards, 7200, busy_share=0.0, began_at=now)
    assert (cards.orders.cap_watts, cards.orders.slot_count) == (350, 16)


@pytest.mark.parametrize("power_is_set", [True, False], ids=["caps and slots", "slots alone"])
def test_a_node_that_got_hot_serves_again_when_it_has_cooled(power_is_set: bool) -> None:
    node_class = NodeClass("n", 1, ENGINE, HeatModel(ambient_celsius=40, celsius_per_watt=0.16), power_is_set=power_is_set)
    crowd = Users("crowd", requests_per_second=2, retries_max=0, for_seconds=300)
    late = Users("late", requests_per_second=0.1, retries_max=0, from_seconds=3600)
    world = World(Scenario("hot-room", "", 1.1, (node_class,), (crowd, late)), "ours", 1)
    (node,) = world.nodes
    usual = node.cards.orders
    held_back: list[bool] = []
    for at_seconds in (300.0, 3600.0):
        world.agenda.at(at_seconds, lambda: held_back.append(node.cards.orders != usual))

    figures = world.run()

    assert held_back == [True, False]
    assert figures.users["late"].served_count > 20
    assert not figures.breaks
