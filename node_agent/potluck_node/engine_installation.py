"""Makes environments for engines with uv, and removes them.

Decides in which order, so that what is cut off is never taken for whole: an environment is built where it stays, and its marker is written
last. A new one stands beside the one that engines run from. uv's downloads are kept beside them until they are of use: a second try goes on
from there, and afterwards they take no space. It must not know which engines there are, nor ask anybody anything.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from potluck_node.domain.engine_environments import Recipe, next_name, package_settings, space_refusal
from potluck_node.engines.environments import (
    MARKER,
    Environment,
    chosen_environment,
    environment_names,
    environments,
    processes_from,
)
from potluck_node.model_store.download import folder_bytes
from potluck_node.model_store.sources import client_environment
from potluck_node.probe.disk import disk_free_bytes
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.private_files import write_private

FAILURE_LINES: Final = 12
PROBE_LIMIT_SECONDS: Final = 600.0
"""For the first import of an engine, which compiles it, on a slow disk."""
STOP_LIMIT_SECONDS: Final = 5.0
"""For uv to end when it is asked to."""
_OF_THIS_INTERPRETER: Final = frozenset({"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"})


@dataclass(frozen=True, slots=True)
class Workshop:
    """An engines' folder, held by this process alone. `open_workshop` gives one.

    Args:
        folder: see `engines.environments`.
        lock: its lock's descriptor. What this process starts holds it as well: uv may outlive a killed command.
        environment: this process's.
        live: uv speaks to the terminal itself; else it is silent, and its last words stand in the failure.
        say: takes a line for the person.
    """

    folder: Path
    lock: int
    environment: Mapping[str, str]
    live: bool
    say: Callable[[str], None]

    def fetched(self, kind: str) -> Path:
        """What uv keeps from one try to install an engine of the kind to the next."""
        return self.folder / "fetched" / kind


@contextmanager
def open_workshop(folder: Path, environment: Mapping[str, str], *, live: bool, say: Callable[[str], None]) -> Iterator[Workshop]:
    """Holds an engines' folder, and clears what earlier tries left unfinished; raises PotluckError(ALREADY_EXISTS) where another has it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            text = f"Another `potluck node engines` command, or the uv that it started, is at work in {folder}; wait for its end."
            raise PotluckError(ErrorCode.ALREADY_EXISTS, text) from None
        whole = {environment.name for environment in environments(folder)}
        for name in set(environment_names(folder)) - whole:
            shutil.rmtree(folder / str(name), ignore_errors=True)
        yield Workshop(folder, lock, environment, live, say)
    finally:
        os.close(lock)


def already_installed(workshop: Workshop, recipe: Recipe) -> Environment | None:
    """The environment that the recipe would make, where it is in use and its engine can still be imported."""
    current = chosen_environment(workshop.folder, recipe.kind)
    if current is None or (current.name.version, current.name.build) != (recipe.version, recipe.build):
        return None
    if failure := _probe_failure(workshop, current.python, recipe):
        workshop.say(f"{current.path} is broken, and made anew: {failure.splitlines()[-1]}")
        return None
    return current


def free_bytes(workshop: Workshop, recipe: Recipe) -> int:
    """What is free for an environment; raises PotluckError(INVALID_REQUEST) with both numbers where it is too little."""
    found_bytes = disk_free_bytes(workshop.folder)
    if refusal := space_refusal(recipe, found_bytes, folder_bytes(workshop.fetched(recipe.kind))):
        text = f"{refusal} where {workshop.folder} is. Free some, or name a folder of another disk with --cache-dir, here and for `run`."
        raise PotluckError(ErrorCode.INVALID_REQUEST, text)
    return found_bytes


def make_environment(workshop: Workshop, recipe: Recipe) -> Environment:
    """Makes one. Cut off by whatever exception, nothing of it is left but what uv fetched.

    Raises:
        PotluckError: NOT_FOUND where there is no uv, ENGINE_FAILED where something cannot be installed or does not fit together.
    """
    name = next_name(recipe, environment_names(workshop.folder))
    path = workshop.folder / str(name)
    python = path / "bin" / "python"
    into = ("--python", str(python))
    try:
        workshop.say(f"Makes {path}.")
        _uv(workshop, recipe, "venv", "--quiet", "--python", sys.executable, str(path))
        workshop.say(f"Fetches and installs {recipe.requirement}.")
        _uv(workshop, recipe, "pip", "install", *into, recipe.requirement)
        if recipe.removed:
            _uv(workshop, recipe, "pip", "uninstall", *into, *recipe.removed)
        _check_import(workshop, python, recipe)
        size_bytes = folder_bytes(path)
        # The marker must not outlive, in a power cut, what it vouches for.
        os.sync()
        write_private(path / MARKER, json.dumps({"size_bytes": size_bytes}).encode())
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise
    forget_fetched(workshop, recipe.kind)
    return Environment(name, path, size_bytes)


def remove(doomed: Iterable[Environment]) -> None:
    """Removes environments, each of which is no longer whole from the first moment on."""
    for environment in doomed:
        (environment.path / MARKER).unlink(missing_ok=True)
        shutil.rmtree(environment.path, ignore_errors=True)


def forget_fetched(workshop: Workshop, kind: str) -> int:
    """Removes what uv keeps for another try with an engine of the kind; how many bytes."""
    fetched = workshop.fetched(kind)
    size_bytes = folder_bytes(fetched)
    shutil.rmtree(fetched, ignore_errors=True)
    with suppress(OSError):  # another's lies there, or nothing
        fetched.parent.rmdir()
    return size_bytes


def in_use(doomed: Iterable[Environment]) -> dict[Path, list[int]]:
    """The environments that processes run from, with their ids."""
    found = {environment.path: processes_from(environment.path) for environment in doomed}
    return {path: process_ids for path, process_ids in found.items() if process_ids}


def _check_import(workshop: Workshop, python: Path, recipe: Recipe) -> None:
    workshop.say(f"Tries whether {recipe.title} can be imported.")
    if failure := _probe_failure(workshop, python, recipe):
        raise PotluckError(ErrorCode.ENGINE_FAILED, f"{recipe.words} was installed and cannot be imported:\n{failure}")


def _uv(workshop: Workshop, recipe: Recipe, *words: str) -> None:
    own = {name: value for name, value in client_environment(workshop.environment).items() if name not in _OF_THIS_INTERPRETER}
    # Downloads lie on the disk that was asked about, from where uv links them into the environment.
    settings = {"UV_CACHE_DIR": str(workshop.fetched(recipe.kind))} | own | package_settings(recipe, own)
    status, output = _run(workshop, (*_uv_program(own), *words), settings, live=workshop.live)
    if status:
        last_words = "Its words are above." if workshop.live else _tail(output)
        text = f"uv could not make the environment of {recipe.words} ({_ending(status)}).\n{last_words}\n"
        raise PotluckError(ErrorCode.ENGINE_FAILED, text + "What it fetched is kept: the same command goes on from there.")


def _uv_program(environment: Mapping[str, str]) -> tuple[str, ...]:
    if find_spec("uv") is not None:
        return sys.executable, "-P", "-m", "uv"
    if (found := shutil.which("uv", path=environment.get("PATH"))) is not None:
        return (found,)
    text = f"uv, which makes environments for engines, is not here. Install it: {sys.executable} -m pip install uv"
    raise PotluckError(ErrorCode.NOT_FOUND, text)


def _probe_failure(workshop: Workshop, python: Path, recipe: Recipe) -> str:
    """The last words of an interpreter that cannot import the engine; empty: it can."""
    own = {name: value for name, value in client_environment(workshop.environment).items() if name not in _OF_THIS_INTERPRETER}
    try:
        status, output = _run(workshop, (str(python), "-P", "-c", f"import {recipe.probe_module}"), own, limit_seconds=PROBE_LIMIT_SECONDS)
    except OSError as error:
        return str(error)
    except subprocess.TimeoutExpired:
        return f"it takes longer than {PROBE_LIMIT_SECONDS:.0f} s"
    return (_tail(output) or _ending(status)) if status else ""


def _run(
    workshop: Workshop, command: tuple[str, ...], environment: Mapping[str, str], *, live: bool = False, limit_seconds: float | None = None
) -> tuple[int, str]:
    """Runs a command to its end: its exit status and, unless it spoke to the terminal, its output. Nothing of it outlives an exception."""
    process = subprocess.Popen(
        command,
        cwd=workshop.folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        # Standard output is for results.
        stdout=sys.stderr.fileno() if live else subprocess.PIPE,
        stderr=None if live else subprocess.STDOUT,
        start_new_session=True,
        pass_fds=(workshop.lock,),
    )
    try:
        output, _ = process.communicate(timeout=limit_seconds)
    except BaseException:
        _end(process)
        raise
    return process.returncode, (output or b"").decode(errors="replace")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Of a process and everything in its group: what uv builds, it builds with processes of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_LIMIT_SECONDS)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _tail(output: str) -> str:
    return "\n".join([line for line in output.splitlines() if line.strip()][-FAILURE_LINES:])


def _ending(status: int) -> str:
    return f"exit status {status}" if status > 0 else f"signal {signal.Signals(-status).name}"
