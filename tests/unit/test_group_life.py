"""When a group is ready, broken, and formed anew, and what follows for its nodes."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from potluck_coordinator.domain.grouping import life
from potluck_coordinator.domain.grouping.explain import group_parts
from potluck_coordinator.domain.grouping.plan import PEERS_PER_NODE_MAX
from potluck_coordinator.domain.grouping.words import Blame, GroupPhase
from potluck_protocol.values import EngineState, FailureKind, NodeId, NodeState, PeerMeasurement
from tests.support.group_planner import GroupPlanner, pair
from tests.support.grouping import GROUP, measured, need, node, reporting, stage_status, with_link

N1, N2 = NodeId("n1"), NodeId("n2")


def test_a_group_is_wished_of_all_its_nodes_at_once():
    plan = pair().step()
    assert plan.groups[GROUP].phase is GroupPhase.FORMING
    assert plan.desired.keys() == {"n1", "n2"}
    (first,), (second,) = plan.desired[N1], plan.desired[N2]
    assert first.replica_id == second.replica_id == GROUP
    assert (first.group.rank, second.group.rank) == (0, 1)
    assert first.group.generation == second.group.generation == 1
    assert (second.group.leader_address, second.group.leader_port, second.group.address) == ("10.0.0.1", 29600, "10.0.0.2")
    assert second.group.layer_counts == (5, 5)
    assert second.shape.kv_cache_bytes == 5
    assert plan.pairs == ()


def test_it_is_ready_when_the_leader_and_every_member_are():
    planner = pair()
    planner.step()
    planner.report(EngineState.STARTING)
    assert planner.step().groups[GROUP].phase is GroupPhase.FORMING
    planner.report(n1=EngineState.STARTING)
    assert planner.step().groups[GROUP].phase is GroupPhase.FORMING
    planner.report()
    assert planner.step().groups[GROUP].phase is GroupPhase.READY
    since = planner.group.since_seconds
    assert planner.step().groups[GROUP].since_seconds == since


def test_nothing_changes_while_nothing_happens():
    planner = pair().formed()
    before = planner.step()
    assert planner.step(3_600) == before


@pytest.mark.parametrize("lost", ["n1", "n2"])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"connected": False}, "is lost: is not connected"),
        ({"state": NodeState.PAUSED}, "is lost: is paused"),
        ({"epoch": 2}, "is lost: its agent began anew"),
    ],
)
def test_a_lost_member_is_the_whole_group_lost_at_once(lost, changes, words):
    planner = pair().formed()
    planner.change(NodeId(lost), **changes)
    plan = planner.step()
    assert planner.group.phase is GroupPhase.BROKEN
    assert f"member {lost} {words}" in planner.group.reason
    assert planner.group.lost_node_id == lost
    assert (plan.desired, plan.payees) == ({}, {})


def test_a_member_that_left_the_pool_breaks_it():
    planner = pair().formed()
    del planner.views[N2]
    planner.step()
    assert planner.group.reason == "member n2 is lost: it is no longer in the pool"


def test_trust_taken_back_breaks_it():
    planner = pair().formed()
    changed = node(1, "ann").inventory
    planner.change(N1, inventory=changed)
    planner.step()
    assert planner.group.phase is GroupPhase.BROKEN
    assert "does not trust" in planner.group.reason


def test_an_address_changed_breaks_it():
    planner = pair().formed()
    planner.change(N2, inventory=node(22, "bob", ("ann",)).inventory)
    planner.step()
    assert "gave it another group address" in planner.group.reason


@pytest.mark.parametrize("state", [EngineState.BACKING_OFF, EngineState.REFUSED])
def test_a_failed_engine_breaks_it_with_the_first_of_its_words(state):
    planner = pair().formed()
    failed = stage_status(planner.group, 1, state, failure="the engine ended: signal SIGKILL\nmore", failure_kind=FailureKind.KILLED)
    planner.change(N2, engines=(failed,))
    planner.step()
    assert planner.group.reason == "the engine of member n2 failed: the engine ended: signal SIGKILL"


def test_an_engine_that_stood_and_is_not_there_any_more_breaks_it():
    planner = pair().formed()
    planner.report(n2=EngineState.STARTING)
    planner.step()
    assert planner.group.reason == "the engine of member n2 is no longer there"


def test_what_is_told_of_another_generation_says_nothing():
    planner = pair()
    planner.step()
    old = replace(planner.group, generation=0)
    planner.views = reporting(planner.views, old, EngineState.BACKING_OFF)
    planner.step()
    assert planner.group.phase is GroupPhase.FORMING


def test_the_cause_is_told_even_if_its_consequence_was_heard_first():
    planner = pair().formed()
    planner.report(n1=EngineState.BACKING_OFF)
    planner.step()
    assert (planner.group.lost_node_id, planner.group.failure_count) == ("n1", 1)
    planner.change(N2, connected=False, engines=())
    planner.step()
    assert (planner.group.lost_node_id, planner.group.blame, planner.group.failure_count) == ("n2", Blame.NODE_GONE, 0)
    planner.change(N1, state=NodeState.PAUSED)
    planner.step(life.BLAME_SECONDS)
    assert planner.group.lost_node_id == "n2"


def test_an_engine_that_missed_its_peer_is_not_to_blame_when_the_peer_tells_what_happened():
    planner = pair().formed()
    missed = stage_status(planner.group, 0, EngineState.BACKING_OFF, failure="10.0.0.2 is gone", failure_kind=FailureKind.GROUP_BROKEN)
    planner.change(N1, engines=(missed,))
    planner.step()
    assert planner.group.lost_node_id == "n1"
    crashed = stage_status(planner.group, 1, EngineState.BACKING_OFF, failure="exit status 1", failure_kind=FailureKind.CRASHED)
    planner.change(N2, engines=(crashed,))
    planner.step()
    assert (planner.group.reason, planner.group.failure_count) == ("the engine of member n2 failed: exit status 1", 1)


def test_it_forms_anew_when_the_member_is_back_and_nothing_of_the_old_generation_is_left():
    planner = pair().formed()
    planner.change(N2, connected=False, engines=())
    planner.step()
    planner.step()
    assert planner.group.phase is GroupPhase.BROKEN
    planner.change(N2, connected=True, epoch=2)
    plan = planner.step()
    assert plan.formations[GROUP].reason == "node n1 is still stopping its stage"
    planner.report(EngineState.STOPPING, n2=None)
    assert planner.step().groups[GROUP].phase is GroupPhase.BROKEN
    planner.report(n1=None, n2=None)
    plan = planner.step()
    assert (planner.group.phase, planner.group.generation) == (GroupPhase.FORMING, 2)
    assert plan.desired.keys() == {"n1", "n2"}


def test_another_candidate_takes_the_place_once_the_lost_one_has_surely_stopped():
    planner = GroupPlanner(node(1), node(2), node(3)).formed()
    lost = planner.group.stages[1].node_id
    planner.change(lost, connected=False, engines=())
    planner.step()
    planner.report(n1=None, n2=None, n3=None)
    plan = planner.step()
    assert "may still run its stage" in plan.formations[GROUP].reason
    planner.step(life.RELEASE_SECONDS)
    assert planner.group.phase is GroupPhase.FORMING
    assert lost not in [stage.node_id for stage in planner.group.stages]


def test_engines_that_fail_in_a_row_are_tried_at_longer_and_longer_intervals():
    planner = pair()
    started_at = []
    for _ in range(10):
        planner.step()
        while planner.group.phase is GroupPhase.BROKEN:
            planner.step()
        started_at.append(planner.now)
        planner.report(EngineState.BACKING_OFF)
        planner.step()
    pauses = [int(later - earlier) for earlier, later in pairwise(started_at)]
    assert pauses[0] <= 2
    assert pauses[1:] == sorted(pauses[1:])
    assert 10 <= pauses[1] <= 12
    assert 600 <= pauses[-1] <= 602
    assert "its engines failed 10 times in a row" in planner.step().formations[GROUP].reason


def test_a_group_that_stood_long_starts_its_count_of_failures_anew():
    planner = pair()
    for _ in range(2):
        planner.step()
        planner.report(EngineState.BACKING_OFF)
        planner.step()
    planner.step(60)
    planner.report()
    planner.step()
    planner.step(life.STEADY_SECONDS)
    planner.report(n2=EngineState.BACKING_OFF)
    planner.step()
    assert planner.group.failure_count == 1


def test_a_group_of_an_earlier_run_stands_while_its_members_come_back():
    planner = pair().formed()
    planner.groups = {GROUP: life.adopted(planner.group, planner.now)}
    for node_id in (N1, N2):
        planner.change(node_id, connected=False, epoch=5)
    planner.step()
    planner.change(N1, connected=True)
    plan = planner.step()
    assert planner.group.phase is GroupPhase.READY
    assert plan.desired.keys() == {"n1", "n2"}
    planner.step(life.ADOPTED_SECONDS_MAX)
    assert planner.group.reason == "member n2 is lost: is not connected"


def test_a_coordinator_that_sees_nobody_blames_nobody():
    planner = pair().formed()
    before = planner.views
    for node_id in (N1, N2):
        planner.change(node_id, connected=False)
    planner.step(3_600)
    assert planner.group.phase is GroupPhase.READY
    planner.views = before
    planner.step()
    assert planner.group.phase is GroupPhase.READY
    planner.change(N2, connected=False)
    planner.step()
    assert planner.group.phase is GroupPhase.BROKEN


def test_a_group_is_formed_anew_when_its_model_is_to_be_served_otherwise_but_not_when_a_figure_of_its_fit_moves():
    planner = pair().formed()
    planner.needs = [need(layer_bytes=11)]
    planner.step()
    assert planner.group.phase is GroupPhase.READY
    planner.needs = [need(slot_count=8)]
    planner.step()
    planner.step(life.LEAVING_SECONDS_MIN)
    assert (planner.group.phase, planner.group.reason) == (GroupPhase.BROKEN, "something else is asked for now")
    planner.report(n1=None, n2=None)
    assert planner.step().desired[N1][0].slot_count == 8


def test_unmet_needs_have_their_candidates_measured_and_nobody_else():
    planner = GroupPlanner(
        node(1, "ann", ("bob",)), node(2, "bob", ("ann",)), node(3, "eve", ("ann", "bob")), node(4, offer={"site": "attic"})
    )
    planner.views = with_link(planner.views, "n1", "n2", None)
    assert planner.step().pairs == (("n1", "n2"),)
    planner.views = with_link(planner.views, "n1", "n2", PeerMeasurement(N2, failure="no answer"))
    assert planner.step().pairs == (("n1", "n2"),)


def test_nobody_is_measured_where_all_of_a_site_would_not_do():
    planner = GroupPlanner(node(1), node(2))
    planner.views = with_link(planner.views, "n1", "n2", None)
    assert planner.step(memory_bytes=60).pairs == ()


def test_measurements_go_on_while_a_broken_group_waits():
    planner = pair().formed()
    planner.change(N2, state=NodeState.PAUSED)
    planner.step()
    planner.change(N2, state=NodeState.SERVING)
    assert planner.step().pairs == (("n1", "n2"),)


def test_no_node_measures_more_than_a_few_others():
    planner = GroupPlanner(*(node(number) for number in range(1, 13)))
    planner.views = {node_id: replace(view, peer_measurements={}) for node_id, view in planner.views.items()}
    pairs = planner.step().pairs
    named = [node_id for chosen in pairs for node_id in chosen]
    assert len(set(pairs)) == len(pairs) > 20
    assert max(named.count(node_id) for node_id in named) <= PEERS_PER_NODE_MAX


def test_nodes_of_one_group_are_in_no_other():
    planner = GroupPlanner(node(1), node(2), node(3), node(4))
    planner.needs.append(replace(planner.needs[0], replica_id="group/other/0"))
    plan = planner.step()
    members = [stage.node_id for group in plan.groups.values() for stage in group.stages]
    assert sorted(members) == ["n1", "n2", "n3", "n4"]
    assert len({group.generation for group in plan.groups.values()}) == 2


def test_a_machine_that_came_back_as_another_node_is_free_when_the_node_that_it_was_has_surely_stopped():
    planner = GroupPlanner(node(1), node(2), node(3)).formed()
    planner.change(N2, connected=False, engines=())
    planner.step()
    other = need(replica_id="group/other/0")
    again = node(9, offer={"address": "10.0.0.2"})
    planner.views = measured(*(view for view in planner.views.values() if view.node_id != "n1"), again)
    planner.needs = [other]
    planner.step()
    assert other.replica_id not in planner.groups
    planner.step(life.RELEASE_SECONDS)
    assert {stage.node_id for stage in planner.groups[other.replica_id].stages} == {"n3", "n9"}


def test_everyone_is_told_their_part():
    planner = GroupPlanner(node(1), node(2), node(3, "eve"))
    parts = group_parts([GROUP], planner.step().groups, planner.step().formations, planner.views)
    assert parts[N2].reason == "starts stage 2 of 2, 5 of 10 layers, in a group which node n1 leads"
    planner.report()
    plan = planner.step()
    parts = group_parts([GROUP], plan.groups, plan.formations, planner.views)
    words = "serves stage 1 of 2, 5 of 10 layers, in a group which it leads; it is paid by 55 bytes of weights (as planned)"
    assert parts[N1].reason == words
    assert (parts["n3"].phase, parts["n3"].reason) == (None, "its owner does not trust the owner of node n1 (group_trusts)")
    planner.change(N2, connected=False)
    planner.step()
    plan = planner.step()
    parts = group_parts([GROUP], plan.groups, plan.formations, planner.views)
    words = "its group broke: member n2 is lost: is not connected; node n1 is still stopping its stage"
    assert (parts[N1].phase, parts[N1].reason) == (GroupPhase.BROKEN, words)
    assert parts["n3"].phase is None
    assert "does not trust" in parts["n3"].reason
