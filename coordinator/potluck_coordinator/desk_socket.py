"""The directory's desks for a gateway in another process, over a socket file in the run's private folder.

Decides how a call crosses, and which calls to a directory that just went away are made again. It must not know what the desks do, nor
that `ray_runtime` starts and restarts the processes.

Calls are many, a payment has two of them, and Ray's own take 2 to 3 ms and 1.7 ms of processor time each; these take a tenth of it. Frames
are pickles, so a connection is only taken from this user's own processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import socket
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, cast

import structlog

from potluck_coordinator.desk_frames import DeskFrames
from potluck_coordinator.desks import (
    Accounts,
    CatalogueDesk,
    DirectoryPort,
    EnrolmentDesk,
    Ledger,
    NodeDesk,
)
from potluck_coordinator.idempotency_desk import IdempotencyDesk
from potluck_coordinator.pool_desk import LethalDesk, PoolDesk
from potluck_protocol.clock import Clock
from potluck_protocol.errors import ErrorCode, PotluckError

DESKS: Final = frozenset({"accounts", "ledger", "enrolment", "nodes", "catalogue", "lethal", "idempotency", "pool"})
NOT_REPEATABLE: Final = frozenset({"create_account", "create_key", "create_join_token", "remove_model", "report", "note_counts"})
"""Calls that would do their work twice if they were made again after a loss, or fail for having done it."""
PATIENCE_SECONDS: Final = 10.0
"""How long a call waits for a directory that is restarting; it takes about two seconds."""
CALL_SECONDS_MAX: Final = 30.0
"""The longest a call may run: `watch` waits for 20 s by design."""
RETRY_PAUSE_SECONDS: Final = 0.1
_PEER: Final = struct.Struct("iII")  # process, user and group, as Linux' SO_PEERCRED gives them

_log = structlog.get_logger()

Ask = Callable[[str, str, tuple[Any, ...], dict[str, Any]], Awaitable[Any]]


class DirectoryLostError(Exception):
    """The directory went away before it answered."""


class DirectoryAbsentError(DirectoryLostError):
    """The directory was not there: the call never left."""


class DeskServer:
    """The directory's end.

    Args:
        directory: whose desks are called.
        path: of the socket file; its folder is this user's alone.
    """

    def __init__(self, directory: DirectoryPort, path: Path) -> None:
        self._directory = directory
        self._path = path
        self._server: asyncio.Server | None = None
        self._calls: set[asyncio.Task[None]] = set()
        self._connections: set[_Caller] = set()

    async def start(self) -> None:
        """Listens, in the place of a predecessor that may have left its socket file."""
        self._path.unlink(missing_ok=True)
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(lambda: _Caller(self._connections, self._begin), self._path)
        self._path.chmod(0o600)

    async def stop(self) -> None:
        """Takes no more calls and breaks off those that run."""
        if self._server is not None:
            self._server.close()
        for connection in tuple(self._connections):
            connection.transport.close()
        for call in tuple(self._calls):
            call.cancel()
        await asyncio.gather(*self._calls, return_exceptions=True)
        self._path.unlink(missing_ok=True)

    def _begin(self, number: int, content: bytearray, caller: _Caller) -> None:
        task = asyncio.ensure_future(self._answer(number, content, caller))
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)

    async def _answer(self, number: int, content: bytearray, caller: _Caller) -> None:
        outcome = await self._outcome(content)
        # A gateway may go away, or be killed, while its call runs: nobody is left to be answered.
        with contextlib.suppress(ConnectionError):
            try:
                caller.send(number, outcome)
            except PotluckError as error:
                caller.send(number, error)

    async def _outcome(self, content: bytearray) -> Any:
        try:
            call = pickle.loads(content)  # noqa: S301 - from this user's own processes only
        except Exception:  # noqa: BLE001 - the caller is told that it failed, the log why
            _log.exception("desk_call_unreadable")
            return PotluckError(ErrorCode.INTERNAL_ERROR)
        return await answer(self._directory, *call)


class _Caller(DeskFrames):
    """The directory's end of one gateway's connection.

    Args:
        connections: of the server's; it is one of them for as long as it may ask.
        begin: takes a call.
    """

    def __init__(self, connections: set[_Caller], begin: Callable[[int, bytearray, _Caller], None]) -> None:
        super().__init__()
        self._connections = connections
        self._begin = begin

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if refusal := _caller_refusal(transport.get_extra_info("socket")):
            _log.error("desk_socket_refused_a_caller", reason=refusal)
            transport.close()
        else:
            self._connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self._connections.discard(self)

    def frame_received(self, number: int, content: bytearray) -> None:
        if self in self._connections:
            self._begin(number, content, self)

    # Who does not take its answers may not ask for more.
    def pause_writing(self) -> None:
        if not self.transport.is_closing():
            self.transport.pause_reading()

    def resume_writing(self) -> None:
        if not self.transport.is_closing():
            self.transport.resume_reading()


async def answer(directory: DirectoryPort, desk: str, method: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """A desk's answer, or its PotluckError as a value: an INTERNAL_ERROR for whatever nobody foresaw."""
    try:
        assert desk in DESKS
        return await getattr(getattr(directory, desk), method)(*arguments, **named)
    except PotluckError as error:
        return error
    except Exception:  # noqa: BLE001 - the caller is told that it failed, the log why
        _log.exception("desk_failed", desk=desk, method=method)
        return PotluckError(ErrorCode.INTERNAL_ERROR)


class DeskClient:
    """Makes one try of each call; any number share one connection, which is made anew after a loss.

    Args:
        path: of the directory's socket file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._connecting = asyncio.Lock()
        self._connection: _Connection | None = None
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._number = 0

    async def call(self, desk: str, method: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """The desk's answer, or its PotluckError as a value; INTERNAL_ERROR as a value for an answer that cannot be read.

        Raises:
            DirectoryLostError: nobody answered.
            PotluckError: INTERNAL_ERROR for a call that cannot be sent.
        """
        connection = self._connection if self._connection is not None else await self._connect()
        self._number += 1
        number = self._number
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            connection.send(number, (desk, method, arguments, named))
            return await answer
        except ConnectionError as error:
            raise DirectoryAbsentError from error
        finally:
            self._waiting.pop(number, None)

    async def _connect(self) -> _Connection:
        async with self._connecting:
            if self._connection is not None:
                return self._connection
            try:
                _, made = await asyncio.get_running_loop().create_unix_connection(lambda: _Connection(self), str(self._path))
            except OSError as error:
                raise DirectoryAbsentError from error
            return made

    def connected(self, connection: _Connection) -> None:
        """There is one to call on."""
        self._connection = connection

    def answered(self, number: int, content: bytearray) -> None:
        """What a call came to, if anybody still waits for it."""
        answer = self._waiting.get(number)
        if answer is not None and not answer.done():
            answer.set_result(_read_outcome(content))

    def lost(self) -> None:
        """The connection has ended, and with it all that waits for its answer."""
        self._connection = None
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(DirectoryLostError())


class _Connection(DeskFrames):
    """A gateway's end."""

    def __init__(self, client: DeskClient) -> None:
        super().__init__()
        self._client = client

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._client.connected(self)

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self._client.lost()

    def frame_received(self, number: int, content: bytearray) -> None:
        self._client.answered(number, content)


class _Desk:
    """One desk of a directory in another process."""

    def __init__(self, ask: Ask, name: str) -> None:
        self._ask = ask
        self._name = name

    def __getattr__(self, method: str) -> Callable[..., Awaitable[Any]]:
        if method.startswith("_"):
            raise AttributeError(method)

        def call(*arguments: Any, **named: Any) -> Awaitable[Any]:
            return self._ask(self._name, method, arguments, named)

        return call


class RemoteDirectory:
    """`DirectoryPort` in another process.

    Args:
        call: makes one try of (desk, method, arguments, named arguments), as `DeskClient.call`.
        clock: for the bound on waiting.
    """

    def __init__(self, call: Ask, clock: Clock) -> None:
        self._call = call
        self._clock = clock

    @property
    def accounts(self) -> Accounts:
        return cast("Accounts", _Desk(self._ask, "accounts"))

    @property
    def ledger(self) -> Ledger:
        return cast("Ledger", _Desk(self._ask, "ledger"))

    @property
    def enrolment(self) -> EnrolmentDesk:
        return cast("EnrolmentDesk", _Desk(self._ask, "enrolment"))

    @property
    def nodes(self) -> NodeDesk:
        return cast("NodeDesk", _Desk(self._ask, "nodes"))

    @property
    def catalogue(self) -> CatalogueDesk:
        return cast("CatalogueDesk", _Desk(self._ask, "catalogue"))

    @property
    def lethal(self) -> LethalDesk:
        return cast("LethalDesk", _Desk(self._ask, "lethal"))

    @property
    def idempotency(self) -> IdempotencyDesk:
        return cast("IdempotencyDesk", _Desk(self._ask, "idempotency"))

    @property
    def pool(self) -> PoolDesk:
        return cast("PoolDesk", _Desk(self._ask, "pool"))

    async def _ask(self, desk: str, method: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        give_up_at = self._clock.monotonic_seconds() + PATIENCE_SECONDS
        while True:
            try:
                async with asyncio.timeout(CALL_SECONDS_MAX):
                    outcome = await self._call(desk, method, arguments, named)
            except TimeoutError:
                raise PotluckError(ErrorCode.COORDINATOR_UNAVAILABLE, "The directory does not answer.") from None
            except DirectoryLostError as error:
                if method in NOT_REPEATABLE and not isinstance(error, DirectoryAbsentError):
                    raise PotluckError(
                        ErrorCode.COORDINATOR_UNAVAILABLE, "The directory went away during the call; look whether it took effect."
                    ) from error
                if self._clock.monotonic_seconds() >= give_up_at:
                    raise PotluckError(ErrorCode.COORDINATOR_UNAVAILABLE, "The directory is restarting.") from error
                await asyncio.sleep(RETRY_PAUSE_SECONDS)
                continue
            if isinstance(outcome, PotluckError):
                raise outcome
            return outcome


def _read_outcome(content: bytearray) -> Any:
    try:
        return pickle.loads(content)  # noqa: S301 - from the directory, whose folder nobody else can enter
    except Exception:  # noqa: BLE001 - it fails this one call; the others share the connection
        _log.exception("desk_answer_unreadable")
        return PotluckError(ErrorCode.INTERNAL_ERROR)


def _caller_refusal(connection: socket.socket | None) -> str:
    """Why whoever called is not taken for a process of this user's; empty if it is one."""
    if connection is None:
        return "it has gone, and uvloop does not know any more whose it was"
    try:
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    except OSError as error:
        return f"the system does not say whose it is: {error.strerror or error}"
    _, user_id, _ = _PEER.unpack(credentials)
    return "" if user_id == os.getuid() else f"it is of another user, {user_id}"
