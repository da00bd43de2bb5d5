"""Ray, in the one place that imports it: where the coordinator's two actors live.

Decides how Ray is started (on loopback, with a token, without a dashboard) or joined, that its actors run on this machine, where the books
are, and that they come back when their process dies. It must not know what directory and gateway do, nor how they talk: it only gives each
its end of `desk_socket`.

An actor serves from its constructor on, because Ray runs that constructor again after every restart and nobody else may be there to ask.
What ends an actor's main work ends its process: Ray's restart is the one way back, whatever went wrong.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import itertools
import os
import secrets
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import structlog

from potluck_coordinator.desk_socket import DeskClient, DeskServer, RemoteDirectory
from potluck_coordinator.settings import Settings
from potluck_protocol.clock import SystemClock
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.observe import configure_logging

if TYPE_CHECKING:
    from potluck_coordinator.gateway.gateway import Gateway

NAMESPACE: Final = "potluck"
DIRECTORY: Final = "directory"
GATEWAY: Final = "gateway"
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


class _Actor:
    """What both actors share: they serve from the start, say when they are ready, and end their process when they fail."""

    def __init__(self, settings: Settings, desk_socket: Path, log_pipe: str | None) -> None:
        _send_log_lines_to(log_pipe)
        configure_logging(json=settings.log_format == "json", level=settings.log_level)
        self._settings = settings
        self._desk_socket = desk_socket
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
            if isinstance(error, PotluckError):
                _log.error("actor_failed", actor=type(self).__name__, code=error.code, reason=error.message)
            else:
                _log.exception("actor_failed", actor=type(self).__name__, process_id=os.getpid())
            if not self._ready.done():
                self._ready.set_result(_as_potluck_error(error))
            await asyncio.sleep(FAILED_PAUSE_SECONDS)
            os._exit(1)


class DirectoryActor(_Actor):
    """The directory in a process of its own."""

    async def stop(self) -> None:
        """Ends the desks and the background work, and closes the database."""
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _serve(self) -> None:
        from potluck_coordinator.directory.directory import Directory, spare_collections  # noqa: PLC0415 - only this process needs SQL

        directory = await Directory.open(self._settings, SystemClock())
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
    """The gateway in a process of its own."""

    _gateway: Gateway | None = None

    async def stop(self) -> None:
        """Says goodbye to the nodes and closes the ports."""
        self._task.cancel()
        await asyncio.wait([self._task])
        if self._gateway is not None:
            await self._gateway.stop()

    async def _serve(self) -> None:
        from potluck_coordinator.gateway.gateway import Gateway  # noqa: PLC0415 - only this process needs servers

        directory = RemoteDirectory(DeskClient(self._desk_socket).call, SystemClock())
        self._gateway = Gateway(self._settings, directory, SystemClock())
        await self._gateway.start()
        self._opened()
        await self._gateway.run()


class RayRuntime:
    """The driver's end: starts Ray and the two actors, and stops them.

    Args:
        settings: with all three ports resolved, so that a restarted gateway gets the same again.
        run_dir: a private folder of this run with a short path; the desks' socket and Ray's own lie in it.
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
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        desk_socket = self._run_dir / "desks"
        for name, actor_class in ((DIRECTORY, DirectoryActor), (GATEWAY, GatewayActor)):
            made = ray.remote(actor_class).options(
                name=name, num_cpus=0, max_restarts=-1, max_task_retries=0, max_concurrency=100, scheduling_strategy=here
            )
            actor = self._actors[name] = made.remote(self._settings, desk_socket, self._log_pipe)
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
                failure: Exception | None = ray.get(actor.ready.remote(), timeout=CHECK_SECONDS_MAX)
            except ray.exceptions.RayError as error:
                failure = error
            if failure is None:
                self._answered_at[name] = self._clock.monotonic_seconds()
                continue
            # One that answers that it failed is about to end its process: it is as absent as one that does not answer.
            absent_seconds = self._clock.monotonic_seconds() - self._answered_at[name]
            _log.warning("actor_absent", actor=name, absent_seconds=round(absent_seconds, 1), reason=type(failure).__name__)
            # Ray's word for an actor that it will not start again.
            if absent_seconds > ABSENCE_SECONDS_MAX or isinstance(failure, ray.exceptions.ActorDiedError):
                raise PotluckError(ErrorCode.COORDINATOR_UNAVAILABLE, _away_text(name, failure)) from failure

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
            # A folder of its own, for Ray opens it to everybody; one letter, for the paths of its sockets are bounded.
            "_temp_dir": str(self._run_dir / "r"),
        }


def _ray_environment(settings: Settings) -> Mapping[str, str]:
    """What Ray must find in its environment before it is imported; a cluster joined by address has its own."""
    if settings.ray_address is not None:
        return {}
    return _private_ray(settings.ray_token_file)


def _private_ray(token_file: Path) -> Mapping[str, str]:
    """Of a Ray of our own on this machine."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(_token_file(token_file)),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray's word for "this machine only": its address becomes 127.0.0.1, which `_node_ip_address` would not do.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # Any free port; the fixed default would collide with another coordinator's.
        "AUTOSCALER_METRIC_PORT": "0",
        # Ray's workers give way to everything else on the machine (niceness 15), and for these two everything else waits.
        "RAY_worker_niceness": "0",
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
    # It stays non-blocking: a terminal that is held, or a driver that is busy, costs lines and not the pool's time.
    os.dup2(descriptor, 2)
    os.close(descriptor)
    # Ray has put a wrapper of its own around the old one, which costs more than the line.
    sys.stderr = io.TextIOWrapper(io.BufferedWriter(_LossyDescriptor(2)), errors="backslashreplace", line_buffering=True)


class _LossyDescriptor(io.RawIOBase):
    """A descriptor that loses what nobody takes at once, and never fails whoever writes."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def write(self, data: Any) -> int:
        with contextlib.suppress(OSError):
            os.write(self._descriptor, data)
        return len(data)


def _away_text(name: str, failure: Exception) -> str:
    reason = f" What it says: {failure.message}" if isinstance(failure, PotluckError) else ""
    return f"The {name} has been away for too long.{reason}"


def _as_potluck_error(error: Exception) -> PotluckError:
    return error if isinstance(error, PotluckError) else PotluckError(ErrorCode.INTERNAL_ERROR, f"It failed at its start: {error}")


def spread(function: Callable[[Any], Any], inputs: Sequence[Any], address: str | None) -> Iterator[tuple[int, Any]]:
    """Calls the function with each input in a process of its own, as many at a time as there are processors; yields numbers and results.

    Args:
        function: of a module that the workers can import, too.
        inputs: values that can be pickled.
        address: of a running cluster; None starts a Ray of its own on this machine, and ends it.

    Raises:
        PotluckError: COORDINATOR_UNAVAILABLE if Ray does not come up, or a worker dies.
    """
    with tempfile.TemporaryDirectory(prefix="potluck-simulate-") as folder, _interrupts_in_turn() as interrupt:
        if address is None:
            os.environ.update(_private_ray(Path(folder) / "token"))
        import ray  # noqa: PLC0415 - reads its environment when it is imported

        local = {"address": "local", "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES, "_temp_dir": f"{folder}/r"}
        try:
            ray.init(log_to_driver=False, configure_logging=False, **({"address": address} if address is not None else local))
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            where = address or "on this machine"
            raise PotluckError(ErrorCode.COORDINATOR_UNAVAILABLE, f"Ray {where} did not come up: {error}") from error
        try:
            yield from _results(ray, function, inputs, interrupt)
        finally:
            ray.shutdown()


@contextlib.contextmanager
def _interrupts_in_turn() -> Iterator[Callable[[], None]]:
    """Ctrl-C counts when the given function is called: in the middle of its start or its end Ray leaves processes, or crashes."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None  # signals are the main thread's
        return
    asked = threading.Event()

    def interrupt() -> None:
        if asked.is_set():
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, lambda *_: asked.set())
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)


def _results(ray: Any, function: Callable[[Any], Any], inputs: Sequence[Any], interrupt: Callable[[], None]) -> Iterator[tuple[int, Any]]:
    task = ray.remote(max_retries=0)(function)
    bound = max(1, int(ray.cluster_resources().get("CPU", 1)))
    waiting = iter(enumerate(inputs))
    running: dict[Any, int] = {}
    while True:
        for number, value in itertools.islice(waiting, bound - len(running)):
            running[task.remote(value)] = number
        if not running:
            return
        ready: list[Any] = []
        while not ready:
            interrupt()
            ready, _ = ray.wait(list(running), num_returns=1, timeout=CANCEL_CHECK_SECONDS)
        try:
            yield running.pop(ready[0]), ray.get(ready[0])
        except ray.exceptions.RayError as error:
            raise PotluckError(ErrorCode.COORDINATOR_UNAVAILABLE, f"A worker of Ray failed: {error}") from error
