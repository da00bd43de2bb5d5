"""What to do next about the engines of this node: wish and observation in, actions out.

Decides which engines are fetched, started, stopped and refused, and when a failed one is tried again: of one that crashes `breaker` says
when. The owner's limits win over the coordinator's wish. It must not know processes, files or clocks: `supervisor` observes, acts, and asks
again after every change.

A replica's life: (absent) → FETCHING → FETCHED → STARTING → READY; a fetch, start or run that fails → FAILED, and after a pause FETCHING
again; what is no longer wished, or wished otherwise, → STOPPING → (absent). REFUSED while the owner's limits, or what this node would ever
run, forbid it; from READY and the phases before by way of STOPPING; and, until it is wished otherwise, once it ran out of memory with the
least that is worth starting. Of what is FAILED or REFUSED nothing lives: → (absent) at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Final

from potluck_node.domain.breaker import (
    BACKOFF_FIRST_SECONDS,
    NO_CRASHES,
    CrashRecord,
    after_absence,
    after_crash,
    backoff_seconds,
    pause_seconds,
)
from potluck_node.domain.group_place import place_refusal
from potluck_node.domain.model_source import ATTACHED_KIND, AttachedSource, HubSource, WheelSource, check_model_file, parse_source
from potluck_protocol.values import DesiredEngine, DesiredState, FailureKind, GroupOffer, ModelId, ReplicaId
from potluck_protocol.vllm_words import shape_refusal

COSTLY_BACKOFF_SECONDS: Final = 600.0
"""After a file that was fetched whole and was not what the catalogue says: fetching it again at once would burn the owner's uplink."""
_ITS_OWNERS_BUSINESS: Final = frozenset({FailureKind.KILLED, FailureKind.HUNG})
"""Of an attached server: it went away, or did not answer for longer than anybody waits, or said that it could not just now."""


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
HOLDING: Final = frozenset({Phase.STARTING, Phase.READY, Phase.STOPPING})
"""An engine may hold memory for it."""


@dataclass(frozen=True, slots=True)
class ObservedReplica:
    """One replica as it is."""

    engine: DesiredEngine
    """The wish it was made for."""
    phase: Phase
    retry_at_seconds: float = 0.0
    """Of what is FAILED: nothing is tried before."""
    fetch_failure_count: int = 0
    """In a row."""
    crashes: CrashRecord = NO_CRASHES
    given_up: str = ""
    """Why it will not be tried again for this wish."""
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
    memory_budget_bytes: int | None = None
    """For engines without cards together; None: as the coordinator plans."""
    group_offer: GroupOffer | None = None
    """None: in no group."""
    card_memory_bytes_max: int | None = None
    """Of one card, for engines; None: all that others leave."""
    card_percents_max: Mapping[str, int] = field(default_factory=dict)
    """The same as a share of each card, by its uuid; empty: no limit."""
    lines_folder: Path | None = None
    """Where the last lines of engines that had served may be kept, which may quote requests; None: nowhere."""
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
    kind: FailureKind = FailureKind.NOT_ALLOWED


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
            if action is None and replica is not None and _is_tried_again(replica):
                wake_at_seconds = replica.retry_at_seconds if wake_at_seconds is None else min(wake_at_seconds, replica.retry_at_seconds)
        if action is not None:
            actions.append(action)
    return Plan(tuple(actions), wake_at_seconds)


def under_card_limit(desired: DesiredState, limits: LocalLimits) -> DesiredState:
    """The wish with no engine's share of a card above the owner's: a coordinator may know less of the card than its node does."""
    return replace(desired, engines=tuple(_under_card_limit(engine, limits.card_percents_max) for engine in desired.engines))


def _under_card_limit(engine: DesiredEngine, percents_max: Mapping[str, int]) -> DesiredEngine:
    shares = [percents_max[uuid] for uuid in engine.shape.card_uuids if uuid in percents_max]
    wished_percent = engine.shape.card_facts.memory_utilization_percent
    if not shares or 0 < wished_percent <= min(shares):
        return engine
    facts = replace(engine.shape.card_facts, memory_utilization_percent=min(shares))
    return replace(engine, shape=replace(engine.shape, card_facts=facts))


def failed_fetch(replica: ObservedReplica, now_seconds: float, *, costly: bool) -> ObservedReplica:
    """Its files could not be had; `costly` where they came whole and were not what the catalogue says."""
    count = replica.fetch_failure_count + 1
    pause = COSTLY_BACKOFF_SECONDS if costly else backoff_seconds(count)
    return replace(replica, phase=Phase.FAILED, fetch_failure_count=count, retry_at_seconds=now_seconds + pause)


def crashed(
    replica: ObservedReplica, now_seconds: float, ready_for_seconds: float, kind: FailureKind = FailureKind.CRASHED
) -> ObservedReplica:
    """Its engine failed, in its start (ready for 0 s) or later, and the next one will be the same."""
    if replica.engine.engine_kind == ATTACHED_KIND and kind in _ITS_OWNERS_BUSINESS:
        crashes = after_absence(replica.crashes, ready_for_seconds)
    else:
        crashes = after_crash(replica.crashes, now_seconds, ready_for_seconds)
    return replace(replica, phase=Phase.FAILED, crashes=crashes, retry_at_seconds=now_seconds + pause_seconds(crashes))


def stepped_down(replica: ObservedReplica, now_seconds: float) -> ObservedReplica:
    """Its engine failed, and the next one will be given less: there are only so many such steps, so it is no crash."""
    return replace(replica, phase=Phase.FAILED, retry_at_seconds=now_seconds + BACKOFF_FIRST_SECONDS)


def given_up(replica: ObservedReplica, reason: str) -> ObservedReplica:
    """Its engine failed, and no other start is worth trying."""
    return replace(replica, phase=Phase.FAILED, given_up=reason)


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
    if replica.engine != engine or (replica.phase is Phase.REFUSED and not replica.given_up):
        return _dismiss(replica)
    if replica.phase is Phase.FETCHED:
        return Start(engine)
    if replica.phase is Phase.FAILED and replica.given_up:
        return Refuse(engine, replica.given_up, FailureKind.OUT_OF_MEMORY)
    if _is_tried_again(replica) and now_seconds >= replica.retry_at_seconds:
        return Fetch(engine)
    return None


def _is_tried_again(replica: ObservedReplica) -> bool:
    """Of a group's stage only the directory says so, by a new generation: the others of this one are stopped by then."""
    return replica.phase is Phase.FAILED and replica.engine.group is None


def _refusals(engines: tuple[DesiredEngine, ...], limits: LocalLimits) -> dict[ReplicaId, str]:
    """Why replicas will not run here. The budgets go to replicas in the order of their ids, each file counted once."""
    refusals: dict[ReplicaId, str] = {}
    counted: dict[str, int] = {}
    memory_left_bytes = limits.memory_budget_bytes
    for engine in engines:
        reason = _own_refusal(engine, limits) or _memory_refusal(engine, memory_left_bytes)
        if not reason and limits.disk_budget_bytes is not None and isinstance(parse_source(engine.model.source), HubSource | WheelSource):
            needed = {file.sha256: file.size_bytes for file in engine.model.files}
            taken_bytes = sum(size for sha256, size in counted.items() if sha256 not in needed)
            if taken_bytes + sum(needed.values()) > limits.disk_budget_bytes:
                reason = (
                    f"{engine.model.model_id} needs {sum(needed.values())} bytes of disk; "
                    f"{max(0, limits.disk_budget_bytes - taken_bytes)} of this node's budget of {limits.disk_budget_bytes} are left"
                )
            else:
                counted |= needed
        if reason:
            refusals[engine.replica_id] = reason
        elif memory_left_bytes is not None:
            memory_left_bytes -= _memory_bytes(engine)
    return refusals


def _memory_refusal(engine: DesiredEngine, left_bytes: int | None) -> str:
    needed_bytes = _memory_bytes(engine)
    if left_bytes is None or needed_bytes <= left_bytes:
        return ""
    return f"{engine.model.model_id} is given {needed_bytes} bytes of memory; {left_bytes} of this node's budget are left"


def _memory_bytes(engine: DesiredEngine) -> int:
    """Of the machine's own memory. The cache is part of what an engine is given, also where a coordinator says that it is not."""
    return 0 if engine.shape.card_uuids else max(engine.shape.memory_bytes, engine.shape.kv_cache_bytes)


def _card_refusal(engine: DesiredEngine, limits: LocalLimits) -> str:
    left_bytes, needed_bytes = limits.card_memory_bytes_max, engine.shape.memory_bytes
    if left_bytes is None or not engine.shape.card_uuids or needed_bytes <= left_bytes:
        return ""
    return f"{engine.model.model_id} is given {needed_bytes} bytes of a card; this node's card_memory_bytes_max is {left_bytes}"


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
    if (engine.engine_kind == ATTACHED_KIND) != isinstance(parse_source(engine.model.source), AttachedSource):
        return f"the engine {engine.engine_kind!r} does not go with the source {engine.model.source!r}"
    if engine.group is not None and engine.shape.stage_layer_counts:
        return "the coordinator would have a group's stage be stages of its own"
    return shape_refusal(engine.shape) or place_refusal(engine.group, limits.group_offer) or _card_refusal(engine, limits)
