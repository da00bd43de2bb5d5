"""What `docs/simulator.md` says is typed and written as it says."""

from __future__ import annotations

import shlex
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from potluck_coordinator import simulate_command
from potluck_coordinator.simulation import scenario_file
from potluck_coordinator.simulation.scenario_file import parse_scenario, scenario_names
from potluck_coordinator.simulation.world import World
from tests.support.readme import blocks

PAGE = Path(__file__).resolve().parents[2] / "docs/simulator.md"


def block(language: str) -> str:
    (found,) = [block for block in blocks(PAGE) if block.language == language and block.mark.startswith("tested by tests/simulation")]
    return found.text


def commands() -> list[str]:
    return [line for line in block("").splitlines() if line]


@pytest.mark.parametrize("command", commands())
def test_every_command_of_the_page_is_understood(command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "my-pool.toml").write_text(block("toml"))
    monkeypatch.chdir(tmp_path)
    load = scenario_file.load_scenario
    # A minute of each, one after the other in this process: how runs are spread is shown elsewhere.
    monkeypatch.setattr(scenario_file, "load_scenario", lambda name: replace(load(name), hours=1 / 60, warm_up_seconds=0.0))
    monkeypatch.setattr(simulate_command, "_spread", lambda _, function, inputs: ((n, function(one)) for n, one in enumerate(inputs)))

    name, sub_command, *words = shlex.split(command)
    result = CliRunner().invoke(simulate_command.app, words)

    assert (name, sub_command) == ("potluck", "simulate")
    assert result.exit_code == 0, result.output


def test_the_scenario_of_the_page_can_be_played() -> None:
    scenario = replace(parse_scenario(tomllib.loads(block("toml")), "my-pool.toml"), hours=0.1)
    assert World(scenario, "ours", 1).run().served_count > 5


def test_the_page_names_every_scenario_that_comes_with_potluck() -> None:
    rows = {line.split("`")[1] for line in PAGE.read_text().splitlines() if line.startswith("| `")}
    assert set(scenario_names()) <= rows
