"""Replicas that fail, are refused, or are on their way for too long: each is judged by itself, and gone round in time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from potluck_coordinator.directory.planner import Planner, PoolFacts
from potluck_coordinator.domain.fit.corrections import NOTHING_LEARNED
from potluck_coordinator.domain.planning.explain import Verdict
from potluck_coordinator.domain.planning.troubles import FAILING_SECONDS_MAX, FETCHING_SECONDS_MAX, REMEMBERED_SECONDS, STARTING_SECONDS_MAX
from potluck_coordinator.domain.planning.words import LEAVING_SECONDS_MAX, WAITING_SECONDS_MAX, Phase
from potluck_protocol.values import EngineState, GroupOffer, ModelId, NodeId, PeerMeasurement
from tests.support.planning import card_entry, node, status, wish

ENTRIES = {entry.model_id: entry for entry in (card_entry("8b"), card_entry("8b", "other"), card_entry("70b", slot_count=2))}
BEAT_SECONDS = 5.0


class Pool:
    """A directory's planner, and nodes whose engines answer at the next beat, but for those that the test speaks for."""

    def __init__(self, *deployments, boxes):
        self.deployments = deployments
        self.boxes = {each.node_id: each for each in boxes}
        self.planner = Planner({}, {}, 0, NOTHING_LEARNED, 0.0)
        self.now = 0.0
        self.answers = {}
        """By replica id, what its node says instead of that it is ready; None: nothing, be it wished or not."""
        self.lasting = ()
        """Statuses of engines that do not end, by their nodes."""
        self.facts = PoolFacts(deployments, ENTRIES, self.boxes)

    def pass_time(self, seconds=BEAT_SECONDS, **facts):
        """Plans at every beat, and twice: the same facts give the same plan."""
        until = self.now + seconds
        while self.now < until:
            self.now = min(until, self.now + BEAT_SECONDS)
            self.facts = PoolFacts(self.deployments, ENTRIES, self.boxes, **facts)
            engines = self.planner.advance(self.facts, self.now).engines
            made = dict(self.planner.replicas)
            assert self.planner.advance(self.facts, self.now).engines == engines
            assert self.planner.replicas == made
            self.boxes = {name: replace(each, engines=self._said(name, engines.get(name, ()))) for name, each in self.boxes.items()}
        return self

    def _said(self, name, engines):
        said = [(engine, self.answers.get(engine.replica_id, {})) for engine in engines]
        lasting = [one for node_id, one in self.lasting if node_id == name]
        return (*lasting, *(_status(engine, **changes) for engine, changes in said if changes is not None))

    def phases(self):
        return {replica_id: replica.phase for replica_id, replica in self.planner.replicas.items()}

    def ready_count(self, model_id):
        return self.planner.standings(self.facts, self.now)[ModelId(model_id)].ready_count

    def verdicts(self, model_id):
        return {one.node_id: one for one in self.planner.explain(self.facts, ModelId(model_id), self.now)}


def _status(engine, state=EngineState.READY, **changes):
    place = engine.group
    grouped = {"group_id": engine.replica_id, "group_generation": place.generation} if place else {}
    return status(engine.replica_id, engine.model.model_id, state, **(grouped | changes))


FAILS = {"state": EngineState.BACKING_OFF, "failure": "the card is bad"}
REFUSES = {"state": EngineState.REFUSED, "failure": "8b is not allowed here"}
STARTS = {"state": EngineState.STARTING}


# Two replicas of one model on one node.


@pytest.mark.parametrize("bad", ["a/8b", "a/8b/1"])
@pytest.mark.parametrize(("answer", "patience_seconds"), [(FAILS, FAILING_SECONDS_MAX), (REFUSES, 0.0)])
def test_of_two_replicas_on_one_node_the_bad_one_is_replaced_and_the_good_one_stays(bad, answer, patience_seconds):
    pool = Pool(wish("8b", 2), boxes=[node("a", cards=2)])
    pool.answers = {bad: answer}
    pool.pass_time(10)
    pool.boxes[NodeId("b")] = node("b", cards=2)
    pool.pass_time(patience_seconds + 30)
    good = ({"a/8b", "a/8b/1"} - {bad}).pop()
    assert pool.ready_count("8b") == 2
    assert pool.phases() == {good: Phase.WISHED, "b/8b": Phase.WISHED}
    # The bad card does not get a replica of the model again so soon.
    pool.deployments = (wish("8b", 3),)
    pool.pass_time(REMEMBERED_SECONDS / 2)
    assert pool.phases() == {good: Phase.WISHED, "b/8b": Phase.WISHED, "b/8b/1": Phase.WISHED}


def test_a_refused_replica_does_not_cost_the_one_that_answers_its_card_while_others_wait():
    pool = Pool(wish("8b", 2), boxes=[node("a", cards=2)])
    pool.answers = {"a/8b/1": REFUSES}
    pool.pass_time(10)
    pool.deployments = (wish("8b", 2), wish("other", 3))
    pool.pass_time(60, attempt_counts={"a/8b": 1}, waiting_counts={ModelId("other"): 3})
    assert pool.phases() == {"a/8b": Phase.WISHED, "a/other": Phase.WISHED}


def test_a_node_that_refuses_a_model_is_not_waited_for():
    pool = Pool(wish("other", 1), wish("8b", 1), boxes=[node("a", cards=2)]).pass_time(10)
    # An engine that does not end keeps the second card.
    pool.lasting = (("a", status("a/other", "other", EngineState.STOPPING)),)
    pool.deployments = (wish("8b", 2),)
    pool.answers = {"a/8b": REFUSES}
    pool.pass_time(5)
    assert pool.phases()["a/8b/1"] is Phase.WAITING
    pool.pass_time(5)
    assert "a/8b/1" not in pool.phases()


# On the way without end.


@pytest.mark.parametrize("answer", [STARTS, {"state": EngineState.STOPPING}, None])
def test_a_start_without_end_is_gone_round(answer):
    pool = Pool(wish("8b", 1), boxes=[node("a", cards=1)])
    pool.answers = {"a/8b": answer}
    pool.pass_time(10)
    pool.boxes[NodeId("b")] = node("b", cards=1)
    pool.pass_time(STARTING_SECONDS_MAX - 60)
    assert set(pool.phases()) == {"a/8b"}
    pool.pass_time(90)
    assert (pool.phases(), pool.ready_count("8b")) == ({"b/8b": Phase.WISHED}, 1)


def test_a_start_that_ends_after_all_meets_the_wish_again():
    pool = Pool(wish("8b", 1), boxes=[node("a", cards=1)])
    pool.answers = {"a/8b": STARTS}
    pool.pass_time(2 * STARTING_SECONDS_MAX)
    assert pool.verdicts("8b")["a"].verdict is Verdict.FAILING
    assert pool.verdicts("8b")["a"].reason == "its engine has been starting for 30 minutes"
    pool.answers = {}
    pool.pass_time(10)
    assert (pool.phases(), pool.ready_count("8b")) == ({"a/8b": Phase.WISHED}, 1)


def test_a_fetch_may_take_long_while_its_node_fetches_anything():
    pool = Pool(wish("8b", 1), boxes=[node("a", cards=1)])
    for fetched_bytes in range(5):
        # Files are fetched one after the other: those of another engine first.
        pool.lasting = (("a", status("group/70b/0", "70b", EngineState.FETCHING, group_id="group/70b/0", fetched_bytes=fetched_bytes)),)
        pool.answers = {"a/8b": {"state": EngineState.FETCHING}}
        pool.pass_time(FETCHING_SECONDS_MAX - 60)
        pool.boxes[NodeId("b")] = node("b", cards=1)
    assert set(pool.phases()) == {"a/8b"}
    pool.pass_time(120)
    assert pool.phases() == {"b/8b": Phase.WISHED}


def test_a_slow_start_before_a_failure_is_no_time_of_failing():
    pool = Pool(wish("8b", 1), boxes=[node("a", cards=1)])
    pool.answers = {"a/8b": STARTS}
    pool.pass_time(STARTING_SECONDS_MAX - 60)
    pool.boxes[NodeId("b")] = node("b", cards=1)
    pool.answers = {"a/8b": FAILS}
    pool.pass_time(FAILING_SECONDS_MAX - 60)
    assert set(pool.phases()) == {"a/8b"}
    pool.pass_time(90)
    assert pool.phases() == {"b/8b": Phase.WISHED}


def test_room_that_does_not_come_is_not_waited_for_for_ever():
    pool = Pool(wish("other", 1), boxes=[node("a", cards=1)]).pass_time(10)
    pool.lasting = (("a", status("a/other", "other", EngineState.STOPPING)),)
    pool.deployments = (wish("8b", 1),)
    pool.pass_time(10)
    pool.boxes[NodeId("b")] = node("b", cards=1)
    pool.pass_time(WAITING_SECONDS_MAX - 60)
    assert pool.phases() == {"a/other": Phase.STOPPING, "a/8b": Phase.WAITING}
    pool.pass_time(90)
    assert pool.phases() == {"a/other": Phase.STOPPING, "b/8b": Phase.WISHED}
    assert WAITING_SECONDS_MAX > 2 * LEAVING_SECONDS_MAX


# Groups.


def box(name, number, card_count):
    made = node(name, cards=card_count, memory_gib=64)
    peers = {NodeId(other): PeerMeasurement(NodeId(other), 200, 10**9) for other in "abcd" if other != name}
    offer = GroupOffer("attic", f"10.0.0.{number}", 29_600)
    return replace(made, inventory=replace(made.inventory, group_offer=offer), peer_measurements=peers)


@pytest.mark.parametrize("answer", [FAILS, REFUSES])
def test_nodes_that_could_hold_a_model_alone_and_do_not_run_it_are_no_group_for_it(answer):
    pool = Pool(wish("8b", 1), boxes=[box("a", 1, 2), box("b", 2, 2)])
    pool.answers = dict.fromkeys(("a/8b", "b/8b"), answer)
    for _ in range(int(3 * FAILING_SECONDS_MAX / 60)):
        pool.pass_time(60)
        assert not pool.planner.groups
    assert {verdict.verdict for verdict in pool.verdicts("8b").values()} == {Verdict.FAILING if answer is FAILS else Verdict.REFUSED}


def test_a_node_that_refused_a_model_is_in_none_of_its_groups():
    boxes = [box("a", 1, 4), box("b", 2, 1), box("c", 3, 1)]
    pool = Pool(wish("70b", 1), boxes=boxes)
    pool.answers = {"a/70b": REFUSES}
    pool.pass_time(30)
    (group,) = pool.planner.groups.values()
    assert {stage.node_id for stage in group.stages} == {"b", "c"}
    assert pool.ready_count("70b") == 1
    assert pool.verdicts("70b")["a"].verdict is Verdict.REFUSED


def test_a_node_that_refused_a_model_is_not_measured_for_its_groups():
    pool = Pool(wish("70b", 1), boxes=[replace(each, peer_measurements={}) for each in (box("a", 1, 4), box("b", 2, 1), box("c", 3, 1))])
    pool.answers = {"a/70b": REFUSES}
    pool.pass_time(10)
    assert pool.planner.advance(pool.facts, pool.now).peers.keys() == {"b", "c"}
