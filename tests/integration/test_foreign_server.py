"""An engine of another environment: announced once it is well, told its key in private, and gone as a whole."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from potluck_node.engines import foreign_server
from potluck_node.engines.foreign_server import BROKEN_EXIT_STATUS, SOCKET_PATH_BYTES_MAX, interface_of, temporary_variables
from potluck_node.engines.shared_memory import free_what_the_dead_left
from potluck_node.lifeline import PARENT_GONE_EXIT_STATUS
from tests.support import namespaces
from tests.support.pool import until

STAND_IN = Path(__file__).parents[1] / "support" / "foreign_engine.py"
SECONDS_MAX = 15.0


class Server:
    """The launcher with a stand-in for an engine."""

    def __init__(self, folder: Path, *options: str, engine: tuple[str, ...] = (), wrap: tuple[str, ...] = ()) -> None:
        self._folder = folder
        folder.mkdir(exist_ok=True)
        self._errors = folder / "stderr"
        command = ("-P", "-m", "potluck_node.engines.foreign_server", "--lifeline", *options)
        stand_in = ("--", sys.executable, "-P", str(STAND_IN), "{port}", str(folder), *engine)
        with self._errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [*wrap, sys.executable, *command, *stand_in],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )

    def announced(self) -> dict[str, str]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.said()
        return json.loads(line)

    def told(self) -> dict:
        assert until((self._folder / "told.json").exists, SECONDS_MAX), self.said()
        return json.loads((self._folder / "told.json").read_text())

    def said(self) -> str:
        return self._errors.read_text()

    def end(self) -> int:
        return self.process.wait(SECONDS_MAX)

    def is_gone(self) -> bool:
        """Nothing of it is left: process, worker, shared memory."""
        told = self.told()
        files = memory_of(told["pid"]), Path(f"/dev/shm/sem.{told['semaphore'].lstrip('/')}")
        # Whoever cleans up does so after the processes have ended.
        return until(lambda: not runs(told["pid"]) and not runs(told["worker"]) and not any(file.exists() for file in files), SECONDS_MAX)


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def memory_of(pid: int) -> Path:
    return Path(f"/dev/shm/potluck-test-{pid}")


@pytest.fixture
def start(tmp_path: Path) -> Iterator:
    started = []

    def starting(*options: str, name: str = "engine", **more) -> Server:
        started.append(Server(tmp_path / name, *options, **more))
        return started[-1]

    yield starting
    for server in started:
        if server.process.poll() is None:
            server.process.stdin.close()
            server.process.wait(SECONDS_MAX)


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """pytest's own are too deep for sockets."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def test_it_is_announced_when_it_is_well_and_not_before(start):
    server = start("--key-variable", "THE_KEY")
    url = server.announced()["url"]
    with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
        assert response.status == 200
    assert memory_of(server.told()["pid"]).exists()
    assert Path(f"/dev/shm/sem.{server.told()['semaphore'].lstrip('/')}").exists()


def test_its_key_is_in_its_environment_or_a_file_of_its_own_and_on_no_command_line(start):
    server = start("--key-variable", "THE_KEY", "--key-file-word", "api-key", engine=("--key-file", "{key_file}"))
    key = server.announced()["api_key"]
    assert len(key) == 48
    assert server.told()["environment"]["THE_KEY"] == key
    assert json.loads(server.told()["key_file"].partition("api-key: ")[2]) == key
    (engine,) = (process for process in psutil.Process(server.process.pid).children() if process.pid == server.told()["pid"])
    key_file = Path(engine.cmdline()[-1])
    assert key_file.stat().st_mode & 0o077 == 0
    assert not any(key in word for process in (engine, psutil.Process(server.process.pid)) for word in process.cmdline())
    server.process.stdin.close()
    server.end()
    assert not key_file.parent.exists()


def test_it_sees_its_settings_and_nothing_of_our_interpreter(start, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(STAND_IN.parent))
    monkeypatch.setenv("VIRTUAL_ENV", sys.prefix)
    server = start("--set", "A=1", "--set", "B=x=y")
    server.announced()
    environment = server.told()["environment"]
    assert (environment["A"], environment["B"]) == ("1", "x=y")
    assert not {"PYTHONPATH", "VIRTUAL_ENV"} & environment.keys()


@pytest.mark.parametrize("whom", ["its stdin is closed", "it is killed with all it started"])
def test_what_it_forgets_in_its_temporary_folder_goes_with_it_and_what_it_compiled_stays(start, short_folder, monkeypatch, whom):
    place = short_folder
    monkeypatch.setenv("TMPDIR", str(place))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", None)
    server = start("--set", "A=1")
    server.announced()
    own = Path(server.told()["environment"]["TMPDIR"])
    assert own.parent == place
    (own / "forgotten").touch()
    compiled = Path(server.told()["environment"]["TORCHINDUCTOR_CACHE_DIR"])
    assert (compiled.parent, compiled.name.startswith("torchinductor_")) == (place, True)
    compiled.mkdir()
    if whom == "its stdin is closed":
        server.process.stdin.close()
    else:
        os.killpg(server.process.pid, signal.SIGKILL)
    server.end()
    free_what_the_dead_left()
    assert list(place.iterdir()) == [compiled]


def test_a_socket_of_an_engine_never_gets_too_long_a_path():
    """Then what it forgets stays behind, as it would without us."""
    longest = Path("/" + "f" * (SOCKET_PATH_BYTES_MAX - 1 - 1 - len(str(uuid.uuid4()))))
    assert temporary_variables(longest, {})["TMPDIR"] == str(longest)
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as bound:
        bound.bind(f"{folder}/".ljust(SOCKET_PATH_BYTES_MAX, "s"))
    assert temporary_variables(Path(f"{longest}f"), {}) == {}


def test_what_an_engine_compiles_lies_where_its_owner_says(start, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/fast/disk")
    server = start()
    server.announced()
    told = server.told()["environment"]
    assert (told["TORCHINDUCTOR_CACHE_DIR"], Path(told["TMPDIR"]).is_dir()) == ("/fast/disk", True)


def test_it_ends_with_its_parent(start):
    server = start()
    server.announced()
    server.process.stdin.close()
    assert server.end() == PARENT_GONE_EXIT_STATUS
    assert server.is_gone()


def test_it_ends_when_asked(start):
    server = start()
    server.announced()
    os.killpg(server.process.pid, signal.SIGTERM)
    assert server.end() == 0
    assert server.is_gone()


@pytest.mark.timed
def test_it_ends_when_one_of_its_processes_is_killed(start):
    server = start()
    server.announced()
    os.kill(server.told()["worker"], signal.SIGKILL)
    began = time.monotonic()
    assert server.end() == BROKEN_EXIT_STATUS
    assert time.monotonic() - began < 3.0
    assert "one of the engine's processes is gone" in server.said()
    assert server.is_gone()


def test_a_process_that_goes_between_two_questions_is_gone():
    process = psutil.Process()

    def status() -> str:
        raise psutil.NoSuchProcess(process.pid)

    assert not foreign_server._is_gone(process)
    assert foreign_server._is_gone(SimpleNamespace(is_running=lambda: True, status=status))


def test_its_own_end_is_the_launchers_too(start):
    assert start(engine=("--exit", "3"), name="exits").end() == 3
    server = start(name="killed")
    server.announced()
    os.kill(server.told()["pid"], signal.SIGKILL)
    assert server.end() == -signal.SIGKILL
    assert server.is_gone()


def test_a_program_that_is_not_there_is_named(tmp_path):
    command = ["-P", "-m", "potluck_node.engines.foreign_server", "--", str(tmp_path / "python")]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert str(tmp_path / "python") in done.stderr


def test_an_address_that_no_interface_has_is_refused_with_what_to_set():
    assert interface_of("127.0.0.1") == "lo"
    with pytest.raises(SystemExit, match="group_address"):
        interface_of("203.0.113.9")


@pytest.mark.namespaces
@pytest.mark.skipif(not namespaces.available(), reason="needs root and `ip netns` (Debian's iproute2)")
@pytest.mark.parametrize("lost", ["leader", "member"])
def test_a_group_ends_on_every_host_when_one_of_them_loses_its_engine(start, lost):
    with namespaces.hosts_of_one_site(2) as (_, first, second):
        place = ("--group-port", "29600", "--set", "INTERFACE={interface}")
        meeting = f"{first.address}:29600"
        leader = start("--group-address", first.address, *place, engine=("--listen", meeting), wrap=first.wrap, name="leader")
        member = start(
            *("--group-address", second.address, *place, "--follows"), engine=("--connect", meeting), wrap=second.wrap, name="member"
        )
        assert member.announced()["url"] == ""
        assert leader.announced()["url"]
        assert leader.told()["environment"]["INTERFACE"] == "potluck0"
        servers = {"leader": leader, "member": member}
        os.kill(servers.pop(lost).told()["pid"], signal.SIGKILL)
        ((_, other),) = servers.items()
        assert other.end() == BROKEN_EXIT_STATUS
        assert f"the group is broken: the member at {first.address if lost == 'leader' else second.address} is gone" in other.said()
        assert leader.is_gone()
        assert member.is_gone()
