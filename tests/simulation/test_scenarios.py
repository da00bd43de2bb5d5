"""The scenarios that come with Potluck: they say what they should, and the model gives the failure that it was made for."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from potluck_coordinator.simulation.figures import Figures
from potluck_coordinator.simulation.scenario_file import load_scenario, parse_scenario, scenario_names, with_value
from potluck_coordinator.simulation.world import World
from potluck_protocol.errors import PotluckError

NAMED = {"evening-peak", "five-thousand-nodes", "flood", "heatwave", "home-churn", "quad-3090-unlimited", "twelve-unequal"}
ENGINE = {"prefill_tokens_per_second": 1000, "step_seconds": 0.02, "step_seconds_per_answer": 0.001, "kv_tokens": 8000}
GOOD = {"hours": 1, "nodes": [{"name": "n", "count": 2, "engine": ENGINE}], "users": [{"name": "u", "requests_per_second": 1}]}


def quad(policy: str, people: int | None = None) -> Figures:
    scenario = load_scenario("quad-3090-unlimited")
    if people is not None:
        scenario = with_value(scenario, "users.people.people", str(people))
    return World(scenario, policy, 1).run()


def test_the_scenarios_that_were_promised_are_there_and_each_says_what_it_is_about() -> None:
    assert set(scenario_names()) == NAMED
    assert all(load_scenario(name).about for name in NAMED)


def test_the_failure_that_potluck_exists_to_avoid_comes_out_of_the_model() -> None:
    """DESIGN, section 1: 85 degrees, clocks 40 % down, throttling after twelve minutes, some 70 % of uptime."""
    figures = quad("round-robin")

    assert figures.celsius_max == pytest.approx(85, abs=1.0)
    assert figures.clock_share_min == pytest.approx(0.6, abs=0.08)
    assert figures.first_throttle_seconds is not None
    assert 8 * 60 <= figures.first_throttle_seconds <= 17 * 60
    assert figures.uptime_share == pytest.approx(0.7, abs=0.08)
    assert figures.engine_death_count >= 10
    assert figures.throttled_seconds > 3600


def test_it_collapses_between_five_and_eight_people() -> None:
    four, eight = quad("round-robin", 4), quad("round-robin", 8)

    # Of three hours: once, and several times an hour.
    assert four.engine_death_count <= 1
    assert four.uptime_share > 0.97
    assert eight.engine_death_count >= 4
    assert eight.uptime_share < 0.95
    assert (eight.first_token_seconds.p95 or 0) > 2 * (four.first_token_seconds.p95 or 0)


def test_the_same_box_and_people_under_our_policy_stay_up_and_cool() -> None:
    figures, naive = quad("ours"), quad("round-robin")

    assert figures.uptime_share >= 0.99
    assert figures.engine_death_count == 0
    assert figures.failed_count == 0
    assert figures.throttled_seconds == 0
    assert figures.celsius_max < 83
    assert figures.served_count > 1.05 * naive.served_count
    assert figures.finished_session_count >= naive.finished_session_count
    assert not figures.breaks


@pytest.mark.parametrize("name", sorted(NAMED - {"five-thousand-nodes", "quad-3090-unlimited"}))
def test_a_few_minutes_of_each_break_nothing(name: str) -> None:
    scenario = replace(load_scenario(name), hours=0.05, warm_up_seconds=0.0)
    figures = World(scenario, "ours", 1).run()

    assert not figures.breaks
    assert figures.served_count > 20


def test_a_large_pool_costs_less_than_its_share_of_a_minute() -> None:
    """An hour of five thousand nodes is to take a minute; a tenth of it takes a tenth of the work."""
    scenario = replace(load_scenario("five-thousand-nodes"), hours=0.1)
    figures = World(scenario, "ours", 1).run()

    assert not figures.breaks
    assert figures.served_count > 2000
    assert figures.lost_attempt_count > 5
    # Processor time, since others may be at work here: twice what an hour in a minute leaves.
    assert figures.cpu_seconds < 12


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"houres": 1}, "there is no key houres; do you mean hours?"),
        ({"hours": "one"}, "hours is a number, not 'one'"),
        ({"hours": 0}, "hours is above zero, not 0"),
        ({"hours": True}, "hours is a number, not True"),
        ({"nodes": []}, "at least one [[nodes]]"),
        ({"nodes": [{"name": "n", "count": 1.5, "engine": ENGINE}]}, "nodes[0].count is a whole number, not 1.5"),
        ({"nodes": [{"name": "n", "count": 1}]}, "nodes[0].engine is missing"),
        ({"nodes": [{"name": "n", "count": 1, "engine": ENGINE | {"when_full": "wait"}}]}, "nodes[0].engine.when_full is preempt, die"),
        (
            {"nodes": [{"name": "n", "count": 1, "engine": ENGINE, "heat": {"full_wats": 3}}]},
            "nodes[0].heat.full_wats; do you mean full_watts?",
        ),
        ({"users": [{"name": "u"}]}, "one of requests_per_second, sessions_per_hour and people"),
        ({"users": [{"name": "u", "requests_per_second": 1, "tier": "gold"}]}, "users[0].tier is flex, default, not 'gold'"),
        ({"users": [{"name": "u", "requests_per_second": 1, "hourly": [1, 2]}]}, "users[0].hourly has 24 factors"),
        (
            {"users": [{"name": "u", "requests_per_second": 1, "prompt_tokens": 7900, "shared_prefix_tokens": 100}]},
            "users 'u' send prompts of 8000 tokens in the mean, and no node has a context and a cache (kv_tokens) for more than 8000",
        ),
        ({"policies": ["best"]}, "policies[0] is round-robin, "),
        ({"faults": {"slow_share": 2}}, "faults.slow_share is a share from 0 to 1, not 2"),
        ({"warm_up_seconds": 4000}, "warm_up_seconds is 4000, and the scenario lasts 3600 s"),
    ],
)
def test_a_scenario_that_cannot_be_is_refused_by_its_key(changes: dict[str, object], words: str) -> None:
    with pytest.raises(PotluckError, match=re.escape(words)):
        parse_scenario(GOOD | changes, "mine.toml")


def test_a_value_is_changed_by_its_path() -> None:
    scenario = parse_scenario(GOOD, "mine.toml")
    assert with_value(scenario, "users.u.requests_per_second", "3").users[0].requests_per_second == 3
    assert with_value(scenario, "nodes.0.engine.kv_tokens", "99").nodes[0].engine.kv_tokens == 99
    assert with_value(scenario, "users.u.tier", "default").users[0].tier == "default"
    with pytest.raises(PotluckError, match="there is no 'kv_token'; do you mean kv_tokens"):
        with_value(scenario, "nodes.0.engine.kv_token", "99")
    with pytest.raises(PotluckError, match=r"nodes\.0 is a table; name one of its values"):
        with_value(scenario, "nodes.0", "3")


def test_a_trace_says_who_is_there_and_a_bad_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "homes.csv").write_text("# node, came, left\n0,0,0.05\n1,0.02,0.1\n")
    table = GOOD | {"hours": 0.1, "nodes": [{"name": "n", "count": 2, "engine": ENGINE, "churn": {"trace": "homes.csv"}}]}
    world = World(parse_scenario(table, "mine.toml", tmp_path), "ours", 1)
    world.run()
    assert [round(node.counts.up_seconds) for node in world.nodes] == [180, 288]

    (tmp_path / "homes.csv").write_text("0,0,0.05\n7,0,1\n")
    with pytest.raises(PotluckError, match=r"homes\.csv, line 2: a line is NODE,HOUR IT CAME,HOUR IT LEFT, with a node from 0 to 1"):
        World(parse_scenario(table, "mine.toml", tmp_path), "ours", 1).run()
