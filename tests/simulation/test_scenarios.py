"""The scenarios that come with Potluck: they say what they should, and the model gives the failure that it was made for."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from potluck_coordinator.simulation.figures import Figures
from potluck_coordinator.simulation.runs import runs_of
from potluck_coordinator.simulation.scenario_checks import refuse_impossible
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
        ({"hours": 10**400}, "hours is no more than 1e+12, not 1000"),
        ({"hours": 16**5000}, "hours is no more than 1e+12, not a number of thousands of digits"),
        ({"hours": float("nan")}, "hours is a number, not nan"),
        ({"nodes": [{"name": "n", "count": 10**400, "engine": ENGINE}]}, "nodes[0].count is no more than 1e+12"),
        ({"name": ""}, "name is up to 100 letters, digits, dots, dashes and underscores, of which the first is a letter or digit, not ''"),
        ({"name": "a/b"}, "not 'a/b'"),
        ({"name": ".hidden"}, "not '.hidden'"),
        ({"name": "n" * 101}, "not 'nnn"),
        ({"name": 16**5000}, "name is a text, not a number of thousands of digits"),
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


@pytest.mark.parametrize(
    ("place", "name"), [("a b/my pool (2).toml", "my-pool-2-"), ("größe.toml", "größe"), ("_.x_1.toml", "x_1"), ("( ).toml", "scenario")]
)
def test_a_scenario_without_a_name_has_its_files_as_far_as_a_name_may_be_so(place: str, name: str) -> None:
    assert parse_scenario(GOOD, place).name == name


def test_a_value_is_changed_by_its_path() -> None:
    scenario = parse_scenario(GOOD, "mine.toml")
    assert with_value(scenario, "users.u.requests_per_second", "3").users[0].requests_per_second == 3
    assert with_value(scenario, "nodes.0.engine.kv_tokens", "99").nodes[0].engine.kv_tokens == 99
    assert with_value(scenario, "users.u.tier", "default").users[0].tier == "default"
    with pytest.raises(PotluckError, match="there is no 'kv_token'; do you mean kv_tokens"):
        with_value(scenario, "nodes.0.engine.kv_token", "99")
    with pytest.raises(PotluckError, match=r"nodes\.0 is a table; name one of its values"):
        with_value(scenario, "nodes.0", "3")
    with pytest.raises(PotluckError, match=r"hours\.x: what stands before \.x is a value, and has no others below it"):
        with_value(scenario, "hours.x", "1")
    with pytest.raises(PotluckError, match=r"policies\.0 is in a list, which only a file changes"):
        with_value(scenario, "policies.0", "ours")
    for text in ("9" * 5000, "[" * 3000 + "]" * 3000):
        with pytest.raises(PotluckError, match="hours is a number, not '"):
            with_value(scenario, "hours", text)


@pytest.mark.parametrize(
    "sweep",
    [
        *("nodes.n.count=1000000000", "hours=1000", "warm_up_seconds=3600", "users.u.requests_per_second=0", "nodes.n.engine.kv_tokens=10"),
        *("users.u.people=3", "name=a/b", "nodes.n.churn.trace=no-such.csv"),
    ],
)
def test_a_sweep_is_held_to_what_a_file_is_before_anything_runs(sweep: str) -> None:
    scenario = parse_scenario(GOOD, "mine.toml")
    key, _, value = sweep.partition("=")
    with pytest.raises(PotluckError) as in_a_file:
        refuse_impossible(with_value(scenario, key, value), "mine.toml")
    with pytest.raises(PotluckError) as swept:
        runs_of(scenario, ["ours"], range(1), [sweep], looks=False)

    words = in_a_file.value.message.removeprefix("mine.toml")
    assert swept.value.message in {f"--sweep {sweep}{words}", words}


def test_values_that_only_fit_together_are_swept_together() -> None:
    sweeps = ["users.u.prompt_tokens=9000", "nodes.n.engine.kv_tokens=20000", "nodes.n.context_tokens=20000"]
    (run,) = runs_of(parse_scenario(GOOD, "mine.toml"), ["ours"], range(1), sweeps, looks=False)
    assert run.scenario.users[0].prompt_tokens == 9000


def test_runs_are_counted_before_they_are_made() -> None:
    values = "hours=" + ",".join(["1"] * 100)
    with pytest.raises(PotluckError, match="These are 1000000000000 runs; 10000 are the most"):
        runs_of(parse_scenario(GOOD, "mine.toml"), ["ours"], range(1), [values] * 6, looks=False)


def test_a_trace_says_who_is_there_and_a_bad_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "homes.csv").write_text("# node, came, left\n0,0,0.05\n1,0.02,0.1\n")
    table = GOOD | {"hours": 0.1, "nodes": [{"name": "n", "count": 2, "engine": ENGINE, "churn": {"trace": "homes.csv"}}]}
    world = World(parse_scenario(table, "mine.toml", tmp_path), "ours", 1)
    world.run()
    assert [round(node.counts.up_seconds) for node in world.nodes] == [180, 288]

    (tmp_path / "homes.csv").write_text("0,0,0.05\n7,0,1\n")
    with pytest.raises(PotluckError, match=r"homes\.csv, line 2: a line is NODE,HOUR IT CAME,HOUR IT LEFT, with a node from 0 to 1"):
        parse_scenario(table, "mine.toml", tmp_path)


def test_a_trace_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    table = GOOD | {"nodes": [{"name": "n", "count": 2, "engine": ENGINE, "churn": {"trace": "homes.csv"}}]}
    for content in (b"\xff\xfe0,0,1", b'0,0,"' + b"1" * 200_000):
        (tmp_path / "homes.csv").write_bytes(content)
        with pytest.raises(PotluckError, match=r"churn\.trace: '.*homes\.csv' cannot be read: .+\."):
            parse_scenario(table, "mine.toml", tmp_path)
