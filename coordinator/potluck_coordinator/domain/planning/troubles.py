"""Which nodes will not run which replicas, in the nodes' own words.

Decides what counts as trouble: a refusal by the owner's limits, a failure that trying again does not mend, an engine that has failed for
long, or one that is on its way for too long; and how long it is remembered once the replica is gone, for a node that is not asked says
nothing. Each replica is judged by itself, for one card may be bad beside a good one; a node with trouble takes no further replica of the
model. An agent that began anew is asked anew. Only of what is planned on a node its word is taken, and no more than a line. It must not
know what is planned instead.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from potluck_coordinator.domain.planning.words import Phase, PlannedReplica, Trouble, TroubleKey
from potluck_protocol.values import EngineState, EngineStatus, FailureKind, ModelId, NodeId, NodeState

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from potluck_coordinator.domain.node_view import NodeView

FAILING_SECONDS_MAX: Final = 600.0
"""An engine that did not answer for so long after its first failure is one that fails; before, its node tries again by itself."""
STARTING_SECONDS_MAX: Final = 1800.0
"""Twice what a node gives a start before it calls it failed: one that takes longer is never called so."""
FETCHING_SECONDS_MAX: Final = 3600.0
"""Without a byte more on the node: a large model's files are also read once more to be checked. A fetch that goes on may take days."""
REMEMBERED_SECONDS: Final = 1800.0
"""Then the node may be asked once more: its owner may have changed something that does not show."""
REASON_CHARACTERS_MAX: Final = 200
_INCURABLE: Final = frozenset({FailureKind.BAD_MODEL, FailureKind.UNSUPPORTED_ARCHITECTURE, FailureKind.UNSUPPORTED_CUDA_VERSION})
_FAILED: Final = frozenset({EngineState.REFUSED, EngineState.BACKING_OFF})
_SLOW_WORDS: Final = {
    None: "the node has not answered to the wish",
    EngineState.FETCHING: "it has fetched nothing more",
    EngineState.STARTING: "its engine has been starting",
    EngineState.STOPPING: "an engine has been stopping in its place",
}


@dataclass(frozen=True, slots=True)
class KnownTrouble:
    """What is remembered of one replica on one node."""

    reason: str
    refused: bool
    incurable: bool
    epoch: int
    """The node's session in which it was said."""
    first_seconds: float
    last_seconds: float
    step: tuple[EngineState | None, int] | None = None
    """Of one on its way: its state, None where nothing is said of it, and the bytes that the node has fetched. None: it failed."""

    def counts(self, now_seconds: float) -> bool:
        """Whether planning is to go round it by now."""
        if self.step is not None:
            return self.last_seconds - self.first_seconds >= _step_seconds_max(self.step[0])
        return self.refused or self.incurable or now_seconds - self.first_seconds >= FAILING_SECONDS_MAX


KnownTroubles = dict[TroubleKey, KnownTrouble]


def remember(
    known: Mapping[TroubleKey, KnownTrouble], nodes: Iterable[NodeView], planned: Collection[PlannedReplica], now_seconds: float
) -> KnownTroubles:
    """What is known after what the nodes say now of the replicas that are planned on them."""
    views = {node.node_id: node for node in nodes}
    statuses = {(node_id, status.replica_id): status for node_id, node in views.items() for status in node.engines}
    fetched_bytes = {node_id: sum(status.fetched_bytes for status in node.engines) for node_id, node in views.items()}
    kept = _remembered(known, views, {_key(replica) for replica in planned}, now_seconds)
    for replica in planned:
        if replica.node_id not in views:
            continue
        key, epoch, status = _key(replica), views[replica.node_id].epoch, statuses.get((replica.node_id, replica.replica_id))
        before = kept.get(key)
        if status is not None and status.state is EngineState.READY:
            kept.pop(key, None)
        elif status is not None and status.state in _FAILED:
            kept[key] = _said(status, before, epoch, now_seconds)
        elif _is_awaited(replica, views[replica.node_id]) and (before is None or before.step is not None):
            # Files are fetched one after the other: a node that fetches others gets on.
            fetches = status is not None and status.state is EngineState.FETCHING
            step = (status.state if status is not None else None, fetched_bytes[replica.node_id] if fetches else 0)
            kept[key] = _on_its_way(step, before, epoch, now_seconds)
    return kept


def troubles(known: Mapping[TroubleKey, KnownTrouble], now_seconds: float) -> dict[TroubleKey, Trouble]:
    """What planning is to go round."""
    return {key: Trouble(trouble.reason, trouble.refused) for key, trouble in known.items() if trouble.counts(now_seconds)}


def by_node(found: Mapping[TroubleKey, Trouble]) -> dict[tuple[NodeId, ModelId], Trouble]:
    """Why nodes take no further replica of a model: a refusal is of the model, and says more than a failure."""
    ordered = sorted(found.items(), key=lambda item: (not item[1].refused, item[0]), reverse=True)
    return {(node_id, model_id): trouble for (node_id, model_id, _), trouble in ordered}


def _key(replica: PlannedReplica) -> TroubleKey:
    return replica.node_id, replica.model_id, replica.replica_id


def _remembered(
    known: Mapping[TroubleKey, KnownTrouble], views: Mapping[NodeId, NodeView], planned: Collection[TroubleKey], now_seconds: float
) -> KnownTroubles:
    return {
        key: trouble
        for key, trouble in known.items()
        if key[0] in views and views[key[0]].epoch == trouble.epoch and now_seconds - trouble.last_seconds < REMEMBERED_SECONDS
        # One that left while it was on its way, and in time, failed at nothing.
        if trouble.step is None or key in planned or trouble.counts(now_seconds)
    }


def _is_awaited(replica: PlannedReplica, node: NodeView) -> bool:
    """Whether its node is to bring it up now."""
    return replica.phase is Phase.WISHED and node.connected and node.state is NodeState.SERVING


def _on_its_way(step: tuple[EngineState | None, int], before: KnownTrouble | None, epoch: int, now_seconds: float) -> KnownTrouble:
    if before is not None and before.step == step:
        return replace(before, last_seconds=now_seconds)
    words = _SLOW_WORDS.get(step[0], f"its engine has been {step[0]}")
    reason = f"{words} for {_step_seconds_max(step[0]) / 60:.0f} minutes"
    return KnownTrouble(reason, refused=False, incurable=False, epoch=epoch, first_seconds=now_seconds, last_seconds=now_seconds, step=step)


def _step_seconds_max(state: EngineState | None) -> float:
    return FETCHING_SECONDS_MAX if state is EngineState.FETCHING else STARTING_SECONDS_MAX


def _said(status: EngineStatus, before: KnownTrouble | None, epoch: int, now_seconds: float) -> KnownTrouble:
    # The first line says what happened; an engine's last words follow it.
    first_line = (status.failure.strip().splitlines() or [""])[0]
    printable = "".join(character for character in first_line if character.isprintable())
    # The time of a start that is not too long is none of failing.
    goes_on = before is not None and (before.step is None or before.counts(now_seconds))
    return KnownTrouble(
        reason=printable[:REASON_CHARACTERS_MAX] or "it gave no reason",
        refused=status.state is EngineState.REFUSED,
        incurable=status.failure_kind in _INCURABLE,
        epoch=epoch,
        first_seconds=before.first_seconds if before is not None and goes_on else now_seconds,
        last_seconds=now_seconds,
    )
