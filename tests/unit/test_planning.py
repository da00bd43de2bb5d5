"""What runs where: wishes and facts in, replicas out, one rule at a time."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck_coordinator.domain.catalogue import ServiceTier
from potluck_coordinator.domain.planning.explain import explain
from potluck_coordinator.domain.planning.node_kinds import UNKNOWN_MEMORY_BYTES
from potluck_coordinator.domain.planning.plan import drafted, plan
from potluck_coordinator.domain.planning.words import (
    ABSENCE_SECONDS_MAX,
    IDLE_SECONDS,
    LEAVING_SECONDS_MAX,
    Phase,
    Trouble,
)
from potluck_protocol.values import EngineState, Inventory, ModelFile, ModelId, NodeId, NodeState
from tests.support.planning import GIB, card_entry, cards, machine_entry, node, status, view, wish

TINY, OTHER = machine_entry("tiny"), machine_entry("other")
REFUSED = Trouble("not allowed here", refused=True)
names = st.sets(st.text("abcdefghijklmnop", min_size=1, max_size=3), max_size=12)


def places(made, model_id):
    return {replica.node_id for replica in made.replicas.values() if replica.model_id == model_id and replica.phase is Phase.WISHED}


def answering(made, *, except_for=()):
    """The nodes' word that everything wished of them answers."""
    return {
        node_id: tuple(status(engine.replica_id, engine.model.model_id) for engine in engines if engine.replica_id not in except_for)
        for node_id, engines in made.desired.items()
    }


def later(before, made, seconds=1.0, **changes):
    """The same pool a while after a plan was carried out."""
    said = changes.pop("said", answering(made))
    nodes = {node_id: replace(each, engines=said.get(node_id, ())) for node_id, each in changes.pop("nodes", before.nodes).items()}
    return replace(before, now_seconds=before.now_seconds + seconds, standing=made.replicas, nodes=nodes, **changes)


def gone(before, name, since):
    nodes = dict(before.nodes) | {NodeId(name): replace(before.nodes[NodeId(name)], connected=False)}
    return {"nodes": nodes, "absent_since": {NodeId(name): since}}


# Placing.


def test_one_everywhere_runs_on_every_node_even_one_that_is_away_and_an_unknown_model_nowhere():
    made = plan(view([node("a"), node("b", connected=False)], [TINY], [wish("tiny", None), wish("gone", None)]))
    assert places(made, "tiny") == {"a", "b"}
    assert [engine.replica_id for engine in made.desired["a"]] == ["a/tiny"]
    assert places(made, "gone") == set()


def test_an_offer_without_files_runs_nowhere():
    offer = replace(TINY, file=None, repository="hf:org/tiny")
    assert plan(view([node("a")], [offer], [wish("tiny", None)])).replicas == {}


@pytest.mark.parametrize(("field", "value"), [("kv_dtype_bytes", float("nan")), ("kv_dtype_bytes", float("inf")), ("kv_head_count", 0)])
def test_an_entry_that_cannot_be_computed_keeps_no_other_from_being_planned(field, value):
    """None like it is made any more; one may have been kept."""
    good = card_entry("8b", "good")
    odd = copy.copy(good.architecture)
    object.__setattr__(odd, field, value)
    bad = replace(card_entry("8b", "bad"), architecture=odd)
    pool = view([node("a", cards=2), node("b", cards=2)], [bad, good], [wish("bad", 2), wish("good", 1)])
    made = plan(pool)
    assert (len(places(made, "bad")), len(places(made, "good"))) == (0, 1)
    reasons = [verdict.reason for verdict in explain(drafted(pool), ModelId("bad"), {})]
    assert all("its size cannot be computed" in reason for reason in reasons)


@given(names, st.integers(0, 15))
def test_a_wish_gets_its_number_or_every_node(node_names, count):
    made = plan(view([node(name) for name in node_names], [TINY], [wish("tiny", count)]))
    assert made.desired.keys() == node_names
    assert len(places(made, "tiny")) == min(count, len(node_names))


@given(names, st.integers(1, 10), st.text("qrstuv", min_size=1, max_size=3))
def test_a_node_that_comes_moves_nothing_that_is_as_well_off(node_names, count, newcomer):
    before = view([node(name) for name in node_names], [TINY], [wish("tiny", count)])
    made = plan(before)
    nodes = dict(before.nodes) | {NodeId(newcomer): node(newcomer)}
    after = plan(later(before, made, nodes=nodes))
    assert places(made, "tiny") <= places(after, "tiny")
    assert places(after, "tiny") - places(made, "tiny") <= {newcomer}


def test_nodes_that_are_away_or_paused_get_nothing_new():
    nodes = [node("a", connected=False), node("b", state=NodeState.PAUSED), node("c", state=NodeState.DRAINING), node("d")]
    assert places(plan(view(nodes, [TINY], [wish("tiny", 4)])), "tiny") == {"d"}


def test_several_replicas_spread_over_nodes_before_they_share_one():
    made = plan(view([node("a", cards=2), node("b", cards=1)], [card_entry("8b")], [wish("8b", 3)]))
    assert sorted(made.replicas) == ["a/8b", "a/8b/1", "b/8b"]
    assert len({uuid for replica in made.replicas.values() for uuid in replica.sizing.shape.card_uuids}) == 3


def test_a_much_slower_node_is_not_taken_for_the_sake_of_spreading():
    slow = node("slow", memory_gib=64, kinds=("vllm",))
    made = plan(view([node("fast", cards=2), slow], [card_entry("8b")], [wish("8b", 2)]))
    assert sorted(made.replicas) == ["fast/8b", "fast/8b/1"]


def test_the_faster_of_two_nodes_is_taken():
    slow = node("slow", cards=cards(1, "NVIDIA GeForce RTX 3060", 12 * GIB, "slow"))
    made = plan(view([slow, node("fast", cards=1)], [card_entry("8b")], [wish("8b", 1)]))
    assert sorted(made.replicas) == ["fast/8b"]


def test_a_large_model_is_split_over_a_bridged_pair_and_small_ones_leave_it_room():
    made = plan(view([node("box", cards=4)], [card_entry("70b"), card_entry("8b")], [wish("8b", 2), wish("70b", 1)]))
    shape = made.replicas["box/70b"].sizing.shape
    assert shape.card_uuids in {("GPU-box-0", "GPU-box-1"), ("GPU-box-2", "GPU-box-3")}
    assert (shape.tensor_parallel_size, shape.quantization) == (2, "awq")
    assert len(places(made, "8b")) == 1
    assert len(made.replicas) == 3


def test_a_card_runs_one_engine():
    made = plan(view([node("a", cards=1)], [card_entry("8b"), card_entry("32b")], [wish("8b", 1), wish("32b", 1)]))
    assert len(made.replicas) == 1


def test_a_machine_never_gets_more_than_its_memory():
    big = [machine_entry(name, 3 * GIB) for name in ("one", "two", "three")]
    made = plan(view([node("a", budget_gib=8)], big, [wish(name, 1) for name in ("one", "two", "three")]))
    assert len(made.replicas) == 2
    assert sum(replica.sizing.shape.memory_bytes for replica in made.replicas.values()) <= 8 * GIB


def test_of_a_machine_whose_memory_is_not_known_a_gib_is_used():
    unknown = replace(node("a"), inventory=Inventory())
    made = plan(view([unknown], [TINY, machine_entry("small", GIB)], [wish("tiny", None), wish("small", None)]))
    assert list(made.replicas) == ["a/tiny"]
    assert made.replicas["a/tiny"].sizing.shape.memory_bytes <= UNKNOWN_MEMORY_BYTES


def test_the_first_engine_of_the_entrys_that_a_node_has_is_used():
    entry = card_entry("8b", engine_kinds=("vllm", "llamacpp"))
    made = plan(view([node("a", cards=1, kinds=("llamacpp",)), node("b", cards=1)], [entry], [wish("8b", None)]))
    kinds = {replica.node_id: replica.sizing.engine_kind for replica in made.replicas.values()}
    assert kinds == {"a": "llamacpp", "b": "vllm"}
    assert made.replicas["a/8b"].sizing.shape.card_uuids == ()


def test_a_model_of_owners_own_engines_runs_where_they_serve_it():
    file = ModelFile(ModelId("llama"), "attach:llama3.2:3b", "", "", 0)
    entry = replace(TINY, model_id=ModelId("llama"), file=file, engine_kinds=("attach",))
    nodes = [node("a", attached=("llama3.2:3b",)), node("b", attached=("other",))]
    made = plan(view(nodes, [entry], [wish("llama", None)]))
    assert places(made, "llama") == {"a"}
    assert made.desired["a"][0].engine_kind == "attach"


def test_a_node_without_enough_free_disk_comes_last():
    entry = machine_entry("small", 3 * GIB)
    nodes = [node("a", disk_free_bytes=GIB), node("b", disk_free_bytes=50 * GIB)]
    made = plan(view(nodes, [entry], [wish("small", 1)]))
    assert places(made, "small") == {"b"}
    assert places(plan(view(nodes[:1], [entry], [wish("small", 1)])), "small") == {"a"}


def test_slots_are_as_many_as_the_cache_holds():
    (replica,) = plan(view([node("a", cards=1)], [card_entry("32b")], [wish("32b", 1)])).replicas.values()
    assert 1 <= replica.sizing.slot_count < card_entry("32b").slot_count


def test_a_bridge_between_cards_that_have_none_is_not_believed():
    odd = cards(2, "NVIDIA GeForce RTX 4090", node="a")
    assert odd[0].nvlink_peer_uuids
    made = plan(view([node("a", cards=odd)], [card_entry("70b")], [wish("70b", 1)]))
    assert len(made.replicas["a/70b"].sizing.shape.card_uuids) == 2


def test_a_model_that_two_cards_are_too_few_for_takes_three_as_stages_of_vllm_and_not_of_sglang():
    held = dict.fromkeys(("GPU-0", "GPU-1", "GPU-2"), 6 * GIB)
    three = node(
        "a", cards=tuple(replace(card, uuid=f"GPU-{place}") for place, card in enumerate(cards(3, node="a"))), card_foreign_bytes=held
    )
    three = replace(three, inventory=replace(three.inventory, engine_kinds=("vllm", "sglang")))
    shape = plan(view([three], [card_entry("70b")], [wish("70b", 1)])).replicas["a/70b"].sizing.shape
    assert (len(shape.card_uuids), shape.tensor_parallel_size, sum(shape.stage_layer_counts)) == (3, 1, 80)
    assert not plan(view([three], [card_entry("70b", engine_kinds=("sglang",))], [wish("70b", 1)])).replicas


# Staying.


def test_a_plan_made_again_of_the_same_facts_is_the_same():
    before = view([node("a", cards=2), node("b"), node("c", cards=1)], [TINY, card_entry("8b")], [wish("tiny", None), wish("8b", 2)])
    made = plan(before)
    again = plan(later(before, made, seconds=0))
    assert (again.replicas, again.desired) == (made.replicas, made.desired)


def test_a_node_that_went_keeps_its_replica_for_a_while_and_then_another_gets_one():
    before = view([node("a"), node("b")], [TINY], [wish("tiny", 1)])
    made = plan(before)
    ((replica_id, replica),) = made.replicas.items()
    away = {"said": {}, **gone(before, replica.node_id, before.now_seconds)}
    soon = plan(later(before, made, ABSENCE_SECONDS_MAX - 1, **away))
    assert list(soon.replicas) == [replica_id]
    late = plan(later(before, made, ABSENCE_SECONDS_MAX, **away))
    assert places(late, "tiny") == {"a", "b"}
    # Once the other one answers, the first is given up; if it comes back before, it is kept.
    stand_in = next(key for key in late.replicas if key != replica_id)
    taken_over = plan(later(before, late, ABSENCE_SECONDS_MAX + 60, **(away | {"said": answering(late, except_for={replica_id})})))
    assert list(taken_over.replicas) == [stand_in]
    came_back = plan(later(before, late, ABSENCE_SECONDS_MAX + 60, said=answering(late, except_for={stand_in})))
    assert list(came_back.replicas) == [replica_id]


def test_where_every_node_is_to_have_one_none_moves():
    before = view([node("a"), node("b")], [TINY], [wish("tiny", None)])
    made = plan(before)
    late = plan(later(before, made, 10 * ABSENCE_SECONDS_MAX, said={}, **gone(before, "a", before.now_seconds)))
    assert late.replicas == made.replicas


@pytest.mark.parametrize(("card", "moves"), [("NVIDIA GeForce RTX 3090 Ti", False), ("NVIDIA GeForce RTX 5090", True)])
def test_a_satisfied_replica_moves_for_twenty_per_cent_and_no_less(card, moves):
    before = view([node("old", cards=1)], [card_entry("8b")], [wish("8b", 1)])
    made = plan(before)
    better = node("new", cards=cards(1, card, node="new"))
    score = plan(view([better], [card_entry("8b")], [wish("8b", 1)])).replicas["new/8b"].sizing.score
    gain = score / made.replicas["old/8b"].sizing.score
    assert gain > 1
    assert (gain >= 1.2) == moves
    moving = later(before, made, nodes=dict(before.nodes) | {NodeId("new"): better})
    after = plan(moving)
    assert ("new/8b" in after.replicas) == moves
    assert after.replicas["old/8b"].phase is Phase.WISHED


def test_what_moves_answers_until_the_new_one_does_and_finishes_what_it_has_begun():
    before = view([node("old", cards=1)], [card_entry("8b")], [wish("8b", 1)])
    made = plan(before)
    nodes = dict(before.nodes) | {NodeId("new"): node("new", cards=cards(1, "NVIDIA H100 80GB HBM3", 80 * GIB, "new"))}
    moving = later(before, made, nodes=nodes)
    begun = plan(moving)
    assert begun.replicas["new/8b"].replaces == "old/8b"
    waiting = plan(later(moving, begun, 60, said=answering(begun, except_for={"new/8b"})))
    assert (waiting.replicas["old/8b"].phase, waiting.leaving) == (Phase.WISHED, frozenset())
    busy = later(moving, begun, 60, attempt_counts={"old/8b": 1})
    leaving = plan(busy)
    assert (leaving.leaving, leaving.replicas["new/8b"].replaces) == ({"old/8b"}, None)
    assert [engine.replica_id for engine in leaving.desired["old"]] == ["old/8b"]
    patient = plan(later(busy, leaving, LEAVING_SECONDS_MAX - 1))
    assert patient.leaving == {"old/8b"}
    stopped = plan(later(busy, leaving, LEAVING_SECONDS_MAX))
    assert stopped.desired["old"] == ()
    assert plan(later(busy, leaving, 1, attempt_counts={})).desired["old"] == ()


def test_a_move_that_fails_is_taken_back():
    before = view([node("old", cards=1)], [card_entry("8b")], [wish("8b", 1)])
    made = plan(before)
    nodes = dict(before.nodes) | {NodeId("new"): node("new", cards=cards(1, "NVIDIA H100 80GB HBM3", 80 * GIB, "new"))}
    moving = later(before, made, nodes=nodes)
    begun = plan(moving)
    after = plan(later(moving, begun, troubles={("new", "8b", "new/8b"): REFUSED}, said=answering(begun, except_for={"new/8b"})))
    assert list(after.replicas) == ["old/8b"]


# Making room.


def idle_pool(*, tier=ServiceTier.DEFAULT, wanted=1):
    """One card, on which `8b` has been idle for long, and a wish for `32b`."""
    entries = [card_entry("8b"), card_entry("32b")]
    before = view([node("a", cards=1)], entries, [wish("8b", 1)])
    made = plan(before)
    return later(before, made, IDLE_SECONDS, deployments=(wish("8b", 1), wish("32b", wanted, tier)))


def test_an_idle_replica_makes_room_only_when_requests_wait_for_the_other_model():
    pool = idle_pool()
    assert set(plan(pool).replicas) == {"a/8b"}
    asked = replace(pool, waiting_counts={ModelId("32b"): 1})
    made = plan(asked)
    assert (made.replicas["a/8b"].phase, made.replicas["a/32b"].phase) == (Phase.STOPPING, Phase.WAITING)
    assert made.desired["a"] == ()
    # The card is free once its node says so, and not before.
    still = plan(later(asked, made, 1, said={NodeId("a"): (status("a/8b", "8b", EngineState.STOPPING),)}))
    assert still.desired["a"] == ()
    free = plan(later(asked, made, 2, said={}))
    assert [engine.replica_id for engine in free.desired["a"]] == ["a/32b"]
    assert set(free.replicas) == {"a/32b"}


@pytest.mark.parametrize(
    "changes",
    [
        {"attempt_counts": {"a/8b": 1}},
        {"waiting_counts": {ModelId("32b"): 1, ModelId("8b"): 1}},
        {"used_at": {"a/8b": 1001.0}},
    ],
    ids=["it answers", "requests wait for it", "it was used lately"],
)
def test_a_replica_that_is_needed_makes_no_room(changes):
    assert set(plan(replace(idle_pool(), **({"waiting_counts": {ModelId("32b"): 1}} | changes))).replicas) == {"a/8b"}


def test_the_default_tier_takes_from_flex_and_never_the_other_way_round():
    flex_asks = replace(idle_pool(tier=ServiceTier.FLEX), waiting_counts={ModelId("32b"): 1})
    assert set(plan(flex_asks).replicas) == {"a/8b"}
    flex_has = replace(idle_pool(), deployments=(wish("8b", 1, ServiceTier.FLEX), wish("32b", 1)))
    assert plan(flex_has).replicas["a/8b"].phase is Phase.STOPPING


def test_without_requests_only_a_wish_that_is_met_better_gives_and_not_its_last():
    entries = [card_entry("8b"), card_entry("32b")]
    before = view([node("a", cards=1), node("b", cards=1)], entries, [wish("8b", 2)])
    made = plan(before)
    both = plan(later(before, made, IDLE_SECONDS, deployments=(wish("8b", 2), wish("32b", 2))))
    assert sorted(replica.phase for replica in both.replicas.values()) == [Phase.STOPPING, Phase.WAITING, Phase.WISHED]


def test_the_longest_unused_leaves_first():
    entries = [machine_entry(name, 3 * GIB) for name in ("one", "two", "three")]
    before = view([node("a", budget_gib=8)], entries, [wish("one", 1), wish("two", 1)])
    made = plan(before)
    wishes = (wish("one", 1), wish("two", 1), wish("three", 1))
    used_at = {"a/one": before.now_seconds + 60, "a/two": before.now_seconds + 30}
    after = plan(
        later(before, made, 2 * IDLE_SECONDS, deployments=wishes, used_at=used_at, waiting_counts={ModelId("three"): 1}),
    )
    assert {key: replica.phase for key, replica in after.replicas.items()} == {
        "a/one": Phase.WISHED,
        "a/two": Phase.STOPPING,
        "a/three": Phase.WAITING,
    }


# Leaving.


def test_what_is_not_wished_any_more_leaves():
    before = view([node("a"), node("b")], [TINY], [wish("tiny", 2)])
    made = plan(before)
    fewer = plan(later(before, made, deployments=(wish("tiny", 1),)))
    assert len(places(fewer, "tiny")) == 1
    assert sorted(map(len, fewer.desired.values())) == [0, 1]
    nothing = plan(later(before, made, deployments=()))
    assert set(nothing.desired.values()) == {()}
    assert plan(later(before, nothing, deployments=(), said={})).replicas == {}


def test_a_model_that_lost_its_files_stops_at_once():
    before = view([node("a")], [TINY], [wish("tiny", 1)])
    made = plan(before)
    for catalogue in ({}, {TINY.model_id: replace(TINY, file=None, repository="hf:org/tiny")}):
        after = plan(later(before, made, catalogue=catalogue, attempt_counts={"a/tiny": 1}))
        assert after.desired["a"] == ()
        assert after.replicas["a/tiny"].phase is Phase.STOPPING


def test_a_refusal_is_gone_round_and_the_node_keeps_the_wish_until_another_answers():
    before = view([node("a"), node("b")], [TINY], [wish("tiny", 1)])
    made = plan(before)
    ((replica_id, replica),) = made.replicas.items()
    troubles = {(replica.node_id, ModelId("tiny"), replica_id): REFUSED}
    after = plan(later(before, made, troubles=troubles, said={}))
    assert places(after, "tiny") == {"a", "b"}
    settled = plan(later(before, after, 2, troubles=troubles, said=answering(after, except_for={replica_id})))
    assert replica_id not in settled.replicas


def test_an_entry_that_changed_is_served_anew_in_the_same_place():
    before = view([node("a", cards=1), node("b", cards=1)], [card_entry("8b")], [wish("8b", 1)])
    made = plan(before)
    shorter = replace(card_entry("8b"), context_length_tokens=2048)
    after = plan(later(before, made, catalogue={shorter.model_id: shorter}))
    assert after.replicas.keys() == made.replicas.keys()
    (engine,) = [engine for engines in after.desired.values() for engine in engines]
    assert engine.context_length_tokens == 2048


def test_a_node_that_lost_a_card_loses_what_ran_there():
    before = view([node("a", cards=2)], [card_entry("8b")], [wish("8b", 2)])
    made = plan(before)
    lesser = node("a", cards=cards(2, node="a")[:1])
    after = plan(later(before, made, nodes={lesser.node_id: lesser}))
    assert sorted(replica.phase for replica in after.replicas.values()) == [Phase.STOPPING, Phase.WISHED]
    assert [engine.shape.card_uuids for engine in after.desired["a"]] == [("GPU-a-0",)]
