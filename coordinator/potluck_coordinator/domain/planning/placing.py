"""Where a wish's next replica goes.

Decides by room: a node that serves, and has place for it now or once others have left. Nodes without a replica of the model come first, for
what one node's end takes along, as far as they are at least half as fast as the fastest; then those with place now, then the faster ones.
Nodes that are alike are asked once. It must not take anybody's room.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import merge
from typing import TYPE_CHECKING, Final

from potluck_coordinator.domain.planning.node_kinds import holds
from potluck_coordinator.domain.planning.sizing import demands_of
from potluck_coordinator.domain.planning.state import draw
from potluck_coordinator.domain.planning.words import Phase, PlannedReplica, Sizing, replica_id_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from potluck_coordinator.domain.catalogue import Deployment
    from potluck_coordinator.domain.planning.alike import First
    from potluck_coordinator.domain.planning.node_kinds import Room
    from potluck_coordinator.domain.planning.state import Draft
    from potluck_protocol.values import ModelId, NodeId, ReplicaId

SPREAD_SHARE_MIN: Final = 0.5
"""Of the fastest place: a slower one is not taken for the sake of having replicas on several nodes."""


@dataclass(frozen=True, slots=True)
class Site:
    """A place for a replica."""

    node_id: NodeId
    sizing: Sizing
    """In the words of the node's kind; `put` brings it onto the node's own cards."""
    replica_count: int
    """Of the same model, on the node already."""
    waits: bool
    """Whether others have to leave first."""
    lacks_disk: bool

    @property
    def is_flawless(self) -> bool:
        """Whether only a faster place would be better."""
        return not (self.replica_count or self.waits or self.lacks_disk)

    def rank(self, model_id: ModelId, best_score: float) -> tuple[bool, int, bool, bool, float, bytes]:
        """Lower is better; `best_score` is the highest of the sites that are compared."""
        is_slow = self.sizing.score < SPREAD_SHARE_MIN * best_score
        return is_slow, self.replica_count, self.lacks_disk, self.waits, -self.sizing.score, draw(model_id, self.node_id)


def best_site(model_id: ModelId, fastest_first: Iterable[Site]) -> Site | None:
    """The one to take; None of none."""
    best: tuple[tuple[bool, int, bool, bool, float, bytes], Site] | None = None
    best_score = 0.0
    for site in fastest_first:
        best_score = max(best_score, site.sizing.score)
        rank = site.rank(model_id, best_score)
        # Nothing slower is better than a place without a flaw, nor one of the slow ones than one of the others.
        if best is not None and (rank[0] > best[0][0] or (best[1].is_flawless and site.sizing.score < best[1].sizing.score)):
            break
        if best is None or rank < best[0]:
            best = (rank, site)
    return None if best is None else best[1]


def place(draft: Draft, deployment: Deployment) -> bool:
    """Adds one replica where it goes best; False where there is no place for it."""
    best = best_site(deployment.model_id, sites(draft, deployment))
    if best is not None:
        put(draft, deployment.model_id, best)
    return best is not None


def put(draft: Draft, model_id: ModelId, site: Site, replaces: ReplicaId | None = None) -> None:
    """Adds the replica."""
    replica_id = _free_id(draft, site.node_id, model_id)
    draft.put(
        PlannedReplica(
            replica_id=replica_id,
            node_id=site.node_id,
            model_id=model_id,
            sizing=draft.kind(site.node_id).own(site.sizing),
            made_for=demands_of(draft.entry(model_id)),
            phase=Phase.WAITING if site.waits else Phase.WISHED,
            since_seconds=draft.view.now_seconds,
            replaces=replaces,
        )
    )


def sites(draft: Draft, deployment: Deployment, least_score: float = 0.0, slot_count_least: int = 1) -> Iterator[Site]:
    """The places for one more replica, the fastest first: of nodes that are alike one, be it with replicas of the model or without.

    Where all nodes are to have one, those that have are left out, and the absent ones are not. A replica takes the fewest cards that give
    it so many slots.
    """
    model_id, everywhere = deployment.model_id, deployment.replica_count is None
    others = draft.alike().fastest_first(model_id, least_score, slot_count_least)
    if everywhere:
        return map(_site, others)

    def counts(model_id: ModelId, node_id: NodeId) -> int:
        return 0 if (node_id, model_id) in draft.node_troubles else draft.count_on(model_id, node_id)

    here = draft.alike().fastest_first(model_id, least_score, slot_count_least, counts)
    return (_site(first) for first in merge(here, others, key=_slowness) if not first.is_absent)


def _site(first: First) -> Site:
    return Site(first.node_id, first.sizing, first.replica_count, first.waits, first.lacks_disk)


def site_on(draft: Draft, model_id: ModelId, node_id: NodeId, room: Room, slot_count_least: int = 1) -> Site | None:
    """The place on a node, in what of it will be free; None where the replica does not fit. A machine's processors serve a model once."""
    kind = draft.kind(node_id)
    sized = draft.sized_on_kind(model_id, kind, kind.free(room), slot_count_least)
    count = draft.count_on(model_id, node_id)
    if not isinstance(sized, Sizing) or (count and not sized.shape.card_uuids):
        return None
    waits = not holds(kind.free(draft.room(node_id, soon=False)), sized)
    return Site(node_id, sized, count, waits, draft.lacks_disk(model_id, node_id))


def _slowness(first: First) -> float:
    return -first.sizing.score


def _free_id(draft: Draft, node_id: NodeId, model_id: ModelId) -> ReplicaId:
    ordinal = 0
    while (replica_id := replica_id_of(node_id, model_id, ordinal)) in draft.replicas:
        ordinal += 1
    return replica_id
