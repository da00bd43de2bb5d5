"""Why a deployment is where it is, and why it is not elsewhere: one verdict for each node of the pool.

Decides which of several reasons is said: what a node does comes before what keeps it from doing it, and of those the first that would still
stand if the others were gone. It must not change the plan that it explains.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from potluck_coordinator.domain.catalogue import not_pinned
from potluck_coordinator.domain.fit.architecture import GIB
from potluck_coordinator.domain.grouping.words import GroupPhase
from potluck_coordinator.domain.planning.node_kinds import FIT_KIND
from potluck_coordinator.domain.planning.placing import site_on
from potluck_coordinator.domain.planning.sizing import Misfit, architecture_of
from potluck_coordinator.domain.planning.sticking import is_worth_moving
from potluck_coordinator.domain.planning.words import GAIN_MIN, Phase
from potluck_protocol.rest import RestCause
from potluck_protocol.values import EngineState, NodeState

if TYPE_CHECKING:
    from collections.abc import Mapping

    from potluck_coordinator.domain.catalogue import Deployment
    from potluck_coordinator.domain.grouping.explain import GroupPart
    from potluck_coordinator.domain.planning.placing import Site
    from potluck_coordinator.domain.planning.state import Draft
    from potluck_coordinator.domain.planning.words import PlannedReplica, Sizing
    from potluck_protocol.values import EngineStatus, ModelId, NodeId


REST_WORDS: Final = {
    RestCause.FIRST_RUN: "its owner has not resumed it since it joined",
    RestCause.OWNER: "its owner paused it",
    RestCause.HOURS: "it is outside its owner's hours",
    RestCause.IN_USE: "its owner uses the machine",
    RestCause.OTHER_PROGRAM: "another program has a card of it",
    RestCause.HEAT: "its cards stayed too hot",
}


class Verdict(StrEnum):
    """What a node has to do with a deployment. Those that serve it come first in a list."""

    SERVES = "serves"
    STARTING = "starting"
    WAITING = "waiting"
    LEAVING = "leaving"
    FAILING = "failing"
    REFUSED = "refused"
    OUTSCORED = "outscored"
    FULL = "full"
    NO_DISK = "no_disk"
    NO_FIT = "no_fit"
    NO_ENGINE = "no_engine"
    PAUSED = "paused"
    OFFLINE = "offline"


_UNPREDICTED: Final = "nothing is predicted of its speed"
_PLACE: Final = {verdict: place for place, verdict in enumerate(Verdict)}
_VERDICT_OF_GROUP: Final = {
    GroupPhase.FORMING: Verdict.STARTING,
    GroupPhase.READY: Verdict.SERVES,
    GroupPhase.BROKEN: Verdict.FAILING,
}


@dataclass(frozen=True, slots=True)
class NodeVerdict:
    """One node's part in a deployment, with its reason in one line."""

    node_id: NodeId
    verdict: Verdict
    reason: str


@dataclass(frozen=True, slots=True)
class Standing:
    """How far a wish is met."""

    ready_count: int
    starting_count: int
    shortfall: str


def explain(draft: Draft, model_id: ModelId, group_parts: Mapping[NodeId, GroupPart]) -> tuple[NodeVerdict, ...]:
    """Every node's verdict on a model. `group_parts` say what nodes do in its groups, or what keeps them out."""
    deployment = draft.deployments.get(model_id)
    if deployment is None:
        return _of_none(draft, model_id)
    slowest = min((draft.score(replica) for replica in draft.counting(model_id)), default=None)
    verdicts = [_verdict(draft, deployment, node_id, group_parts.get(node_id), slowest) for node_id in sorted(draft.view.nodes)]
    return tuple(sorted(verdicts, key=lambda verdict: (_PLACE[verdict.verdict], verdict.node_id)))


def standing(draft: Draft, deployment: Deployment) -> Standing:
    """The wish's replicas that answer, those on their way, and what keeps further ones away."""
    replicas = draft.counting(deployment.model_id)
    groups = [draft.view.groups[replica_id] for replica_id in draft.standing_groups(deployment.model_id)]
    ready_group_count = sum(1 for group in groups if group.phase is GroupPhase.READY and not draft.is_absent(group.stages[0].node_id))
    ready_count = sum(1 for replica in replicas if draft.is_ready(replica)) + ready_group_count
    have_count = draft.have_count(deployment.model_id)
    if have_count >= draft.wanted_count(deployment) and have_count:
        return Standing(ready_count, have_count - ready_count, "")
    counts = Counter(verdict.verdict for verdict in explain(draft, deployment.model_id, {}))
    if not draft.view.nodes:
        return Standing(ready_count, have_count - ready_count, "the pool has no node")
    words = [f"{count} {verdict}" for verdict, count in counts.items() if verdict is not Verdict.SERVES]
    words += [f"{count} {reason}" for reason, count in _no_seconds(draft, deployment.model_id).items()]
    return Standing(ready_count, have_count - ready_count, f"nodes: {', '.join(words)}")


def _of_none(draft: Draft, model_id: ModelId) -> tuple[NodeVerdict, ...]:
    """Of a wish that was withdrawn a moment ago, or of a model that cannot be served any more."""
    verdict, reason = Verdict.OUTSCORED, "no replica is wished"
    if any(deployment.model_id == model_id for deployment in draft.view.deployments):
        entry = draft.view.catalogue.get(model_id)
        verdict, reason = Verdict.NO_FIT, "the catalogue has no such model" if entry is None else not_pinned(entry)
    return tuple(NodeVerdict(node_id, verdict, reason) for node_id in sorted(draft.view.nodes))


def _no_seconds(draft: Draft, model_id: ModelId) -> Counter[str]:
    """Of the nodes that serve a model: why none of them takes another replica."""
    serving = {replica.node_id: replica for replica in draft.of_model(model_id) if draft.is_ready(replica)}
    return Counter(
        "serves and has no card free for another" if replica.sizing.shape.card_uuids else "serves, and a machine without cards runs it once"
        for replica in serving.values()
        if not draft.is_absent(replica.node_id)
    )


def _verdict(draft: Draft, deployment: Deployment, node_id: NodeId, part: GroupPart | None, slowest: float | None) -> NodeVerdict:
    model_id = deployment.model_id
    here = [replica for replica in draft.on_node(node_id) if replica.model_id == model_id]
    if here:
        return min((_of_replica(draft, replica) for replica in here), key=lambda verdict: _PLACE[verdict.verdict])
    if part is not None and part.phase is not None:
        alone = draft.obstacle(model_id, node_id)
        return NodeVerdict(node_id, _VERDICT_OF_GROUP[part.phase], f"{part.reason}; alone: {alone}" if alone else part.reason)
    if draft.is_absent(node_id):
        return _of_absent(draft, node_id)
    if trouble := draft.node_troubles.get((node_id, model_id)):
        return NodeVerdict(node_id, Verdict.REFUSED if trouble.refused else Verdict.FAILING, trouble.reason)
    sized = draft.sized(model_id, node_id, draft.whole_room(node_id))
    if isinstance(sized, Misfit):
        beside = f"; in a group: {part.reason}" if part is not None else ""
        return NodeVerdict(node_id, Verdict.NO_ENGINE if sized.no_engine else Verdict.NO_FIT, sized.reason + beside)
    site = site_on(draft, model_id, node_id, draft.room(node_id, soon=True))
    if site is None:
        return NodeVerdict(node_id, Verdict.FULL, _taken_by(draft, node_id))
    return _of_free(draft, deployment, site, slowest)


def _of_replica(draft: Draft, replica: PlannedReplica) -> NodeVerdict:
    status, trouble = draft.status(replica), draft.trouble(replica)
    if replica.phase is Phase.WAITING:
        return NodeVerdict(replica.node_id, Verdict.WAITING, f"room is being made: {_taken_by(draft, replica.node_id, leaving=True)}")
    if replica.phase is not Phase.WISHED:
        words = "it finishes its answers" if draft.is_answering(replica) else "its engine stops"
        return NodeVerdict(replica.node_id, Verdict.LEAVING, words)
    if draft.is_absent(replica.node_id):
        away = _of_absent(draft, replica.node_id)
        return NodeVerdict(replica.node_id, away.verdict, f"{away.reason}; it keeps its replica")
    if draft.is_ready(replica):
        sizing = replica.sizing
        where = f"{len(sizing.shape.card_uuids)} cards" if sizing.shape.card_uuids else "the machine's processors"
        text = f"{sizing.engine_kind} on {where}, {_serving(sizing, status)}"
        rate = _rate(draft, replica.model_id, sizing, draft.score(replica))
        return NodeVerdict(replica.node_id, Verdict.SERVES, f"{text}, {rate} predicted" if rate else f"{text}; {_UNPREDICTED}")
    if trouble is not None:
        return NodeVerdict(replica.node_id, Verdict.REFUSED if trouble.refused else Verdict.FAILING, trouble.reason)
    return NodeVerdict(replica.node_id, Verdict.STARTING, _progress(status))


def _serving(sizing: Sizing, status: EngineStatus | None) -> str:
    """What its engine was really started with; it is less than planned where memory ran out."""
    planned = sizing.slot_count, sizing.context_length_tokens
    real = (status.slot_count, status.context_length_tokens) if status is not None else planned
    slots, tokens = (told or known for told, known in zip(real, planned, strict=True))
    words = f"{slots} slots of {tokens} tokens"
    return words if (slots, tokens) == planned else f"{words} (planned: {planned[0]} of {planned[1]})"


def _progress(status: EngineStatus | None) -> str:
    if status is None:
        return "the node has not answered to the wish yet"
    if status.state is EngineState.FETCHING:
        share = 100 * status.fetched_bytes // status.fetch_total_bytes if status.fetch_total_bytes else 0
        return f"it fetches its files, {share} % of {status.fetch_total_bytes / 1e9:.1f} GB"
    if status.state is EngineState.BACKING_OFF:
        return f"its engine failed and is tried again: {status.failure.partition(chr(10))[0]}"
    return "its engine starts" if status.state is EngineState.STARTING else f"its engine is {status.state}"


def _of_absent(draft: Draft, node_id: NodeId) -> NodeVerdict:
    node = draft.view.nodes[node_id]
    seconds = max(0.0, draft.view.now_seconds - draft.view.absent_since[node_id])
    if not node.connected:
        return NodeVerdict(node_id, Verdict.OFFLINE, f"not connected for {seconds:.0f} s")
    if node.state is NodeState.PAUSED:
        causes = ", ".join(REST_WORDS[cause] for cause in node.rest_causes) or "it does not say why"
        return NodeVerdict(node_id, Verdict.PAUSED, f"at rest for {seconds:.0f} s: {causes}")
    return NodeVerdict(node_id, Verdict.OFFLINE, "it ends its work, to rest or to stop")


def _of_free(draft: Draft, deployment: Deployment, site: Site, slowest: float | None) -> NodeVerdict:
    """A node with room, and why the replicas are elsewhere, the slowest of which has that score."""
    score = site.sizing.score
    if site.lacks_disk:
        file = draft.entry(deployment.model_id).file
        total_bytes = file.total_bytes if file is not None else 0
        free_bytes = draft.view.nodes[site.node_id].disk_free_bytes
        text = f"its files take {total_bytes / 1e9:.1f} GB of disk, and {free_bytes / 1e9:.1f} GB are free"
        return NodeVerdict(site.node_id, Verdict.NO_DISK, text)
    rate = _rate(draft, deployment.model_id, site.sizing, score)
    if slowest is None:
        return NodeVerdict(site.node_id, Verdict.OUTSCORED, f"{rate or 'room'} here; no replica is wished")
    if not rate:
        return NodeVerdict(site.node_id, Verdict.OUTSCORED, f"it has room; {_UNPREDICTED}")
    text = f"{rate} here, {slowest:.0f} tokens/s where it runs"
    if score > slowest and not is_worth_moving(slowest, score):
        text += f"; a replica moves for {100 * (GAIN_MIN - 1):.0f} % more"
    return NodeVerdict(site.node_id, Verdict.OUTSCORED, text)


def _taken_by(draft: Draft, node_id: NodeId, *, leaving: bool = False) -> str:
    """Who has the node's cards and memory."""
    phases = {Phase.LEAVING, Phase.STOPPING} if leaving else set(Phase)
    models = sorted({replica.model_id for replica in draft.on_node(node_id) if replica.phase in phases})
    is_grouped = draft.stops_a_stage(node_id) or (draft.has_groups(node_id) and not leaving)
    names = [*models, *(["a shard group"] if is_grouped else [])]
    room, whole = draft.room(node_id, soon=True), draft.whole_room(node_id)
    if whole.card_uuids:
        left = f"{len(room.card_uuids)} of {len(whole.card_uuids)} cards"
    else:
        left = f"{max(0, room.memory_bytes) / GIB:.1f} of {whole.memory_bytes / GIB:.1f} GiB"
    holder = ", ".join(names) or "nobody"
    return f"{holder} leaves" if leaving else f"{holder} has the room; {left} are free"


def _rate(draft: Draft, model_id: ModelId, sizing: Sizing, score: float) -> str:
    """Empty where the fit predicts nothing: for want of the model's architecture, or of figures for the engine."""
    is_predicted = sizing.engine_kind in FIT_KIND and architecture_of(draft.entry(model_id)) is not None
    return f"{score:.0f} tokens/s" if is_predicted else ""
