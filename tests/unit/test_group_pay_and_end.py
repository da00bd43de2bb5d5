"""Who is paid for what a group answers, and how a group ends that nobody needs any more."""

from __future__ import annotations

from dataclasses import replace

import pytest

from potluck_coordinator.domain.grouping import life
from potluck_coordinator.domain.grouping.explain import group_parts
from potluck_coordinator.domain.grouping.shares import payee_shares, stage_weight
from potluck_coordinator.domain.grouping.words import GroupPhase
from potluck_coordinator.domain.payees import PayeeShare
from potluck_protocol.values import NodeId
from tests.support.group_planner import GroupPlanner, pair
from tests.support.grouping import GROUP, need, node, stage_status

N1, N2 = NodeId("n1"), NodeId("n2")


def test_a_group_that_nobody_needs_is_wished_no_more():
    planner = pair().formed()
    planner.needs = []
    planner.step()
    plan = planner.step(life.LEAVING_SECONDS_MIN)
    assert (plan.desired, plan.payees, plan.pairs) == ({}, {}, ())
    planner.needs = [need()]
    assert planner.step().formations[GROUP].reason == "node n1 is still stopping its stage"
    planner.needs = []
    planner.report(n1=None, n2=None)
    assert planner.step().groups == {}


@pytest.mark.parametrize(
    ("attempt_count", "seconds", "stays"),
    [
        (0, life.LEAVING_SECONDS_MIN - 0.1, True),
        (0, life.LEAVING_SECONDS_MIN, False),
        (1, life.LEAVING_SECONDS_MIN, True),
        (1, life.LEAVING_SECONDS_MAX - 0.1, True),
        (1, life.LEAVING_SECONDS_MAX, False),
    ],
)
def test_a_group_that_nobody_needs_finishes_its_answers_and_gets_no_new_ones(attempt_count, seconds, stays):
    planner = pair().formed()
    planner.attempt_counts = {GROUP: attempt_count}
    planner.needs = []
    assert planner.step().leaving == {GROUP}
    plan = planner.step(seconds)
    assert (bool(plan.desired), bool(plan.payees), plan.leaving) == (stays, stays, {GROUP} if stays else set())
    if stays:
        assert "is on its way out as stage 1 of 2" in group_parts([GROUP], plan.groups, plan.formations, planner.views)[N1].reason


def test_a_group_on_its_way_out_that_is_needed_again_stays():
    planner = pair().formed()
    planner.needs = []
    planner.step()
    planner.needs = [need()]
    plan = planner.step()
    assert (plan.leaving, planner.group.leaving_since_seconds, planner.group.generation) == (set(), None, 1)
    assert planner.step(3_600).groups[GROUP].phase is GroupPhase.READY


def test_a_group_on_its_way_out_that_loses_a_member_is_broken_at_once():
    planner = pair().formed()
    planner.attempt_counts = {GROUP: 1}
    planner.needs = []
    planner.step()
    planner.change(N2, connected=False)
    plan = planner.step()
    assert (planner.group.phase, planner.group.reason, plan.leaving) == (GroupPhase.BROKEN, "member n2 is lost: is not connected", set())


def test_a_group_that_does_not_answer_yet_goes_at_once():
    planner = pair()
    planner.step()
    planner.needs = []
    assert planner.step().desired == {}


def test_owners_share_by_the_weights_of_their_stages():
    planner = GroupPlanner(node(1, "ann", ("bob",)), node(2, "bob", ("ann",)))
    plan = planner.step()
    assert plan.payees == {GROUP: (PayeeShare("ann", 1), PayeeShare("bob", 1))}
    stages = (replace(planner.group.stages[0], weight_bytes=300), replace(planner.group.stages[1], weight_bytes=100))
    assert payee_shares(stages, {}) == (PayeeShare("ann", 3), PayeeShare("bob", 1))
    assert payee_shares((stages[0], replace(stages[1], owner_account_id="ann")), {}) == (PayeeShare("ann", 1),)


@pytest.mark.parametrize(("counted", "paid"), [(None, 1000), (10**12, 1050), (1040, 1040), (1000, 1000), (990, 990), (10, 950), (-5, 950)])
def test_what_a_members_engine_counted_moves_its_share_within_a_band(counted, paid):
    assert stage_weight(1000, counted) == paid


def test_what_members_engines_counted_reaches_their_shares_and_the_memory_that_they_take_does_not():
    planner = pair().formed()
    counts = [stage_status(planner.group, rank, weight_bytes=counted, memory_bytes=10**9) for rank, counted in enumerate((56, 54))]
    for node_id, status in zip((N1, N2), counts, strict=True):
        planner.change(node_id, engines=(status,))
    assert planner.step().payees == {GROUP: (PayeeShare("ann", 28), PayeeShare("bob", 27))}


def test_what_was_counted_in_another_generation_pays_nobody():
    planner = pair().formed()
    old = stage_status(replace(planner.group, generation=0), 0, weight_bytes=56)
    planner.change(N1, engines=(*planner.views[N1].engines, old))
    assert planner.step().payees == {GROUP: (PayeeShare("ann", 1), PayeeShare("bob", 1))}


def test_a_freed_node_serves_the_need_with_its_room():
    planner = GroupPlanner(node(1), node(2), node(3)).formed()
    planner.needs = [need(replica_id="group/next/0")]
    planner.step()
    planner.step(life.LEAVING_SECONDS_MIN)
    planner.report(n1=None, n2=None, n3=None)
    plan = planner.step()
    assert plan.groups.keys() == {"group/next/0"}
