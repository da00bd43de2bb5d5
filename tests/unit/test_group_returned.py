"""A machine that came back as another node while the stage of the node that it was may still run, and who only has the same address."""

from __future__ import annotations

from dataclasses import replace

import pytest

from potluck_coordinator.domain.grouping.life import ADOPTED_SECONDS_MAX, RELEASE_SECONDS, adopted
from potluck_coordinator.domain.grouping.words import GroupPhase
from potluck_coordinator.domain.planning.words import IDLE_SECONDS
from potluck_protocol.values import AccountId, EngineState, GroupOffer, ModelId, NodeId, NodeState
from tests.support.group_planner import GroupPlanner
from tests.support.grouping import GROUP, measured, node
from tests.support.planning import wish
from tests.unit.test_planning_groups import FLEX, Pool, box

N1, N2, N3 = NodeId("n1"), NodeId("n2"), NodeId("n3")
WORDS = "it has the address of node n2, whose stage may still run there"


def of_another_place(pool, owner="bob", site="bobs-home"):
    """Two more nodes, at the same private addresses as the first two."""
    for name, address in (("c", "10.0.0.1"), ("d", "10.0.0.2")):
        one = box(9, name)
        inventory = replace(one.inventory, group_offer=GroupOffer(site, address, 29_600))
        pool.boxes[NodeId(name)] = replace(one, owner_account_id=AccountId(owner), inventory=inventory)
    return pool


@pytest.mark.parametrize(("owner", "site"), [("bob", "bobs-home"), ("bob", "attic"), ("ann", "cellar")])
def test_another_place_with_the_same_addresses_forms_a_group_of_its_own(owner, site):
    pool = Pool(wish("70b", 1))
    pool.step().obey().step()
    of_another_place(pool, owner, site)
    pool.deployments = (wish("70b", 2),)
    assert pool.step().wished() == {name: ["70b"] for name in "abcd"}
    assert pool.obey().step().standing("70b").ready_count == 2


def test_nor_does_a_group_that_broke_elsewhere_keep_it_waiting():
    pool = Pool(wish("70b", 1)).step().obey().step()
    of_another_place(pool, site="attic")
    pool.change("b", connected=False, engines=())
    pool.change("a", engines=())
    pool.deployments = (wish("70b", 2),)
    assert pool.step().wished() == {"a": [], "b": [], "c": ["70b"], "d": ["70b"]}


def lost(address="fd00::2", again="fd00:0:0:0:0:0:0:2", **changes):
    """A group of two whose second node is away, while a third one has its address; and a fourth need for what is left."""
    offers = {"offer": {"address": "fd00::1"}}, {"offer": {"address": address}}, {"offer": {"address": again}, **changes}
    first, second, third = (node(number, **offer) for number, offer in enumerate(offers, 1))
    planner = GroupPlanner(first, second)
    planner.formed()
    planner.views = {**measured(first, second, third), N1: replace(measured(first, second, third)[N1], engines=planner.views[N1].engines)}
    planner.change(N2, connected=False)
    planner.now += 1
    return planner


def test_a_machine_that_came_back_as_another_node_waits_until_its_stage_has_ended():
    planner = lost()
    plan = planner.step()
    assert planner.group.phase is GroupPhase.BROKEN
    # It still stops its stage, and nobody else has its address.
    assert "address" not in plan.formations[GROUP].rejections.get(N1, "")
    planner.change(N1, engines=())
    # Another need is kept waiting too, and is told why.
    planner.needs.insert(0, replace(planner.needs[0], replica_id="group/big/1"))
    plan = planner.step(RELEASE_SECONDS - 2)
    assert plan.formations["group/big/1"].rejections[N3] == WORDS
    assert plan.desired == {}
    plan = planner.step(2)
    assert plan.desired.keys() == {N1, N3}


@pytest.mark.parametrize(
    "changes", [{"owner": "bob", "trusts": ("ann",)}, {"offer": {"site": "cellar", "address": "fd00::2"}}, {"again": "fd00::3"}]
)
def test_one_of_another_owner_place_or_address_is_not_taken_for_it(changes):
    planner = lost(**changes)
    planner.step()
    planner.change(N1, engines=())
    planner.needs.insert(0, replace(planner.needs[0], replica_id="group/big/1"))
    assert planner.step().formations["group/big/1"].rejections.get(N3) != WORDS


def test_where_the_member_stands_its_machine_is_no_other_node():
    planner = lost()
    planner.change(N2, connected=True)
    planner.report()
    planner.needs.append(replace(planner.needs[0], replica_id="group/big/1"))
    plan = planner.step()
    assert planner.group.phase is GroupPhase.READY
    assert WORDS not in plan.formations["group/big/1"].rejections.values()


def test_a_member_that_a_new_directory_has_not_seen_yet_may_be_back_as_another_node():
    planner = lost()
    planner.groups = {GROUP: adopted(planner.group, planner.now)}
    planner.needs.append(replace(planner.needs[0], replica_id="group/big/1"))
    plan = planner.step(ADOPTED_SECONDS_MAX - 5)
    assert planner.group.phase is GroupPhase.READY
    assert plan.formations["group/big/1"].rejections[N3] == WORDS


def one_machine_twice(*deployments):
    """A pool whose nodes b and c are one machine, and whose group of a and b broke; b is paused, and its stage does not end."""
    pool = Pool(*deployments, names=("c",))
    pool.step().obey().step()
    inventory = pool.boxes[NodeId("c")].inventory
    pool.change("c", inventory=replace(inventory, group_offer=GroupOffer("attic", "10.0.0.2", 29_600)))
    pool.boxes |= {NodeId(name): box(number, name) for number, name in ((2, "b"), (3, "a"))}
    pool.deployments = (*deployments, wish("70b", 1))
    if not deployments:
        pool.change("c", state=NodeState.PAUSED)
    pool.step().obey().step(IDLE_SECONDS)
    assert (pool.wished()["a"], pool.wished()["b"]) == (["70b"], ["70b"])
    (engine,) = pool.boxes[NodeId("b")].engines
    pool.change("c", state=NodeState.SERVING)
    pool.change("a", engines=())
    pool.change("b", engines=(replace(engine, state=EngineState.STOPPING),), state=NodeState.PAUSED)
    return pool


def test_nobody_leaves_for_a_group_of_nodes_that_are_in_doubt():
    pool = one_machine_twice(wish("8b", 1, FLEX))
    for _ in range(3):
        pool.step(30)
        assert pool.wished() == {"a": [], "b": [], "c": ["8b"]}
    reasons = {verdict.node_id: verdict.reason for verdict in pool.planner.explain(pool.facts, ModelId("70b"), pool.now)}
    assert "it has the address of node b, whose stage may still run there" in reasons["c"]
    pool.change("b", engines=())
    pool.step().obey().step()
    assert pool.wished() == {"a": ["70b"], "b": [], "c": ["70b"]}


def test_nor_is_their_room_kept_for_one():
    pool = one_machine_twice().step()
    pool.deployments = (wish("70b", 1), wish("8b", 2, FLEX))
    assert pool.step().wished() == {"a": ["8b"], "b": [], "c": ["8b"]}
