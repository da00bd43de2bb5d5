"""An engine of another environment as a process of the agent's: `python -m potluck_node.engines.foreign_server [OPTION…] -- COMMAND…`.

Starts the command on a free loopback port with a key that only the environment tells, prints one line of JSON with both once it says that
it is well (and, of a group's stage, where its workers leave what they count), and from then on watches. Decides that such an engine ends as
a whole: with the agent, when one of its processes dies (the others of vLLM would wait for it for ever, and say that they are well), or when
another member of its group is gone. Nothing of it is left: no process, no shared memory, and none of the sockets and files that it forgets
in the folder for temporary ones, which is this process's own; where this process is killed itself, `shared_memory` says who frees that. It
must not know models, nor what the command's flags mean.
"""

from __future__ import annotations

import argparse
import contextlib
import getpass
import http.client
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn

import psutil

from potluck_node.engines import stage_count
from potluck_node.engines.shared_memory import EngineFolder, free_what_the_dead_left
from potluck_node.lifeline import PARENT_GONE_EXIT_STATUS

LOOK_SECONDS: Final = 0.25
NOTE_SECONDS: Final = 2.0
"""Between looks at what is shared: engines go on to share more while they load, and some with their first requests."""
HEALTH_LIMIT_SECONDS: Final = 5.0
STOP_LIMIT_SECONDS: Final = 3.0
"""For an engine that was asked to end; the agent gives this process five."""
KILL_ROUND_SECONDS: Final = 0.2
KILL_ROUNDS_MAX: Final = 5
"""A process may start another one while it is being killed."""
BROKEN_EXIT_STATUS: Final = 70
SOCKET_PATH_BYTES_MAX: Final = 107
"""What Linux takes; a zero follows."""
SOCKET_NAME_BYTES_MAX: Final = 36
"""vLLM's are UUIDs."""
_COMPILED: Final = "TORCHINDUCTOR_CACHE_DIR"
"""PyTorch's name for where it keeps what it compiled."""
_READ_BYTES: Final = 4096


@dataclass(frozen=True, slots=True)
class Group:
    """Where the members of a shard group reach each other."""

    address: str
    """This node's own."""
    port: int
    """The leader's."""
    follows: bool
    """Another member leads, and answers."""


@dataclass(frozen=True, slots=True)
class Key:
    """What the engine asks for, and how it is told: by a variable of its environment, or by a line of a file that only its owner reads."""

    secret: str = field(repr=False)
    folder: EngineFolder
    """Gone with the engine."""

    @property
    def file(self) -> Path:
        """For engines that read their settings from YAML."""
        return self.folder.path / "key.yaml"

    def write(self, word: str) -> None:
        """Writes the file, as the setting of this name."""
        self.file.touch(mode=0o600)
        self.file.write_text(f"{word}: {json.dumps(self.secret)}\n")


class ForeignEngine:
    """The running command, and everything it started.

    Args:
        command: the program and its arguments.
        environment: all of it.
        port: on loopback.
        key: what it asks for.
        group: None: it is alone.
    """

    def __init__(self, command: list[str], environment: dict[str, str], port: int, key: Key, group: Group | None) -> None:
        self._port, self._key, self._group = port, key, group
        self._processes: list[psutil.Process] = []
        self._peers: frozenset[str] = frozenset()
        # Its stdin is its own lifeline. What it prints must not be taken for this process's one line.
        self._command = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=sys.stderr.fileno())

    @property
    def exit_status(self) -> int | None:
        """As `Popen.poll`: None while it runs, a signal's number below zero."""
        return self._command.poll()

    def is_well(self) -> bool:
        """Whether it can be announced: a leader answers; a member behind it is connected to it."""
        if self._group is not None and self._group.follows:
            return bool(self._connected())
        asking = http.client.HTTPConnection("127.0.0.1", self._port, timeout=HEALTH_LIMIT_SECONDS)
        try:
            asking.request("GET", "/health", headers={"Authorization": f"Bearer {self._key.secret}"})
            return asking.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            asking.close()

    def remember(self) -> None:
        """What is there now belongs to it as long as it lives."""
        self._processes = [process for process in _members() if "::" in _title(process)]
        self._peers = self._connected()
        self.note_shared_memory()

    def note_shared_memory(self) -> None:
        """So that it can be freed, whoever is killed."""
        self._key.folder.note(process.pid for process in _members())

    def fault(self) -> str:
        """What is missing of what was there; empty: nothing."""
        for process in self._processes:
            if _is_gone(process):
                return f"one of the engine's processes is gone (pid {process.pid})"
        for address in sorted(self._peers - self._connected() if self._peers else ()):
            return f"the group is broken: the member at {address} is gone"
        return ""

    def end(self, limit_seconds: float) -> None:
        """Waits for the command's own end, then kills what is left, and frees the memory that it shared among its processes."""
        self.note_shared_memory()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._command.wait(limit_seconds)
        for _ in range(KILL_ROUNDS_MAX):
            if not (left := _members()):
                break
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(left, KILL_ROUND_SECONDS)
        self._key.folder.remove()

    def _connected(self) -> frozenset[str]:
        """The addresses of the group's other members that a connection to or from its meeting place stands to."""
        if self._group is None:
            return frozenset()
        found: set[str] = set()
        for process in _members():
            with contextlib.suppress(psutil.Error):
                for connection in process.net_connections("tcp"):
                    if connection.status != psutil.CONN_ESTABLISHED or self._group.port not in {
                        connection.laddr.port,
                        connection.raddr.port,
                    }:
                        continue
                    found.add(connection.raddr.ip.removeprefix("::ffff:"))
        return frozenset(found - {self._group.address})


def _members() -> list[psutil.Process]:
    """The other processes of this one's group."""
    found = []
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError, psutil.Error):
            if pid != os.getpid() and os.getpgid(pid) == os.getpgrp():
                found.append(psutil.Process(pid))
    return found


def _is_gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # between the two questions
        return True


def _title(process: psutil.Process) -> str:
    """Its first word: engines name theirs "VLLM::EngineCore" and the like, and the rest come and go."""
    with contextlib.suppress(psutil.Error, IndexError):
        return process.cmdline()[0]
    return ""


def interface_of(address: str) -> str:
    """The name of the network interface that has an address; raises SystemExit where none has."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == address for each in addresses):
            return name
    raise SystemExit(f"no network interface of this machine has the group's address {address}; set group_address of this node")


def engine_environment(settings: list[str], group: Group | None) -> dict[str, str]:
    """This process's environment, without what belongs to its own interpreter, and with the settings."""
    interface = interface_of(group.address) if group else ""
    kept = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    told = dict(setting.split("=", 1) for setting in settings)
    return kept | {name: value.replace("{interface}", interface) for name, value in told.items()}


def temporary_variables(folder: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """What has an engine put its temporary files into its own folder, and keep what is worth keeping where it would lie without that.

    What it compiles lies where the environment says, if it says so.

    Empty where the folder's path is too long for the sockets that engines make there: then what they forget stays behind.
    """
    if len(os.fsencode(folder)) + 1 + SOCKET_NAME_BYTES_MAX > SOCKET_PATH_BYTES_MAX:
        return {}
    if _COMPILED in environment:
        return {"TMPDIR": str(folder)}
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # of a user without a name
        user = f"uid_{os.getuid()}"
    # As PyTorch makes it; compiling it all again costs minutes.
    compiled = Path(tempfile.gettempdir(), "torchinductor_" + re.sub(r'[\\/:*?"<>|]', "_", user))
    return {"TMPDIR": str(folder), _COMPILED: str(compiled)}


def _end_with_parent(engine: ForeignEngine, orphaned: threading.Event) -> None:
    with contextlib.suppress(OSError):
        while os.read(0, _READ_BYTES):
            pass
    # Said first: whoever watches the engine sees it end, and would take that for its own end.
    orphaned.set()
    engine.end(0)
    os._exit(PARENT_GONE_EXIT_STATUS)


def _run(engine: ForeignEngine, announcement: str) -> int:
    """Announces the engine when it is well; returns when it is over: its exit status, or below zero the signal that ended it."""
    announced, noted_at = False, 0.0
    while (status := engine.exit_status) is None:
        if announced and (fault := engine.fault()):
            print(fault, file=sys.stderr, flush=True)  # noqa: T201 - the supervisor's tail
            engine.end(0)
            return BROKEN_EXIT_STATUS
        if not announced and engine.is_well():
            engine.remember()
            print(announcement, flush=True)  # noqa: T201 - how the supervisor learns the port
            announced = True
        if time.monotonic() - noted_at >= NOTE_SECONDS:
            engine.note_shared_memory()
            noted_at = time.monotonic()
        time.sleep(LOOK_SECONDS)
    engine.end(0)
    return status


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="potluck_node.engines.foreign_server", description=__doc__)
    parser.add_argument("--lifeline", action="store_true", help="exit when stdin ends")
    parser.add_argument("--key-variable", default="", help="the environment variable that tells the engine its key")
    parser.add_argument("--key-file-word", default="", help="the setting that tells it, in the file that {key_file} stands for")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a variable of the engine's environment")
    parser.add_argument("--group-address", default="", help="this node's address among the members of its group")
    parser.add_argument("--group-port", type=int, default=0, help="the leader's port there")
    parser.add_argument("--follows", action="store_true", help="another member of the group leads")
    parser.add_argument("command", nargs="+", help="the engine; {port} stands for its port")
    return parser.parse_args()


def _start(options: argparse.Namespace, port: int) -> tuple[ForeignEngine, str]:
    """The engine, just started, and the line that announces it."""
    group = Group(options.group_address, options.group_port, options.follows) if options.group_address else None
    environment = engine_environment(options.set, group)
    # Hexadecimal: SGLang makes a flag of what its file says, and takes a key that begins with a dash for another one.
    key = Key(secrets.token_hex(24), EngineFolder())
    environment |= temporary_variables(key.folder.path, environment)
    if options.key_variable:
        environment[options.key_variable] = key.secret
    counts = key.folder.path / stage_count.FOLDER_NAME
    if group is not None:
        counts.mkdir()
        environment[stage_count.VARIABLE] = str(counts)
    if options.key_file_word:
        key.write(options.key_file_word)
    command = [word.replace("{port}", str(port)).replace("{key_file}", str(key.file)) for word in options.command]
    url = "" if group is not None and group.follows else f"http://127.0.0.1:{port}"
    announcement = {"url": url, "api_key": key.secret, **({"stage_counts": str(counts)} if group is not None else {})}
    return ForeignEngine(command, environment, port, key, group), json.dumps(announcement)


def main() -> None:
    options = _options()
    if os.getpgrp() != os.getpid():
        os.setpgrp()
    free_what_the_dead_left()
    # Held, though not listened on, until the engine is well, which is minutes after: nobody else is given this port.
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        try:
            engine, announcement = _start(options, held.getsockname()[1])
        except OSError as error:
            raise SystemExit(f"the engine could not be started: {error}") from None

        def stop(_number: int, _frame: FrameType | None) -> NoReturn:
            # The whole group was told, the engine with it.
            engine.end(STOP_LIMIT_SECONDS)
            os._exit(0)

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        orphaned = threading.Event()
        if options.lifeline:
            threading.Thread(target=_end_with_parent, args=(engine, orphaned), name="lifeline", daemon=True).start()
        status = _run(engine, announcement)
    if orphaned.is_set():
        os._exit(PARENT_GONE_EXIT_STATUS)
    if status < 0:
        with contextlib.suppress(OSError):  # of those that are not to be handled
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


if __name__ == "__main__":
    main()
