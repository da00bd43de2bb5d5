"""Which pool a command talks to, and with which key.

Decides the order: options, then POTLUCK_URL and POTLUCK_API_KEY, then the operator's file of a coordinator on this machine. A key is never
taken from the command line itself, where other people of the machine could read it, and the operator's key goes to the operator's own
coordinator only.
"""

from __future__ import annotations

import json
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
    return state_home() / "potluck" / "coordinator", state_home() / "potluck" / "up" / "coordinator"


def local_operator() -> PoolAddress | None:
    """The operator's address on this machine, of a coordinator that runs if there is one; None if none ever ran."""
    folders = [folder for folder in coordinator_folders() if (folder / "operator.json").is_file()]
    folders.sort(key=lambda folder: not (folder / "endpoints.json").is_file())
    return read_operator(folders[0]) if folders else None


def read_operator(data_folder: Path) -> PoolAddress:
    """The address in a coordinator's data folder; raises NotPermittedError where this person may not read it."""
    path = data_folder / "operator.json"
    try:
        fields = json.loads(path.read_text())
        return PoolAddress(str(fields["url"]), str(fields["api_key"]))
    except PermissionError as error:
        raise pool_error(
            ErrorCode.PERMISSION_DENIED, f"{path} belongs to another person; set {URL_VARIABLE} and {API_KEY_VARIABLE}."
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise pool_error(ErrorCode.NOT_FOUND, f"{path} cannot be read: {error}") from error


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
        raise pool_error(ErrorCode.INVALID_API_KEY, f"No API key for {wanted_url}: pass --api-key-file or set {API_KEY_VARIABLE}.")
    return pool_address(wanted_url, api_key)


@contextmanager
def connected(url: str | None, api_key_file: Path | None) -> Iterator[Transport]:
    """A transport to the pool, closed at the end. A refusal of the key says where the operator's may be."""
    found = address(url, api_key_file)
    transport = Transport(found)
    try:
        yield transport
    except NotPermittedError as error:
        if (hint := _operators_key_hint(found)) is None:
            raise
        raise pool_error(error.code, f"{error.message} {hint}", param=error.param, request_id=error.request_id) from error
    finally:
        transport.close()


def _operators_key_hint(refused: PoolAddress) -> str | None:
    """Where the operator's key to the same pool lies on this machine; None if it is not here, or is the key that was refused."""
    for folder in coordinator_folders():
        with suppress(PoolError):
            operator = read_operator(folder)
            if operator.url == refused.url and operator.api_key != refused.api_key:
                return f"The operator's key is in {folder / 'operator.json'}; without {API_KEY_VARIABLE} and --api-key-file it is used."
    return None


def _file_key(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise pool_error(ErrorCode.INVALID_API_KEY, f"The API key file {path} cannot be read: {error}") from error
