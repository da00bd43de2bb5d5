"""`potluck simulate …`: a pool in virtual time, with the deciding functions of the real one.

Decides the flags, and what is shown while it runs and at its end. It must not know how a world works, `simulation` does, nor Ray,
`ray_runtime` does.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn

import typer
from typer.core import TyperGroup

from potluck_coordinator.offline_command import application, option, refuse
from potluck_protocol.errors import PotluckError

EXIT_BROKEN: Final = 1
"""An invariant did not hold."""
SEEDS_MAX: Final = 10_000
BAR_STEPS: Final = 1000

app = application("simulate")


class OneScenario(TyperGroup):
    """Has no commands below it, so that a word too many is not one that is unknown."""

    def resolve_command(self, ctx: Any, args: list[str]) -> NoReturn:  # noqa: ARG002 - as Typer calls it
        """Refuses the first word after the scenario."""
        refuse(f"one scenario at a time: {args[0]!r} is a word too many. Policies stand after --policy, other values after --sweep.")


ScenarioName = Annotated[str | None, typer.Argument(help="A scenario of Potluck's own, or a TOML file.", show_default=False)]
Policies = Annotated[list[str] | None, option("Policies, with commas between them or one an option. [those of the scenario]", "--policy")]
Seed = Annotated[int, option("The first seed. [1]")]
Seeds = Annotated[int, option("How many seeds, one after the other from --seed. [1]")]
Sweeps = Annotated[list[str] | None, option("KEY=VALUE,VALUE,…: run it with each value. May be given again.", "--sweep")]
Plots = Annotated[Path | None, option("Folder for the plots, PNG and SVG.", "--plot")]
RayAddress = Annotated[str | None, option("Spread several runs over this Ray cluster. [a Ray of their own on this machine]")]
Listing = Annotated[bool, typer.Option("--list", help="List the scenarios that come with Potluck.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.callback(cls=OneScenario)
def simulate(  # noqa: PLR0917 - a command's parameters are its flags
    scenario: ScenarioName = None,
    policies: Policies = None,
    seed: Seed = 1,
    seeds: Seeds = 1,
    sweeps: Sweeps = None,
    plot: Plots = None,
    ray_address: RayAddress = None,
    listing: Listing = False,
    as_json: Json = False,
) -> None:
    """Play a pool through in virtual time: nodes with caches, heat and home lines, users, and what goes wrong.

    potluck simulate --list

    potluck simulate quad-3090-unlimited --plot plots

    potluck simulate my-pool.toml --policy ours --seeds 20

    potluck simulate flood --sweep users.flooder.requests_per_second=5,10,20 --json

    The pool's own policy runs the same deciding functions as a coordinator. Several runs are spread over this machine's processors, or a
    cluster, by Ray. What a scenario can say, and what the model leaves out, is in docs/simulator.md.

    Exit codes: 0 done, 1 an invariant was broken, 2 wrong usage.
    """
    # `--help` need not wait for it.
    from potluck_coordinator.simulation import plots, report, runs, scenario_file  # noqa: PLC0415

    try:
        if listing or scenario is None:
            _list(scenario_file, as_json=as_json, asked=listing)
            return
        if not 1 <= seeds <= SEEDS_MAX:
            refuse(f"--seeds is from 1 to {SEEDS_MAX}.")
        found = scenario_file.load_scenario(scenario)
        names = _policies(policies or found.policies)
        wanted = runs.runs_of(found, names, range(seed, seed + seeds), sweeps or (), looks=plot is not None)
        if plot is not None:
            plots.prepare(plot)
        with _bar(found.name, len(wanted)) as progress:
            results = runs.carry_out(wanted, partial(_spread, ray_address), progress)
    except PotluckError as error:
        refuse(error.message)
    if as_json:
        typer.echo(json.dumps([{"changes": dict(each.run.changes)} | each.figures.as_json() for each in results], indent=2))
    else:
        typer.echo(f"{found.name}: {found.about}" if found.about else found.name)
        typer.echo(f"{found.hours:g} h, {sum(one.count for one in found.nodes)} nodes, {seeds} seed{'s' if seeds > 1 else ''}\n")
        typer.echo("\n".join(report.table(results)))
    if plot is not None:
        try:
            pictures = plots.draw(results, plot)
        except PotluckError as error:
            refuse(error.message)
        if not as_json:
            typer.echo("\n".join(f"wrote {path}" for path in pictures))
    if any(each.figures.break_counts for each in results):
        raise typer.Exit(EXIT_BROKEN)


def _policies(words: Sequence[str]) -> list[str]:
    from potluck_coordinator.simulation.policies import NAMES  # noqa: PLC0415 - as above

    names = [name.strip() for word in words for name in word.split(",") if name.strip()]
    unknown = [name for name in names if name not in NAMES]
    if unknown or not names:
        refuse(f"--policy is of {', '.join(NAMES)}, not {', '.join(unknown) or 'nothing'}.")
    return list(dict.fromkeys(names))


def _list(scenario_file: Any, *, as_json: bool, asked: bool) -> None:
    known = [(name, scenario_file.load_scenario(name).about) for name in scenario_file.scenario_names()]
    if as_json:
        typer.echo(json.dumps([{"name": name, "about": about} for name, about in known], indent=2))
        return
    width = max(len(name) for name, _ in known)
    typer.echo("\n".join(f"{name.ljust(width)}  {about}" for name, about in known))
    if not asked:
        refuse("say which scenario, or give the path of a TOML file.")


def _spread(ray_address: str | None, function: Callable[[Any], Any], inputs: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    # Ray takes seconds to import, and one run does without.
    from potluck_coordinator.ray_runtime import spread  # noqa: PLC0415

    return spread(function, inputs, ray_address)


@contextmanager
def _bar(label: str, run_count: int) -> Iterator[Callable[[float], None]]:
    """A bar on standard error, where somebody looks at it."""
    words = label if run_count == 1 else f"{label}, {run_count} runs"
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    with typer.progressbar(length=BAR_STEPS, label=words, file=sys.stderr) as bar:
        done = 0

        def progress(share: float) -> None:
            nonlocal done
            steps = round(share * BAR_STEPS) - done
            if steps > 0:
                done += steps
                bar.update(steps)

        yield progress
