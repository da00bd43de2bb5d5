"""`potluck simulate` as it is typed: the table, the JSON, the plots, the exit codes, and runs that are spread over processors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from potluck_coordinator.offline_command import EXIT_USAGE
from potluck_coordinator.simulate_command import app
from potluck_coordinator.simulation import world
from potluck_coordinator.simulation.invariants import Invariant

INTERRUPTED = 130
SMALL = """
about = "Two nodes for three minutes."
hours = 0.05
policies = ["least-connections", "ours"]

[[nodes]]
name = "home"
count = 2
[nodes.engine]
prefill_tokens_per_second = 2500
step_seconds = 0.02
step_seconds_per_answer = 0.001
kv_tokens = 20000

[[users]]
name = "people"
account_count = 3
requests_per_second = 1
"""


@pytest.fixture
def scenario(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return path


def run(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_one_run_prints_a_line_for_its_policy(scenario: Path) -> None:
    result = run(scenario, "--policy", "ours")

    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert lines[0] == "small: Two nodes for three minutes."
    assert lines[3].split()[:4] == ["POLICY", "ASKED", "SERVED", "REFUSED"]
    assert lines[4].startswith("ours ")
    assert lines[4].split()[-1] == "0"


def test_json_holds_every_figure(scenario: Path) -> None:
    (found,) = json.loads(run(scenario, "--policy", "ours", "--seed", 7, "--json").output)

    assert (found["policy"], found["seed"], found["changes"]) == ("ours", 7, {})
    assert found["asked_count"] >= found["served_count"] > 100
    assert found["users"]["people"]["first_token_seconds"]["p50"] > 0
    assert found["break_counts"] == {}


def test_plots_are_written_as_png_and_svg(scenario: Path, tmp_path: Path) -> None:
    result = run(scenario, "--policy", "ours", "--plot", tmp_path / "plots")

    assert result.exit_code == 0
    assert (tmp_path / "plots/small.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "plots/small.svg").read_text()
    assert f"wrote {tmp_path / 'plots/small.svg'}" in result.output


@pytest.mark.parametrize("folder", ["/proc/no-such", "small.toml"])
def test_plots_that_cannot_be_written_are_refused_before_anything_runs(
    folder: str, scenario: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(scenario.parent)
    monkeypatch.setattr(world.World, "run", lambda *_: pytest.fail("it ran"))
    result = run(scenario, "--policy", "ours", "--plot", folder)
    assert result.exit_code == EXIT_USAGE
    assert f"Plots cannot be written to {folder}: " in result.output


def test_without_matplotlib_nothing_runs_for_plots(scenario: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(world.World, "run", lambda *_: pytest.fail("it ran"))
    result = run(scenario, "--policy", "ours", "--plot", scenario.parent / "plots")
    assert result.exit_code == EXIT_USAGE
    assert "pip install 'potluck[simulation]'" in result.output


@pytest.mark.parametrize("words", [[], ["--json"]], ids=["table", "json"])
def test_what_was_run_is_printed_even_if_its_plots_cannot_be_written_after_all(words: list[str], scenario: Path, tmp_path: Path) -> None:
    for suffix in ("png", "svg"):
        (tmp_path / f"small.{suffix}").mkdir()
    result = run(scenario, "--policy", "ours", "--plot", tmp_path, *words)
    assert result.exit_code == EXIT_USAGE
    assert "Plots cannot be written to" in result.output
    assert (json.loads(result.stdout)[0]["served_count"] > 100) if words else ("\nours " in result.stdout)


def test_a_scenario_may_be_about_dollars(scenario: Path, tmp_path: Path) -> None:
    scenario.write_text(SMALL.replace("Two nodes", "Between $5_{ and $6: two nodes"))
    assert run(scenario, "--policy", "ours", "--plot", tmp_path / "plots").exit_code == 0


def test_the_same_run_gives_the_same_json_but_for_the_time_that_it_took(scenario: Path) -> None:
    one, other = (json.loads(run(scenario, "--policy", "ours", "--json").output)[0] for _ in range(2))
    timing = one.pop("timing")
    other.pop("timing")
    assert sorted(timing) == ["cpu_seconds", "wall_seconds"]
    assert one == other


def test_several_runs_are_spread_and_come_back_in_their_order(scenario: Path) -> None:
    result = run(scenario, "--seeds", 2, "--sweep", "users.people.requests_per_second=1,2", "--json")

    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert [(each["changes"]["users.people.requests_per_second"], each["policy"], each["seed"]) for each in found] == [
        (rate, policy, seed) for rate in ("1", "2") for policy in ("least-connections", "ours") for seed in (1, 2)
    ]
    # What ran elsewhere is what runs here.
    (here,) = json.loads(run(scenario, "--policy", "ours", "--seed", 2, "--json").output)
    there = next(each for each in found if (each["policy"], each["seed"]) == ("ours", 2))
    assert (there["served_count"], there["answer_tokens"]) == (here["served_count"], here["answer_tokens"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["no-such"], "There is no scenario 'no-such', and no such file. Those that come with Potluck: evening-peak"),
        (["flood", "--policy", "best"], "--policy is of round-robin"),
        (["flood", "--sweep", "hours"], "--sweep is KEY=VALUE,VALUE"),
        (["flood", "--sweep", "houres=1"], "houres: there is no 'houres'; do you mean hours?"),
        (["flood", "--seeds", "0"], "--seeds is from 1 to"),
        (["flood", "--sweep", "nodes.0.count=1000000000"], "--sweep nodes.0.count=1000000000: a world has up to 100000 nodes"),
        (["flood", "--sweep", "hours.x=1"], "hours.x: what stands before .x is a value"),
        (["flood", "heatwave"], "one scenario at a time: 'heatwave' is a word too many. Policies stand after --policy"),
        (["x" * 300], f"{'x' * 300} cannot be read: "),
    ],
)
def test_wrong_usage_is_exit_code_2_and_says_what_is_wrong(words: list[str], said: str) -> None:
    result = run(*words)
    assert result.exit_code == EXIT_USAGE
    assert said in result.output


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("hours = = 1", "bad.toml is not TOML: "),
        ("hours = " + "[" * 3000 + "]" * 3000, "bad.toml is not TOML that can be read: its brackets are nested too deeply."),
        ("about = 'long'\nhours = " + "9" * 5000, "bad.toml, line 2: a number has too many digits."),
        (SMALL.replace("0.05", "1" + "0" * 400), "bad.toml: hours is no more than 1e+12, not 1000"),
    ],
    ids=["wrong", "nested", "digits", "huge"],
)
def test_a_file_that_cannot_be_read_is_named_in_a_sentence(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text(content)
    result = run(tmp_path / "bad.toml")
    assert result.exit_code == EXIT_USAGE
    assert said in result.output


def test_the_list_names_every_scenario() -> None:
    assert [each["name"] for each in json.loads(run("--list", "--json").output)][:2] == ["evening-peak", "five-thousand-nodes"]
    assert run().exit_code == EXIT_USAGE


def test_a_broken_invariant_is_exit_code_1_and_in_the_output(scenario: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = world.World.run

    def broken(self, progress=None):
        self.invariants.break_of(Invariant.TOKEN_LOST, "planted", 0.0)
        return begin(self, progress)

    monkeypatch.setattr(world.World, "run", broken)
    result = run(scenario, "--policy", "ours")
    assert result.exit_code == 1
    assert "not so: no token is lost: planted" in result.output


@pytest.mark.parametrize("sign", ["potluck-simulate-*", "potluck-simulate-*/r/session_*/logs/worker-*.out"], ids=["starting", "running"])
def test_ctrl_c_ends_a_spread_run_and_leaves_nothing(sign: str, tmp_path: Path) -> None:
    long = tmp_path / "long.toml"
    long.write_text(SMALL.replace("hours = 0.05", "hours = 20"))
    # Ray's sockets need a short path.
    with tempfile.TemporaryDirectory(prefix="pls-", dir="/tmp") as home:
        interrupt_and_look(long, Path(home), sign)


def interrupt_and_look(long: Path, home: Path, sign: str) -> None:
    command = [sys.executable, "-c", "from potluck.command import main; main()", "simulate", str(long), "--seeds", "4"]
    process = subprocess.Popen(command, env=os.environ | {"TMPDIR": str(home)}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not list(home.glob(sign)) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, words = process.communicate(timeout=60)

    assert process.returncode == INTERRUPTED, words
    assert not list(home.glob("potluck-simulate-*"))
