"""What running replicas show of predictions, and what is made of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from potluck_coordinator.directory.planner import Planner, PoolFacts
from potluck_coordinator.domain.fit.corrections import NOTHING_LEARNED, Measure
from potluck_coordinator.domain.planning.learning import observations
from potluck_coordinator.domain.planning.plan import plan
from potluck_coordinator.domain.planning.sizing import Sizer, whole_room
from potluck_protocol.values import EngineState
from tests.support.planning import card_entry, machine_entry, node, status, view, wish

ENTRY = card_entry("32b")


def running(**changes):
    """A replica on one card, and what its node says of it."""
    box = node("a", cards=1)
    (replica,) = plan(view([box], [ENTRY], [wish("32b", 1)])).replicas.values()
    said = replace(status("a/32b", "32b"), **({"engine_version": "0.32.0", "memory_utilization_percent": 95} | changes))
    return replace(box, engines=(said,)), replica, said


def shown(**changes):
    box, replica, said = running(**changes)
    return {observation.measure: observation for observation in observations(ENTRY, box, replica, said)}


def test_the_cache_of_a_replica_is_set_beside_what_was_predicted_for_its_cards():
    found = shown(kv_capacity_tokens=9_000)[Measure.KV_TOKENS]
    assert (found.node_id, found.observed) == ("a", 9_000)
    assert found.predicted > 1_000
    assert (found.key.card_name, found.key.engine, found.key.model_id, found.key.quantization) == ("rtx3090", "vllm 0.32.0", "32b", "awq")


def test_an_engine_that_was_started_with_less_memory_is_compared_with_less():
    full, less = (shown(kv_capacity_tokens=1_000, memory_utilization_percent=percent)[Measure.KV_TOKENS] for percent in (95, 90))
    assert less.predicted < full.predicted


def test_rates_are_compared_where_the_engine_tells_them():
    assert set(shown(kv_capacity_tokens=1, decode_tokens_per_second=40.0, prefill_tokens_per_second=900.0)) == set(Measure) - {
        Measure.MEMORY
    }
    assert shown() == {}


@pytest.mark.parametrize("state", set(EngineState) - {EngineState.READY})
def test_an_engine_that_does_not_answer_shows_nothing(state):
    box, replica, said = running(kv_capacity_tokens=9_000)
    assert observations(ENTRY, box, replica, replace(said, state=state)) == ()


def test_a_model_without_an_architecture_shows_nothing():
    tiny = machine_entry("tiny")
    (replica,) = plan(view([node("a")], [tiny], [wish("tiny", 1)])).replicas.values()
    assert observations(tiny, node("a"), replica, status("a/tiny", "tiny", kv_capacity_tokens=5)) == ()


def test_what_one_node_showed_counts_once_and_for_others_with_the_same_card():
    box, replica, said = running(kv_capacity_tokens=5_000)
    facts = PoolFacts((wish("32b", 1),), {ENTRY.model_id: ENTRY}, {box.node_id: box})
    planner = Planner({replica.replica_id: replica}, {}, 0, NOTHING_LEARNED, 1000.0)
    planner.advance(facts, 1000.0)
    first = planner.corrections
    assert first != NOTHING_LEARNED
    planner.advance(facts, 1001.0)
    assert planner.corrections is first
    planner.advance(replace(facts, nodes={box.node_id: replace(box, engines=(replace(said, kv_capacity_tokens=20_000),))}), 1002.0)
    assert planner.corrections != first
    other = node("b", cards=1)

    def slots(sizer):
        return sizer.size(
            replace(ENTRY, slot_count=100, context_length_tokens=256), other, sizer.kind_of(other), whole_room(other.inventory)
        ).slot_count

    assert slots(Sizer(first, (("vllm", "0.32.0"),))) < slots(Sizer())
    assert slots(Sizer(first)) == slots(Sizer())


def test_what_was_learned_outlives_the_directory(tmp_path):
    from potluck_coordinator.storage.state import StateName
    from tests.support.books import open_books

    box, replica, _ = running(kv_capacity_tokens=5_000)
    planner = Planner({replica.replica_id: replica}, {}, 0, NOTHING_LEARNED, 1000.0)
    planner.advance(PoolFacts((wish("32b", 1),), {ENTRY.model_id: ENTRY}, {box.node_id: box}), 1000.0)
    with open_books(tmp_path) as books:
        assert books.run_now(lambda work: work.plan.corrections()) == NOTHING_LEARNED
        books.run_now(lambda work: work.plan.keep_corrections(planner.corrections))
        assert books.run_now(lambda work: work.plan.corrections()) == planner.corrections
        books.run_now(lambda work: work.state.put(StateName.FIT_CORRECTIONS, '{"ratios": 5}'))
        assert books.run_now(lambda work: work.plan.corrections()) == NOTHING_LEARNED
