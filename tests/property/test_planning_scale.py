"""Nodes that are alike are asked once: the same places come out as if every node were asked, and the same plans as without memory."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from potluck_coordinator.directory.planner import Planner, PoolFacts
from potluck_coordinator.domain.catalogue import ServiceTier
from potluck_coordinator.domain.fit.corrections import NOTHING_LEARNED
from potluck_coordinator.domain.planning import displacing, placing
from potluck_coordinator.domain.planning import plan as plan_module
from potluck_coordinator.domain.planning.displacing import Displacing
from potluck_coordinator.domain.planning.placing import best_site, site_on, sites
from potluck_coordinator.domain.planning.plan import drafted, plan
from potluck_coordinator.domain.planning.settling import retire
from potluck_coordinator.domain.planning.sizing import Sizer
from potluck_coordinator.domain.planning.state import Draft
from potluck_coordinator.domain.planning.words import IDLE_SECONDS, PlanningView, Trouble, replica_id_of
from potluck_protocol.values import ModelId
from tests.benchmarks.planning import is_same_without_memory, pool, wishes
from tests.support.planning import card_entry, status, wish
from tests.support.planning import node as card_node
from tests.support.planning import view as view_of

DEPLOYMENTS = 10


def asked_one_by_one(draft, deployment):
    """The place to take, found by asking every node."""
    model_id = deployment.model_id
    found = [
        site
        for node_id in draft.serving_nodes()
        if not draft.obstacle(model_id, node_id)
        if (site := site_on(draft, model_id, node_id, draft.room(node_id, soon=True))) is not None
    ]
    best_score = max((site.sizing.score for site in found), default=0.0)
    return min(found, key=lambda site: site.rank(model_id, best_score), default=None)


@pytest.mark.parametrize("seed", range(6))
def test_the_best_place_is_the_one_that_asking_every_node_finds(seed):
    entries, deployments = wishes(40, DEPLOYMENTS)
    nodes = pool(40, seed)
    # Some have little disk, some are away, and some will not run a model.
    nodes |= {node_id: replace(nodes[node_id], disk_free_bytes=1 << 30) for node_id in sorted(nodes)[::3]}
    view = PlanningView(
        now_seconds=1000.0,
        deployments=deployments,
        catalogue=entries,
        nodes=nodes,
        sizer=Sizer(),
        standing={},
        absent_since=dict.fromkeys(sorted(nodes)[::7], 990.0),
        troubles={
            (node_id, ModelId("8b-0"), replica_id_of(node_id, ModelId("8b-0"))): Trouble("no", refused=True)
            for node_id in sorted(nodes)[::5]
        },
    )
    draft = drafted(view)
    compared = 0
    for replica in sorted(draft.replicas.values(), key=lambda replica: replica.replica_id)[::4]:
        retire(draft, replica)
        for deployment in deployments:
            if deployment.replica_count is not None:
                expected = asked_one_by_one(draft, deployment)
                assert best_site(deployment.model_id, sites(draft, deployment)) == expected
                compared += expected is not None
    assert compared > 20


@pytest.mark.parametrize("seed", [1, 2])
def test_plans_are_the_same_without_memory_of_fits(seed):
    assert is_same_without_memory(12, DEPLOYMENTS, seed)


class ForgetfulDisplacing(Displacing):
    """Looks at every node each time."""

    def displace(self, deployment):
        self._looked.clear()
        return super().displace(deployment)


def plans_under_demand(seed):
    """Some plans of one pool whose wishes and demand change, and whose nodes do what they are told."""
    draw = random.Random(seed)
    entries, deployments = wishes(20, 8)
    nodes = {node_id: replace(view, disk_free_bytes=draw.choice((1 << 30, 500 << 30))) for node_id, view in pool(20, seed).items()}
    planner, now, made, wished = Planner({}, {}, 0, NOTHING_LEARNED, 1000.0), 1000.0, [], {}
    for _ in range(8):
        now += draw.choice((1.0, 30.0, 400.0, 700.0))
        one = draw.choice(deployments)
        wished[one.model_id] = replace(one, replica_count=one.replica_count and draw.randint(1, 20), tier=draw.choice(list(ServiceTier)))
        waiting = {model_id: 3 for model_id in sorted(wished) if draw.random() < 0.2}
        busy = {replica_id: 1 for replica_id in sorted(planner.replicas) if draw.random() < 0.1}
        told = planner.advance(PoolFacts(tuple(wished.values()), entries, nodes, attempt_counts=busy, waiting_counts=waiting), now)
        made.append((told, dict(planner.replicas)))
        said = {node_id: tuple(status(one.replica_id, one.model.model_id) for one in told.engines[node_id]) for node_id in nodes}
        nodes = {node_id: replace(view, engines=said[node_id]) for node_id, view in nodes.items()}
    return made


@pytest.mark.parametrize("seed", range(5))
def test_plans_are_the_same_without_memory_of_what_nodes_could_give(seed, monkeypatch):
    made = plans_under_demand(seed)
    monkeypatch.setattr(plan_module, "Displacing", ForgetfulDisplacing)
    assert plans_under_demand(seed) == made


def looks(monkeypatch, module):
    """Each time that the module sees what would have place on a node."""
    seen = []
    monkeypatch.setattr(module, "site_on", lambda *asked: seen.append(asked) or site_on(*asked))
    return seen


def test_many_replicas_are_placed_and_make_room_with_a_few_looks_at_each_node(monkeypatch):
    nodes = [card_node(f"n{number:03}", cards=1) for number in range(120)]
    entries = [card_entry("8b"), card_entry("8b", model_id="other")]
    placing_looks, displacing_looks = looks(monkeypatch, placing), looks(monkeypatch, displacing)
    asked = []
    sized_on_kind = Draft.sized_on_kind
    monkeypatch.setattr(Draft, "sized_on_kind", lambda self, *one: asked.append(one) or sized_on_kind(self, *one))
    half = plan(view_of(nodes, entries, [wish("8b", 60)]))
    assert len(half.replicas) == 60
    assert (placing_looks, len(asked) < 5 * len(nodes)) == ([], True)
    everywhere = plan(view_of(nodes, entries, [wish("8b", None)]))
    asked.clear()
    pressed = view_of(nodes, entries, [wish("8b", None), wish("other", 60)], 1000.0 + IDLE_SECONDS, standing=everywhere.replicas)
    taken = [replica for replica in plan(pressed).replicas.values() if replica.model_id == "other"]
    assert len(taken) == 40
    assert 0 < len(displacing_looks) < 3 * len(nodes)
