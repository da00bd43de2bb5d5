"""What was decided over one request, kept so that people can ask why.

Decides what is kept of a request's story and for how long, and what the stories together say of one replica. It must not know who asks.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from potluck_coordinator.domain.placement import NOT_TRUSTED

if TYPE_CHECKING:
    from collections.abc import Iterable

    from potluck_coordinator.domain.cost import Cost
    from potluck_coordinator.domain.placement import Candidate, Placement
    from potluck_protocol.values import AccountId, AttemptId, ModelId, NodeId, ReplicaId, RequestId

STEPS_MAX: Final = 32
"""Of one request: three attempts have some four steps each. Beyond it the newest are left out."""
KEPT_SECONDS: Final = 900.0
"""From a request's arrival: whoever wonders asks within minutes."""


TOLD_DIGITS: Final = 2
"""After the point, of the seconds in which a node's habits are hidden."""


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
    HEDGED = "hedged"
    """Its first token is late, and another node is asked, too."""
    NOT_HEDGED = "not_hedged"
    """Its first token is late, and nobody else is asked."""
    HEDGE_OVER = "hedge_over"
    """Which of the two goes on."""
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
        if len(self.steps) >= STEPS_MAX:
            return self
        steps = (*self.steps, step)
        return Story(self.request_id, self.account_id, self.model_id, self.arrived_at_unix_ms, self.arrived_at_seconds, steps)


def was_refused(story: Story) -> bool:
    """Whether the pool refused the request, and no node ever had it: such stories cost a client nothing, and come by the thousand."""
    steps = story.steps
    return bool(steps) and steps[-1].kind is StepKind.REFUSED and all(step.kind is not StepKind.PLACED for step in steps)


def is_over(story: Story, now_seconds: float) -> bool:
    """Whether nobody needs the story any more."""
    return now_seconds - story.arrived_at_seconds > KEPT_SECONDS


def told_terms(cost: Cost, *, tells_habits: bool) -> dict[str, float]:
    """What somebody is told of a cost, in seconds by name: all that adds up to it.

    Where a node is, how it is used and when its owner takes it away are nobody else's affair. They are told together with what the answer
    takes, and rounded, so that no difference of two numbers gives one of them.

    Args:
        cost: of a candidate.
        tells_habits: to the operator and the node's owner.
    """
    if tells_habits:
        return {name.removesuffix("_seconds"): seconds for name, seconds in cost._asdict().items()}
    rest = cost.line_seconds + cost.writing_seconds + cost.cache_seconds + cost.loss_seconds
    return {"waiting": cost.waiting_seconds, "reading": cost.reading_seconds, "rest": round(rest, TOLD_DIGITS)}


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


def trust_loss_count(stories: Iterable[Story], model_id: ModelId) -> int:
    """The placements of the model for which replicas were left out because they are not trusted: of these, no more is kept than that."""
    found = _candidates(story for story in stories if story.model_id == model_id)
    return sum(candidate.reason == NOT_TRUSTED for candidate in found)


def _candidates(stories: Iterable[Story]) -> Iterable[Candidate]:
    for story in stories:
        for step in story.steps:
            if step.placement is not None:
                yield from step.placement.candidates
