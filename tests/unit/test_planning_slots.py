"""A place is worth what it does with the slots that the replica gets there, not with all that its cache would hold."""

from __future__ import annotations

from dataclasses import replace

from potluck_coordinator.domain.planning.plan import plan
from potluck_coordinator.domain.planning.words import Phase
from tests.support.planning import GIB, card_entry, cards, node, status, view, wish

ENTRY = card_entry("8b", slot_count=2, context_length_tokens=8192)
A6000 = node("slower", cards=cards(1, "NVIDIA RTX A6000", 48 * GIB, node="slower"))
RTX_3090 = node("faster", cards=1)


def only(made):
    (replica,) = made.replicas.values()
    return replica


def test_a_card_is_chosen_by_what_it_does_with_the_slots_of_the_entry():
    """The A6000 holds twice as many sequences, which is worth nothing to two slots; it reads slower."""
    replica = only(plan(view([A6000, RTX_3090], [ENTRY], [wish("8b", 1)])))
    assert replica.sizing.slot_count == 2
    assert replica.node_id == "faster"


def test_more_slots_are_worth_more():
    def score(slot_count):
        return only(plan(view([RTX_3090], [replace(ENTRY, slot_count=slot_count)], [wish("8b", 1)]))).sizing.score

    assert score(1) < score(2) < score(8)


def test_a_satisfied_replica_is_not_moved_for_sequences_that_no_slot_would_take():
    """The larger card would do 30 % more with a batch that fills its cache, and does less with two slots."""
    small = node("small", cards=cards(1, "NVIDIA GeForce RTX 3060", 12 * GIB, node="small"))
    large = node("large", cards=cards(1, "NVIDIA GeForce RTX 4060 Ti", 16 * GIB, node="large"))
    before = view([small], [ENTRY], [wish("8b", 1)])
    made = plan(before)
    said = replace(small, engines=(status(only(made).replica_id, "8b"),))
    again = plan(replace(before, standing=made.replicas, nodes={each.node_id: each for each in (said, large)}, now_seconds=2000.0))
    assert [(one.node_id, one.phase) for one in again.replicas.values()] == [("small", Phase.WISHED)]
