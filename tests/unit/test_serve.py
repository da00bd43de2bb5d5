"""Ports before anything is started, and the sweep after everything ended."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from potluck_coordinator import serve
from potluck_coordinator.serve import settled_ports
from potluck_coordinator.settings import Settings
from potluck_coordinator.warden import RUN_MARK, Warden, sweep
from potluck_protocol.errors import ErrorCode, PotluckError


def _settings(tmp_path: Path, **changes: object) -> Settings:
    return Settings.model_validate({"data_dir": tmp_path, "http_port": 0, "grpc_port": 0, "link_port": 0, **changes})


def test_free_ports_are_found_once_and_differ(tmp_path: Path) -> None:
    with settled_ports(_settings(tmp_path), 0) as settled:
        ports = {settled.http_port, settled.grpc_port, settled.link_port}
        assert len(ports) == 3
        assert 0 not in ports
        with settled_ports(settled, 0) as again:
            assert again == settled


@pytest.mark.parametrize("named", [{}, {"http_port": 20_003, "grpc_port": 20_004, "link_port": 20_005}])
def test_coordinators_that_start_at_once_never_find_the_same_ports(
    named: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "FREE_PORTS", range(20_000, 20_020))
    with settled_ports(_settings(tmp_path, **named), 0) as first:
        for _ in range(20):
            with settled_ports(_settings(tmp_path), 0) as second:
                found = {getattr(settled, name) for settled in (first, second) for name in serve.PORT_FLAGS}
                assert len(found) == 6


@pytest.mark.parametrize("name", ["http_port", "grpc_port", "link_port"])
def test_a_taken_port_is_refused_with_its_flag(tmp_path: Path, name: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = _settings(tmp_path, **{name: taken.getsockname()[1]})
        with pytest.raises(PotluckError, match=f"--{name.replace('_', '-')}") as caught, settled_ports(settings, 0):
            pass
    assert caught.value.code is ErrorCode.COORDINATOR_UNAVAILABLE


def test_an_address_of_another_machine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PotluckError, match="--host"), settled_ports(_settings(tmp_path, host="192.0.2.1"), 0):
        pass


def test_the_actors_lines_are_taken_even_when_nobody_reads_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    log_read, log_write = os.pipe()
    reader, broken_stderr = os.pipe()
    os.close(reader)
    monkeypatch.setattr(serve, "STDERR", broken_stderr)
    copying = threading.Thread(target=serve._copy_to_stderr, args=(log_read,), daemon=True)
    copying.start()
    os.set_blocking(log_write, False)
    for _ in range(100):
        assert select.select([], [log_write], [], 5)[1], "the pipe is full: nobody empties it"
        os.write(log_write, b"x" * 4096)
    os.close(log_write)
    copying.join(5)
    assert not copying.is_alive()
    for descriptor in (log_read, broken_stderr):
        os.close(descriptor)


def _sleeper(mark: Path | None = None, open_file: Path | None = None) -> subprocess.Popen[bytes]:
    environment = {**os.environ, **({RUN_MARK: str(mark)} if mark else {})}
    with (open_file or Path(os.devnull)).open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(60)"], env=environment, start_new_session=True, stdout=output
        )


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
def test_a_sweep_kills_what_belongs_to_the_run_and_nothing_else(tmp_path: Path) -> None:
    run_dir, other_dir = tmp_path / "run", tmp_path / "run-2"
    run_dir.mkdir()
    other_dir.mkdir()
    marked = _sleeper(mark=run_dir)
    # As a process that set its title, and so overwrote its environment.
    writing = _sleeper(open_file=run_dir / "agent.err")
    others = [_sleeper(mark=other_dir), _sleeper(open_file=other_dir / "agent.err"), _sleeper()]
    try:
        assert Warden(run_dir).dismiss(10)

        assert marked.wait(5) < 0
        assert writing.wait(5) < 0
        assert [other.poll() for other in others] == [None, None, None]
        assert not run_dir.exists()
        assert other_dir.exists()
    finally:
        for process in (marked, writing, *others):
            process.kill()
            process.wait(5)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
def test_a_graceful_sweep_spares_the_coordinator_itself(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with (run_dir / "log").open("wb"):
        assert Warden(run_dir).dismiss(10)
    assert not run_dir.exists()


def test_a_sweep_of_nothing_removes_the_folder(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()

    assert sweep(run_dir)
    assert not run_dir.exists()


STUCK = """
import ctypes, os, signal, sys
from pathlib import Path
from potluck_coordinator import serve
from potluck_coordinator.settings import Settings

class Stuck:
    def stop(self):
        for number in serve.STOP_SIGNALS:
            os.kill(os.getpid(), number)  # whoever asks again waits like everybody
        print("stopping", flush=True)
        # Unlike CDLL it keeps the interpreter's lock, so that no other thread of Python's runs any more.
        ctypes.PyDLL(None).sleep(100)

serve.STOP_SECONDS_MAX = 0.2
for number in serve.STOP_SIGNALS:
    signal.signal(number, signal.SIG_DFL)
serve._stop(Stuck(), Settings.model_validate({"data_dir": Path(sys.argv[1])}))
"""


def test_a_stop_that_never_returns_is_ended_even_where_python_itself_stands_still(tmp_path: Path) -> None:
    stuck = subprocess.run([sys.executable, "-c", STUCK, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False)
    assert (stuck.stdout, stuck.returncode) == ("stopping\n", 1)
    assert "in stop" in stuck.stderr, "it says where it stood"


@pytest.fixture
def _handlers_kept() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in serve.STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_handlers_kept")
@pytest.mark.parametrize("number", serve.STOP_SIGNALS)
def test_a_signal_to_stop_ends_the_wait_and_is_ignored_from_then_on(number: signal.Signals) -> None:
    with serve._stop_signal() as stopped_within:
        assert not stopped_within(0)
        threading.Timer(0.05, os.kill, (os.getpid(), number)).start()
        assert stopped_within(10)
    assert {signal.getsignal(one) for one in serve.STOP_SIGNALS} == {signal.SIG_IGN}


@pytest.mark.usefixtures("_handlers_kept")
def test_however_many_signals_come_nobody_waits_for_the_pipe_that_takes_them() -> None:
    with serve._stop_signal() as stopped_within:
        for _ in range(100_000):  # more than the pipe holds
            signal.raise_signal(signal.SIGTERM)
        assert stopped_within(10)


@pytest.mark.usefixtures("_handlers_kept")
def test_a_coordinator_under_nohup_outlives_its_terminal() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with serve._stop_signal() as stopped_within:
        signal.raise_signal(signal.SIGHUP)
        assert not stopped_within(0)
        signal.raise_signal(signal.SIGTERM)
        assert stopped_within(10)


def test_a_start_that_waits_for_a_port_claims_nothing_that_it_does_not_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "FREE_PORTS", range(20_000, 20_020))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = _settings(tmp_path, link_port=taken.getsockname()[1])
        with pytest.raises(PotluckError), settled_ports(settings, 0.5):
            pass
    claims = [serve.claim("127.0.0.1", port) for port in serve.FREE_PORTS]
    assert None not in claims
    for claimed in claims:
        assert claimed is not None
        claimed.close()
