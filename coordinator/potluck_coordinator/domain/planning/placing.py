"""Where a wish's next replica goes.

Decides by room: a node that serves, and has place for it now or once others have left. Nodes without a replica of the model come first, for
what one node's end takes along, as far as they are at least half as fast as the fastest; then those with place now, then the faster ones.
It must not take anybody's room.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from potluck_coordinator.domain.planning.sizing import Room, demands_of
from potluck_coordinator.domain.planning.state import draw
from potluck_coordinator.domain.planning.words import Phase, PlannedReplica, Sizing, replica_id_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from potluck_coordinator.domain.catalogue import Deployment
    from potluck_coordinator.domain.planning.state import Draft
    from potluck_protocol.values import ModelId, NodeId, ReplicaId

SPREAD_SHARE_MIN: Final = 0.5
"""Of the fastest place: a slower one is not taken for the sake of having replicas on several nodes."""


@dataclass(frozen=True, slots=True)
class Site:
    """A place for a replica."""

    node_id: NodeId
    sizing: Sizing
    replica_count: int
    """Of the same model, on the node already."""
    waits: bool
    """Whether others have to leave first."""
    lacks_disk: bool

    def rank(self, model_id: ModelId, best_score: float) -> tuple[bool, int, bool, bool, float, bytes]:
        """Lower is better; `best_score` is the highest of the sites that are compared."""
        is_slow = self.sizing.score < SPREAD_SHARE_MIN * best_score
        return is_slow, self.replica_count, self.lacks_disk, self.waits, -self.sizing.score, draw(model_id, self.node_id)


def best_site(model_id: ModelId, found: Iterable[Site]) -> Site | None:
    """The one to take; None of none."""
    compared = tuple(found)
    best_score = max((site.sizing.score for site in compared), default=0.0)
    return min(compared, key=lambda site: site.rank(model_id, best_score), default=None)


def place(draft: Draft, deployment: Deployment) -> bool:
    """Adds one replica where it goes best; False where there is no place for it."""
    if deployment.replica_count is None:
        # All of them get one, so the first is as good as the best.
        best = next(sites(draft, deployment), None)
    else:
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
            sizing=site.sizing,
            made_for=demands_of(draft.entry(model_id)),
            phase=Phase.WAITING if site.waits else Phase.WISHED,
            since_seconds=draft.view.now_seconds,
            replaces=replaces,
        )
    )


def sites(draft: Draft, deployment: Deployment) -> Iterator[Site]:
    """Every place that there is for one more replica; where all nodes are to have one, on those without, the absent ones too."""
    everywhere = deployment.replica_count is None
    served = {replica.node_id for replica in draft.of_model(deployment.model_id)} if everywhere else frozenset()
    for node_id in sorted(draft.view.nodes) if everywhere else draft.serving_nodes():
        if node_id not in served and not draft.obstacle(deployment.model_id, node_id):
            found = site_on(draft, deployment.model_id, node_id, draft.room(node_id, soon=True))
            if found is not None:
                yield found


def site_on(draft: Draft, model_id: ModelId, node_id: NodeId, room: Room) -> Site | None:
    """The place on a node, in what of it will be free; None where the replica does not fit. A machine's processors serve a model once."""
    sized = draft.sized(model_id, node_id, room)
    count = sum(1 for replica in draft.on_node(node_id) if replica.model_id == model_id)
    if not isinstance(sized, Sizing) or (count and not sized.shape.card_uuids):
        return None
    waits = not draft.room(node_id, soon=False).holds(sized)
    return Site(node_id, sized, count, waits, draft.lacks_disk(model_id, node_id))


def _free_id(draft: Draft, node_id: NodeId, model_id: ModelId) -> ReplicaId:
    ordinal = 0
    while (replica_id := replica_id_of(node_id, model_id, ordinal)) in draft.replicas:
        ordinal += 1
    return replica_id
