"""`potluck node engines`: which engines this node has, and environments for those that have none yet.

Decides flags, words, and what is asked before gigabytes are fetched. What is installed is `domain.engine_environments`' business, how is
`engine_installation`'s. It must not know uv.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Final

import typer

from potluck_node import engine_installation as installation
from potluck_node.domain.attached import parse_attached
from potluck_node.domain.doctor_host import CARD_ENGINE_KINDS
from potluck_node.domain.engine_environments import KINDS, Recipe, RecipeError, gigabytes, recipe_of
from potluck_node.engines import sglang, vllm
from potluck_node.engines.base import Engine
from potluck_node.engines.environments import Environment, chosen_environment, engines_folder, environments
from potluck_node.engines.llamacpp import LlamaCppEngine
from potluck_node.identity_store import StateFolder
from potluck_node.probe.inventory import take_inventory
from potluck_node.settings import Settings, load_settings
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.interruption import ended_by_signals
from potluck_protocol.observe import configure_logging

_HELP: Final = """The engines of this node: llama.cpp comes with it, vLLM and SGLang get environments of their own.

`potluck node engines install vllm` makes one with uv, several gigabytes large. UV_* variables and uv's own settings say where packages come
from. The agent uses the environment that was made last, unless vllm_python or sglang_python names another.
"""
_ENGINES: Final[Mapping[str, Callable[[Path], Engine]]] = {"vllm": vllm.environment_of, "sglang": sglang.environment_of}

engines_app = typer.Typer(name="engines", help=_HELP, no_args_is_help=True, rich_markup_mode=None)

Kind = Annotated[str, typer.Argument(help="vllm or sglang.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]
StateDir = Annotated[Path | None, typer.Option("--state-dir", help="Where the node's key and settings lie.", show_default=False)]
CacheDir = Annotated[Path | None, typer.Option("--cache-dir", help="Where model files and environments are kept.", show_default=False)]


@dataclass(frozen=True, slots=True)
class EngineLine:
    """One kind of engine, as its owner sees it."""

    kind: str
    installed: bool
    version: str
    python: str
    why: str
    """Why it is not installed, or what else there is to know."""
    fix: str = ""
    """A command, and what comes before it."""
    size_bytes: int = 0
    """Of an environment that was made here; 0: the kind has none, or it is another's."""


@engines_app.command("list")
def list_engines(as_json: AsJson = False, state_dir: StateDir = None, cache_dir: CacheDir = None) -> None:
    """Show each kind of engine: whether this node has it, and what to do where it has not."""
    configure_logging(json=False, level="warning")
    settings = load_settings(state_dir=state_dir, cache_dir=cache_dir)
    lines = engine_lines(settings, has_cards=_has_cards(settings))
    typer.echo(json.dumps([asdict(line) for line in lines], indent=1) if as_json else "\n".join(map(_words, lines)))


@engines_app.command()
def install(
    kind: Kind,
    *,
    version: Annotated[str | None, typer.Option(help="The one that Potluck was made for, if not given.", show_default=False)] = None,
    processors: Annotated[bool, typer.Option("--cpu", help="The build for processors, also on a machine with cards.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before gigabytes are fetched.")] = False,
    as_json: AsJson = False,
    state_dir: StateDir = None,
    cache_dir: CacheDir = None,
) -> None:
    """Make an environment with an engine in it, or mend the one that is there."""
    configure_logging(json=False, level="warning")
    settings = load_settings(state_dir=state_dir, cache_dir=cache_dir)
    recipe = _recipe(kind, settings, processors=processors, version=version)
    began = time.monotonic()
    folder = engines_folder(settings.cache_dir)
    with (
        ended_by_signals(),
        installation.open_workshop(folder, os.environ, live=not as_json and sys.stderr.isatty(), say=_say) as workshop,
    ):
        made = installation.already_installed(workshop, recipe)
        if made is None:
            _say_if_unused(kind, settings)
            _ask_for_disk(recipe, folder, installation.free_bytes(workshop, recipe), yes=yes)
            made = installation.make_environment(workshop, recipe)
        _free_replaced(made, settings)
    facts = {**asdict(made.name), "python": str(made.python), "size_bytes": made.size_bytes, "seconds": round(time.monotonic() - began, 1)}
    words = f"{recipe.words} is installed: {made.python}, {gigabytes(made.size_bytes)}."
    typer.echo(json.dumps(facts, indent=1) if as_json else words)
    _say(_next_step(kind, settings))


@engines_app.command("remove")
def remove_engine(kind: Kind, as_json: AsJson = False, state_dir: StateDir = None, cache_dir: CacheDir = None) -> None:
    """Remove an engine's environments, and what was fetched for them."""
    if kind not in KINDS:
        text = f'"{kind}" is no engine with an environment of its own; those are {" and ".join(KINDS)}. See `potluck node engines list`.'
        raise PotluckError(ErrorCode.INVALID_REQUEST, text)
    settings = load_settings(state_dir=state_dir, cache_dir=cache_dir)
    folder = engines_folder(settings.cache_dir)
    with installation.open_workshop(folder, os.environ, live=False, say=_say) as workshop:
        doomed = [environment for environment in environments(folder) if environment.name.kind == kind]
        if not doomed and not workshop.fetched(kind).exists():
            raise PotluckError(ErrorCode.NOT_FOUND, f"There is no environment of {kind} in {folder}; see `potluck node engines list`.")
        if doomed and _agent_uses(kind, settings):
            text = f"An agent is running on {settings.state_dir}, and starts {kind} from there. Stop it first, then try again."
            raise PotluckError(ErrorCode.ALREADY_EXISTS, text)
        for path, process_ids in installation.in_use(doomed).items():
            text = f"Processes run from {path} (pid {', '.join(map(str, process_ids))}). End them first, then try again."
            raise PotluckError(ErrorCode.ALREADY_EXISTS, text)
        installation.remove(doomed)
        fetched_bytes = installation.forget_fetched(workshop, kind)
    freed_bytes = sum(environment.size_bytes for environment in doomed) + fetched_bytes
    facts = {"kind": kind, "freed_bytes": freed_bytes}
    what = f"{kind} is removed" if doomed else f"{kind} was not installed, and what was fetched for it is removed"
    typer.echo(json.dumps(facts, indent=1) if as_json else f"{what}; {gigabytes(freed_bytes)} are free again.")


def engine_lines(settings: Settings, *, has_cards: bool) -> list[EngineLine]:
    """Every kind of engine, first the one that comes with the node."""
    if find_spec("xllamacpp") is not None:
        llamacpp = EngineLine("llamacpp", True, LlamaCppEngine().version, sys.executable, "comes with the node")
    else:
        fix = "pip install '.[node]' (in the folder of Potluck's sources)"
        llamacpp = EngineLine("llamacpp", False, "", "", "it is not in this Python", fix)
    # Not the whole URL: its path may be secret.
    attached = ", ".join(f"http://{parse_attached(url).place}" for url in settings.attach_urls)
    if attached:
        attach = EngineLine("attach", True, "", "", attached)
    else:
        attach = EngineLine("attach", False, "", "", "no server that runs already is shared", "potluck node run --attach URL")
    return [
        llamacpp,
        _environment_line("vllm", settings.vllm_python, settings, has_cards=has_cards),
        _environment_line("sglang", settings.sglang_python, settings, has_cards=has_cards),
        attach,
    ]


def missing_engine_hint(settings: Settings, *, has_cards: bool) -> str:
    """What to tell an owner whose cards no engine of this node could use; empty: there is one, or there are no cards."""
    lines = engine_lines(settings, has_cards=has_cards)
    if not has_cards or any(line.installed and line.kind in CARD_ENGINE_KINDS for line in lines):
        return ""
    first = "take vllm_python out of your settings, and then: " if settings.vllm_python is not None else ""
    return f"This machine has cards, and no engine that computes on them. To get one: {first}potluck node engines install vllm"


def _environment_line(kind: str, named: Path | None, settings: Settings, *, has_cards: bool) -> EngineLine:
    install_command = _install_command(kind)
    if named is not None:
        try:
            return EngineLine(kind, True, _ENGINES[kind](named).version, str(named), f"named by {kind}_python")
        except PotluckError:
            fix = f"take {kind}_python out of your settings, then: {install_command}"
            return EngineLine(kind, False, "", str(named), f"{kind}_python names it, and there is no {kind} in it", fix)
    folder = engines_folder(settings.cache_dir)
    present = [environment for environment in environments(folder) if environment.name.kind == kind]
    used = chosen_environment(folder, kind)
    if used is not None:
        replaced_bytes = sum(environment.size_bytes for environment in present if environment != used)
        version = f"{kind} {used.name.version} for {used.name.build}"
        if not replaced_bytes:
            return EngineLine(kind, True, version, str(used.python), "", size_bytes=used.size_bytes)
        more = f"and {gigabytes(replaced_bytes)} in what it replaced"
        return EngineLine(kind, True, version, str(used.python), more, install_command, used.size_bytes)
    if present:
        return EngineLine(kind, False, "", "", "the Python that its environment was made with is gone", install_command)
    if kind == "sglang" and not has_cards:
        return EngineLine(kind, False, "", "", "it runs on NVIDIA cards only, and this machine shows none", "potluck node doctor")
    return EngineLine(kind, False, "", "", "not installed", install_command)


def _words(line: EngineLine) -> str:
    """Such as "vllm      vllm 0.32.0 for cards, 9.1 GB, /…/bin/python"."""
    size = gigabytes(line.size_bytes) if line.size_bytes else ""
    facts = ", ".join(filter(None, (line.version, size, line.python if line.python != sys.executable else "", line.why)))
    return f"{line.kind:<9} {'yes' if line.installed else 'no':<4} {facts}" + (f"  → {line.fix}" if line.fix else "")


def _install_command(kind: str) -> str:
    return f"potluck node engines install {kind}"


def _recipe(kind: str, settings: Settings, *, processors: bool, version: str | None) -> Recipe:
    has_cards = _has_cards(settings)
    try:
        recipe = recipe_of(kind, has_cards=has_cards, processors=processors, version=version)
    except RecipeError as error:
        raise PotluckError(ErrorCode.INVALID_REQUEST, str(error)) from None
    if not has_cards and not processors:
        _say("This machine shows no NVIDIA card (`potluck node doctor` says why), so this is the build for processors.")
    return recipe


def _ask_for_disk(recipe: Recipe, folder: Path, free_bytes: int, *, yes: bool) -> None:
    _say(f"{recipe.words} takes about {gigabytes(recipe.installed_bytes)} in {folder}; {gigabytes(free_bytes)} are free there.")
    if yes:
        return
    if not sys.stdin.isatty():
        raise typer.BadParameter("there is nobody to ask here; add --yes")
    if not typer.confirm("Fetch and install it?", default=True, err=True):
        raise typer.Exit(1)


def _free_replaced(made: Environment, settings: Settings) -> None:
    """Removes the environments that are not used any more, except those that an engine may run from."""
    replaced = [other for other in environments(made.path.parent) if other.name.kind == made.name.kind and other != made]
    busy = installation.in_use(replaced)
    agent_runs = _agent_uses(made.name.kind, settings)
    for other in replaced:
        if agent_runs or other.path in busy:
            _say(f"{other.path} may be in use, and stays. When the agent is stopped: {_install_command(made.name.kind)} removes it.")
        else:
            installation.remove([other])


def _say_if_unused(kind: str, settings: Settings) -> None:
    """Before gigabytes are fetched for nothing."""
    if (named := _named(kind, settings)) is not None:
        _say(f"What is installed here is not used as long as {kind}_python names {named}: take that out of your settings.")


def _named(kind: str, settings: Settings) -> Path | None:
    """The Python that the owner's settings name for engines of the kind."""
    return {"vllm": settings.vllm_python, "sglang": settings.sglang_python}.get(kind)


def _next_step(kind: str, settings: Settings) -> str:
    if (named := _named(kind, settings)) is not None:
        return f"It is not used as long as {kind}_python names {named}."
    if StateFolder(settings.state_dir).locked:
        return "The running agent uses it when it is started again."
    return "Next: potluck node run"


def _agent_uses(kind: str, settings: Settings) -> bool:
    """Whether a running agent may start engines of the kind from environments that were made here."""
    return _named(kind, settings) is None and StateFolder(settings.state_dir).locked


def _has_cards(settings: Settings) -> bool:
    return bool(take_inventory(settings.cache_dir).accelerators)


def _say(text: str) -> None:
    typer.echo(text, err=True)
