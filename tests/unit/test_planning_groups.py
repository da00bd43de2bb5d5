"""Whole replicas and groups on the same cards: who gives room to whom, when it is free, and what is said of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from potluck_coordinator.directory.planner import Planner, PoolFacts
from potluck_coordinator.domain.catalogue import ServiceTier
from potluck_coordinator.domain.fit.corrections import NOTHING_LEARNED
from potluck_coordinator.domain.grouping.life import RELEASE_SECONDS
from potluck_coordinator.domain.grouping.words import GroupPhase
from potluck_coordinator.domain.planning.words import IDLE_SECONDS, Phase
from potluck_protocol.values import EngineState, GroupOffer, ModelId, NodeId, PeerMeasurement
from tests.support.planning import GIB, card_entry, cards, machine_entry, node, status, wish

BIG = card_entry("70b", slot_count=2)
SMALL = card_entry("8b")
FLEX = ServiceTier.FLEX
NAMES = ("a", "b")


def box(number, name, *, is_measured=True):
    """A machine with a 24 GB card, of one owner and site."""
    made = node(name, cards=1, memory_gib=64)
    peers = {NodeId(other): PeerMeasurement(NodeId(other), 200, 10**9) for other in "abcd" if other != name}
    offer = GroupOffer("attic", f"10.0.0.{number}", 29_600)
    return replace(made, inventory=replace(made.inventory, group_offer=offer), peer_measurements=peers if is_measured else {})


class Pool:
    """A directory's planner, and nodes that say what the test says."""

    def __init__(self, *deployments, names=NAMES, is_measured=True):
        self.deployments = deployments
        self.entries = {entry.model_id: entry for entry in (BIG, SMALL, machine_entry("tiny"))}
        self.boxes = {NodeId(name): box(number, name, is_measured=is_measured) for number, name in enumerate(names, 1)}
        self.planner = Planner({}, {}, 0, NOTHING_LEARNED, 1000.0)
        self.now = 1000.0
        self.waiting_counts = {}
        self.attempt_counts = {}
        self.wishes = None

    @property
    def facts(self):
        return PoolFacts(
            self.deployments, self.entries, dict(self.boxes), attempt_counts=self.attempt_counts, waiting_counts=self.waiting_counts
        )

    def step(self, seconds=1.0):
        self.now += seconds
        self.wishes = self.planner.advance(self.facts, self.now)
        return self

    def obey(self, state=EngineState.READY):
        """Every node that is there says that all its wishes are so far, and nothing else."""
        for name, each in self.boxes.items():
            said = tuple(
                status(
                    engine.replica_id,
                    engine.model.model_id,
                    state,
                    group_id=engine.replica_id if engine.group else "",
                    group_generation=engine.group.generation if engine.group else 0,
                )
                for engine in self.wishes.engines[name]
            )
            self.boxes[name] = replace(each, engines=said if each.connected else ())
        return self

    def change(self, name, **changes):
        self.boxes[NodeId(name)] = replace(self.boxes[NodeId(name)], **changes)

    def wished(self):
        return {name: [engine.model.model_id for engine in engines] for name, engines in self.wishes.engines.items()}

    def standing(self, model_id):
        return self.planner.standings(self.facts, self.now)[ModelId(model_id)]


def idle_pool(deployment, names=NAMES, **changes):
    """Boxes with an idle replica each, and then a wish for what only two of them hold."""
    pool = Pool(wish("8b", len(names), FLEX), names=names, **changes).step().obey().step().obey().step(IDLE_SECONDS)
    assert pool.wished() == {name: ["8b"] for name in pool.boxes}
    pool.obey()
    pool.deployments = (*pool.deployments, deployment)
    return pool


# Room for groups.


@pytest.mark.parametrize("waiting_counts", [{}, {ModelId("70b"): 3}])
def test_a_group_of_the_default_tier_gets_the_room_of_idle_flex_replicas(waiting_counts):
    pool = idle_pool(wish("70b", 1))
    pool.waiting_counts = waiting_counts
    stopping = {name: each.engines for name, each in pool.boxes.items()}
    pool.step()
    # First they stop, and their room is nobody else's meanwhile.
    assert pool.wished() == {"a": [], "b": []}
    for _ in range(3):
        pool.step()
        assert pool.wished() == {"a": [], "b": []}
        assert {replica.phase for replica in pool.planner.replicas.values()} == {Phase.STOPPING}
    assert all(stopping.values())
    pool.obey().step()
    assert pool.wished() == {"a": ["70b"], "b": ["70b"]}
    for _ in range(3):
        pool.obey().step(IDLE_SECONDS)
        assert pool.wished() == {"a": ["70b"], "b": ["70b"]}
    assert pool.standing("70b").ready_count == 1


def test_a_busy_replica_gives_a_group_no_room():
    pool = idle_pool(wish("70b", 1))
    pool.waiting_counts = {ModelId("8b"): 1}
    assert pool.step().wished() == {"a": ["8b"], "b": ["8b"]}


def test_a_group_of_the_flex_tier_takes_nothing_from_the_default_tier():
    pool = idle_pool(wish("70b", 1, FLEX))
    pool.deployments = (wish("8b", 2), wish("70b", 1, FLEX))
    assert pool.step().wished() == {"a": ["8b"], "b": ["8b"]}


def test_of_its_own_tier_a_group_takes_only_what_leaves_the_other_better_met():
    pool = idle_pool(wish("70b", 1, FLEX))
    assert pool.step().wished() == {"a": ["8b"], "b": ["8b"]}
    pool = idle_pool(wish("70b", 1, FLEX), names=("a", "b", "c"))
    for _ in range(4):
        pool.step().obey()
    assert sorted(pool.wished().values()) == [["70b"], ["70b"], ["8b"]]


def test_nobody_leaves_for_nodes_that_may_not_be_together_and_they_are_measured_first():
    pool = idle_pool(wish("70b", 1), is_measured=False)
    assert pool.step().wished() == {"a": ["8b"], "b": ["8b"]}
    assert pool.wishes.peers.keys() == {"a", "b"}
    for number, name in enumerate(NAMES, 1):
        pool.change(name, peer_measurements=box(number, name).peer_measurements)
    assert pool.step().wished() == {"a": [], "b": []}


def test_a_node_of_which_room_is_kept_is_no_other_groups():
    """The one that is wished more waits for one of its nodes; the other one would find the free one beside a smaller card."""
    other = card_entry("70b", "other", slot_count=2, architecture=replace(BIG.architecture, model_id="other", layer_count=48))
    pool = Pool(wish("8b", 1, FLEX), names=("a",)).step().obey().step(IDLE_SECONDS).obey()
    pool.entries[other.model_id] = other
    pool.boxes[NodeId("b")] = box(2, "b")
    pool.boxes[NodeId("c")] = replace(
        box(3, "c"), inventory=replace(box(3, "c").inventory, accelerators=cards(1, "NVIDIA GeForce RTX 3060", 12 * GIB, "c"))
    )
    pool.deployments = (wish("8b", 1, FLEX), wish("other", 1, FLEX))
    assert pool.step().wished() == {"a": ["8b"], "b": ["other"], "c": ["other"]}
    pool.deployments = (wish("8b", 1, FLEX),)
    pool.step().obey().step()
    pool.deployments = (wish("70b", 1), wish("other", 1, FLEX))
    assert pool.step().wished() == {"a": [], "b": [], "c": []}
    assert pool.obey().step().wished() == {"a": ["70b"], "b": ["70b"], "c": []}


def test_a_replica_that_is_refused_where_every_node_is_to_have_one_leaves():
    pool = Pool(wish("8b", None, FLEX)).step().obey(EngineState.REFUSED)
    assert pool.step().wished() == {"a": [], "b": []}
    pool.deployments = (wish("8b", None, FLEX), wish("70b", 1))
    assert pool.obey().step().wished() == {"a": ["70b"], "b": ["70b"]}


# What a group leaves.


def broken_pool():
    """A group whose engine on `b` failed, while `a` still stops its stage."""
    pool = Pool(wish("70b", 1)).step().obey().step()
    assert pool.wished() == {"a": ["70b"], "b": ["70b"]}
    (stage_a,) = pool.boxes[NodeId("a")].engines
    (stage_b,) = pool.boxes[NodeId("b")].engines
    pool.change("a", engines=(replace(stage_a, state=EngineState.STOPPING),))
    pool.change("b", engines=(replace(stage_b, state=EngineState.BACKING_OFF, failure="out of memory"),))
    pool.deployments = (wish("8b", 2),)
    return pool.step()


def test_what_a_broken_group_still_runs_is_not_free():
    pool = broken_pool()
    assert pool.planner.groups[next(iter(pool.planner.groups))].phase is GroupPhase.BROKEN
    for _ in range(3):
        assert pool.wished() == {"a": [], "b": ["8b"]}
        reasons = {verdict.node_id: verdict for verdict in pool.planner.explain(pool.facts, ModelId("8b"), pool.now)}
        assert reasons["a"].reason == "room is being made: a shard group leaves"
        pool.step(100.0)
    pool.change("a", engines=())
    assert pool.step().wished() == {"a": ["8b"], "b": ["8b"]}


def test_a_member_that_went_away_while_it_stopped_is_free_once_its_stage_has_surely_ended():
    pool = broken_pool()
    pool.deployments = (wish("70b", 1),)
    pool.change("b", engines=())
    pool.step(100.0)
    pool.change("a", connected=False, engines=())
    pool.step()
    pool.boxes[NodeId("c")] = box(3, "c")
    pool.step(RELEASE_SECONDS - 2)
    assert pool.wished() == {"a": [], "b": [], "c": []}
    pool.step(2.0)
    assert pool.wished() == {"a": [], "b": ["70b"], "c": ["70b"]}


def test_a_group_is_ready_while_its_leader_is_there():
    pool = Pool(wish("70b", 1)).step().obey().step()
    assert pool.standing("70b").ready_count == 1
    for name in NAMES:
        pool.change(name, connected=False, engines=())
    pool.step()
    # Nobody is connected: the coordinator itself may have been away, and gives nothing up.
    assert [group.phase for group in pool.planner.groups.values()] == [GroupPhase.READY]
    assert (pool.standing("70b").ready_count, pool.standing("70b").starting_count) == (0, 1)
