"""Which node of this machine the owner's commands speak to where none is named.

Decides it between the two places where one may be: the usual one, and that of `potluck up`. The one that runs is meant, and the usual one
where both do or neither does; whoever reads is told where another could be meant. A folder that flag, variable or file names is taken as it
is. Each node keeps its files in its own folder, and nothing is written down about where. It must not know what the commands do.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

import platformdirs
import typer

from potluck_node.identity_store import StateFolder
from potluck_node.settings import NodePlace, Settings, load_place, load_settings
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.places import LOCAL_POOL_FOLDER, NODE_FOLDER, STATE_FOLDER


@dataclass(frozen=True, slots=True)
class Place:
    """A folder where a node may be, as it was found."""

    path: Path
    joined: bool
    running: bool


def meant(usual: Place, local_pools: Place) -> tuple[Place, str]:
    """The node that is meant, and what is to be said of that; empty where nobody could have meant another."""
    if local_pools.running and not usual.running:
        other = f" The one in {usual.path} does not run; it is meant with {_flag(usual)}." if usual.joined else ""
        return local_pools, f"This is the node of `potluck up`, in {local_pools.path}.{other}"
    if local_pools.running:
        return usual, f"This is the node in {usual.path}. That of `potluck up` runs, too; it is meant with {_flag(local_pools)}."
    return usual, ""


def settings_of_node_meant(state_dir: Path | None, *, only_joined: bool = True) -> Settings:
    """The settings, with the folder of the node that is meant; says on standard error which that is, where it could be another.

    Args:
        state_dir: as it was typed.
        only_joined: whether a place that holds no node is of no use.

    Raises:
        PotluckError: NOT_FOUND where only `potluck up` has a node here, and it does not run; and as `load_settings`.
    """
    settings = load_settings(state_dir=state_dir)
    return settings.model_copy(update={"state_dir": _folder_meant(settings, only_joined=only_joined)})


def folder_of_node_meant(state_dir: Path | None) -> StateFolder:
    """The same for what needs the folder only: a slip in another setting is told of, and keeps nobody from their own machine."""
    try:
        place: NodePlace = load_settings(state_dir=state_dir)
    except PotluckError as error:
        typer.echo(f"warning: {error.message}", err=True)
        place = load_place(state_dir)
    return StateFolder(_folder_meant(place, only_joined=True))


def settings_of_node_named(state_dir: Path | None) -> Settings:
    """The settings, for what cannot be taken back: the node of `potluck up` has to be named; raises PotluckError as the other."""
    settings = load_settings(state_dir=state_dir)
    usual, local_pools = _places(settings)
    if local_pools is not None and local_pools.joined and not usual.joined:
        raise _not_joined(usual, f"For the node of `potluck up`, name it with {_flag(local_pools)}.")
    return settings


def _folder_meant(settings: NodePlace, *, only_joined: bool) -> Path:
    usual, local_pools = _places(settings)
    if local_pools is None:
        return usual.path
    place, words = meant(usual, local_pools)
    if only_joined and local_pools.joined and not place.joined:
        raise _not_joined(usual, f"The node of `potluck up` does not run: start it so, or name it with {_flag(local_pools)}.")
    if words:
        typer.echo(words, err=True)
    return place.path


def _places(settings: NodePlace) -> tuple[Place, Place | None]:
    """The place that the settings name, and that of `potluck up`, unless somebody named one."""
    usual = _place(settings.state_dir)
    if "state_dir" in settings.model_fields_set:
        return usual, None
    return usual, _place(platformdirs.user_state_path(STATE_FOLDER) / LOCAL_POOL_FOLDER / NODE_FOLDER)


def _place(path: Path) -> Place:
    """One that this user may not look into is no node of his."""
    folder = StateFolder(path)
    try:
        return Place(path, folder.joined, folder.locked)
    except OSError:
        return Place(path, joined=False, running=False)


def _flag(place: Place) -> str:
    return f"--state-dir {shlex.quote(str(place.path))}"


def _not_joined(usual: Place, fix: str) -> PotluckError:
    return PotluckError(ErrorCode.NOT_FOUND, f"This machine has not joined a pool ({usual.path} holds no node). {fix}")
