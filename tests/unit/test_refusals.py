"""The demand for what has no replica: who was refused lately, and that asking often makes nobody more."""

from __future__ import annotations

from potluck_coordinator.gateway.refusals import ACCOUNTS_MAX, REFUSED_SECONDS, Refusals
from potluck_protocol.values import AccountId, ModelId
from tests.support.books import MovableClock

TINY, OTHER = ModelId("tiny"), ModelId("other")
ANN, BOB = AccountId("ann"), AccountId("bob")


def test_who_asks_again_and_again_counts_once_and_for_a_minute():
    clock = MovableClock()
    refusals = Refusals(clock)
    for _ in range(100):
        refusals.note(TINY, ANN)
    refusals.note(TINY, BOB)
    refusals.note(OTHER, BOB)
    assert refusals.counts({TINY, OTHER}) == {TINY: 2, OTHER: 1}
    clock.advance(REFUSED_SECONDS - 1)
    refusals.note(TINY, ANN)
    clock.advance(2)
    assert refusals.counts({TINY, OTHER}) == {TINY: 1}


def test_a_model_that_is_no_more_is_forgotten_and_of_many_people_only_so_many_are_remembered():
    refusals = Refusals(MovableClock())
    refusals.note(OTHER, ANN)
    for number in range(ACCOUNTS_MAX + 10):
        refusals.note(TINY, AccountId(str(number)))
    assert refusals.counts({TINY}) == {TINY: ACCOUNTS_MAX}
    assert refusals.counts({TINY, OTHER}) == {TINY: ACCOUNTS_MAX}
