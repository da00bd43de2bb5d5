"""Potluck as a contender: a coordinator and its joined nodes, started by the commands that operators and volunteers type.

Decides the pool's catalogue (one model, whose engine is the scripted one) and which process is what. It must not know what is measured.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.benchmarks.contenders import (
    CONTEXT_LENGTH_TOKENS,
    MODEL,
    READY_SECONDS_MAX,
    SLOT_COUNT,
    STAMPED_SCRIPT,
    Contender,
    wait_until_answers,
    write_script,
)
from tests.benchmarks.processes import Child, title

COMMAND_SECONDS_MAX: Final = 60.0
_POTLUCK: Final = (sys.executable, "-m", "potluck")
_POLL_SECONDS: Final = 0.1


CREDITS: Final[Mapping[str, str]] = {"POTLUCK_COORDINATOR_GRANT_CREDITS": "1000000"}
"""Every request is paid for, and long prompts cost much."""


@dataclass(frozen=True, slots=True)
class PoolModel:
    """The pool's one model."""

    script: Mapping[str, object] = field(default_factory=lambda: STAMPED_SCRIPT)
    context_length_tokens: int = CONTEXT_LENGTH_TOKENS
    slot_count: int = SLOT_COUNT
    settings: Mapping[str, str] = field(default_factory=lambda: CREDITS)
    """Of the coordinator, by their names in its environment."""


@dataclass(slots=True)
class Pool:
    """A running coordinator and its nodes."""

    folder: Path
    coordinator: Child
    node_cores: frozenset[int]
    environment: Mapping[str, str]
    contender: Contender
    nodes: list[Child] = field(default_factory=list)

    def add_node(self) -> None:
        """Joins another node and starts it."""
        name = f"node-{len(self.nodes)}"
        invite = run_potluck(["tokens", "create"], self.environment)
        joining = ["node", "join", "-", "--state-dir", str(self.folder / name), "--name", name, "--serve"]
        run_potluck(joining, self.environment, stdin=invite)
        self._run_node(len(self.nodes))

    def start_again(self, number: int) -> None:
        """Starts a node anew whose processes are gone."""
        self.contender.children.remove(self.nodes[number])
        self.nodes[number].stop()
        self._run_node(number)

    def _run_node(self, number: int) -> None:
        state_dir, cache_dir = self.folder / f"node-{number}", self.folder / "cache"
        run = [*_POTLUCK, "node", "run", "--state-dir", str(state_dir), "--cache-dir", str(cache_dir), "--models-allowed", MODEL]
        with_script = {**self.environment, "POTLUCK_NODE_SCRIPTED_ENGINE": "true"}
        node = Child(run, self.folder / f"node-{number}.log", environment=with_script, cores=self.node_cores)
        self.nodes[number : number + 1] = [node]
        self.contender.children.append(node)

    def wait_until_ready(self) -> None:
        """Returns once every node's replica is ready; raises RuntimeError."""
        deadline = time.monotonic() + READY_SECONDS_MAX
        while True:
            models = json.loads(run_potluck(["models", "--json"], self.environment))
            ready_count = next(model["ready_replica_count"] for model in models if model["model_id"] == MODEL)
            if ready_count >= len(self.nodes):
                return
            if time.monotonic() > deadline:
                raise RuntimeError(f"{ready_count} of {len(self.nodes)} replicas are ready after {READY_SECONDS_MAX:.0f} s")
            time.sleep(_POLL_SECONDS)

    def engine_of(self, number: int) -> int:
        """The process of a node's engine; raises RuntimeError where there is none."""
        found = [process_id for process_id in self.nodes[number].family if _is_engine(process_id)]
        if len(found) != 1:
            raise RuntimeError(f"node {number} has {len(found)} engines")
        return found[0]


def start_pool(
    folder: Path, coordinator_cores: frozenset[int], node_cores: frozenset[int], *, model: PoolModel | None = None, node_count: int = 1
) -> Pool:
    """A pool whose nodes are all ready to answer; raises RuntimeError, with what its processes printed, where it does not get so far."""
    data_dir, model = folder / "coordinator", model or PoolModel()
    environment = {"POTLUCK_COORDINATOR_DATA_DIR": str(data_dir)}
    catalogue = _write_catalogue(folder, model)
    coordinator = Child(
        [*_POTLUCK, "coordinator", "serve", "--data-dir", str(data_dir), *_PORTS, "--catalogue", str(catalogue)],
        folder / "coordinator.log",
        environment={**environment, **model.settings},
        cores=coordinator_cores,
    )
    contender = Contender("Potluck", "", dict, ("gateway", "directory", "driver"), children=[coordinator])
    pool = Pool(folder, coordinator, node_cores, environment, contender)
    try:
        _wait_for_file(data_dir / "endpoints.json", coordinator)
        operator = json.loads((data_dir / "operator.json").read_text())
        contender.url, contender.authorization = operator["url"], f"Bearer {operator['api_key']}"
        contender.process_ids = lambda: _process_groups(coordinator, pool.nodes)
        for _ in range(node_count):
            pool.add_node()
        wait_until_answers(contender)
        pool.wait_until_ready()
        _check_groups(contender.process_ids())
    except BaseException:
        contender.stop()
        raise
    return pool


def account_keys(folder: Path, count: int) -> tuple[str, ...]:
    """API keys of so many new people of the pool that was started in this folder."""
    environment = {"POTLUCK_COORDINATOR_DATA_DIR": str(folder / "coordinator")}
    keys = []
    for number in range(count):
        account = json.loads(run_potluck(["accounts", "create", f"person-{number}", "--json"], environment))
        made = run_potluck(["keys", "create", "--account", account["account_id"], "--json"], environment)
        keys.append(json.loads(made)["api_key"])
    return tuple(keys)


_PORTS: Final = ("--http-port", "0", "--grpc-port", "0", "--link-port", "0")


def _write_catalogue(folder: Path, model: PoolModel) -> Path:
    script = write_script(folder, model.script)
    content = script.read_bytes()
    path = folder / "catalogue.toml"
    path.write_text(
        f"""
[[model]]
model_id = "{MODEL}"
source = "path:{script.parent}"
file_name = "{script.name}"
sha256 = "{hashlib.sha256(content).hexdigest()}"
size_bytes = {len(content)}
engine_kind = "scripted"
context_length_tokens = {model.context_length_tokens}
slot_count = {model.slot_count}
prompt_price_micro_credits = 1
completion_price_micro_credits = 4
licence = "Apache-2.0"
endpoints = ["/v1/chat/completions"]
created_at_unix_seconds = 0
"""
    )
    return path


def run_potluck(arguments: list[str], environment: Mapping[str, str], stdin: str = "") -> str:
    """What a potluck command printed; raises RuntimeError where it failed."""
    done = subprocess.run(
        [*_POTLUCK, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=COMMAND_SECONDS_MAX,
        env={**os.environ, **environment},
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"potluck {' '.join(arguments[:2])} failed with {done.returncode}:\n{done.stderr.strip()}")
    return done.stdout


def _wait_for_file(path: Path, child: Child) -> None:
    deadline = time.monotonic() + READY_SECONDS_MAX
    while not path.exists():
        child.check_alive()
        if time.monotonic() > deadline:
            raise RuntimeError(f"{path.name} did not appear within {READY_SECONDS_MAX:.0f} s:\n{child.log_tail()}")
        time.sleep(_POLL_SECONDS)


def _process_groups(coordinator: Child, agents: Sequence[Child]) -> dict[str, tuple[int, ...]]:
    """Who is who, by the titles that Ray gives its actors. What is left over is Ray's own."""
    groups: dict[str, list[int]] = {name: [] for name in ("gateway", "directory", "driver", "ray", "agent", "engine")}
    for process_id in coordinator.family:
        groups[_coordinator_part(process_id, coordinator)].append(process_id)
    for process_id in (process_id for agent in agents for process_id in agent.family):
        groups["engine" if _is_engine(process_id) else "agent"].append(process_id)
    return {name: tuple(ids) for name, ids in groups.items()}


def _is_engine(process_id: int) -> bool:
    return "scripted_server" in title(process_id)


def _coordinator_part(process_id: int, coordinator: Child) -> str:
    shown = title(process_id).lower()
    if process_id == coordinator.process_id or "potluck_coordinator.warden" in shown:
        return "driver"
    if shown.startswith("ray::"):
        return next((part for part in ("gateway", "directory") if part in shown), "ray")
    return "ray"


def _check_groups(groups: Mapping[str, tuple[int, ...]]) -> None:
    missing = [name for name in ("gateway", "directory", "agent", "engine") if not groups[name]]
    if missing:
        raise RuntimeError(f"cannot tell which process is the pool's {missing[0]}, so nothing could be counted for it")
