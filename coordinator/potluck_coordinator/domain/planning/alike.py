"""Nodes that are alike to a model, the fastest first: those that do not run it, or those that do and may take one more.

Decides nothing but order: where thousands of nodes are of a few kinds with the same room free, a place is looked for among the few, and the
node is the first of its like. It must not know what makes nodes alike, nor what is placed.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from potluck_coordinator.domain.planning.node_kinds import holds
from potluck_coordinator.domain.planning.words import Sizing
from potluck_protocol.values import ModelId, NodeId

if TYPE_CHECKING:
    from collections.abc import Iterator

    from potluck_coordinator.domain.planning.node_kinds import Free, NodeKind
    from potluck_coordinator.domain.planning.sizing import Misfit


class Likeness(NamedTuple):
    """What nodes have in common."""

    number: int
    """Of their kind."""
    is_absent: bool
    soon: Free
    """Free once those that leave have left and those that wait have come."""
    now: Free


Order = tuple[bool, bytes]
Counts = Callable[[ModelId, NodeId], int]
"""How many replicas of a model a node has that may be given one more."""


class First(NamedTuple):
    """The first of nodes that are as good as each other, but for their order."""

    node_id: NodeId
    replica_count: int
    lacks_disk: bool
    waits: bool
    is_absent: bool
    sizing: Sizing
    """Of a replica there, in the words of the node's kind."""


class _Worth(NamedTuple):
    """What a model's places are told apart by; lower comes first."""

    slowness: float
    waits: bool
    is_absent: bool


@dataclass(slots=True)
class _Listing:
    """One model's view of the nodes."""

    slot_count_least: int
    counts: bool
    """Whether of the nodes that run it; else of the others."""
    seen_count: int = 0
    """Of the arrivals."""
    worth: dict[Likeness, tuple[_Worth, Sizing] | None] = field(default_factory=dict)
    alike: dict[_Worth, list[Likeness]] = field(default_factory=dict)
    best_first: list[_Worth] = field(default_factory=list)
    queues: dict[_Worth, list[tuple[int, Order, NodeId, Likeness]]] = field(default_factory=dict)
    """Only of those that somebody asked for."""


class AlikeNodes:
    """Every node under its likeness.

    Args:
        size: how a replica of so many slots at the least would run in what of a node is free soon.
        order: what decides between nodes that are as good: whether its disk is too small, and a draw; lower comes first.
        is_out: whether a node is none of those that a model asks for: it runs the model already, or will not.
    """

    def __init__(
        self,
        size: Callable[[ModelId, NodeKind, Free, int], Sizing | Misfit],
        order: Callable[[ModelId, NodeId], Order],
        is_out: Callable[[ModelId, NodeId], bool],
    ) -> None:
        self._size = size
        self._order = order
        self._is_out = is_out
        self._likeness: dict[NodeId, Likeness] = {}
        self._nodes: dict[Likeness, set[NodeId]] = {}
        self._kinds: dict[int, NodeKind] = {}
        self._arrivals: list[tuple[Likeness, NodeId]] = []
        self._listings: dict[tuple[ModelId, int, bool], _Listing] = {}

    def put(self, node_id: NodeId, kind: NodeKind, likeness: Likeness) -> None:
        """Brings a node under what it is now; to be called also when it began or ceased to run a model."""
        before = self._likeness.get(node_id)
        if before is not None:
            self._nodes[before].discard(node_id)
        self._likeness[node_id] = likeness
        self._kinds[likeness.number] = kind
        self._nodes.setdefault(likeness, set()).add(node_id)
        self._arrivals.append((likeness, node_id))

    def fastest_first(
        self, model_id: ModelId, least_score: float = 0.0, slot_count_least: int = 1, counts: Counts | None = None
    ) -> Iterator[First]:
        """The nodes that are first of their like, as far as a replica of so many slots reaches the score. Nothing may be put meanwhile.

        With `counts` they are those for which it says more than 0, the ones with the fewest replicas first, and only on cards: a machine's
        processors serve a model once.
        """
        key = (model_id, slot_count_least, counts is not None)
        listing = self._listings.setdefault(key, _Listing(slot_count_least, counts is not None))
        self._catch_up(model_id, listing, counts)
        for worth in listing.best_first:
            if -worth.slowness < least_score:
                return
            first = self._first(model_id, listing, worth, counts)
            if first is not None:
                yield first

    def _catch_up(self, model_id: ModelId, listing: _Listing, counts: Counts | None) -> None:
        """Lists what nodes came to be since the model last looked."""
        for likeness, node_id in islice(self._arrivals, listing.seen_count, None):
            if likeness not in listing.worth:
                self._list(model_id, listing, likeness)
            worthy = listing.worth[likeness]
            if worthy is not None and worthy[0] in listing.queues and self._is_asked_for(model_id, node_id, counts):
                # It may have been taken out of the queue while it was none of those that are asked for.
                heappush(listing.queues[worthy[0]], self._entry(model_id, node_id, likeness, counts))
        listing.seen_count = len(self._arrivals)

    def _list(self, model_id: ModelId, listing: _Listing, likeness: Likeness) -> None:
        sized = self._size(model_id, self._kinds[likeness.number], likeness.soon, listing.slot_count_least)
        if not isinstance(sized, Sizing) or (listing.counts and not sized.shape.card_uuids):
            listing.worth[likeness] = None
            return
        worth = _Worth(-sized.score, not holds(likeness.now, sized), likeness.is_absent)
        listing.worth[likeness] = (worth, sized)
        if worth not in listing.alike:
            insort(listing.best_first, worth)
        listing.alike.setdefault(worth, []).append(likeness)

    def _first(self, model_id: ModelId, listing: _Listing, worth: _Worth, counts: Counts | None) -> First | None:
        queue = listing.queues.get(worth)
        if queue is None:
            queue = listing.queues[worth] = [
                self._entry(model_id, node_id, likeness, counts)
                for likeness in listing.alike[worth]
                for node_id in self._nodes.get(likeness, ())
                if self._is_asked_for(model_id, node_id, counts)
            ]
            heapify(queue)
        while queue:
            replica_count, (lacks_disk, _), node_id, likeness = queue[0]
            worthy = listing.worth[likeness]
            is_so_still = self._likeness[node_id] == likeness and replica_count == (counts(model_id, node_id) if counts else 0)
            if worthy is not None and is_so_still and self._is_asked_for(model_id, node_id, counts):
                return First(node_id, replica_count, lacks_disk, worth.waits, worth.is_absent, worthy[1])
            heappop(queue)
        return None

    def _is_asked_for(self, model_id: ModelId, node_id: NodeId, counts: Counts | None) -> bool:
        return counts(model_id, node_id) > 0 if counts else not self._is_out(model_id, node_id)

    def _entry(self, model_id: ModelId, node_id: NodeId, likeness: Likeness, counts: Counts | None) -> tuple[int, Order, NodeId, Likeness]:
        """One of a queue, which begins with the one to take."""
        return (counts(model_id, node_id) if counts else 0), self._order(model_id, node_id), node_id, likeness
