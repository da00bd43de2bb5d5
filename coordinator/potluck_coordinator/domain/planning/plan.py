"""What runs where: from wishes, catalogue, nodes and demand to each node's engines.

Decides in four steps, again and again until nothing changes: `settling` sees to what stands, `placing` gives each wish its replicas, first
to the one that is met least, `displacing` takes room from idle replicas for wishes that found none, and `sticking` drops what is too much
and moves what is much better off elsewhere, as `giving_way` does with groups. So the same facts lead to the same plan, and a plan that was
made leads to itself. It must not know how a plan is carried out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from potluck_coordinator.domain.planning.displacing import Displacing
from potluck_coordinator.domain.planning.giving_way import bring_one_node
from potluck_coordinator.domain.planning.group_needs import group_needs, node_rooms, refusals
from potluck_coordinator.domain.planning.group_room import make_room_for_group
from potluck_coordinator.domain.planning.idle_groups import give_up_idle_group
from potluck_coordinator.domain.planning.placing import place
from potluck_coordinator.domain.planning.settling import admit_waiting, settle
from potluck_coordinator.domain.planning.state import Draft
from potluck_coordinator.domain.planning.sticking import move, trim
from potluck_coordinator.domain.planning.words import Phase, Plan
from potluck_protocol.values import DesiredEngine

if TYPE_CHECKING:
    from collections.abc import Mapping

    from potluck_coordinator.domain.planning.words import PlannedReplica, PlanningView
    from potluck_protocol.values import ModelId, NodeId, ReplicaId

ROUNDS_MAX: Final = 20
"""Each round acts on what the one before freed; two or three suffice."""
FILL_STEPS_MIN: Final = 1_000
FILL_STEPS_PER_REPLICA: Final = 4
"""Each step places a replica, takes room from idle ones for a wish that is met less, or gives a wish up. No more are made in a round than
so many for each replica that is wished."""

_WISHED: Final = frozenset({Phase.WISHED, Phase.LEAVING})


def plan(view: PlanningView) -> Plan:
    """The next plan; made of itself and the same facts it is the same."""
    draft = drafted(view)
    needs = group_needs(draft)
    replicas = {replica_id: _wished(draft, replica) for replica_id, replica in draft.replicas.items()}
    return Plan(
        replicas=replicas,
        desired=_desired(view, replicas),
        leaving=frozenset(replica.replica_id for replica in replicas.values() if replica.phase is Phase.LEAVING),
        needs=needs,
        rooms=node_rooms(draft) if needs else {},
        promised=draft.promised,
        hoped_rooms=draft.hoped_rooms,
        refusals=refusals(draft) if needs else {},
    )


def drafted(view: PlanningView) -> Draft:
    """The replicas of the next plan, with all that they were judged by."""
    draft = Draft(view)
    settle(draft)
    for _ in range(ROUNDS_MAX):
        before = dict(draft.replicas)
        _fill(draft)
        for deployment in draft.deployments.values():
            trim(draft, deployment)
        for deployment in draft.deployments.values():
            move(draft, deployment)
            bring_one_node(draft, deployment)
        admit_waiting(draft)
        if draft.replicas == before:
            break
    return draft


def _fill(draft: Draft) -> None:
    """Gives replicas to wishes, one at a time, to the one that is met least; who finds no room may take that of idle ones."""
    stuck: set[ModelId] = set()
    displacing = Displacing(draft)
    wanted_count = sum(draft.wanted_count(deployment) for deployment in draft.deployments.values())
    for _ in range(FILL_STEPS_MIN + FILL_STEPS_PER_REPLICA * wanted_count):
        short = [one for one in draft.deployments.values() if one.model_id not in stuck and draft.is_short(one)]
        if not short:
            return
        deployment = min(short, key=draft.urgency)
        if place(draft, deployment):
            continue
        displaced = displacing.displace(deployment) or make_room_for_group(draft, deployment)
        if displaced is None:
            give_up_idle_group(draft, deployment)
            stuck.add(deployment.model_id)
        else:
            stuck -= displaced


def _wished(draft: Draft, replica: PlannedReplica) -> PlannedReplica:
    """The replica with the file that it is to serve. One on its way out keeps its own: another would end the answers it is to finish."""
    keeps = replica.phase is Phase.LEAVING and replica.file is not None
    if keeps or replica.phase not in _WISHED or replica.file == (file := draft.entry(replica.model_id).file):
        return replica
    return replace(replica, file=file)


def _desired(view: PlanningView, replicas: Mapping[ReplicaId, PlannedReplica]) -> dict[NodeId, tuple[DesiredEngine, ...]]:
    desired: dict[NodeId, list[DesiredEngine]] = {node_id: [] for node_id in view.nodes}
    for _, replica in sorted(replicas.items()):
        if replica.phase in _WISHED:
            desired[replica.node_id].append(_engine(replica))
    return {node_id: tuple(engines) for node_id, engines in desired.items()}


def _engine(replica: PlannedReplica) -> DesiredEngine:
    assert replica.file is not None, "an entry without files is never planned"
    return DesiredEngine(
        replica_id=replica.replica_id,
        model=replica.file,
        engine_kind=replica.sizing.engine_kind,
        slot_count=replica.sizing.slot_count,
        context_length_tokens=replica.sizing.context_length_tokens,
        shape=replica.sizing.shape,
    )
