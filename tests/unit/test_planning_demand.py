"""How much room requests may take for a model: what waits, and what one planner is told of it."""

from __future__ import annotations

import itertools
from dataclasses import replace

from potluck_coordinator.directory.planner import Planner, PoolFacts
from potluck_coordinator.domain.fit.corrections import NOTHING_LEARNED
from potluck_coordinator.domain.planning.plan import plan
from potluck_coordinator.domain.planning.words import IDLE_SECONDS, Phase
from potluck_protocol.values import EngineState, ModelId
from tests.support.planning import card_entry, cards, node, status, view, wish
from tests.unit.test_planning import answering, later

IDLE, WANTED = ModelId("8b"), ModelId("32b")
ENTRIES = [card_entry("8b"), card_entry("32b")]
NAMES = ("a", "b", "c", "d")


def idle_pool(**changes):
    """Four cards, each with an idle replica of `8b`, and four replicas of `32b` wished."""
    before = view([node(name, cards=1) for name in NAMES], ENTRIES, [wish("8b", 4)])
    made = plan(before)
    asked = {"deployments": (wish("8b", 4), wish("32b", 4)), "waiting_counts": {WANTED: 1}}
    return later(before, made, IDLE_SECONDS, **(asked | changes))


def nodes_of(made, model_id):
    return {replica.node_id for replica in made.replicas.values() if replica.model_id == model_id and replica.phase is not Phase.STOPPING}


def test_demand_takes_room_for_one_replica_at_a_time_beyond_what_wishes_share_anyway():
    pool = idle_pool()
    without = plan(replace(pool, waiting_counts={}))
    shared_count = len(nodes_of(without, WANTED))
    assert 0 < shared_count < len(NAMES)
    made = plan(pool)
    assert len(nodes_of(made, WANTED)) <= shared_count
    assert nodes_of(made, IDLE)
    # While those are on their way, however long it takes, nothing more is taken.
    starting = pool
    for _ in range(3):
        starting = later(starting, made, IDLE_SECONDS, said=answering(made, except_for={f"{name}/32b" for name in NAMES}))
        made = plan(starting)
        assert len(nodes_of(made, WANTED)) <= shared_count
    # Each that answers while requests wait still makes room for one more.
    counts = [len(nodes_of(made, WANTED))]
    while counts[-1] < len(NAMES):
        starting = later(starting, made, IDLE_SECONDS, said=answering(made))
        made = plan(starting)
        counts.append(len(nodes_of(made, WANTED)))
        assert len(counts) < 20
    assert all(after - before <= 1 for before, after in itertools.pairwise(counts))


def planner_of(box, entry):
    made = plan(view([box], [entry], [wish(entry.model_id, 1)]))
    return Planner(made.replicas, {}, 0, NOTHING_LEARNED, 1000.0)


def test_nothing_is_learned_from_what_a_node_says_of_anothers_replica():
    owner, liar = node("a", cards=1), node("b", cards=cards(1, node="b"))
    planner = planner_of(owner, ENTRIES[1])
    said = status("a/32b", "32b", kv_capacity_tokens=5_000, context_length_tokens=4096)
    facts = PoolFacts((wish("32b", 1),), {WANTED: ENTRIES[1]}, {"a": owner, "b": replace(liar, engines=(said,))})
    planner.advance(facts, 1000.0)
    assert planner.corrections == NOTHING_LEARNED
    planner.advance(replace(facts, nodes={"a": replace(owner, engines=(said,)), "b": liar}), 1001.0)
    assert planner.corrections != NOTHING_LEARNED


def test_a_refusal_is_remembered_of_what_is_planned_there_only():
    box = node("a", cards=1)
    planner = planner_of(box, ENTRIES[1])
    refusals = tuple(status(f"a/{model_id}", model_id, EngineState.REFUSED, failure="no\x07 " * 200) for model_id in ("32b", "8b", "own"))
    planner.advance(PoolFacts((wish("32b", 1),), {WANTED: ENTRIES[1]}, {"a": replace(box, engines=refusals)}), 1000.0)
    ((key, trouble),) = planner._troubles.items()
    assert key == ("a", "32b", "a/32b")
    assert (len(trouble.reason), trouble.reason.isprintable()) == (200, True)
