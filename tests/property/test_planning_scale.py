"""Nodes that are alike are asked once: the same places come out as if every node were asked, and the same plans as without memory."""

from __future__ import annotations

from dataclasses import replace

import pytest

from potluck_coordinator.domain.planning.placing import best_site, site_on, sites
from potluck_coordinator.domain.planning.plan import drafted
from potluck_coordinator.domain.planning.settling import retire
from potluck_coordinator.domain.planning.sizing import Sizer
from potluck_coordinator.domain.planning.words import PlanningView, Trouble
from potluck_protocol.values import ModelId
from tests.benchmarks.planning import is_same_without_memory, pool, wishes

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
        troubles={(node_id, ModelId("8b-0")): Trouble("no", refused=True) for node_id in sorted(nodes)[::5]},
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
