"""Builders for engines under test: pinned files, wishes, a supervisor that runs while a block does."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from potluck_node.ceilings import Ceilings
from potluck_node.domain.plan import LocalLimits
from potluck_node.engines.base import Engine
from potluck_node.engines.registry import available_engines
from potluck_node.model_store.store import ModelStore
from potluck_node.settings import Settings
from potluck_node.supervisor import EngineSupervisor
from potluck_protocol.clock import Clock
from potluck_protocol.values import DesiredEngine, DesiredState, EngineState, EngineStatus, ModelFile, ModelId, ReplicaId

WAIT_LIMIT_SECONDS = 60.0


class MovedClock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now_seconds = 1000.0

    def monotonic_seconds(self) -> float:
        return self.now_seconds

    def unix_ms(self) -> int:
        return int(self.now_seconds * 1000)


def pinned(path: Path, model_id: str = "tiny", source: str = "") -> ModelFile:
    """The file as a catalogue would pin it."""
    content = path.read_bytes()
    return ModelFile(ModelId(model_id), source or f"path:{path.parent}", path.name, hashlib.sha256(content).hexdigest(), len(content))


def script_file(folder: Path, **script: object) -> Path:
    """A script for the scripted engine."""
    path = folder / "script.json"
    path.write_text(json.dumps(script))
    return path


def wished(file: ModelFile, *, kind: str = "scripted", replica_id: str = "replica-1", slots: int = 2, context: int = 256) -> DesiredEngine:
    return DesiredEngine(ReplicaId(replica_id), file, kind, slots, context)


def supervisor_of(
    folder: Path, clock: Clock, *, limits: LocalLimits | None = None, engines: dict[str, Engine] | None = None
) -> EngineSupervisor:
    engines = engines or available_engines(Settings(scripted_engine=True))
    store = ModelStore(folder / "cache", disk_budget_bytes=None, environment=os.environ)
    limits = limits or LocalLimits(frozenset(engines))
    ceilings = Ceilings(folder / "ceilings.json", "machine")
    return EngineSupervisor(engines=engines, store=store, limits=limits, ceilings=ceilings, clock=clock, environment=os.environ)


class Watched:
    """A running supervisor, and a way to wait for what it shows."""

    def __init__(self, supervisor: EngineSupervisor) -> None:
        self.supervisor = supervisor
        self._changed = asyncio.Event()
        supervisor.on_change(self._changed.set)

    def wish(self, *engines: DesiredEngine) -> None:
        self.supervisor.set_desired(DesiredState(1, engines))

    async def until(self, condition: Callable[[tuple[EngineStatus, ...]], bool]) -> tuple[EngineStatus, ...]:
        """The statuses as soon as they meet the condition."""
        async with asyncio.timeout(WAIT_LIMIT_SECONDS):
            while not condition(statuses := self.supervisor.statuses()):
                self._changed.clear()
                await self._changed.wait()
        return statuses

    async def until_state(self, state: EngineState) -> EngineStatus:
        """The only replica's status as soon as it has this state."""
        return (await self.until(lambda statuses: len(statuses) == 1 and statuses[0].state is state))[0]

    def url(self) -> str:
        address = self.supervisor.ready_address(self.supervisor.statuses()[0].replica_id)
        assert address is not None
        return address.url


@asynccontextmanager
async def running(supervisor: EngineSupervisor) -> AsyncIterator[Watched]:
    """The supervisor's loop runs inside the block and is cancelled after it."""
    task = asyncio.create_task(supervisor.run())
    try:
        yield Watched(supervisor)
    finally:
        task.cancel()
        await asyncio.wait({task})


def children_of(pid: int) -> list[int]:
    """Direct children of a process, by /proc."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]
