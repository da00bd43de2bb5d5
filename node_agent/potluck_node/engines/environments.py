"""Engines that live in Python environments of their own: those that `potluck node engines install` made, and those that the owner names.

Decides which environments there are, whether one is whole and has its engine in it, and what to do where it has not. It must not import the
engine, nor run its interpreter. Layout, below the cache folder:

    engines/KIND-VERSION-BUILD-NUMBER/                one environment, never moved: its scripts hold their own path
    engines/KIND-VERSION-BUILD-NUMBER/potluck.json    written last; without it, the environment is not whole and not used
    engines/fetched/KIND/                             what package clients keep from one try to the next
    engines/lock                                      held while anything is made or removed here
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import psutil

from potluck_node.domain.engine_environments import EnvironmentName, newest, parse_name
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.private_files import read_json

MARKER: Final = "potluck.json"


@dataclass(frozen=True, slots=True)
class Environment:
    """One that is whole."""

    name: EnvironmentName
    path: Path
    size_bytes: int

    @property
    def python(self) -> Path:
        """Its interpreter, which links to one of the system's; it is gone when that one is."""
        return self.path / "bin" / "python"


def engines_folder(cache_folder: Path) -> Path:
    """Where environments are made."""
    # Absolute, because engines are known by it among the machine's processes.
    return cache_folder.absolute() / "engines"


def environments(folder: Path) -> list[Environment]:
    """Every whole one in an engines' folder."""
    return [
        Environment(name, folder / str(name), size_bytes)
        for name in environment_names(folder)
        if (size_bytes := _marked_bytes(folder / str(name))) is not None
    ]


def environment_names(folder: Path) -> list[EnvironmentName]:
    """Of every folder there, whole or not."""
    try:
        return [name for entry in os.scandir(folder) if (name := parse_name(entry.name)) is not None]
    except FileNotFoundError:
        return []


def chosen_environment(folder: Path, kind: str) -> Environment | None:
    """The one that this node runs engines of a kind from, if it has one whose interpreter is still there."""
    usable = {environment.name: environment for environment in environments(folder) if environment.python.exists()}
    name = newest(usable, kind)
    return usable[name] if name is not None else None


def python_of(kind: str, named: Path | None, cache_folder: Path) -> Path | None:
    """The interpreter for engines of a kind: what the owner names in his settings, else that of the environment made last."""
    if named is not None:
        return named
    environment = chosen_environment(engines_folder(cache_folder), kind)
    return environment.python if environment is not None else None


def processes_from(path: Path) -> list[int]:
    """The ids of the processes that were started with a program or a file of an environment."""
    prefix = f"{path}{os.sep}"
    return sorted(
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if process.pid != os.getpid() and any(word.startswith(prefix) for word in process.info["cmdline"] or ())
    )


@cache  # every status names the version
def installed_version(python: Path, package_pattern: str) -> str:
    """Of a package in an interpreter's environment, by its metadata; empty: there is none. The pattern is a regular expression."""
    metadata = re.compile(rf"(?:{package_pattern})-(?P<version>[^-]+)\.dist-info")
    folders = python.parent.parent.glob("lib*/python3*/site-packages/*.dist-info")
    found = [match["version"] for folder in folders if (match := metadata.fullmatch(folder.name))]
    return found[0] if found else ""


def not_installed(python: Path, kind: str, title: str) -> PotluckError:
    """That there is no such engine in the environment, and how to make one that has it."""
    return PotluckError(
        ErrorCode.INVALID_REQUEST,
        f"There is no {title} in the environment of {python}. To make one that has it: potluck node engines install {kind}; "
        f"it is used where {kind}_python is not set.",
    )


def _marked_bytes(path: Path) -> int | None:
    """What the marker says of an environment's size; None: there is no marker."""
    try:
        size_bytes = read_json(path / MARKER)["size_bytes"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return size_bytes if isinstance(size_bytes, int) else None
