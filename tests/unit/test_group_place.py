"""A machine takes no place in a group that its owner did not offer."""

from __future__ import annotations

from dataclasses import replace

import pytest

from potluck_node.domain.group_place import place_refusal
from potluck_node.domain.plan import LocalLimits, ObservedReplica, Phase, Refuse, crashed, plan
from potluck_protocol.values import DesiredEngine, DesiredState, EngineShape, GroupOffer, GroupPlace, ModelFile, ModelId, ReplicaId

OFFER = GroupOffer("lab", "10.0.0.2", 29600)
PLACE = GroupPlace("group/big/0", 3, 1, "10.0.0.1", 29600, "10.0.0.2", (5, 5))
LEADER = replace(PLACE, rank=0, leader_address="10.0.0.2")
FILE = ModelFile(ModelId("big"), "wheel:big==1", "big.gguf", "a" * 64, 100)
STAGE = DesiredEngine(ReplicaId("group/big/0"), FILE, "scripted", 2, 256, EngineShape(memory_bytes=60), PLACE)
LIMITS = LocalLimits(frozenset({"scripted"}), group_offer=OFFER)


@pytest.mark.parametrize("place", [None, PLACE, LEADER])
def test_a_place_as_offered_is_taken(place):
    assert place_refusal(place, OFFER) == ""


@pytest.mark.parametrize(
    ("place", "offer", "words"),
    [
        (PLACE, None, "offer it to no group"),
        (replace(PLACE, address="10.0.0.9"), OFFER, "offer 10.0.0.2"),
        (replace(PLACE, leader_address="203.0.113.1"), OFFER, "203.0.113.1, which is public"),
        (replace(LEADER, leader_port=22), OFFER, "port 22, which this node does not offer"),
        (replace(LEADER, leader_address="10.0.0.1"), OFFER, "led at 10.0.0.1"),
        (replace(PLACE, rank=2), OFFER, "has no rank 2"),
        (replace(LEADER, layer_counts=(10,)), OFFER, "a group of 1 stages"),
    ],
)
def test_any_other_place_is_refused(place, offer, words):
    assert words in place_refusal(place, offer)


def planned(engine, observed=None, limits=LIMITS):
    return plan(DesiredState(1, (engine,)), {observed.engine.replica_id: observed} if observed else {}, limits, 1000.0)


def test_the_owners_word_wins_over_the_wish():
    (action,) = planned(STAGE, limits=replace(LIMITS, group_offer=None)).actions
    assert isinstance(action, Refuse)


def test_a_failed_stage_waits_for_the_next_generation_and_never_for_a_clock():
    failed = crashed(ObservedReplica(STAGE, Phase.READY), 10.0, 5.0)
    step = planned(STAGE, failed)
    assert (step.actions, step.wake_at_seconds) == ((), None)
    (action,) = planned(replace(STAGE, group=replace(PLACE, generation=4)), failed).actions
    assert type(action).__name__ == "Forget"


def test_a_stage_of_an_older_generation_is_stopped_before_the_newer_one_starts():
    newer = replace(STAGE, group=replace(PLACE, generation=4))
    (action,) = planned(newer, ObservedReplica(STAGE, Phase.READY)).actions
    assert type(action).__name__ == "Stop"
    assert planned(newer, ObservedReplica(STAGE, Phase.STOPPING)).actions == ()


@pytest.mark.parametrize(("budget_bytes", "refused"), [(None, []), (120, []), (119, ["b"]), (59, ["a", "b"])])
def test_engines_without_cards_share_the_owners_budget_of_memory(budget_bytes, refused):
    engines = tuple(replace(STAGE, replica_id=ReplicaId(name), group=None) for name in ("a", "b"))
    step = plan(DesiredState(1, engines), {}, LocalLimits(frozenset({"scripted"}), memory_budget_bytes=budget_bytes), 1000.0)
    assert [action.engine.replica_id for action in step.actions if isinstance(action, Refuse)] == refused


def test_a_cache_that_a_coordinator_leaves_out_of_the_memory_counts_all_the_same():
    greedy = replace(STAGE, shape=EngineShape(memory_bytes=0, kv_cache_bytes=500 << 30), group=None)
    (action,) = planned(greedy, limits=LocalLimits(frozenset({"scripted"}), memory_budget_bytes=4 << 30)).actions
    assert isinstance(action, Refuse)


def test_an_engine_on_cards_takes_none_of_the_machines_memory():
    on_card = replace(STAGE, shape=EngineShape(("card",), memory_bytes=60), group=None)
    (action,) = planned(on_card, limits=LocalLimits(frozenset({"scripted"}), memory_budget_bytes=1)).actions
    assert not isinstance(action, Refuse)
