"""A PostgreSQL of the tests' own: a cluster in a temporary folder, on a Unix socket there and on a free port of loopback.

It is started by whoever needs it and stopped by its process id; it dies with the process that started it, and is no child of it: tests look
for children of theirs, and end them. The server refuses to run as root, so it then runs as `postgres`. Debian's package suffices,
`apt-get install postgresql`, and no server of the machine's is touched.
"""

from __future__ import annotations

import contextlib
import getpass
import itertools
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO

import psutil
import psycopg
from sqlalchemy import create_engine

from potluck_coordinator.storage.schema import migrate

MISSING = "These tests need PostgreSQL's own programs. On Debian and Ubuntu: apt-get install --no-install-recommends postgresql"
SERVER_USER = "postgres"
START_SECONDS_MAX = 30.0
TEMPLATE = "migrated"
_QUICK_RECOVERY = ("-c", "recovery_init_sync_method=syncfs")
"""Else a server that was killed opens each of its files, of which every database has three hundred."""
_LAUNCHER = """
import os, signal, subprocess, sys, threading
if os.fork():
    os._exit(0)
os.setsid()
server = subprocess.Popen(sys.argv[2:], stdin=subprocess.DEVNULL)
with os.fdopen(int(sys.argv[1]), "w") as told:
    print(server.pid, file=told)
def end_with_starter():
    sys.stdin.read()
    server.send_signal(signal.SIGQUIT)
threading.Thread(target=end_with_starter, daemon=True).start()
server.wait()
"""
"""Starts the server and reaps it. It is told by its standard input's end that whoever started it is gone."""
_FAST = ("-c", "fsync=off", "-c", "full_page_writes=off", "-c", "autovacuum=off")


@cache
def program(name: str) -> str:
    """The path of one of PostgreSQL's programs, the newest where Debian has several."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: float(folder.parent.name))
    for folder in reversed(folders):
        if (folder / name).exists():
            return str(folder / name)
    found = shutil.which(name)
    if found is None:
        raise RuntimeError(MISSING)
    return found


class Cluster:
    """One server with its data.

    Args:
        folder: its own, which nobody else writes.
        durable: as a pool's server is; else it forgets everything if the machine stops, and is quicker.
        options: further ones of the server.
    """

    def __init__(self, folder: Path, *, durable: bool = False, options: Sequence[str] = ()) -> None:
        self.folder = folder
        self._options = (*_QUICK_RECOVERY, *(() if durable else _FAST), *options)
        self._process: psutil.Process | None = None
        self._lifeline: IO[bytes] | None = None
        self._numbers = itertools.count()
        self.user = "keeper"
        self.password = secrets.token_hex(16)
        self.port = _free_port()
        folder.chmod(0o700)
        if os.geteuid() == 0:
            shutil.chown(folder, SERVER_USER, SERVER_USER)
        password_file = folder / "password"
        password_file.write_text(self.password)
        # Names sort by the rules of a language, as on most servers and not in SQLite: nothing may depend on it.
        locale = ("--locale=C.UTF-8", "--locale-provider=icu", "--icu-locale=en-US")
        accounts = (f"--username={self.user}", f"--pwfile={password_file}", "--auth-local=trust", "--auth-host=scram-sha-256")
        no_sync = () if durable else ("--no-sync",)
        command = [program("initdb"), "-D", str(folder / "data"), "--encoding=UTF8", *locale, *accounts, *no_sync]
        made = subprocess.run([*_as_server(), *command], capture_output=True, text=True, cwd=folder, check=False)
        assert made.returncode == 0, made.stderr

    @property
    def process_id(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Returns once it takes connections."""
        arguments = ["-D", str(self.folder / "data"), "-k", str(self.folder), "-p", str(self.port), "-c", "listen_addresses=127.0.0.1"]
        give_up_at = time.monotonic() + START_SECONDS_MAX
        while True:
            self._launch([*_as_server("--pdeathsig", "QUIT"), program("postgres"), *arguments, *self._options])
            while self._process is not None and self._process.is_running():
                with contextlib.suppress(psycopg.OperationalError):
                    self.connect("postgres").close()
                    return
                time.sleep(0.02)
            # A server that was killed leaves its shared memory until the last of its processes has noticed.
            assert time.monotonic() < give_up_at, (self.folder / "log").read_text()
            time.sleep(0.05)

    def _launch(self, command: Sequence[str]) -> None:
        reader, writer = os.pipe()
        with (self.folder / "log").open("ab") as log, os.fdopen(reader) as told:
            launcher = subprocess.Popen(
                [sys.executable, "-c", _LAUNCHER, str(writer), *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                pass_fds=(writer,),
            )
            os.close(writer)
            self._lifeline = launcher.stdin
            process_id = int(told.readline())
        launcher.wait()
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended at once: its log says why
            self._process = psutil.Process(process_id)

    def stop(self) -> None:
        """In good order, connections or not."""
        self._end(signal.SIGINT)

    def crash(self) -> None:
        """As the loss of its processes would end it: nothing is flushed that was not."""
        self._end(signal.SIGQUIT)

    def kill(self) -> None:
        """`kill -9` of the server; its sessions notice and end."""
        children = psutil.Process(self.process_id).children(recursive=True)
        self._end(signal.SIGKILL)
        psutil.wait_procs(children, timeout=START_SECONDS_MAX)

    def _end(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            self._process.send_signal(number)
            self._process.wait(START_SECONDS_MAX)
            self._process = None
        if self._lifeline is not None:
            self._lifeline.close()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """All of its processes stand still; the system goes on taking connections for them."""
        server = psutil.Process(self.process_id)
        stopped = [server, *server.children(recursive=True)]
        for process in stopped:
            process.suspend()
        try:
            yield
        finally:
            for process in stopped:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.resume()

    def kill_and_start(self) -> None:
        """`kill -9`, and started again."""
        self.kill()
        self.start()

    def kill_a_session(self) -> None:
        """`kill -9` of the process that serves a coordinator, after which the server ends all other sessions, too, and recovers."""
        with self.connect("postgres") as connection:
            ((process_id,),) = connection.execute("SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'potluck coordinator%'")
        os.kill(process_id, signal.SIGKILL)

    def connect(self, database: str) -> psycopg.Connection:
        return psycopg.connect(host=str(self.folder), port=self.port, user=self.user, dbname=database, autocommit=True, connect_timeout=5)

    def url(self, database: str) -> str:
        """By the socket in the folder, which only its owner can enter: no password."""
        return f"postgresql+psycopg://{self.user}@/{database}?host={self.folder}&port={self.port}"

    def url_by_network(self, database: str) -> str:
        """By loopback, without the password that it then asks for."""
        return f"postgresql+psycopg://{self.user}@127.0.0.1:{self.port}/{database}"

    def new_database(self, *, empty: bool = False) -> str:
        """A fresh one's name, with the newest schema unless it is to be empty."""
        name = f"pool_{next(self._numbers)}"
        with self.connect("postgres") as connection:
            if not empty and connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", (TEMPLATE,)).fetchone() is None:
                connection.execute(f"CREATE DATABASE {TEMPLATE}")
                engine = create_engine(self.url(TEMPLATE))
                with engine.begin() as migrating:
                    migrate(migrating)
                engine.dispose()
            connection.execute(f"CREATE DATABASE {name} TEMPLATE {'template1' if empty else TEMPLATE}")
        return name

    @contextmanager
    def fresh_url(self) -> Iterator[str]:
        """A database with the newest schema, for as long as it is needed."""
        name = self.new_database()
        yield self.url(name)
        self.drop(name)

    def drop(self, name: str) -> None:
        with self.connect("postgres") as connection:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@contextmanager
def cluster(*, durable: bool = False, options: Sequence[str] = ()) -> Iterator[Cluster]:
    """A running one, whose folder goes with it."""
    # Right in the temporary folder: the server's user cannot enter pytest's own, and a socket's path may have 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="potluck-postgresql-"))
    made = None
    try:
        made = Cluster(folder, durable=durable, options=options)
        made.start()
        yield made
    finally:
        if made is not None:
            made.crash()
        shutil.rmtree(folder, ignore_errors=True)


def _as_server(*options: str) -> list[str]:
    """A prefix that runs a command as a user the server takes, and in the given way."""
    if os.geteuid() == 0:
        options = ("--reuid", SERVER_USER, "--regid", SERVER_USER, "--clear-groups", *options)
    elif not options:
        return []
    return ["setpriv", *options, "env", "LC_ALL=C.UTF-8", f"HOME={tempfile.gettempdir()}", f"USER={getpass.getuser()}"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
