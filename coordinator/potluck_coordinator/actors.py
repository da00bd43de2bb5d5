"""The coordinator's two kinds of actors: the directory, and the gateways, each in a process of its own.

Decides what their processes begin and end with. An actor serves from its constructor on, because Ray runs that constructor again after
every restart and nobody else may be there to ask. What ends an actor's main work ends its process: Ray's restart is the one way back,
whatever went wrong. It must not know Ray, nor what directory and gateway do.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import sys
from typing import TYPE_CHECKING, Any, Final, Protocol

import structlog

from potluck_coordinator.desk_socket import DeskServer, RemoteDirectory, answer
from potluck_coordinator.log_pipe import LogPipe
from potluck_coordinator.log_surges import LogSurges
from potluck_coordinator.storage.absence import FellBackError
from potluck_protocol.clock import SystemClock
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.observe import configure_logging
from potluck_protocol.private_files import write_private

if TYPE_CHECKING:
    from pathlib import Path

    from potluck_coordinator.desk_socket import Ask
    from potluck_coordinator.directory.directory import Directory
    from potluck_coordinator.gateway.gateway import Gateway
from potluck_coordinator.settings import Settings

FAILED_PAUSE_SECONDS: Final = 1.0
"""Between a failure and the end of its actor's process, so that a lasting cause does not become a busy loop of restarts."""

_log = structlog.get_logger()


class Reach(Protocol):
    """How an actor, wherever it came up, reaches what else there is of the coordinator."""

    def log_pipe(self) -> str | None:
        """Where its log lines go; None leaves them to Ray's own log files."""
        ...

    def directory(self) -> Ask:
        """Makes one try of a call of the directory's."""
        ...

    def peer_host(self) -> str:
        """The address of this machine by which the coordinator's other machines reach it; loopback where there are none."""
        ...

    def listening_host(self, host: str) -> str:
        """What the operator's setting comes to on this machine."""
        ...


async def _tell_each_second(surges: LogSurges) -> None:
    while True:
        await asyncio.sleep(1)
        surges.tell()


class _Actor:
    """What both actors share: they serve from the start, say when they are ready, and end their process when they fail."""

    def __init__(self, settings: Settings, reach: Reach) -> None:
        self._log_pipe = _send_log_lines_to(reach.log_pipe(), asyncio.get_running_loop())
        surges = LogSurges()
        configure_logging(json=settings.log_format == "json", level=settings.log_level, first=surges)
        self._surges = asyncio.ensure_future(_tell_each_second(surges))
        self._settings = settings
        self._reach = reach
        self._ready: asyncio.Future[PotluckError | None] = asyncio.get_running_loop().create_future()
        self._task = asyncio.get_running_loop().create_task(self._guard())

    async def ready(self) -> PotluckError | None:
        """None once it serves, or what kept it from serving."""
        return await asyncio.shield(self._ready)

    async def process_id(self) -> int:
        """Another one after each restart."""
        return os.getpid()

    def _say_last_words(self) -> None:
        """Who stops an actor ends its process next."""
        if self._log_pipe is not None:
            self._log_pipe.let_out()

    async def _serve(self) -> None:
        """Opens, calls `_opened`, and returns only when told to stop."""
        raise NotImplementedError

    def _opened(self, **which: Any) -> None:
        _log.info("actor_serving", actor=type(self).__name__, process_id=os.getpid(), **which)
        self._ready.set_result(None)

    async def _guard(self) -> None:
        try:
            await self._serve()
        except asyncio.CancelledError:
            return
        except Exception as error:  # noqa: BLE001 - whatever it is, the process ends and Ray starts it again
            if isinstance(error, PotluckError):
                _log.error("actor_failed", actor=type(self).__name__, code=error.code, reason=error.message)
            else:
                _log.exception("actor_failed", actor=type(self).__name__, process_id=os.getpid())
            if not self._ready.done():
                self._ready.set_result(_as_potluck_error(error))
            await asyncio.sleep(FAILED_PAUSE_SECONDS)
            os._exit(1)  # after all its lines have left: the pause is longer than they wait


class DirectoryActor(_Actor):
    """The directory in a process of its own.

    Args:
        settings: the operator's.
        reach: to the driver.
        desk_socket: where gateways of this machine call; those of others call `ask`.
    """

    def __init__(self, settings: Settings, reach: Reach, desk_socket: Path) -> None:
        super().__init__(settings, reach)
        self._desk_socket = desk_socket
        self._directory: Directory | None = None

    async def ask(self, desk: str, method: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """The desk's answer, or its PotluckError as a value."""
        if (failure := await self.ready()) is not None:
            return failure
        assert self._directory is not None, "it serves"
        return await answer(self._directory, desk, method, arguments, named)

    async def stop(self) -> None:
        """Ends the desks and the background work, and closes the database."""
        self._task.cancel()
        await asyncio.wait([self._task])
        self._say_last_words()

    async def _serve(self) -> None:
        # A directory that starts again would see nothing of what is missing in the books.
        fell_back_file = self._desk_socket.with_name("fell_back")
        if fell_back_file.exists():
            raise FellBackError
        try:
            await self._serve_from_books()
        except FellBackError:
            write_private(fell_back_file, b"", durable=False)
            raise

    async def _serve_from_books(self) -> None:
        from potluck_coordinator.directory.directory import Directory, spare_collections  # noqa: PLC0415 - only this process needs SQL

        # Once this run has begun its term on the database, a directory that starts again goes on with it, or not at all.
        term_file = self._desk_socket.with_name("term")
        term = int(term_file.read_text()) if term_file.exists() else None
        directory = self._directory = await Directory.open(self._settings, SystemClock(), term)
        write_private(term_file, str(directory.term).encode(), durable=False)
        desks = DeskServer(directory, self._desk_socket)
        try:
            await desks.start()
            self._opened()
            spare_collections()
            await directory.run_background()
            raise RuntimeError("the directory's background work ended by itself")
        finally:
            await desks.stop()
            directory.close()


class GatewayActor(_Actor):
    """A gateway in a process of its own.

    Args:
        settings: the operator's.
        reach: to the directory.
        number: which of the gateways.
    """

    def __init__(self, settings: Settings, reach: Reach, number: int) -> None:
        super().__init__(settings, reach)
        self._number = number
        self._gateway: Gateway | None = None

    async def stop(self) -> None:
        """Says goodbye to the nodes and closes the ports."""
        self._task.cancel()
        await asyncio.wait([self._task])
        if self._gateway is not None:
            await self._gateway.stop()
        self._say_last_words()

    async def drain(self, seconds_max: float) -> int:
        """As `Gateway.drain`; nothing is left where it has not begun to serve."""
        return 0 if self._gateway is None or (await self.ready()) is not None else await self._gateway.drain(seconds_max)

    async def load(self) -> tuple[int, int]:
        """As `Gateway.load`."""
        return (0, 0) if self._gateway is None or (await self.ready()) is not None else self._gateway.load

    async def _serve(self) -> None:
        from potluck_coordinator.gateway.gateway import Gateway  # noqa: PLC0415 - only this process needs servers

        directory = RemoteDirectory(self._reach.directory(), SystemClock())
        settings = self._settings.model_copy(update={"host": self._reach.listening_host(self._settings.host)})
        self._gateway = Gateway(settings, directory, SystemClock(), self._number, self._reach.peer_host())
        await self._gateway.start()
        self._opened(number=self._number)
        await self._gateway.run()


def _send_log_lines_to(log_pipe: str | None, loop: asyncio.AbstractEventLoop) -> LogPipe | None:
    """Puts the driver's pipe in standard error's place; without a reader there, Ray's log file keeps it."""
    if log_pipe is None:
        return None
    try:
        descriptor = os.open(log_pipe, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return None
    os.dup2(descriptor, 2)
    os.close(descriptor)
    # Ray has put a wrapper of its own around the old one, which costs more than the line.
    sys.stderr = pipe = LogPipe(2, loop)
    atexit.register(pipe.let_out)
    return pipe


def _as_potluck_error(error: Exception) -> PotluckError:
    return error if isinstance(error, PotluckError) else PotluckError(ErrorCode.INTERNAL_ERROR, f"It failed at its start: {error}")
