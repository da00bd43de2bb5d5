"""What runs where."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from potluck_coordinator.domain.catalogue import Deployment
from potluck_coordinator.domain.planning import plan
from potluck_protocol.values import ModelId, NodeId
from tests.support.replicas import catalogue_entry

CATALOGUE = {ModelId(name): catalogue_entry(name) for name in ("one", "two")}
nodes = st.sets(st.text("abcdefghijklmnop", min_size=1, max_size=3).map(NodeId), max_size=20)


def holders(desired, model_id):
    return {node_id for node_id, engines in desired.items() for engine in engines if engine.model.model_id == model_id}


def test_a_deployment_without_a_number_runs_everywhere_and_an_unknown_model_nowhere():
    desired = plan([Deployment(ModelId("one")), Deployment(ModelId("gone"))], CATALOGUE, [NodeId("a"), NodeId("b")])
    assert holders(desired, "one") == {"a", "b"}
    assert [engine.replica_id for engine in desired[NodeId("a")]] == ["a/one"]


@given(nodes, st.integers(0, 25))
def test_a_deployment_gets_its_number_or_every_node(node_ids, count):
    desired = plan([Deployment(ModelId("one"), count)], CATALOGUE, node_ids)
    assert desired.keys() == node_ids
    assert len(holders(desired, "one")) == min(count, len(node_ids))


@given(nodes, st.integers(1, 10), st.text("qrstuv", min_size=1, max_size=3).map(NodeId))
def test_a_node_that_comes_moves_at_most_one_replica_of_a_model(node_ids, count, newcomer):
    before = holders(plan([Deployment(ModelId("one"), count)], CATALOGUE, node_ids), "one")
    after = holders(plan([Deployment(ModelId("one"), count)], CATALOGUE, node_ids | {newcomer}), "one")
    assert len(before - after) <= 1
    assert after - before <= {newcomer}
