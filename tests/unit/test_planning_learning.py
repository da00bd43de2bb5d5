"""What running replicas show of predictions, and what is made of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from potluck_coordinator.directory.planner import Planner, PoolFacts, _figures
from potluck_coordinator.domain.fit.architecture import GIB
from potluck_coordinator.domain.fit.corrections import NOTHING_LEARNED, Measure
from potluck_coordinator.domain.fit.fitting import fit
from potluck_coordinator.domain.planning.learning import observations
from potluck_coordinator.domain.planning.node_kinds import Room, engine_versions, hardware_of, whole_room
from potluck_coordinator.domain.planning.plan import plan
from potluck_coordinator.domain.planning.sizing import Sizer, architecture_of
from potluck_protocol.values import EngineState
from tests.support.planning import card_entry, machine_entry, node, status, view, wish

ENTRY = card_entry("32b")


def running(**changes):
    """A replica on one card, and what its node says of it."""
    box = node("a", cards=1)
    (replica,) = plan(view([box], [ENTRY], [wish("32b", 1)])).replicas.values()
    said = said_of(replica, **({"engine_version": "0.32.0", "memory_utilization_percent": 95} | changes))
    return replace(box, engines=(said,)), replica, said


def said_of(replica, **changes):
    """What a node says of a replica that came up as it was planned."""
    planned = {"context_length_tokens": replica.sizing.context_length_tokens, "engine_kind": replica.sizing.engine_kind}
    return replace(status(replica.replica_id, replica.model_id), **(planned | changes))


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
    rates = {"decode_tokens_per_second": 40.0, "prefill_tokens_per_second": 900.0}
    assert set(shown(kv_capacity_tokens=1, **rates)) == set(Measure) - {Measure.MEMORY}
    assert shown() == {}


def fitted(context_length_tokens: int = ENTRY.context_length_tokens):
    """What the fit says of the replica's one card."""
    box, replica, _ = running()
    room = Room(frozenset(replica.sizing.shape.card_uuids), replica.sizing.shape.memory_bytes)
    hardware, _ = hardware_of(box, room, on_cards=True)
    architecture = architecture_of(ENTRY)
    return fit(architecture, [hardware], engine_kind="vllm", context_length_tokens=context_length_tokens, sequence_count_wanted=1).shapes[0]


def test_memory_is_compared_without_the_cache_that_it_holds():
    predicted = fitted()
    (card,) = predicted.memory
    beside_bytes = card.weight_bytes + card.overhead_bytes
    found = shown(memory_bytes=beside_bytes + GIB + 9_000 * predicted.kv_bytes_per_token, kv_capacity_tokens=9_000)[Measure.MEMORY]
    assert (found.observed, found.predicted) == (beside_bytes + GIB, beside_bytes)
    assert Measure.MEMORY not in shown(memory_bytes=20 * GIB)
    assert Measure.MEMORY not in shown(kv_capacity_tokens=9_000)


def test_memory_of_several_cards_is_compared_together():
    wide = replace(card_entry("70b"), context_length_tokens=2048)
    box = node("a", cards=2)
    (replica,) = plan(view([box], [wide], [wish("70b", 1)])).replicas.values()
    assert len(replica.sizing.shape.card_uuids) == 2
    said = said_of(replica, engine_version="0.32.0", memory_bytes=44 * GIB, kv_capacity_tokens=1_000)
    (found,) = (each for each in observations(wide, box, replica, said) if each.measure is Measure.MEMORY)
    per_token_bytes = architecture_of(wide).sequence_kv_bytes(2048) / 2048
    assert found.observed == pytest.approx(44 * GIB - 1_000 * per_token_bytes, rel=1e-6)
    assert 36 * GIB < found.predicted < 44 * GIB


def test_without_cards_neither_cache_nor_memory_is_compared():
    entry = machine_entry("small", architecture=ENTRY.architecture)
    box = node("a", memory_gib=64)
    (replica,) = plan(view([box], [entry], [wish("small", 1)])).replicas.values()
    said = said_of(replica, memory_bytes=9 * GIB, kv_capacity_tokens=9_000, decode_tokens_per_second=2.0)
    assert {each.measure for each in observations(entry, box, replica, said)} == {Measure.DECODE}


def test_rates_are_compared_at_the_length_that_they_were_measured_over():
    told = {"prefill_tokens_per_second": 900.0, "decode_tokens_per_second": 40.0}
    for past_tokens in (300, 1_500):
        found = shown(**told, prefill_past_tokens=past_tokens, decode_past_tokens=past_tokens)
        rates = fitted(2 * past_tokens).rates
        assert found[Measure.PREFILL].predicted == pytest.approx(rates.prefill)
        assert found[Measure.DECODE].predicted == pytest.approx(rates.decode_single)
    silent = shown(**told)
    assert silent[Measure.DECODE].predicted == pytest.approx(fitted().rates.decode_single)
    far = shown(**told, decode_past_tokens=2**60)[Measure.DECODE]
    assert far.predicted == pytest.approx(fitted(ENTRY.architecture.context_length_max_tokens).rates.decode_single)


@pytest.mark.parametrize("other", [{"context_length_tokens": 2048}, {"engine_kind": "sglang"}])
def test_an_engine_that_runs_otherwise_than_planned_shows_nothing(other):
    assert shown(kv_capacity_tokens=9_000)
    assert shown(kv_capacity_tokens=9_000, **other) == {}


@pytest.mark.parametrize("state", [state for state in EngineState if state is not EngineState.READY])
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
            replace(ENTRY, slot_count=100, context_length_tokens=256), sizer.kind_of(other), whole_room(other.inventory)
        ).slot_count

    assert slots(Sizer(first, (("vllm", "0.32.0"),))) < slots(Sizer())
    assert slots(Sizer(first)) == slots(Sizer())


def test_what_was_learned_outlives_the_directory(database_url):
    from potluck_coordinator.storage.state import StateName
    from tests.support.books import open_books

    box, replica, _ = running(kv_capacity_tokens=5_000)
    planner = Planner({replica.replica_id: replica}, {}, 0, NOTHING_LEARNED, 1000.0)
    planner.advance(PoolFacts((wish("32b", 1),), {ENTRY.model_id: ENTRY}, {box.node_id: box}), 1000.0)
    with open_books(database_url) as books:
        assert books.run_now(lambda work: work.plan.corrections()) == NOTHING_LEARNED
        books.run_now(lambda work: work.plan.keep_corrections(planner.corrections))
        assert books.run_now(lambda work: work.plan.corrections()) == planner.corrections
        books.run_now(lambda work: work.state.put(StateName.FIT_CORRECTIONS, '{"ratios": 5}'))
        assert books.run_now(lambda work: work.plan.corrections()) == NOTHING_LEARNED


def test_the_version_that_most_replicas_answer_with_counts_and_of_equally_many_the_newest():
    def told(*versions, kind="vllm", state=EngineState.READY):
        return [replace(status("a/m", "m", state), engine_kind=kind, engine_version=version) for version in versions]

    assert engine_versions(told("0.9.2", "0.32.0", "0.9.2")) == {"vllm": "0.9.2"}
    assert engine_versions(told("0.9.2", "0.10.1")) == {"vllm": "0.10.1"}
    assert engine_versions(told("0.9.1b", "0.9.1a")) == {"vllm": "0.9.1b"}
    assert engine_versions([*told("0.9.2", ""), *told("1.0", "1.0", state=EngineState.STARTING)]) == {"vllm": "0.9.2"}
    assert engine_versions([*told("0.9.2"), *told("0.5.3", kind="sglang"), *told("7", kind="attach")]) == {
        "vllm": "0.9.2",
        "sglang": "0.5.3",
    }


def test_what_sglang_shows_is_learned_and_looked_up_as_sglangs_whatever_else_its_node_runs():
    entry = replace(ENTRY, engine_kinds=("sglang",))
    box = node("a", cards=1, kinds=("vllm", "sglang"))
    (replica,) = plan(view([box], [entry], [wish("32b", 1)])).replicas.values()
    said = said_of(replica, engine_version="0.5.3", kv_capacity_tokens=5_000)
    beside = replace(status("a/8b", "8b"), engine_kind="vllm", engine_version="0.9.2")
    box = replace(box, engines=(said, beside))
    (found,) = observations(entry, box, replica, said)
    assert found.key.engine == "sglang 0.5.3"
    planner = Planner({replica.replica_id: replica}, {}, 0, NOTHING_LEARNED, 1000.0)
    planner.advance(PoolFacts((wish("32b", 1),), {entry.model_id: entry}, {box.node_id: box}), 1000.0)

    def slots(kind, versions):
        asked = replace(entry, engine_kinds=(kind,), slot_count=100, context_length_tokens=256)
        sizer = Sizer(planner.corrections, versions)
        return sizer.size(asked, sizer.kind_of(box), whole_room(box.inventory)).slot_count

    versions = planner._sizer.versions
    assert versions == (("sglang", "0.5.3"),)
    assert slots("sglang", versions) < slots("sglang", ())
    assert slots("vllm", (("vllm", "0.5.3"),)) == slots("vllm", ())


def test_memory_that_moves_calls_for_a_new_fit_on_cards_only_and_only_by_a_step():
    step = GIB // 16
    said = [replace(status("a/m", "m"), memory_bytes=held) for held in (10 * step, 9 * step + 1, 11 * step)]
    same, near, far = (_figures(each, on_cards=True) for each in said)
    assert same == near != far
    assert len({_figures(each, on_cards=False) for each in said}) == 1
