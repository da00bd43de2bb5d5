"""Which pool a command talks to, and with which key.

Decides the order: options, then POTLUCK_URL and POTLUCK_API_KEY, then the operator's file of a coordinator on this machine. A key is never
taken from the command line itself, where other people of the machine could read it, and the operator's key goes to the operator's own
coordinator only.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Final

import typer

from potluck.address import API_KEY_VARIABLE, URL_VARIABLE, PoolAddress, pool_address, pool_url
from potluck.errors import NotPermittedError, PoolError, pool_error
from potluck.transport import Transport
from potluck_protocol.errors import ErrorCode
from potluck_protocol.places import LOCAL_POOL_FOLDER, STATE_FOLDER
from potluck_protocol.private_files import read_json

DATA_DIR_VARIABLE: Final = "POTLUCK_COORDINATOR_DATA_DIR"

UrlOption = Annotated[
    str | None, typer.Option("--url", help=f"The pool, as its coordinator prints it. Else {URL_VARIABLE}, else the one on this machine.")
]
KeyFileOption = Annotated[
    Path | None,
    typer.Option("--api-key-file", help=f"A file with your API key. Else {API_KEY_VARIABLE}, else the operator's on this machine."),
]


def state_home() -> Path:
    """`$XDG_STATE_HOME`, by the XDG rule that an unset or relative one means `~/.local/state`."""
    base = os.environ.get("XDG_STATE_HOME", "")
    return Path(base) if base.startswith("/") else Path.home() / ".local" / "state"


def coordinator_folders() -> tuple[Path, ...]:
    """Where a coordinator of this machine may keep its data: its own folder, and the one of `potluck up`."""
    chosen = os.environ.get(DATA_DIR_VARIABLE, "")
    if chosen:
        return (Path(chosen),)
    return state_home() / STATE_FOLDER / "coordinator", local_pool_folder() / "coordinator"


def local_pool_folder() -> Path:
    """Where `potluck up` keeps its state."""
    return state_home() / STATE_FOLDER / LOCAL_POOL_FOLDER


def local_operator() -> PoolAddress | None:
    """The operator's address on this machine, of a coordinator that runs if there is one; None if none ever ran."""
    folders = [folder for folder in coordinator_folders() if (folder / "operator.json").is_file()]
    folders.sort(key=lambda folder: not (folder / "endpoints.json").is_file())
    return read_operator(folders[0]) if folders else None


def read_operator(data_folder: Path) -> PoolAddress:
    """The address in a coordinator's data folder; raises NotPermittedError where this person may not read it."""
    path = data_folder / "operator.json"
    try:
        fields = read_json(path)
        return PoolAddress(str(fields["url"]), str(fields["api_key"]))
    except PermissionError as error:
        raise pool_error(
            ErrorCode.PERMISSION_DENIED, f"{path} belongs to another person; set {URL_VARIABLE} and {API_KEY_VARIABLE}."
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"it lacks {error}" if isinstance(error, KeyError) else error
        fix = f"The coordinator writes it anew when it starts; or set {URL_VARIABLE} and {API_KEY_VARIABLE}."
        raise pool_error(ErrorCode.NOT_FOUND, f"{path} cannot be read: {why}. {fix}") from error


def address(url: str | None, api_key_file: Path | None) -> PoolAddress:
    """The pool and key for a command; raises a `PoolError` that names what is missing."""
    wanted_url = url or os.environ.get(URL_VARIABLE) or None
    if wanted_url is not None:
        wanted_url = pool_url(wanted_url)
    api_key = _file_key(api_key_file) if api_key_file else os.environ.get(API_KEY_VARIABLE) or None
    if wanted_url is None or api_key is None:
        operator = local_operator()
        if operator is not None and wanted_url in {None, operator.url}:
            return pool_address(operator.url, api_key or operator.api_key)
        if wanted_url is None:
            message = f"No pool is named: pass --url or set {URL_VARIABLE}, or start one on this machine with `potluck up`."
            raise pool_error(ErrorCode.INVALID_REQUEST, message)
        fix = f"pass --api-key-file or set {API_KEY_VARIABLE}; the pool's operator makes keys with `potluck keys create`."
        raise pool_error(ErrorCode.INVALID_API_KEY, f"No API key for {wanted_url}: {fix}")
    return pool_address(wanted_url, api_key)


@contextmanager
def connected(url: str | None, api_key_file: Path | None) -> Iterator[Transport]:
    """A transport to the pool, closed at the end. A refusal of the key says where the operator's may be."""
    found = address(url, api_key_file)
    transport = Transport(found)
    try:
        yield transport
    except NotPermittedError as error:
        message = f"{error.message} {_operators_key_hint(found)}"
        raise pool_error(error.code, message, param=error.param, request_id=error.request_id) from error
    finally:
        transport.close()


def _operators_key_hint(refused: PoolAddress) -> str:
    """Where the operator's key to the same pool lies, on this machine or another."""
    for folder in coordinator_folders():
        with suppress(PoolError):
            operator = read_operator(folder)
            if operator.url == refused.url and operator.api_key != refused.api_key:
                return f"The operator's key is in {folder / 'operator.json'}; without {API_KEY_VARIABLE} and --api-key-file it is used."
    return "What only an operator may do is typed on the coordinator's machine, or with --api-key-file and a file of the operator's key."


def _file_key(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise pool_error(ErrorCode.INVALID_API_KEY, f"The API key file {path} cannot be read: {error}") from error
