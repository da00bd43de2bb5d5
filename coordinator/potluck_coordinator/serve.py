"""One coordinator from start to stop: the only one on its data folder, three ports settled, its actors up, nothing left behind.

Decides the order of that, what a start is refused for, and what tells other programs that the coordinator is ready. `ray_runtime` runs the
actors; `warden` clears up should this process die. It must not know how requests are served.
"""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import json
import os
import random
import select
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any, Final

import structlog

from potluck_coordinator.control import Control
from potluck_coordinator.data_folder import locked, unusable
from potluck_coordinator.listening import PREDECESSOR_SECONDS_MAX, RETRY_SECONDS, bind, claim
from potluck_coordinator.ray_runtime import RayRuntime
from potluck_coordinator.settings import Settings
from potluck_coordinator.warden import Warden, sweep
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.private_files import write_private

STOP_SECONDS_MAX: Final = 9.5
"""After a signal, whatever has not stopped by then is killed."""
WARDEN_SECONDS_MAX: Final = 5.0
CHECK_PAUSE_SECONDS: Final = 2.0
"""Between looks at the actors. Ray restarts one that died without being asked, so nothing is lost if a look comes late."""
TEMPORARY_PATH_LENGTH_MAX: Final = 24
FREE_PORTS: Final = range(20_000, 30_000)
"""Where a port 0 is taken from. The kernel's own choice could be given to one of Ray's sockets before the gateway has bound it."""
FREE_PORT_TRIES: Final = 20
STDERR: Final = 2
STOP_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PORT_FLAGS: Final = {"http_port": "--http-port", "grpc_port": "--grpc-port", "link_port": "--link-port"}

_log = structlog.get_logger()


def serve(settings: Settings, on_ready: Callable[[Settings], None]) -> None:
    """Runs a coordinator until SIGINT, SIGTERM or SIGHUP; one that is ignored at the start stays ignored.

    Args:
        settings: as given; ports may be 0.
        on_ready: called once everything serves, with the settings whose ports are the real ones.

    Raises:
        PotluckError: COORDINATOR_UNAVAILABLE if another coordinator has the data folder or another process a port, or if a part of it stays
            away; else what failed.
    """
    with _data_folder(settings) as predecessor_died:
        place, prefix = _run_dir_names(settings.data_dir)
        for left_behind in place.glob(f"{prefix}*"):
            # The place is everybody's: another user could have laid a link there, to have what it points at swept.
            if not left_behind.is_symlink() and left_behind.stat().st_uid == os.getuid():
                sweep(left_behind)
        with settled_ports(settings, PREDECESSOR_SECONDS_MAX if predecessor_died else 0.0) as settled:
            _run(settled, _make_run_dir(place, prefix), on_ready)


def _run(settings: Settings, run_dir: Path, on_ready: Callable[[Settings], None]) -> None:
    warden = Warden(run_dir)
    try:
        with _log_pipe(run_dir / "log") as log_pipe:
            runtime = RayRuntime(settings, run_dir, log_pipe)
            try:
                _start(runtime)
                with _stop_signal() as stopped_within, _controlled(runtime, run_dir / "control"):
                    _write_endpoints(settings, run_dir / "control")
                    on_ready(settings)
                    while not stopped_within(CHECK_PAUSE_SECONDS):
                        runtime.check()
            finally:
                _stop(runtime, settings)
    finally:
        if not warden.dismiss(WARDEN_SECONDS_MAX):
            _log.error("run_not_cleared", run_dir=str(run_dir))


@contextmanager
def settled_ports(settings: Settings, patience_seconds: float) -> Iterator[Settings]:
    """The settings with each port 0 replaced by a free one, once every port is known to be free.

    No other coordinator takes what was found here, though it starts in the seconds until the gateway has bound it.

    Raises:
        PotluckError: COORDINATOR_UNAVAILABLE for a port or address that cannot be had, naming the flag that changes it.
    """
    give_up_at = time.monotonic() + patience_seconds
    while True:
        with ExitStack() as claims:
            try:
                settled = _settle_ports_now(settings, claims)
            except PotluckError:
                if time.monotonic() >= give_up_at:
                    raise
            else:
                yield settled
                return
        time.sleep(RETRY_SECONDS)


def _settle_ports_now(settings: Settings, claims: ExitStack) -> Settings:
    ports: dict[str, int] = {}
    with ExitStack() as held:
        for name, flag in PORT_FLAGS.items():
            probe = held.enter_context(_socket(settings.host, getattr(settings, name), flag, claims))
            ports[name] = probe.getsockname()[1]
        if not settings.link_port and settings.own_link_port is None:
            ports["own_link_port"] = 0
        for port in settings.own_link_ports:
            held.enter_context(_socket(settings.host, port, "own_link_port in --settings", claims))
    return settings.model_copy(update=ports)


def _socket(host: str, wanted: int, flag: str, claims: ExitStack) -> socket.socket:
    """On the port that is wanted, or for 0 on a free one, which is claimed either way."""
    if wanted:
        if claimed := claim(host, wanted):
            claims.enter_context(claimed)
        return bind(host, wanted, flag)
    for port in random.sample(FREE_PORTS, FREE_PORT_TRIES):
        if claimed := claim(host, port):
            with contextlib.suppress(PotluckError):
                found = bind(host, port, flag)
                claims.enter_context(claimed)
                return found
            claimed.close()
    # None of so many could be had, so it is hardly a matter of ports: binding any free one says what is wrong with the address.
    return bind(host, 0, flag)


def _start(runtime: RayRuntime) -> None:
    # Ray's processes inherit the mask: a Ctrl-C in the terminal reaches every process of it, and only this one may act on it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        runtime.start(lambda: signal.SIGINT in signal.sigpending())
    finally:
        # Where one is waiting, this raises KeyboardInterrupt.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _stop(runtime: RayRuntime, settings: Settings) -> None:
    settings.endpoints_file.unlink(missing_ok=True)
    # A start that failed, or was broken off, is stopped without having come to `_stop_signal`.
    _ignore(STOP_SIGNALS)
    # Should Ray's own code never return: this needs no interpreter to say where it stands and end the process. Then the warden sweeps.
    faulthandler.dump_traceback_later(STOP_SECONDS_MAX, exit=True, file=STDERR)
    runtime.stop()
    faulthandler.cancel_dump_traceback_later()


def _ignore(numbers: Iterable[signal.Signals]) -> None:
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)


def _write_endpoints(settings: Settings, control: Path) -> None:
    """Whole or not at all: whoever sees the file may connect."""
    ports = {"http": settings.http_port, "grpc": settings.grpc_port, "link": settings.link_port}
    endpoints = {**ports, "pid": os.getpid(), "control": str(control)}
    write_private(settings.endpoints_file, json.dumps(endpoints).encode() + b"\n", durable=False)


@contextmanager
def _controlled(runtime: RayRuntime, path: Path) -> Iterator[None]:
    """Other processes of this operator may ask for a restart of the gateways meanwhile."""

    def answer(asked: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        if asked.get("ask") != "restart":
            raise PotluckError(ErrorCode.INVALID_REQUEST, "This coordinator does not know what it was asked; is it an older one?")
        yield from map(asdict, runtime.restart_gateways(float(asked["drain_seconds_max"])))

    control = Control(path, answer)
    try:
        yield
    finally:
        control.stop()


@contextmanager
def _data_folder(settings: Settings) -> Iterator[bool]:
    """Makes the folder, holds it for this process, and says whether a predecessor left without stopping."""
    folder = settings.data_dir
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
    except OSError as error:
        raise unusable(folder, error) from error
    with locked(settings):
        predecessor_died = settings.endpoints_file.exists()
        settings.endpoints_file.unlink(missing_ok=True)
        yield predecessor_died


def _run_dir_names(data_dir: Path) -> tuple[Path, str]:
    """Where the folders of runs on this data folder lie, and how their names begin; while its lock is held, all of them are left behind.

    They lie in the system's temporary folder because Ray's socket paths below them may have 107 characters at most.
    """
    place = Path(tempfile.gettempdir())
    if len(str(place)) > TEMPORARY_PATH_LENGTH_MAX:
        place = Path("/tmp")  # noqa: S108 - the folder made in it is private
    return place, f"potluck-{hashlib.sha256(str(data_dir.resolve()).encode()).hexdigest()[:8]}-"


def _make_run_dir(place: Path, prefix: str) -> Path:
    """An empty private folder for this run's sockets and logs."""
    try:
        return Path(tempfile.mkdtemp(prefix=prefix, dir=place))
    except OSError as error:
        raise PotluckError(
            ErrorCode.COORDINATOR_UNAVAILABLE, f"Cannot make a folder in {place}: {error.strerror}; set TMPDIR to another place."
        ) from error


@contextmanager
def _log_pipe(path: Path) -> Iterator[Path]:
    """A named pipe whose lines appear on this process's standard error: the actors' log."""
    os.mkfifo(path, 0o600)
    # Open for writing too, so that it does not end when an actor does.
    descriptor = os.open(path, os.O_RDWR)
    threading.Thread(target=_copy_to_stderr, args=(descriptor,), name="log-pipe", daemon=True).start()
    yield path


def _copy_to_stderr(descriptor: int) -> None:
    """For ever, whatever becomes of standard error: while nobody empties the pipe, the actors' lines are lost."""
    while chunk := os.read(descriptor, 65536):
        # Whoever read it may have gone (`serve 2>&1 | head`), or the disk may be full.
        with contextlib.suppress(OSError):
            while chunk:
                chunk = chunk[os.write(STDERR, chunk) :]


@contextmanager
def _stop_signal() -> Iterator[Callable[[float], bool]]:
    """Gives a wait for so many seconds at most, which says whether one of `STOP_SIGNALS` has come.

    Entered after Ray's start, which sets handlers too. A pipe takes the signals: several at once interrupt each other's handlers, and one
    that sets an event finds its lock held by the one before. After the block they are ignored, for the stop that they ask for is bounded.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def handle(_number: int, _frame: FrameType | None) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(writer, b"!")

    def stopped_within(seconds: float) -> bool:
        return bool(select.select([reader], [], [], seconds)[0])

    # What is ignored stays so: `nohup` means the coordinator to outlive its terminal.
    numbers = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    for number in numbers:
        signal.signal(number, handle)
    try:
        yield stopped_within
    finally:
        _ignore(numbers)
        os.close(reader)
        os.close(writer)
