"""What the sizer keeps of nodes."""

from __future__ import annotations

import gc
import re
import weakref
from dataclasses import replace

from potluck_coordinator.domain.catalogue import Deployment
from potluck_coordinator.domain.fit.architecture import GIB
from potluck_coordinator.domain.planning import sizing
from potluck_coordinator.domain.planning.node_kinds import model_node, whole_room
from potluck_coordinator.domain.planning.plan import drafted
from potluck_coordinator.domain.planning.sizing import Misfit, Sizer
from potluck_coordinator.domain.planning.words import PlanningView
from potluck_protocol.values import ModelId
from tests.support.planning import card_entry, cards, node, status


def test_a_node_that_says_something_else_each_time_takes_one_place_and_no_more():
    sizer, box = Sizer(), node("a", cards=2)
    (first, second) = (card.uuid for card in box.inventory.accelerators)
    for held in range(1, 50):
        sizer.kind_of(replace(box, card_foreign_bytes={first: held * GIB // 16, second: GIB}))
    assert len(sizer._nodes) == 1
    assert max(len(key) for key in sizer._kinds) == 64


def test_what_owners_programs_hold_makes_another_kind_by_steps_only():
    sizer, box = Sizer(), node("a", cards=1)
    (card,) = box.inventory.accelerators
    little, near, far = (sizer.kind_of(replace(box, card_foreign_bytes={card.uuid: held})) for held in (1, GIB // 16, GIB))
    assert little is near
    assert little.number != far.number
    assert far.number != sizer.kind_of(box).number


def test_the_model_of_a_kind_holds_neither_engines_nor_measurements():
    model = model_node(replace(node("a", cards=1), engines=(status("a/m", "m"),), peer_measurements={"b": object()}))
    assert (model.engines, model.peer_measurements) == ((), {})


def test_engines_for_cards_run_nowhere_on_a_node_whose_cards_are_all_lost():
    sizer, entry = Sizer(), card_entry("8b")
    bare = node("a", memory_gib=64)

    def sized(box):
        return sizer.size(entry, sizer.kind_of(box), whole_room(box.inventory))

    assert not isinstance(sized(bare), Misfit)
    assert sized(replace(bare, cards_lost=True)) == Misfit("its driver reaches none of its cards")
    assert not isinstance(sized(bare), Misfit)


def test_what_is_known_is_forgotten_where_it_would_be_too_much(monkeypatch):
    monkeypatch.setattr(sizing, "KNOWN_MAX", 20)
    sizer, entry = Sizer(), card_entry("8b")
    for number in range(100):
        kind = sizer.kind_of(node(f"n{number}", memory_gib=8 + number, cards=1))
        sizer.size(entry, kind, whole_room(kind.model.inventory))
        sizer.known(("other", number), lambda number=number: number)
        memories = (sizer._nodes, sizer._kinds, sizer._questions, sizer._known, sizer._others)
        assert all(len(memory) <= 20 for memory in memories)


def test_nothing_of_a_plans_draft_waits_for_the_collector():
    box = node("a", cards=1)
    view = PlanningView(0.0, (Deployment(ModelId("8b"), 1),), {ModelId("8b"): card_entry("8b")}, {box.node_id: box}, Sizer(), {})
    collects = gc.isenabled()
    gc.disable()
    try:
        draft = drafted(view)
        assert draft.replicas
        left = weakref.ref(draft)
        del draft
        assert left() is None
    finally:
        if collects:
            gc.enable()


def test_a_model_of_unknown_architecture_gets_cards_that_are_bridged():
    apart = tuple(card for pair in zip(cards(2, node="x"), cards(2, node="y"), strict=True) for card in pair)
    sizer, box = Sizer(), node("a", cards=apart)
    sized = sizer.size(card_entry("70b", architecture=None), sizer.kind_of(box), whole_room(box.inventory))
    assert not isinstance(sized, Misfit)
    assert sized.shape.card_uuids == ("GPU-x-0", "GPU-x-1")


def test_sglang_is_said_not_to_be_started_with_stages_where_that_is_why_it_does_not_fit():
    sizer, box = Sizer(), node("a", cards=3, kinds=("sglang",))
    held = replace(box, card_foreign_bytes={card.uuid: 6 * GIB for card in box.inventory.accelerators})
    reasons = [
        sizer.size(card_entry("70b", engine_kinds=("sglang",)), sizer.kind_of(each), whole_room(each.inventory)).reason
        for each in (held, node("b", cards=1, kinds=("sglang",)))
    ]
    assert re.search(r"^tensor parallel 2 .+ weights .+; it would fit with layers over 3 cards .+ sglang is not started so", reasons[0])
    assert "not started" not in reasons[1]
