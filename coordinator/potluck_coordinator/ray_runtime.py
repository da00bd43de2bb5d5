"""Ray, in the one place that imports it: where the coordinator's actors live.

Decides how Ray is started (as `ray_environment` has it, without a dashboard) or joined, that the directory runs on this machine, where the
books are, and the gateways on all machines in turn, that they come back when their process or machine dies, and when so much is away that
only a new coordinator helps. It must not know what `actors` do: it only gives each its way to the others (`Reach`).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import structlog

from potluck_coordinator.actors import DirectoryActor, GatewayActor
from potluck_coordinator.desk_socket import Ask, DeskClient, DirectoryLostError
from potluck_coordinator.ray_environment import check_host, private_ray, ray_environment
from potluck_coordinator.settings import Settings
from potluck_protocol.clock import SystemClock
from potluck_protocol.errors import ErrorCode, PotluckError

NAMESPACE: Final = "potluck"
DIRECTORY: Final = "directory"
GATEWAY: Final = "gateway-"
"""With its number behind it."""
CALLS_MAX: Final = 1000
"""Of one actor at a time: each gateway of another machine always waits for the directory's next snapshot."""
CANCEL_CHECK_SECONDS: Final = 0.25
CHECK_SECONDS_MAX: Final = 1.0
RESTART_PAUSE_SECONDS: Final = 2.0
ABSENCE_SECONDS_MAX: Final = 30.0
"""An actor that does not answer for so long is not coming back, for Ray itself has failed or the process hangs."""
GATEWAY_STOP_SECONDS_MAX: Final = 5.0
DIRECTORY_STOP_SECONDS_MAX: Final = 2.0
OBJECT_STORE_BYTES: Final = 80 * 1024 * 1024
"""Ray refuses less than 75 MiB. Nothing of ours goes through it."""
ACTOR_MEMORY_BYTES: Final = 1
"""What Ray is told that an actor takes. For one that takes nothing Ray draws a machine at random, whatever machine was preferred."""

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class RestartStep:
    """How far a restart has come."""

    gateway: int
    state: str
    """ "draining", "starting" or "serving"."""
    answer_count: int = 0
    """Under way; once it is starting, those that were broken off."""
    node_count: int = 0


@dataclass(frozen=True)
class _Reach:
    """How actors reach the driver and the directory: by files where the driver is, through Ray from other machines.

    It crosses to the actors' processes, and answers there.
    """

    driver_machine: str
    """Ray's id of it."""
    driver_address: str
    is_cluster: bool
    """Of the operator's own: machines may join it at any time."""
    desk_socket: Path
    driver_log_pipe: str | None

    def log_pipe(self) -> str | None:
        return self.driver_log_pipe if self._is_with_driver() else None

    def directory(self) -> Ask:
        return DeskClient(self.desk_socket).call if self._is_with_driver() else self._ask_through_ray

    def peer_host(self) -> str:
        return self._address() if self.is_cluster else "127.0.0.1"

    def listening_host(self, host: str) -> str:
        return self._address() if host == self.driver_address and self.is_cluster else host

    def _is_with_driver(self) -> bool:
        import ray  # noqa: PLC0415

        return bool(ray.get_runtime_context().get_node_id() == self.driver_machine)

    def _address(self) -> str:
        import ray  # noqa: PLC0415

        here = ray.get_runtime_context().get_node_id()
        return next(str(node["NodeManagerAddress"]) for node in ray.nodes() if node["NodeID"] == here)

    async def _ask_through_ray(self, desk: str, method: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        import ray  # noqa: PLC0415

        try:
            # By name: Ray would keep a constructor's handle where it may be lost, and with it the way back of whoever was given it.
            directory = ray.get_actor(DIRECTORY, namespace=NAMESPACE)
            return await directory.ask.remote(desk, method, arguments, named)
        except (ray.exceptions.RayError, ValueError) as error:
            raise DirectoryLostError from error


class RayRuntime:
    """The driver's end: starts Ray and the actors, and stops them.

    Args:
        settings: with all three ports resolved, so that a restarted gateway gets the same again.
        run_dir: a private folder of this run with a short path; the desks' socket and Ray's own lie in it.
        log_pipe: where the lines of this machine's actors go; None leaves them to Ray's own log files.
    """

    def __init__(self, settings: Settings, run_dir: Path, log_pipe: Path | None) -> None:
        self._settings = settings
        self._run_dir = run_dir
        self._log_pipe = None if log_pipe is None else str(log_pipe)
        self._clock = SystemClock()
        self._actors: dict[str, Any] = {}
        self._answered_at: dict[str, float] = {}
        self._reach: _Reach | None = None
        self._machines: list[str] = []
        """Ray's ids, this one's first."""

    def start(self, cancelled: Callable[[], bool]) -> None:
        """Returns once every gateway serves, or early once `cancelled` says so.

        Raises:
            PotluckError: COORDINATOR_UNAVAILABLE if Ray or the named cluster does not come up, INVALID_REQUEST for a host that not every
                machine has; else whatever kept an actor from serving.
        """
        os.environ.update(ray_environment(self._settings))
        import ray  # noqa: PLC0415 - reads its environment when it is imported

        try:
            ray.init(namespace=NAMESPACE, log_to_driver=False, configure_logging=False, **self._init_arguments())
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            where = self._settings.ray_address or "on this machine"
            raise PotluckError(ErrorCode.COORDINATOR_UNAVAILABLE, f"Ray {where} did not come up: {error}") from error
        here = ray.get_runtime_context().get_node_id()
        alive = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
        self._machines = [here, *sorted(alive.keys() - {here})]
        check_host(self._settings, len(self._machines))
        desk_socket = self._run_dir / "desks"
        self._reach = _Reach(here, alive[here], self._settings.ray_address is not None, desk_socket, self._log_pipe)
        made = self._made(DirectoryActor, DIRECTORY, here, soft=False)
        self._actors[DIRECTORY] = made.remote(self._settings, self._reach, desk_socket)
        if not self._wait_ready([DIRECTORY], cancelled):
            return
        for number in range(self._settings.gateways):
            self._make_gateway(number)
        self._wait_ready([name for name in self._actors if name != DIRECTORY], cancelled)

    def check(self) -> None:
        """Asks all actors whether they serve, for a second. Of several gateways, one that is silent for 30 s is killed, to be started anew.

        Raises:
            PotluckError: COORDINATOR_UNAVAILABLE once the directory, or every gateway, is gone for good or silent for 30 s. Only a new
                coordinator helps then.
        """
        import ray  # noqa: PLC0415

        asked = {name: actor.ready.remote() for name, actor in self._actors.items()}
        ray.wait(list(asked.values()), num_returns=len(asked), timeout=CHECK_SECONDS_MAX)
        failures: dict[str, Exception] = {}
        for name, ready in asked.items():
            try:
                failure: Exception | None = ray.get(ready, timeout=0)
            except ray.exceptions.RayError as error:
                failure = error
            if failure is None:
                self._answered_at[name] = self._clock.monotonic_seconds()
            elif self._is_gone(name, failure):
                failures[name] = failure
        if DIRECTORY in failures or len(failures) == len(asked) - 1:
            name = DIRECTORY if DIRECTORY in failures else next(iter(failures))
            raise PotluckError(ErrorCode.COORDINATOR_UNAVAILABLE, _away_text(name, failures[name])) from failures[name]
        for name, failure in failures.items():
            if isinstance(failure, ray.exceptions.ActorDiedError):
                _log.error("gateway_made_anew", actor=name)
                self._make_gateway(int(name.removeprefix(GATEWAY)))
            else:
                # A process that hangs goes on getting its share of a port's connections, and nobody answers there.
                _log.error("gateway_killed", actor=name)
                ray.kill(self._actors[name], no_restart=False)
            self._answered_at[name] = self._clock.monotonic_seconds()

    def restart_gateways(self, drain_seconds_max: float) -> Iterator[RestartStep]:
        """One after another: each lets its answers end, stops, is started again, and serves before the next one begins.

        Raises:
            PotluckError: COORDINATOR_UNAVAILABLE for one that does not come back; those after it are left alone.
        """
        import ray  # noqa: PLC0415

        for number in range(self._settings.gateways):
            name = f"{GATEWAY}{number}"
            actor = self._actors[name]
            drained, process_id = actor.drain.remote(drain_seconds_max), self._process_id(name)
            while not ray.wait([drained], timeout=CHECK_SECONDS_MAX)[0]:
                with contextlib.suppress(ray.exceptions.RayError):
                    yield RestartStep(number, "draining", *ray.get(actor.load.remote(), timeout=CHECK_SECONDS_MAX))
            yield RestartStep(number, "starting", self._end_for_restart(name, drained))
            self._wait_back(name, process_id)
            yield RestartStep(number, "serving")
            # The others are told of it, and link to it, before they send it their nodes.
            time.sleep(RESTART_PAUSE_SECONDS)

    def _end_for_restart(self, name: str, drained: Any) -> int:
        """Ends its process once it has drained, and stopped or had its time to; how many answers that breaks off."""
        import ray  # noqa: PLC0415

        left_count, actor = 0, self._actors[name]
        try:
            left_count = ray.get(drained)
            ray.get(actor.stop.remote(), timeout=GATEWAY_STOP_SECONDS_MAX)
        except ray.exceptions.RayActorError:
            return left_count  # it died meanwhile, and comes back anyway
        except ray.exceptions.RayError as error:
            _log.warning("actor_not_stopped", actor=name, reason=type(error).__name__)
        ray.kill(actor, no_restart=False)
        return left_count

    def _process_id(self, name: str) -> int:
        """0 while it is away."""
        import ray  # noqa: PLC0415

        with contextlib.suppress(ray.exceptions.RayError):
            return int(ray.get(self._actors[name].process_id.remote(), timeout=CHECK_SECONDS_MAX))
        return 0

    def _wait_back(self, name: str, former_process_id: int) -> None:
        """Until another process serves in its place; a killed one may still answer for a moment."""
        import ray  # noqa: PLC0415

        give_up_at = self._clock.monotonic_seconds() + ABSENCE_SECONDS_MAX
        while self._clock.monotonic_seconds() < give_up_at:
            with contextlib.suppress(ray.exceptions.RayError):
                is_ready = ray.get(self._actors[name].ready.remote(), timeout=CHECK_SECONDS_MAX) is None
                if is_ready and self._process_id(name) not in {0, former_process_id}:
                    return
            time.sleep(CANCEL_CHECK_SECONDS)
        raise PotluckError(ErrorCode.COORDINATOR_UNAVAILABLE, f"{name} did not come back within {ABSENCE_SECONDS_MAX:.0f} s.")

    def stop(self) -> None:
        """Gateways first, so that nodes hear a goodbye and holds are settled; then the directory; then Ray. Bounded, never raises."""
        import ray  # noqa: PLC0415

        gateways = [name for name in self._actors if name != DIRECTORY]
        for names, seconds in ((gateways, GATEWAY_STOP_SECONDS_MAX), ([DIRECTORY], DIRECTORY_STOP_SECONDS_MAX)):
            actors = {name: self._actors.pop(name) for name in names if name in self._actors}
            stopping = {name: actor.stop.remote() for name, actor in actors.items()}
            if stopping:
                ray.wait(list(stopping.values()), num_returns=len(stopping), timeout=seconds)
            for name, stopped in stopping.items():
                try:
                    ray.get(stopped, timeout=0)
                except ray.exceptions.RayError as error:
                    _log.warning("actor_not_stopped", actor=name, reason=type(error).__name__)
                ray.kill(actors[name], no_restart=True)
        ray.shutdown()

    def _made(self, actor_class: type, name: str, machine: str, *, soft: bool) -> Any:
        import ray  # noqa: PLC0415

        where = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(machine, soft=soft)
        return ray.remote(actor_class).options(
            name=name,
            num_cpus=0,
            memory=ACTOR_MEMORY_BYTES,
            max_restarts=-1,
            max_task_retries=0,
            max_concurrency=CALLS_MAX,
            scheduling_strategy=where,
        )

    def _make_gateway(self, number: int) -> None:
        """On the machines in turn; where its machine is gone, on any other."""
        machine = self._machines[number % len(self._machines)]
        name = f"{GATEWAY}{number}"
        self._actors[name] = self._made(GatewayActor, name, machine, soft=True).remote(self._settings, self._reach, number)

    def _wait_ready(self, names: Sequence[str], cancelled: Callable[[], bool]) -> bool:
        """Whether they serve; False where it was cancelled. Raises what kept one of them from it."""
        import ray  # noqa: PLC0415

        waiting = {self._actors[name].ready.remote(): name for name in names}
        while waiting:
            ready, _ = ray.wait(list(waiting), timeout=CANCEL_CHECK_SECONDS)
            if not ready and cancelled():
                return False
            for one in ready:
                failure = ray.get(one)
                if failure is not None:
                    raise failure
                self._answered_at[waiting.pop(one)] = self._clock.monotonic_seconds()
        return True

    def _is_gone(self, name: str, failure: Exception) -> bool:
        """Whether it is not coming back. One that answers that it failed is about to end its process: it is absent, too."""
        import ray  # noqa: PLC0415

        absent_seconds = self._clock.monotonic_seconds() - self._answered_at[name]
        _log.warning("actor_absent", actor=name, absent_seconds=round(absent_seconds, 1), reason=type(failure).__name__)
        # The latter is Ray's word for an actor that it will not start again.
        return absent_seconds > ABSENCE_SECONDS_MAX or isinstance(failure, ray.exceptions.ActorDiedError)

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


def _away_text(name: str, failure: Exception) -> str:
    reason = f" What it says: {failure.message}" if isinstance(failure, PotluckError) else ""
    return f"The coordinator's {name} has been away for too long.{reason}"


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
            os.environ.update(private_ray(Path(folder) / "token"))
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
