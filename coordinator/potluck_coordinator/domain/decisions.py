"""What was decided over one request, kept so that people can ask why.

Decides what is kept of a request's story and for how long, and what the stories together say of one replica. It must not know who asks.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

    from potluck_coordinator.domain.placement import Candidate, Placement
    from potluck_protocol.values import AccountId, AttemptId, ModelId, NodeId, ReplicaId, RequestId

STEPS_MAX: Final = 32
"""Of one request: three attempts have some four steps each. Beyond it the newest are left out."""
KEPT_SECONDS: Final = 900.0
"""From a request's arrival: whoever wonders asks within minutes."""


class StepKind(StrEnum):
    """One thing that happened to a request."""

    WAITS = "waits"
    PLACED = "placed"
    REFUSED = "refused"
    """By the pool, before any engine had it."""
    FAILED = "failed"
    """An attempt; what follows it says whether the request went on."""
    CONTINUED = "continued"
    """Elsewhere, from the text so far."""
    RESTARTED = "restarted"
    """Elsewhere, from its beginning: nothing of it had reached the client."""
    ANSWERED = "answered"
    BROKE_OFF = "broke_off"


@dataclass(frozen=True, slots=True)
class Step:
    """One decision, or what led to it."""

    kind: StepKind
    at_seconds: float
    """Monotonic."""
    words: str = ""
    node_id: NodeId | None = None
    attempt_id: AttemptId | None = None
    placement: Placement | None = None


@dataclass(frozen=True, slots=True)
class Story:
    """One request's."""

    request_id: RequestId
    account_id: AccountId
    model_id: ModelId
    arrived_at_unix_ms: int
    arrived_at_seconds: float
    steps: tuple[Step, ...] = ()

    def and_then(self, step: Step) -> Story:
        """The story with one more step."""
        return self if len(self.steps) >= STEPS_MAX else replace(self, steps=(*self.steps, step))


def is_over(story: Story, now_seconds: float) -> bool:
    """Whether nobody needs the story any more."""
    return now_seconds - story.arrived_at_seconds > KEPT_SECONDS


@dataclass(frozen=True, slots=True)
class ReplicaRecord:
    """How one replica did in the placements of its model."""

    considered_count: int = 0
    chosen_count: int = 0
    losses: Counter[str] = field(default_factory=Counter)


def placement_count(stories: Iterable[Story], model_ids: frozenset[ModelId]) -> int:
    """The placements of these models."""
    return sum(step.placement is not None for story in stories if story.model_id in model_ids for step in story.steps)


def replica_records(stories: Iterable[Story], node_id: NodeId) -> dict[ReplicaId, ReplicaRecord]:
    """Every replica of the node that was looked at by name in some placement, and why it lost those that it lost."""
    records: dict[ReplicaId, ReplicaRecord] = {}
    for candidate in _candidates(stories):
        if candidate.replica_id is None or candidate.node_id != node_id:
            continue
        before = records.get(candidate.replica_id, ReplicaRecord())
        losses = before.losses if candidate.chosen else before.losses + Counter({candidate.reason: 1})
        records[candidate.replica_id] = ReplicaRecord(before.considered_count + 1, before.chosen_count + candidate.chosen, losses)
    return records


def _candidates(stories: Iterable[Story]) -> Iterable[Candidate]:
    for story in stories:
        for step in story.steps:
            if step.placement is not None:
                yield from step.placement.candidates
