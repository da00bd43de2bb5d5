"""A whole pool on this machine: a coordinator and one node as child processes.

Decides the order of their start, what "ready" means (a model that answers), and that they stop together. It learns how they do in the way
any client does: from the coordinator's files and over gRPC.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final, Self

from potluck import calls
from potluck.address import PoolAddress
from potluck.commands.access import make_invite
from potluck.commands.children import Child, child_environment, potluck_command
from potluck.commands.progress import LiveLine, megabytes
from potluck.commands.session import read_operator
from potluck.commands.terminal import install_command
from potluck.errors import PoolError, pool_error
from potluck.results import NodeInfo
from potluck.transport import Transport
from potluck_protocol.errors import ErrorCode
from potluck_protocol.places import NODE_FOLDER
from potluck_protocol.private_files import read_json
from potluck_protocol.rest import RestCause
from potluck_protocol.values import AccountId, EngineState, EngineStatus, NodeId

COORDINATOR_START_SECONDS_MAX: Final = 90.0
JOIN_SECONDS_MAX: Final = 60.0
READY_SECONDS_MAX: Final = 1800.0
"""A slow line fetches the model within it."""
STALL_SECONDS_MAX: Final = 180.0
"""Without any change on the way to ready."""
ENGINE_FAILURE_COUNT_MAX: Final = 3
STOP_SECONDS_MAX: Final = 15.0
POLL_SECONDS: Final = 0.2
WATCH_SECONDS: Final = 0.5
INVITE_LIFETIME_SECONDS: Final = 600
ANNOUNCEMENT: Final = "endpoints.json"
_OPERATORS_PREFIX: Final = "POTLUCK_COORDINATOR_"
_MODULE_OF_EXTRA: Final = {"coordinator": "ray", "node": "xllamacpp"}


@dataclass(frozen=True, slots=True)
class LocalPoolPlan:
    """What to start and where."""

    folder: Path
    http_port: int
    grpc_port: int
    link_port: int
    catalogue: Path | None
    owner_name: str | None = None
    """The person for whom the node earns, and who may ask about it; None: the operator."""

    @property
    def data_folder(self) -> Path:
        return self.folder / "coordinator"

    @property
    def node_folder(self) -> Path:
        return self.folder / NODE_FOLDER


class LocalPool:
    """A running local pool. Use it in a `with` block: leaving it, by whatever way, leaves nothing running."""

    def __init__(self, plan: LocalPoolPlan, line: LiveLine) -> None:
        self._plan = plan
        self._line = line
        self._children: list[Child] = []
        self._transport: Transport | None = None
        self._lock: IO[str] | None = None

    @property
    def operator(self) -> PoolAddress:
        """The operator's address; once the coordinator is up."""
        return read_operator(self._plan.data_folder)

    @property
    def transport(self) -> Transport:
        """The operator's calls; once the coordinator is up."""
        if self._transport is None:
            self._transport = Transport(self.operator)
        return self._transport

    def start(self) -> None:
        """Returns once a model answers.

        Raises:
            PoolError: what kept the pool from starting, with the last lines of the child that failed.
        """
        _check_extras()
        self._plan.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Before anything of the folder is written: the logs in it are those of the pool that runs.
        self._lock = _held(self._plan.folder)
        self._start_coordinator()
        self._start_node()
        self._wait_until_ready()

    def watch(self) -> None:
        """Blocks until a child ends by itself, which raises InternalError."""
        while True:
            self._check_children()
            time.sleep(WATCH_SECONDS)

    def stop(self) -> None:
        """Stops the node, then the coordinator. Bounded; a second Ctrl-C kills what is left. May be called again."""
        if self._transport is not None:
            self._transport.close()
            self._transport = None
        grace_seconds = STOP_SECONDS_MAX
        while self._children:
            child = self._children[-1]
            try:
                child.stop(grace_seconds)
            except KeyboardInterrupt:
                grace_seconds = 0.0
            self._children.pop()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.stop()

    def _start_coordinator(self) -> None:
        plan = self._plan
        self._line.update("Starting the coordinator")
        command = potluck_command("coordinator", "serve", "--data-dir", str(plan.data_folder))
        for flag, port in (("--http-port", plan.http_port), ("--grpc-port", plan.grpc_port), ("--link-port", plan.link_port)):
            command += [flag, str(port)]
        if plan.catalogue is not None:
            command += ["--catalogue", str(plan.catalogue)]
        # What one that was killed left there may bear the number of the one to come: containers give the same ones out again.
        (plan.data_folder / ANNOUNCEMENT).unlink(missing_ok=True)
        # Settings meant for the operator's own coordinator, its database above all, are not for this one.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(_OPERATORS_PREFIX)}
        child = self._spawn("coordinator", command, inherited)
        deadline = time.monotonic() + COORDINATOR_START_SECONDS_MAX
        while _announced_pid(plan.data_folder) != child.pid:
            self._check_children()
            if time.monotonic() > deadline:
                raise self._late("coordinator", COORDINATOR_START_SECONDS_MAX)
            self._line.update("Starting the coordinator")
            time.sleep(POLL_SECONDS)

    def _start_node(self) -> None:
        environment = {**os.environ, "POTLUCK_NODE_STATE_DIR": str(self._plan.node_folder)}
        if not (self._plan.node_folder / "node.json").is_file():
            self._line.update("Joining the node")
            self._join(environment)
        self._line.update("Starting the node")
        # With the URL, because a node that joined in an earlier run may remember other ports.
        self._spawn("node", potluck_command("node", "run", "--url", self.operator.url), environment)

    def _join(self, environment: Mapping[str, str]) -> None:
        owner_id = None if self._plan.owner_name is None else _person(self.transport, self._plan.owner_name)
        invite, _ = make_invite(self.transport, self.operator.url, INVITE_LIFETIME_SECONDS, owner_id)
        try:
            joined = subprocess.run(
                potluck_command("node", "join", "-", "--name", "local", "--serve"),
                input=invite.encode(),
                env=child_environment(environment),
                capture_output=True,
                text=True,
                timeout=JOIN_SECONDS_MAX,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise self._late("node's joining", JOIN_SECONDS_MAX) from error
        if joined.returncode:
            raise pool_error(ErrorCode.INTERNAL_ERROR, f"The node could not join:\n{(joined.stderr or joined.stdout).strip()}")
        self._trust()

    def _trust(self) -> None:
        """Said once, when the node joins: it is this person's own machine, whose coordinator sees every prompt anyway.

        So `--trusted-only` works here at once, and what the operator says later stands at the next start.
        """
        node_id = NodeId(str(read_json(self._plan.node_folder / "node.json")["node_id"]))
        self.transport.unary(calls.set_node_trust(node_id, trusted=True))

    def _wait_until_ready(self) -> None:
        started_at = changed_at = time.monotonic()
        seen: tuple[EngineStatus, ...] = ()
        failure_count = 0
        while True:
            self._check_children()
            if any(model.ready_replica_count for model in self.transport.unary(calls.list_models())):
                self._line.update("Ready")
                return
            nodes = tuple(node for node in self.transport.unary(calls.list_nodes()) if node.connection == "connected")
            engines = tuple(engine for node in nodes for engine in node.engines)
            rest, now = _rest(nodes), time.monotonic()
            # A node that rests stands still by somebody's word: that is told, and no failure.
            if engines != seen or rest is not None:
                failure_count += _fails(engines) and not _fails(seen)
                seen, changed_at = engines, now
            if engines and all(engine.state is EngineState.REFUSED for engine in engines):
                raise pool_error(ErrorCode.ENGINE_FAILED, f"The node refuses every model: {_failures(engines)}")
            if failure_count >= ENGINE_FAILURE_COUNT_MAX:
                raise pool_error(ErrorCode.ENGINE_FAILED, f"The engine keeps failing: {_failures(engines)}")
            if now - changed_at > STALL_SECONDS_MAX or now - started_at > READY_SECONDS_MAX:
                raise self._late("model", now - started_at)
            self._line.update(*(rest or _phase(engines)))
            time.sleep(POLL_SECONDS)

    def _spawn(self, name: str, command: list[str], environment: Mapping[str, str]) -> Child:
        child = Child(name, command, child_environment(environment), self._plan.folder / f"{name}.log")
        self._children.append(child)
        return child

    def _check_children(self) -> None:
        for child in self._children:
            child.check()

    def _late(self, what: str, seconds: float) -> PoolError:
        tails = "".join(f"\nThe end of {child.log_file}:\n{child.log_tail()}" for child in self._children)
        return pool_error(ErrorCode.INTERNAL_ERROR, f"The {what} was not ready after {seconds:.0f} s.{tails}")


def person_key(transport: Transport, name: str, key_name: str) -> str:
    """A new API key of the person of that name, who is added where there is none."""
    return transport.unary(calls.create_key(key_name, account_id=_person(transport, name))).value


def _person(transport: Transport, name: str) -> AccountId:
    known = [account for account in transport.unary(calls.list_accounts()) if account.name == name]
    return (known[0] if known else transport.unary(calls.create_account(name))).account_id


def _check_extras() -> None:
    missing = [extra for extra, module in _MODULE_OF_EXTRA.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise pool_error(
            ErrorCode.INVALID_REQUEST,
            f"A pool on this machine needs parts that are not installed. Run: {install_command(','.join(missing))}",
        )


def _held(folder: Path) -> IO[str]:
    """The folder's lock, taken; it is given back when the file is closed or this process ends."""
    lock = (folder / "lock").open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        message = f"A pool of `potluck up` already runs on {folder}. Use that one, or stop it first with Ctrl-C where it runs."
        raise pool_error(ErrorCode.ALREADY_EXISTS, message) from error
    return lock


def _announced_pid(data_folder: Path) -> int | None:
    """The process that serves from the folder, by its own word; None if none is ready."""
    try:
        process_id = read_json(data_folder / ANNOUNCEMENT)["pid"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return process_id if isinstance(process_id, int) else None


def _fails(engines: tuple[EngineStatus, ...]) -> bool:
    return any(engine.state is EngineState.BACKING_OFF for engine in engines)


def _failures(engines: tuple[EngineStatus, ...]) -> str:
    return "; ".join(f"{engine.model_id}: {engine.failure or engine.state}" for engine in engines if engine.failure or _fails((engine,)))


def _rest(nodes: tuple[NodeInfo, ...]) -> tuple[str, str] | None:
    """What to show of a node that rests; None where none does."""
    causes = {cause for node in nodes for cause in node.rest_causes}
    if not causes:
        return None
    if causes <= {RestCause.OWNER, RestCause.FIRST_RUN}:
        return "The node is paused: `potluck node resume`, in another terminal, shares this machine again", ""
    return "The node rests: `potluck node status`, in another terminal, says why and until when", ""


def _phase(engines: tuple[EngineStatus, ...]) -> tuple[str, str]:
    """What to show: the phase, and the detail that changes within it."""
    words: Mapping[EngineState, Callable[[EngineStatus], tuple[str, str]]] = {
        EngineState.FETCHING: lambda engine: (
            f"Fetching {engine.model_id}",
            f"{megabytes(engine.fetched_bytes)} of {megabytes(engine.fetch_total_bytes)}" if engine.fetch_total_bytes else "",
        ),
        EngineState.STARTING: lambda engine: (f"Starting the engine for {engine.model_id}", ""),
        EngineState.BACKING_OFF: lambda engine: (f"The engine for {engine.model_id} failed and is tried again: {engine.failure}", ""),
        EngineState.READY: lambda engine: (f"The engine for {engine.model_id} is ready", ""),
    }
    for engine in engines:
        if engine.state in words:
            return words[engine.state](engine)
    return "Waiting for the node", ""
