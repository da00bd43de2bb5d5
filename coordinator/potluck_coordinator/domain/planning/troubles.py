"""Which nodes will not run which models, in the nodes' own words.

Decides what counts as trouble: a refusal by the owner's limits, a failure that trying again does not mend, or an engine that has failed for
long; and how long it is remembered once the replica is gone, for a node that is not asked says nothing. An agent that began anew is asked
anew. Only of what is planned on a node its word is taken, and no more than a line. It must not know what is planned instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from potluck_coordinator.domain.planning.words import Trouble
from potluck_protocol.values import EngineState, EngineStatus, FailureKind, ModelId, NodeId

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from potluck_coordinator.domain.node_view import NodeView

FAILING_SECONDS_MAX: Final = 600.0
"""An engine that did not answer for so long after its first failure is one that fails; before, its node tries again by itself."""
REMEMBERED_SECONDS: Final = 1800.0
"""Then the node may be asked once more: its owner may have changed something that does not show."""
REASON_CHARACTERS_MAX: Final = 200
_INCURABLE: Final = frozenset({FailureKind.BAD_MODEL, FailureKind.UNSUPPORTED_ARCHITECTURE, FailureKind.UNSUPPORTED_CUDA_VERSION})


@dataclass(frozen=True, slots=True)
class KnownTrouble:
    """What is remembered of one model on one node."""

    reason: str
    refused: bool
    incurable: bool
    epoch: int
    """The node's session in which it was said."""
    first_seconds: float
    last_seconds: float

    def counts(self, now_seconds: float) -> bool:
        """Whether planning is to go round it by now."""
        return self.refused or self.incurable or now_seconds - self.first_seconds >= FAILING_SECONDS_MAX


KnownTroubles = dict[tuple[NodeId, ModelId], KnownTrouble]


def remember(
    known: Mapping[tuple[NodeId, ModelId], KnownTrouble],
    nodes: Iterable[NodeView],
    planned: Collection[tuple[NodeId, ModelId]],
    now_seconds: float,
) -> KnownTroubles:
    """What is known after what the nodes say now of the models that are planned on them."""
    views = {node.node_id: node for node in nodes}
    kept = {
        key: trouble
        for key, trouble in known.items()
        if key[0] in views and views[key[0]].epoch == trouble.epoch and now_seconds - trouble.last_seconds < REMEMBERED_SECONDS
    }
    for node in views.values():
        for status in node.engines:
            key = (node.node_id, status.model_id)
            if status.state is EngineState.READY:
                kept.pop(key, None)
            elif status.state in {EngineState.REFUSED, EngineState.BACKING_OFF} and not status.group_id and key in planned:
                kept[key] = _said(status, kept.get(key), node.epoch, now_seconds)
    return kept


def troubles(known: Mapping[tuple[NodeId, ModelId], KnownTrouble], now_seconds: float) -> dict[tuple[NodeId, ModelId], Trouble]:
    """What planning is to go round."""
    return {key: Trouble(trouble.reason, trouble.refused) for key, trouble in known.items() if trouble.counts(now_seconds)}


def _said(status: EngineStatus, before: KnownTrouble | None, epoch: int, now_seconds: float) -> KnownTrouble:
    # The first line says what happened; an engine's last words follow it.
    first_line = (status.failure.strip().splitlines() or [""])[0]
    printable = "".join(character for character in first_line if character.isprintable())
    return KnownTrouble(
        reason=printable[:REASON_CHARACTERS_MAX] or "it gave no reason",
        refused=status.state is EngineState.REFUSED,
        incurable=status.failure_kind in _INCURABLE,
        epoch=epoch,
        first_seconds=now_seconds if before is None else before.first_seconds,
        last_seconds=now_seconds,
    )
