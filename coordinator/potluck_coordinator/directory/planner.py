"""The plan over time: what the last one was, what nodes have done since, and what follows for everyone.

Decides what is remembered between two plans: the replicas that stand, the groups, which nodes are away and since when, when replicas last
answered, and which nodes will not run which replicas. `domain.planning` makes the plan, `domain.grouping` the groups. It must not know how
facts are heard, kept or told.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Final

from potluck_coordinator.directory.groups import PeerSecrets
from potluck_coordinator.domain.catalogue import CatalogueEntry, Deployment, ServiceTier
from potluck_coordinator.domain.fit.corrections import Corrections, Observation, learn
from potluck_coordinator.domain.grouping.explain import group_parts
from potluck_coordinator.domain.grouping.life import adopted
from potluck_coordinator.domain.grouping.plan import plan_groups
from potluck_coordinator.domain.grouping.words import Formation, GroupPhase, GroupPlan, ShardGroup
from potluck_coordinator.domain.node_view import NodeView
from potluck_coordinator.domain.payees import PayeeShare
from potluck_coordinator.domain.planning.doubt import apparent_absences
from potluck_coordinator.domain.planning.explain import NodeVerdict, Standing, explain, standing
from potluck_coordinator.domain.planning.learning import observations
from potluck_coordinator.domain.planning.node_kinds import engine_versions, in_steps
from potluck_coordinator.domain.planning.plan import drafted, plan
from potluck_coordinator.domain.planning.sizing import Sizer
from potluck_coordinator.domain.planning.state import group_prefix
from potluck_coordinator.domain.planning.troubles import KnownTroubles, remember, troubles
from potluck_coordinator.domain.planning.words import Plan, PlannedReplica, PlanningView
from potluck_protocol.values import DesiredEngine, EngineStatus, ModelId, NodeId, NodeState, Peer, ReplicaId

ROUNDS_MAX: Final = 3
"""A group that forms or breaks changes what is left for others, and the other way round."""


@dataclass(frozen=True, slots=True)
class PoolFacts:
    """Everything a plan is made from that is not remembered here."""

    deployments: tuple[Deployment, ...]
    catalogue: Mapping[ModelId, CatalogueEntry]
    nodes: Mapping[NodeId, NodeView]
    """The active ones."""
    said_goodbye: frozenset[NodeId] = frozenset()
    """Of those that are not connected: whom their owners stopped. The others fell silent."""
    attempt_counts: Mapping[ReplicaId, int] = field(default_factory=dict)
    used_at: Mapping[ReplicaId, float] = field(default_factory=dict)
    """When gateways last said that replicas answered, be it for less than the time between two plans."""
    waiting_counts: Mapping[ModelId, int] = field(default_factory=dict)

    @property
    def flex_models(self) -> frozenset[ModelId]:
        """Those that are deployed in the flex tier."""
        return frozenset(deployment.model_id for deployment in self.deployments if deployment.tier is ServiceTier.FLEX)


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a plan asks of nodes, and what gateways must know of it."""

    engines: Mapping[NodeId, tuple[DesiredEngine, ...]]
    """Of every active node."""
    peers: Mapping[NodeId, tuple[Peer, ...]]
    replica_payees: Mapping[ReplicaId, tuple[PayeeShare, ...]]
    broken_groups: Mapping[ReplicaId, str]
    leaving: frozenset[ReplicaId]
    """Replicas that get no new requests."""


class Planner:
    """One pool's plan.

    Args:
        standing: the replicas of an earlier run.
        groups: its groups.
        generation: the highest number that one of its groups had.
        corrections: what its nodes showed of the fit's predictions.
        now: monotonic seconds.
    """

    def __init__(
        self,
        standing: Mapping[ReplicaId, PlannedReplica],
        groups: Mapping[ReplicaId, ShardGroup],
        generation: int,
        corrections: Corrections,
        now: float,
    ) -> None:
        # An earlier run's seconds were of another clock.
        self.replicas = {replica_id: replace(replica, since_seconds=now) for replica_id, replica in standing.items()}
        self.groups = {replica_id: adopted(group, now) for replica_id, group in groups.items()}
        self.generation = generation
        self._formations: Mapping[ReplicaId, Formation] = {}
        self._sizer = Sizer(corrections)
        self._heard: dict[ReplicaId, object] = {}
        self._learned: dict[ReplicaId, tuple[Observation, ...]] = {}
        self._peer_secrets = PeerSecrets()
        self._absent_since: dict[NodeId, float] = {}
        self._apparent_absences: dict[NodeId, float] = {}
        """The same, as far as it is believed."""
        self._used_at: dict[ReplicaId, float] = {}
        self._troubles: KnownTroubles = {}

    def advance(self, facts: PoolFacts, now: float) -> Wishes:
        """Plans anew; the same facts at the same time lead to the same wishes."""
        self._remember(facts, now)
        for _ in range(ROUNDS_MAX):
            before = self.groups
            whole = plan(self._view(facts, now))
            self.replicas = dict(whole.replicas)
            grouped = plan_groups(
                whole.needs,
                facts.nodes,
                whole.rooms,
                before,
                next_generation=self._next_generation,
                now=now,
                absent_since=self._apparent_absences,
                promised=whole.promised,
                hoped_rooms=whole.hoped_rooms,
                refusals=whole.refusals,
                attempt_counts=facts.attempt_counts,
            )
            self.groups, self._formations = dict(grouped.groups), grouped.formations
            if self.groups == before:
                break
        return self._wishes(facts, whole, grouped)

    @property
    def corrections(self) -> Corrections:
        """What nodes showed so far."""
        return self._sizer.corrections

    def expect_back(self, now: float) -> None:
        """Every link has ended, or will, for the coordinator's own reasons: members of groups that come back soon were never lost."""
        self.groups = {replica_id: adopted(group, now) for replica_id, group in self.groups.items()}

    def explain(self, facts: PoolFacts, model_id: ModelId, now: float) -> tuple[NodeVerdict, ...]:
        """Every node's part in a deployment."""
        ids = [replica_id for replica_id in self.groups.keys() | self._formations.keys() if replica_id.startswith(group_prefix(model_id))]
        parts = group_parts(ids, self.groups, self._formations, facts.nodes)
        return explain(drafted(self._view(facts, now)), model_id, parts)

    def standings(self, facts: PoolFacts, now: float) -> dict[ModelId, Standing]:
        """How far each wish is met."""
        draft = drafted(self._view(facts, now))
        return {model_id: standing(draft, deployment) for model_id, deployment in draft.deployments.items()}

    def group_words(self, model_id: ModelId) -> str:
        """What became of a model's groups, in words; empty where none was thought of."""
        words = []
        for replica_id, group in self.groups.items():
            if replica_id.startswith(group_prefix(model_id)):
                members = ", ".join(stage.node_id for stage in group.stages)
                why = f": {group.reason}" if group.reason and group.phase is not GroupPhase.READY else ""
                words.append(f"group of {members}, generation {group.generation}, is {group.phase}{why}")
        words += [
            formation.reason
            for replica_id, formation in self._formations.items()
            if replica_id.startswith(group_prefix(model_id)) and formation.reason
        ]
        return "; ".join(dict.fromkeys(words))

    def _remember(self, facts: PoolFacts, now: float) -> None:
        away = [node for node in facts.nodes.values() if not node.connected or node.state is not NodeState.SERVING]
        self._absent_since = {node.node_id: self._absent_since.get(node.node_id, now) for node in away}
        silent_since = {
            node.node_id: self._absent_since[node.node_id] for node in away if not node.connected and node.node_id not in facts.said_goodbye
        }
        present_count = sum(node.connected for node in facts.nodes.values())
        self._apparent_absences = apparent_absences(self._absent_since, silent_since, present_count, now)
        self._used_at |= facts.used_at
        self._used_at |= {replica_id: now for replica_id, count in facts.attempt_counts.items() if count}
        known = self.replicas.keys() | self.groups.keys()
        self._used_at = {replica_id: used_at for replica_id, used_at in self._used_at.items() if replica_id in known}
        self._troubles = remember(self._troubles, facts.nodes.values(), self.replicas.values(), now)
        self._learn(facts)

    def _learn(self, facts: PoolFacts) -> None:
        """Each replica's word counts once, until it says something else."""
        corrections = self._sizer.corrections
        heard: dict[ReplicaId, object] = {}
        said = _statuses(facts, self.replicas)
        for replica_id, status, node in said:
            replica = self.replicas[replica_id]
            heard[replica_id] = words = (replica.sizing, *_figures(status, on_cards=bool(replica.sizing.shape.card_uuids)))
            if self._heard.get(replica_id) == words:
                continue
            shown = observations(facts.catalogue[replica.model_id], node, replica, status) if replica.model_id in facts.catalogue else ()
            if shown and self._learned.get(replica_id) != shown:
                self._learned[replica_id] = shown
                corrections = reduce(learn, shown, corrections)
        self._heard = heard
        self._learned = {replica_id: shown for replica_id, shown in self._learned.items() if replica_id in self.replicas}
        told = engine_versions(status for _, status, _ in said)
        versions = tuple(sorted((dict(self._sizer.versions) | told).items()))
        self._sizer = self._sizer.learning(corrections, versions)

    def _view(self, facts: PoolFacts, now: float) -> PlanningView:
        return PlanningView(
            now_seconds=now,
            deployments=facts.deployments,
            catalogue=facts.catalogue,
            nodes=facts.nodes,
            sizer=self._sizer,
            standing=self.replicas,
            absent_since=self._apparent_absences,
            troubles=troubles(self._troubles, now),
            attempt_counts=facts.attempt_counts,
            used_at=self._used_at,
            waiting_counts=facts.waiting_counts,
            groups=self.groups,
        )

    def _next_generation(self) -> int:
        self.generation += 1
        return self.generation

    def _wishes(self, facts: PoolFacts, whole: Plan, grouped: GroupPlan) -> Wishes:
        engines = {node_id: (*whole.desired.get(node_id, ()), *grouped.desired.get(node_id, ())) for node_id in facts.nodes}
        broken = {replica_id: group.reason for replica_id, group in self.groups.items() if group.phase is GroupPhase.BROKEN}
        return Wishes(
            engines=engines,
            peers=self._peer_secrets.peers(grouped.pairs, facts.nodes),
            replica_payees=grouped.payees,
            broken_groups=broken,
            leaving=whole.leaving | grouped.leaving,
        )


def _statuses(facts: PoolFacts, replicas: Mapping[ReplicaId, PlannedReplica]) -> list[tuple[ReplicaId, EngineStatus, NodeView]]:
    """What nodes say of replicas that are planned on them; of another node's they know nothing."""
    said = [(replicas.get(status.replica_id), status, node) for node in facts.nodes.values() for status in node.engines]
    return [(status.replica_id, status, node) for replica, status, node in said if replica is not None and replica.node_id == node.node_id]


def _figures(status: EngineStatus, *, on_cards: bool) -> tuple[object, ...]:
    """All of an engine's words that something can be learned from; memory, which moves at each look, in steps, and on cards only."""
    memory_bytes = in_steps(status.memory_bytes) if on_cards and status.memory_bytes is not None else None
    rates = (status.prefill_tokens_per_second, status.decode_tokens_per_second)
    return status.state, status.engine_version, status.kv_capacity_tokens, memory_bytes, status.memory_utilization_percent, *rates
