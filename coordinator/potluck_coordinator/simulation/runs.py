"""Which worlds a command makes: every combination of policies, seeds and changed values, and what becomes of them.

Decides that one world runs here and several run beside each other, by whatever `spread` it is given. It must not know Ray.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Final

from potluck_coordinator.simulation.figures import Figures
from potluck_coordinator.simulation.scenario import Scenario
from potluck_coordinator.simulation.scenario_checks import refuse_impossible
from potluck_coordinator.simulation.scenario_file import with_value
from potluck_coordinator.simulation.world import Progress, World
from potluck_protocol.errors import ErrorCode, PotluckError

RUNS_MAX: Final = 10_000


@dataclass(frozen=True, slots=True)
class Run:
    """One world that is to be."""

    scenario: Scenario
    policy: str
    seed: int
    changes: tuple[tuple[str, str], ...] = ()
    """What the sweep has changed of the scenario: key and value."""
    looks: bool = False
    """Whether the points of plots are wanted."""


@dataclass(frozen=True, slots=True)
class Result:
    """What it came to."""

    run: Run
    figures: Figures


Spread = Callable[[Callable[[Run], Figures], Sequence[Run]], Iterator[tuple[int, Figures]]]
"""Calls the function with every run, in processes of their own; numbers and results as they come."""


def runs_of(scenario: Scenario, policies: Sequence[str], seeds: Sequence[int], sweeps: Sequence[str], *, looks: bool) -> list[Run]:
    """Every combination.

    Raises:
        PotluckError: INVALID_REQUEST; a sweep that is none, a scenario that could not be as a file either, or too many runs.
    """
    keys: list[tuple[str, list[str]]] = []
    for sweep in sweeps:
        key, sign, values = sweep.partition("=")
        told = [value.strip() for value in values.split(",") if value.strip()]
        if not sign or not told:
            raise PotluckError(ErrorCode.INVALID_REQUEST, f"--sweep is KEY=VALUE,VALUE,… such as hours=1,2, not {sweep!r}.")
        keys.append((key.strip(), told))
    run_count = math.prod(len(told) for _, told in keys) * len(policies) * len(seeds)
    if run_count > RUNS_MAX:
        raise PotluckError(ErrorCode.INVALID_REQUEST, f"These are {run_count} runs; {RUNS_MAX} are the most.")
    runs: list[Run] = []
    for chosen in product(*(told for _, told in keys)):
        changes = tuple((key, value) for (key, _), value in zip(keys, chosen, strict=True))
        changed = scenario
        for key, value in changes:
            changed = with_value(changed, key, value)
        if changes:
            refuse_impossible(changed, "--sweep " + " ".join(f"{key}={value}" for key, value in changes))
        runs += [Run(changed, policy, seed, changes, looks) for policy in policies for seed in seeds]
    return runs


def figures_of_run(run: Run, progress: Progress | None = None) -> Figures:
    """One world, from its beginning to its end."""
    figures = World(run.scenario, run.policy, run.seed).run(progress)
    return figures if run.looks else replace(figures, looks=())


def carry_out(runs: Sequence[Run], spread: Spread, progress: Progress) -> list[Result]:
    """All of them, in their order."""
    if len(runs) == 1:
        return [Result(runs[0], figures_of_run(runs[0], progress))]
    found: dict[int, Figures] = {}
    for number, figures in spread(figures_of_run, runs):
        found[number] = figures
        progress(len(found) / len(runs))
    return [Result(run, found[number]) for number, run in enumerate(runs)]
