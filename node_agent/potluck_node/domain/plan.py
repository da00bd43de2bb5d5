"""What to do next about the engines of this node: wish and observation in, actions out.

Decides which engines are fetched, started, stopped and refused, and when a failed one is tried again. The owner's limits win over the
coordinator's wish. It must not know processes, files or clocks: `supervisor` observes, acts, and asks again after every change.

A replica's life: (absent) → FETCHING → FETCHED → STARTING → READY; a fetch, start or run that fails → FAILED, and after a pause FETCHING
again; what is no longer wished, or wished otherwise, → STOPPING → (absent). REFUSED while the owner's limits, or what this node would ever
run, forbid it; from READY and the phases before by way of STOPPING. Of what is FAILED or REFUSED nothing lives: → (absent) at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from potluck_node.domain.model_source import FolderSource, check_model_file, parse_source
from potluck_protocol.values import DesiredEngine, DesiredState, ModelId, ReplicaId

BACKOFF_FIRST_SECONDS: Final = 1.0
BACKOFF_LAST_SECONDS: Final = 60.0
COSTLY_BACKOFF_SECONDS: Final = 600.0
"""After a file that was fetched whole and was not what the catalogue says: fetching it again at once would burn the owner's uplink."""
HEALTHY_AFTER_SECONDS: Final = 300.0
"""An engine that was ready this long starts again from the first backoff."""


class Phase(StrEnum):
    """Where a replica stands, as the supervisor sees it."""

    FETCHING = "fetching"
    FETCHED = "fetched"
    STARTING = "starting"
    READY = "ready"
    FAILED = "failed"
    REFUSED = "refused"
    STOPPING = "stopping"


RUNNING: Final = frozenset({Phase.FETCHING, Phase.FETCHED, Phase.STARTING, Phase.READY})
"""Something of it lives: it has to be stopped before it can be forgotten."""


@dataclass(frozen=True, slots=True)
class ObservedReplica:
    """One replica as it is."""

    engine: DesiredEngine
    """The wish it was made for."""
    phase: Phase
    failure_count: int = 0
    """Failures in a row."""
    failed_at_seconds: float = 0.0
    failure_was_costly: bool = False
    refusal: str = ""


@dataclass(frozen=True, slots=True)
class LocalLimits:
    """What the owner of this machine allows."""

    engine_kinds: frozenset[str]
    """The engines that this node can run."""
    models_allowed: frozenset[ModelId] = frozenset()
    """Empty: all."""
    disk_budget_bytes: int | None = None
    """For model files that this node fetches; None: as much as is free."""
    paused: bool = False


@dataclass(frozen=True, slots=True)
class Fetch:
    """Make the replica's file present and verified."""

    engine: DesiredEngine


@dataclass(frozen=True, slots=True)
class Start:
    """Start the engine of a replica whose file is verified."""

    engine: DesiredEngine


@dataclass(frozen=True, slots=True)
class Stop:
    """Stop whatever the replica is at; it is absent afterwards."""

    replica_id: ReplicaId


@dataclass(frozen=True, slots=True)
class Refuse:
    """Show the coordinator and the owner why this replica will not run here."""

    engine: DesiredEngine
    reason: str


@dataclass(frozen=True, slots=True)
class Forget:
    """Drop a replica of which nothing lives."""

    replica_id: ReplicaId


Action = Fetch | Start | Stop | Refuse | Forget


@dataclass(frozen=True, slots=True)
class Plan:
    """The actions to take now, at most one a replica, and when to ask again if nothing changes before."""

    actions: tuple[Action, ...]
    wake_at_seconds: float | None


def plan(desired: DesiredState, observed: Mapping[ReplicaId, ObservedReplica], limits: LocalLimits, now_seconds: float) -> Plan:
    """The next step from what is to what is wished. `now_seconds` is of the clock that stamped the failures."""
    wished = {} if limits.paused else {engine.replica_id: engine for engine in reversed(desired.engines)}
    refusals = _refusals(tuple(wished[replica_id] for replica_id in sorted(wished)), limits)
    actions: list[Action] = []
    wake_at_seconds: float | None = None
    for replica_id in sorted({*wished, *observed}):
        replica = observed.get(replica_id)
        engine = wished.get(replica_id)
        if engine is None:
            action = _dismiss(replica)
        elif reason := refusals.get(replica_id):
            action = _refuse(engine, replica, reason)
        else:
            action = _advance(engine, replica, now_seconds)
            if action is None and replica is not None and replica.phase is Phase.FAILED:
                retry_at_seconds = _retry_at_seconds(replica)
                wake_at_seconds = retry_at_seconds if wake_at_seconds is None else min(wake_at_seconds, retry_at_seconds)
        if action is not None:
            actions.append(action)
    return Plan(tuple(actions), wake_at_seconds)


def failures_in_a_row(earlier_count: int, ready_for_seconds: float) -> int:
    """The count after one more failure of an engine that had been ready for so long (0: it never was)."""
    return 1 if ready_for_seconds >= HEALTHY_AFTER_SECONDS else earlier_count + 1


def backoff_seconds(failure_count: int) -> float:
    """The pause after so many failures in a row: 1, 2, 4 … 60 s."""
    return min(BACKOFF_LAST_SECONDS, BACKOFF_FIRST_SECONDS * 2.0 ** min(failure_count - 1, 16))


def _retry_at_seconds(replica: ObservedReplica) -> float:
    pause_seconds = COSTLY_BACKOFF_SECONDS if replica.failure_was_costly else backoff_seconds(replica.failure_count)
    return replica.failed_at_seconds + pause_seconds


def _dismiss(replica: ObservedReplica | None) -> Action | None:
    if replica is None or replica.phase is Phase.STOPPING:
        return None
    replica_id = replica.engine.replica_id
    return Stop(replica_id) if replica.phase in RUNNING else Forget(replica_id)


def _refuse(engine: DesiredEngine, replica: ObservedReplica | None, reason: str) -> Action | None:
    if replica is None or replica.phase is Phase.FAILED:
        return Refuse(engine, reason)
    if replica.phase is Phase.REFUSED:
        return None if (replica.engine, replica.refusal) == (engine, reason) else Refuse(engine, reason)
    return _dismiss(replica)


def _advance(engine: DesiredEngine, replica: ObservedReplica | None, now_seconds: float) -> Action | None:
    if replica is None:
        return Fetch(engine)
    if replica.engine != engine or replica.phase is Phase.REFUSED:
        return _dismiss(replica)
    if replica.phase is Phase.FETCHED:
        return Start(engine)
    if replica.phase is Phase.FAILED and now_seconds >= _retry_at_seconds(replica):
        return Fetch(engine)
    return None


def _refusals(engines: tuple[DesiredEngine, ...], limits: LocalLimits) -> dict[ReplicaId, str]:
    """Why replicas will not run here. The disk budget goes to replicas in the order of their ids, each file counted once."""
    refusals: dict[ReplicaId, str] = {}
    counted: dict[str, int] = {}
    for engine in engines:
        reason = _own_refusal(engine, limits)
        if not reason and limits.disk_budget_bytes is not None and not isinstance(parse_source(engine.model.source), FolderSource):
            taken_bytes = sum(size for sha256, size in counted.items() if sha256 != engine.model.sha256)
            if taken_bytes + engine.model.size_bytes > limits.disk_budget_bytes:
                reason = (
                    f"{engine.model.model_id} needs {engine.model.size_bytes} bytes of disk; "
                    f"{max(0, limits.disk_budget_bytes - taken_bytes)} of this node's budget of {limits.disk_budget_bytes} are left"
                )
            else:
                counted[engine.model.sha256] = engine.model.size_bytes
        if reason:
            refusals[engine.replica_id] = reason
    return refusals


def _own_refusal(engine: DesiredEngine, limits: LocalLimits) -> str:
    if limits.models_allowed and engine.model.model_id not in limits.models_allowed:
        return f"this node's settings do not allow the model {engine.model.model_id}"
    if engine.engine_kind not in limits.engine_kinds:
        return f"this node has no engine of the kind {engine.engine_kind!r}, only {', '.join(sorted(limits.engine_kinds))}"
    if engine.slot_count <= 0 or engine.context_length_tokens <= 0:
        return f"{engine.slot_count} slots of {engine.context_length_tokens} tokens are not an engine"
    try:
        check_model_file(engine.model)
    except ValueError as error:
        return str(error)
    return ""
