"""What the planner takes others to hold of a node's cards, while the node cannot always tell."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from potluck_coordinator.domain.node_view import foreign_bytes_known
from potluck_protocol.cards import CardTelemetry


def told(**foreign_bytes: int | None) -> tuple[CardTelemetry, ...]:
    return tuple(CardTelemetry(uuid, memory_foreign_bytes=held) for uuid, held in foreign_bytes.items())


def test_what_cannot_be_told_now_is_what_was_told_last():
    known = foreign_bytes_known({}, told(a=5, b=0, c=None))
    assert known == {"a": 5}
    known = foreign_bytes_known(known, told(a=None, b=None, c=7))
    assert known == {"a": 5, "c": 7}
    assert foreign_bytes_known(known, told(a=0, b=2, c=None)) == {"b": 2, "c": 7}


def test_a_node_that_has_not_looked_yet_takes_nothing_back_and_a_card_that_is_gone_is_forgotten():
    assert foreign_bytes_known({"a": 5}, ()) == {"a": 5}
    assert foreign_bytes_known({"a": 5, "b": 6}, told(b=None)) == {"b": 6}


@given(st.lists(st.dictionaries(st.sampled_from("abcd"), st.none() | st.integers(0, 9), max_size=4), max_size=12))
def test_nothing_is_known_that_was_never_told_and_no_more_than_the_cards_there_are(words):
    known, ever = {}, {}
    for word in words:
        known = foreign_bytes_known(known, told(**word))
        ever |= {uuid: held for uuid, held in word.items() if held is not None}
        assert all(ever[uuid] == held > 0 for uuid, held in known.items())
        assert not word or known.keys() <= word.keys()
