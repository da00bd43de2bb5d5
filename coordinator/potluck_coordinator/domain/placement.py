"""Which replica answers a request, and why each other one does not.

Decides from the replicas as they are at one moment, those that are alike together: a large pool has few kinds of them, and most are full,
so that a decision costs no more with a thousand nodes than with ten. It must not know how replicas are reached. The formula is the simple
one, load relative to slots; a better formula changes `score` and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING, Final

from potluck_protocol.values import Endpoint, ModelId, NodeId, ReplicaId

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

_NOBODY: Final[frozenset[NodeId]] = frozenset()
_TRIED: Final = "tried before"


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """One replica as the gateway sees it now."""

    replica_id: ReplicaId
    node_id: NodeId
    model_id: ModelId
    ready: bool
    slot_count: int
    in_flight_count: int
    """The gateway's own count of attempts there, never the node's word."""
    node_paused: bool
    node_suspect: bool
    link_up: bool
    endpoints: tuple[Endpoint, ...]
    leaving: bool = False
    """It finishes what it is answering, and makes room."""
    context_length_tokens: int = 0
    """What its engine was really started with, prompt and answer together; 0: it does not say."""


def likeness(replica: ReplicaView) -> tuple[object, ...]:
    """All of a replica but its names and its model: of two with the same, a request may have either."""
    return (
        replica.ready,
        replica.slot_count,
        replica.in_flight_count,
        replica.node_paused,
        replica.node_suspect,
        replica.link_up,
        replica.endpoints,
        replica.leaving,
        replica.context_length_tokens,
    )


@dataclass(frozen=True, slots=True)
class Cohort:
    """The replicas of one model that have the same `likeness`; at least one."""

    replicas: Collection[ReplicaView]

    @property
    def sample(self) -> ReplicaView:
        """Any of them: what is true of it, but for its names, is true of all."""
        return next(iter(self.replicas))

    @property
    def is_free(self) -> bool:
        """Whether there is a request that they would take now."""
        return _hurdle(self.sample) is None and self.sample.in_flight_count < self.sample.slot_count

    def without(self, excluded: frozenset[NodeId]) -> Collection[ReplicaView]:
        """Those on other nodes; maybe none."""
        return [replica for replica in self.replicas if replica.node_id not in excluded] if excluded else self.replicas


@dataclass(frozen=True, slots=True)
class Candidate:
    """The part that some replicas had in a decision: the score in shares of their slots taken, or why they could not be chosen."""

    replica_count: int
    score: float | None
    reason: str


@dataclass(frozen=True, slots=True)
class Placement:
    """The decision with everything it was made from."""

    chosen: ReplicaView | None
    candidates: tuple[Candidate, ...]

    def explanation(self) -> str:
        """One line for people: how many replicas lost for which reason."""
        counts: dict[str, int] = {}
        for candidate in self.candidates:
            counts[candidate.reason] = counts.get(candidate.reason, 0) + candidate.replica_count
        return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items())) or "no node has this model"


def rejection(replica: ReplicaView, endpoint: Endpoint, excluded: frozenset[NodeId], tokens_min: int = 0) -> str | None:
    """Why the replica cannot take the request at all, whatever its load; None if it can. `tokens_min` are of its prompt, at the least."""
    if replica.node_id in excluded:
        return _TRIED
    hurdle = _hurdle(replica)
    if hurdle is not None:
        return hurdle
    if endpoint not in replica.endpoints:
        return f"without {endpoint.value}"
    if 0 < replica.context_length_tokens < tokens_min:
        return f"with a context of {replica.context_length_tokens} tokens, too short for it"
    return None


def _hurdle(replica: ReplicaView) -> str | None:
    """Why the replica takes no request at all, whatever it is; None if it does."""
    if not replica.link_up:
        return "disconnected"
    if replica.node_suspect:
        return "suspect"
    if replica.node_paused:
        return "paused"
    if replica.leaving:
        return "leaving"
    return None if replica.ready else "not ready"


def tokens_wanted(
    cohorts: Iterable[Cohort],
    endpoint: Endpoint,
    excluded: frozenset[NodeId],
    prompt_tokens_min: int,
    completion_tokens_max: int | None,
) -> int:
    """What a replica has to have room for: the prompt and the longest answer, or, where none that may take it has so much, the prompt.

    Engines were started with less context than the catalogue says where memory ran out; some refuse what is longer, others cut the answer.
    """
    wanted = prompt_tokens_min + (1 if completion_tokens_max is None else completion_tokens_max)
    able = (cohort.sample for cohort in cohorts if rejection(cohort.sample, endpoint, _NOBODY) is None and cohort.without(excluded))
    room = max((replica.context_length_tokens or wanted for replica in able), default=0)
    return wanted if wanted <= room else prompt_tokens_min


def slots_beside_owner(slot_count: int, in_flight_count: int, waiting_count: int | None) -> int:
    """How many slots an engine has that its owner uses, too: while requests wait inside it, those that are taken.

    What it runs says nothing, for how much that may be is not told, nor whose it is; whom the waiting ones belong to does not matter. One
    slot is always left: some engines tell old numbers when they have nothing to do, and the next request makes them tell new ones.

    Args:
        slot_count: as wished.
        in_flight_count: of them that are taken.
        waiting_count: requests that the engine has taken and not begun, by its last word; None: it does not say.
    """
    return min(slot_count, max(1, in_flight_count)) if waiting_count else slot_count


def score(replica: ReplicaView) -> float:
    """The share of its slots that would be taken with this request; lower is better."""
    return (replica.in_flight_count + 1) / replica.slot_count


def slots(cohorts: Iterable[Cohort], endpoint: Endpoint, excluded: frozenset[NodeId], tokens_min: int) -> tuple[int, int]:
    """The slots of replicas that can take a request, busy or not, and how many of them are free."""
    usable = free = 0
    for cohort in cohorts:
        sample = cohort.sample
        if rejection(sample, endpoint, _NOBODY, tokens_min) is None:
            replica_count = len(cohort.without(excluded))
            usable += replica_count * sample.slot_count
            free += replica_count * max(0, sample.slot_count - sample.in_flight_count)
    return usable, free


def place(cohorts: Iterable[Cohort], endpoint: Endpoint, excluded: frozenset[NodeId], draw: float, tokens_min: int = 0) -> Placement:
    """Chooses a free replica with the lowest score; `draw` in [0, 1) breaks ties, so that equal nodes share the work."""
    candidates: list[Candidate] = []
    free: list[tuple[float, Collection[ReplicaView]]] = []
    for cohort in cohorts:
        sample, untried = cohort.sample, cohort.without(excluded)
        if len(untried) < len(cohort.replicas):
            candidates.append(Candidate(len(cohort.replicas) - len(untried), None, _TRIED))
        if not untried:
            continue
        reason = rejection(sample, endpoint, _NOBODY, tokens_min)
        if reason is None and sample.in_flight_count >= sample.slot_count:
            reason = "busy"
        if reason is None:
            free.append((score(sample), untried))
        else:
            candidates.append(Candidate(len(untried), None, reason))
    chosen = _lowest(free, draw)
    if chosen is not None:
        candidates.append(Candidate(1, score(chosen), "chosen"))
        for points, replicas in free:
            is_its_own = likeness(next(iter(replicas))) == likeness(chosen)
            if len(replicas) > is_its_own:
                candidates.append(Candidate(len(replicas) - is_its_own, points, "more loaded"))
    return Placement(chosen, tuple(candidates))


def _lowest(scored: Sequence[tuple[float, Collection[ReplicaView]]], draw: float) -> ReplicaView | None:
    if not scored:
        return None
    best = min(points for points, _ in scored)
    ties = [replicas for points, replicas in scored if points == best]
    number = int(draw * sum(len(replicas) for replicas in ties))
    return next(islice(chain.from_iterable(ties), number, None))
