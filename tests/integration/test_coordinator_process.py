"""The coordinator as a process: what it opens, what it leaves behind, and how it comes back from the death of any part of it."""

from __future__ import annotations

import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.coordinator_process import CoordinatorProcess, alive, wait_gone, wait_until

pytestmark = pytest.mark.timeout(180)

BACK_SECONDS_MAX = 10.0
STOP_SECONDS_MAX = 10.0
GONE_SECONDS_MAX = 10.0


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CoordinatorProcess]:
    with CoordinatorProcess(tmp_path_factory.mktemp("coordinator") / "data") as process:
        process.wait_ready()
        yield process


def _authenticated(process: CoordinatorProcess) -> bool:
    return process.get("/v1/models", process.operator()["api_key"])[0] == 200


def _run_dir(processes: list[psutil.Process]) -> Path:
    warden = next(process for process in processes if "potluck_coordinator.warden" in process.cmdline())
    return Path(warden.cmdline()[-1])


def test_every_listener_is_on_loopback_and_only_three_are_ours(coordinator: CoordinatorProcess) -> None:
    listeners = {
        (connection.laddr.ip.removeprefix("::ffff:"), connection.laddr.port)
        for process in coordinator.processes()
        for connection in process.net_connections()
        if connection.status == psutil.CONN_LISTEN
    }
    endpoints = coordinator.wait_ready()

    assert {ip for ip, _ in listeners} == {"127.0.0.1"}
    assert {endpoints["http"], endpoints["grpc"], endpoints["link"]} <= {port for _, port in listeners}


def test_files_of_the_data_folder_are_private(coordinator: CoordinatorProcess) -> None:
    assert coordinator.data_dir.stat().st_mode & 0o777 == 0o700
    for name in ("operator.json", "ray_token", "ca/ca.key"):
        assert (coordinator.data_dir / name).stat().st_mode & 0o777 == 0o600, name


def test_a_second_coordinator_on_the_same_folder_is_refused_at_once(coordinator: CoordinatorProcess) -> None:
    started = time.monotonic()
    with CoordinatorProcess(coordinator.data_dir) as second:
        assert second.process.wait(30) == 1
    assert "Another coordinator runs on" in second.log()
    assert time.monotonic() - started < 10
    assert coordinator.endpoints_file.exists()


def test_a_taken_port_is_named_with_its_flag(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with CoordinatorProcess(tmp_path / "data", ports=(0, port, 0)) as process:
            assert process.process.wait(30) == 1
    assert f"Port {port} of 127.0.0.1 is taken" in process.log()
    assert "--grpc-port" in process.log()


def test_a_wrong_setting_is_named(tmp_path: Path) -> None:
    with CoordinatorProcess(tmp_path / "data", "--fee-basis-points", "20000") as process:
        assert process.process.wait(30) == 2
    assert "fee_basis_points" in process.log()


def test_a_start_that_fails_inside_an_actor_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    catalogue = tmp_path / "catalogue.toml"
    catalogue.write_text("this is not = [ TOML")
    with CoordinatorProcess(tmp_path / "data", "--catalogue", str(catalogue)) as process:
        started = process.watch_to_its_end(60)
        assert process.process.wait(5) == 2
    # The directory's actor runs below Ray: without it the start has not come to what this is about.
    assert any("raylet" in name for name in started.values())
    assert "error: " in process.log()
    assert "catalogue.toml" in process.log().rpartition("error: ")[2]
    wait_gone(list(started), GONE_SECONDS_MAX)


@pytest.fixture
def own_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A Ray cluster that the operator started, with a token of its own; its address."""
    token = tmp_path / "token"
    token.write_text(secrets.token_hex(32))
    for name, value in (("AUTH_MODE", "token"), ("AUTH_TOKEN_PATH", str(token)), ("ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")):
        monkeypatch.setenv(f"RAY_{name}", value)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    # A folder of its own with a short path, for the paths of its sockets are bounded.
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        flags = [
            "--node-ip-address=127.0.0.1",
            "--include-dashboard=false",
            "--num-cpus=0",
            f"--temp-dir={folder}",
            "--disable-usage-stats",
        ]
        head = subprocess.Popen(
            [Path(sys.executable).with_name("ray"), "start", "--head", "--block", f"--port={port}", f"--temp-dir={folder}", *flags],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        family = psutil.Process(head.pid)
        try:
            wait_until(lambda: any("raylet" in child.name() for child in family.children(recursive=True)), 60, "the cluster")
            yield f"127.0.0.1:{port}"
            assert head.poll() is None, "the cluster is its operator's, and outlives the coordinator"
        finally:
            ended = [family, *family.children(recursive=True)]
            head.terminate()
            head.wait(30)
            wait_gone(ended, GONE_SECONDS_MAX)


def test_a_coordinator_joins_its_operators_own_cluster(own_cluster: str, tmp_path: Path) -> None:
    with CoordinatorProcess(tmp_path / "data", "--ray-address", own_cluster) as process:
        process.wait_ready()
        assert _authenticated(process)
        assert not any("gcs_server" in started.name() for started in process.processes())
        process.process.send_signal(signal.SIGINT)
        assert process.process.wait(STOP_SECONDS_MAX) == 0


@pytest.mark.parametrize("actor", ["GatewayActor", "DirectoryActor"])
def test_an_actor_that_is_killed_comes_back_with_the_same_ports(coordinator: CoordinatorProcess, actor: str) -> None:
    before = coordinator.wait_ready()
    victim = coordinator.actor(actor)

    victim.kill()
    # A key that no gateway remembers, each time another: only gateway and directory together can refuse it.
    wait_until(
        lambda: coordinator.get("/v1/models", f"sk-potluck-aaaaaaaa-{secrets.token_hex(21)}b")[0] == 401,
        BACK_SECONDS_MAX,
        f"an answer after the death of {actor}",
    )

    assert _authenticated(coordinator)
    assert coordinator.actor(actor).pid != victim.pid
    assert coordinator.wait_ready() == before


def test_ctrl_c_in_the_terminal_and_many_signals_more_stop_everything_in_time(tmp_path: Path) -> None:
    with CoordinatorProcess(tmp_path / "data") as process:
        process.wait_ready()
        processes = process.processes()
        run_dir = _run_dir(processes)
        process.signal_group(signal.SIGINT)
        for _ in range(20):
            process.process.terminate()
        started = time.monotonic()
        assert process.process.wait(STOP_SECONDS_MAX) == 0, process.log()

    assert time.monotonic() - started < STOP_SECONDS_MAX
    assert not alive(processes)
    assert not run_dir.exists()
    assert not process.endpoints_file.exists()
    assert "Traceback" not in process.log()


def test_a_coordinator_that_is_killed_leaves_nothing_and_its_successor_serves_the_same_pool(tmp_path: Path) -> None:
    with CoordinatorProcess(tmp_path / "data") as first:
        endpoints = first.wait_ready()
        api_key = first.operator()["api_key"]
        document = first.get("/pool/v1/connection")
        processes = first.processes()
        run_dir = _run_dir(processes)
        first.process.kill()
        first.process.wait(5)
        ports = (endpoints["http"], endpoints["grpc"], endpoints["link"])
        with CoordinatorProcess(tmp_path / "data", ports=ports) as second:
            wait_gone(processes, GONE_SECONDS_MAX)
            wait_until(lambda: second.endpoints_file.exists() and second.wait_ready()["pid"] == second.process.pid, 60, "the second one")
            assert second.operator()["api_key"] == api_key
            assert _authenticated(second)
            assert second.get("/pool/v1/connection") == document
    assert not run_dir.exists()


def test_help_teaches() -> None:
    command = [sys.executable, "-c", "from potluck_coordinator.command import app; app()"]
    general = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True, timeout=60).stdout
    serve = subprocess.run([*command, "serve", "--help"], capture_output=True, text=True, check=True, timeout=60).stdout

    assert "potluck tokens create" in " ".join(general.split())
    for flag in ("--data-dir", "--http-port", "--grpc-port", "--link-port", "--catalogue", "--ray-address", "--log-format"):
        assert flag in serve
