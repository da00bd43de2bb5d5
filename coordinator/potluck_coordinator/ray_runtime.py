"""Ray, in the one place that imports it: where the coordinator's two actors live and how they reach each other.

Decides how Ray is started (on loopback, with a token, without a dashboard), that its actors come back when their process dies, and which
calls to a directory that just died are made again. It must not know what directory and gateway do.

An actor serves from its constructor on, because Ray runs that constructor again after every restart and nobody else may be there to ask.
What fails inside an actor ends its process: Ray's restart is the one way back, whatever went wrong.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import structlog

from potluck_coordinator.ports import Accounts, EnrolmentDesk, Ledger, NodeDesk, PoolDesk
from potluck_coordinator.settings import Settings
from potluck_protocol.clock import Clock, SystemClock
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.observe import configure_logging

if TYPE_CHECKING:
    from potluck_coordinator.directory.directory import Directory
    from potluck_coordinator.gateway.gateway import Gateway

NAMESPACE: Final = "potluck"
DIRECTORY: Final = "directory"
GATEWAY: Final = "gateway"
DESKS: Final = frozenset({"accounts", "ledger", "enrolment", "nodes", "pool"})

NOT_REPEATABLE: Final = frozenset({"create_account", "create_key", "create_join_token", "report"})
"""Calls that would do their work twice if they were made again after a loss."""
PATIENCE_SECONDS: Final = 10.0
"""How long a call waits for a directory that is restarting; it takes about half a second."""
CALL_SECONDS_MAX: Final = 30.0
"""The longest a call may run: `watch` waits for 20 s by design."""
RETRY_PAUSE_SECONDS: Final = 0.1
FAILED_PAUSE_SECONDS: Final = 1.0
"""Between a failure and the end of its actor's process, so that a lasting cause does not become a busy loop of restarts."""
CANCEL_CHECK_SECONDS: Final = 0.25
CHECK_SECONDS_MAX: Final = 1.0
ABSENCE_SECONDS_MAX: Final = 30.0
"""An actor that does not answer for so long is not coming back, for Ray itself has failed or the process hangs."""
GATEWAY_STOP_SECONDS_MAX: Final = 5.0
DIRECTORY_STOP_SECONDS_MAX: Final = 2.0
OBJECT_STORE_BYTES: Final = 80 * 1024 * 1024
"""Ray refuses less than 75 MiB. Nothing of ours goes through it."""

_log = structlog.get_logger()

Ask = Callable[[str, str, tuple[Any, ...], dict[str, Any]], Awaitable[Any]]


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


class RayDirectory:
    """`DirectoryPort` over an actor.

    Args:
        call: makes one try of (desk, method, arguments, named arguments); returns the result or a PotluckError as a value.
        lost: the exceptions of a try whose actor is not there, or went away before it answered.
        clock: for the bound on waiting.
    """

    def __init__(self, call: Ask, lost: tuple[type[Exception], ...], clock: Clock) -> None:
        self._call = call
        self._lost = lost
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
            except self._lost as error:
                if method in NOT_REPEATABLE:
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


class _Actor:
    """What both actors share: they serve from the start, say when they are ready, and end their process when they fail."""

    def __init__(self, settings: Settings, log_pipe: str | None) -> None:
        _send_log_lines_to(log_pipe)
        configure_logging(json=settings.log_format == "json", level=settings.log_level)
        self._settings = settings
        self._ready: asyncio.Future[PotluckError | None] = asyncio.get_running_loop().create_future()
        self._task = asyncio.get_running_loop().create_task(self._guard())

    async def ready(self) -> PotluckError | None:
        """None once it serves, or what kept it from serving."""
        return await asyncio.shield(self._ready)

    async def _serve(self) -> None:
        """Opens, calls `_opened`, and returns only when told to stop."""
        raise NotImplementedError

    def _opened(self) -> None:
        _log.info("actor_serving", actor=type(self).__name__, process_id=os.getpid())
        self._ready.set_result(None)

    async def _guard(self) -> None:
        try:
            await self._serve()
        except asyncio.CancelledError:
            return
        except Exception as error:  # noqa: BLE001 - whatever it is, the process ends and Ray starts it again
            _log.exception("actor_failed", actor=type(self).__name__, process_id=os.getpid())
            if not self._ready.done():
                self._ready.set_result(_as_potluck_error(error))
            await asyncio.sleep(FAILED_PAUSE_SECONDS)
            os._exit(1)


class DirectoryActor(_Actor):
    """The directory in a process of its own."""

    _directory: Directory

    async def call(self, desk: str, method: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """The desk's answer, or the PotluckError it raised, as a value: Ray would wrap a raised one into a type of its own."""
        failure = await self.ready()
        if failure is not None:
            return failure
        assert desk in DESKS
        try:
            return await getattr(getattr(self._directory, desk), method)(*arguments, **named)
        except PotluckError as error:
            return error
        except Exception:  # noqa: BLE001 - the caller is told that it failed, the log why
            _log.exception("desk_failed", desk=desk, method=method)
            return PotluckError(ErrorCode.INTERNAL_ERROR)

    async def stop(self) -> None:
        """Ends the background work and closes the database."""
        self._task.cancel()
        await asyncio.wait([self._task])
        if self._ready.done() and self._ready.result() is None:
            self._directory.close()

    async def _serve(self) -> None:
        from potluck_coordinator.directory.directory import Directory  # noqa: PLC0415 - only this process needs SQL

        self._directory = await Directory.open(self._settings, SystemClock())
        self._opened()
        await self._directory.run_background()
        raise RuntimeError("the directory's background work ended by itself")


class GatewayActor(_Actor):
    """The gateway in a process of its own."""

    _gateway: Gateway | None = None

    async def stop(self) -> None:
        """Says goodbye to the nodes and closes the ports."""
        self._task.cancel()
        await asyncio.wait([self._task])
        if self._gateway is not None:
            await self._gateway.stop()

    async def _serve(self) -> None:
        import ray  # noqa: PLC0415

        from potluck_coordinator.gateway.gateway import Gateway  # noqa: PLC0415 - only this process needs servers

        handle = ray.get_actor(DIRECTORY, namespace=NAMESPACE)
        call: Ask = handle.call.remote
        self._gateway = Gateway(self._settings, RayDirectory(call, (ray.exceptions.RayActorError,), SystemClock()), SystemClock())
        await self._gateway.start()
        self._opened()
        await asyncio.Event().wait()


class RayRuntime:
    """The driver's end: starts Ray and the two actors, and stops them.

    Args:
        settings: with all three ports resolved, so that a restarted gateway gets the same again.
        run_dir: a private folder of this run with a short path; Ray keeps its sockets and logs in it.
        log_pipe: where the actors' log lines go; None leaves them to Ray's own log files.
    """

    def __init__(self, settings: Settings, run_dir: Path, log_pipe: Path | None) -> None:
        self._settings = settings
        self._run_dir = run_dir
        self._log_pipe = None if log_pipe is None else str(log_pipe)
        self._clock = SystemClock()
        self._actors: dict[str, Any] = {}
        self._answered_at: dict[str, float] = {}

    def start(self, cancelled: Callable[[], bool]) -> None:
        """Returns once the gateway serves, or early once `cancelled` says so.

        Raises:
            PotluckError: COORDINATOR_UNAVAILABLE if Ray or the named cluster does not come up; else whatever kept an actor from serving.
        """
        os.environ.update(_ray_environment(self._settings))
        import ray  # noqa: PLC0415 - reads its environment when it is imported

        try:
            ray.init(namespace=NAMESPACE, log_to_driver=False, configure_logging=False, **self._init_arguments())
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            where = self._settings.ray_address or "on this machine"
            raise PotluckError(ErrorCode.COORDINATOR_UNAVAILABLE, f"Ray {where} did not come up: {error}") from error
        for name, actor_class in ((DIRECTORY, DirectoryActor), (GATEWAY, GatewayActor)):
            made = ray.remote(actor_class).options(name=name, num_cpus=0, max_restarts=-1, max_task_retries=0, max_concurrency=10_000)
            actor = self._actors[name] = made.remote(self._settings, self._log_pipe)
            ready = actor.ready.remote()
            while not ray.wait([ready], timeout=CANCEL_CHECK_SECONDS)[0]:
                if cancelled():
                    return
            failure = ray.get(ready)
            if failure is not None:
                raise failure
            self._answered_at[name] = self._clock.monotonic_seconds()

    def check(self) -> None:
        """Asks both actors whether they serve, for a second each.

        Raises:
            PotluckError: COORDINATOR_UNAVAILABLE once one is gone for good or silent for 30 s. Only a new coordinator helps then.
        """
        import ray  # noqa: PLC0415

        for name, actor in self._actors.items():
            try:
                ray.get(actor.ready.remote(), timeout=CHECK_SECONDS_MAX)
                self._answered_at[name] = self._clock.monotonic_seconds()
            except ray.exceptions.RayError as error:
                absent_seconds = self._clock.monotonic_seconds() - self._answered_at[name]
                _log.warning("actor_absent", actor=name, absent_seconds=round(absent_seconds, 1), reason=type(error).__name__)
                # Ray's word for an actor that it will not start again.
                if absent_seconds > ABSENCE_SECONDS_MAX or isinstance(error, ray.exceptions.ActorDiedError):
                    raise PotluckError(ErrorCode.COORDINATOR_UNAVAILABLE, f"The {name} has been away for too long.") from error

    def stop(self) -> None:
        """Gateway first, so that nodes hear a goodbye and holds are settled; then the directory; then Ray. Bounded, never raises."""
        import ray  # noqa: PLC0415

        for name, seconds in ((GATEWAY, GATEWAY_STOP_SECONDS_MAX), (DIRECTORY, DIRECTORY_STOP_SECONDS_MAX)):
            actor = self._actors.pop(name, None)
            if actor is None:
                continue
            try:
                ray.get(actor.stop.remote(), timeout=seconds)
            except ray.exceptions.RayError as error:
                _log.warning("actor_not_stopped", actor=name, reason=type(error).__name__)
            ray.kill(actor, no_restart=True)
        ray.shutdown()

    def _init_arguments(self) -> Mapping[str, Any]:
        if self._settings.ray_address is not None:
            return {"address": self._settings.ray_address}
        return {
            "address": "local",
            "include_dashboard": False,
            "num_cpus": 0,
            "num_gpus": 0,
            "object_store_memory": OBJECT_STORE_BYTES,
            "_temp_dir": str(self._run_dir),
        }


def _ray_environment(settings: Settings) -> Mapping[str, str]:
    """What Ray must find in its environment before it is imported; a cluster joined by address has its own."""
    if settings.ray_address is not None:
        return {}
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(_token_file(settings.ray_token_file)),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray's word for "this machine only": its address becomes 127.0.0.1, which `_node_ip_address` would not do.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # Any free port; the fixed default would collide with another coordinator's.
        "AUTOSCALER_METRIC_PORT": "0",
        # Ray's own out-of-memory killer would pick the gateway when something else fills the machine.
        "RAY_memory_monitor_refresh_ms": "0",
    }


def _token_file(path: Path) -> Path:
    """The file with Ray's token, 0600, made once."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return path
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
    return path


def _send_log_lines_to(log_pipe: str | None) -> None:
    """Points standard error at the driver's pipe; without a reader there, Ray's log file keeps it."""
    if log_pipe is None:
        return
    try:
        descriptor = os.open(log_pipe, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return
    os.set_blocking(descriptor, True)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def _as_potluck_error(error: Exception) -> PotluckError:
    return error if isinstance(error, PotluckError) else PotluckError(ErrorCode.INTERNAL_ERROR, f"It failed at its start: {error}")
