"""Which requests are refused after engines died with them, and which are not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck_protocol import culprits
from potluck_protocol.culprits import Culprits, Fingerprint, is_culprit
from potluck_protocol.values import Endpoint

K = Fingerprint(b"k")


def prints(names: str) -> set[Fingerprint]:
    return {Fingerprint(name.encode()) for name in names}


@pytest.mark.parametrize(
    ("deaths", "refused"),
    [
        ("", False),
        ("k", False),
        ("kab", False),
        ("k k", True),  # alone both times
        ("kab k", True),  # whoever was there before is not there now
        ("kab kcd", True),
        ("kab kac", False),  # it was k or a
        ("kab kac kbd", True),  # of all three deaths only k was at each
        ("kabc kabcd kabce", True),  # one of four, and a fourth engine is not risked for the other three
        ("kabcd kabcde kabcdf", False),  # one of five
        ("kabcd kabcde kabcdf kabcdg", True),
        ("ab cd", False),
    ],
)
def test_by_who_was_there(deaths, refused):
    assert is_culprit(K, [prints(names) for names in deaths.split()]) is refused


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_refusing_one_clears_those_that_were_there_with_it():
    known = Culprits(Clock())
    known.died(prints("kab"))
    assert {name for name in "kabz" if known.is_suspect(Fingerprint(name.encode()))} == set("kab")
    known.died(prints("kcd"))
    assert known.is_refused(K)
    assert not any(known.is_refused(other) or known.is_suspect(other) for other in prints("abcd"))


def test_an_answer_in_full_clears_a_suspect_and_brings_its_companions_closer():
    known = Culprits(Clock())
    known.died(prints("ka"))
    known.clear(Fingerprint(b"a"))
    known.died(prints("ka"))
    assert known.is_refused(K)
    assert not known.is_refused(Fingerprint(b"a"))


def test_all_of_the_last_few_are_refused_where_nothing_tells_them_apart():
    known = Culprits(Clock())
    for _ in range(3):
        known.died(prints("ka"))
    assert known.is_refused(K)
    assert known.is_refused(Fingerprint(b"a"))


def test_a_great_crowd_is_not_told_apart_one_by_one():
    known = Culprits(Clock())
    crowd = {Fingerprint(bytes([number])) for number in range(culprits.LINE_UP_MAX + 1)}
    known.died(crowd)
    assert not any(known.is_suspect(one) for one in crowd)
    known.died(list(crowd)[:3])
    assert sum(known.is_suspect(one) for one in crowd) == 3


def test_nothing_is_remembered_for_ever():
    clock = Clock()
    known = Culprits(clock)
    assert not known.has_any
    known.died(prints("k"))
    clock.now += culprits.DEATH_KEPT_SECONDS + 1
    known.died(prints("k"))
    assert not known.is_refused(K)
    known.died(prints("k"))
    assert known.is_refused(K)
    clock.now += culprits.REFUSED_KEPT_SECONDS + 1
    assert not known.is_refused(K)
    assert not known.is_suspect(K)


def test_a_fingerprint_says_nothing_outside_its_process():
    one, other = Culprits(Clock()), Culprits(Clock())
    chat, text = Endpoint.CHAT_COMPLETIONS, Endpoint.COMPLETIONS
    assert one.fingerprint(chat, b"{}") == one.fingerprint(chat, b"{}")
    assert (
        len({one.fingerprint(chat, b"{}"), one.fingerprint(text, b"{}"), one.fingerprint(chat, b"{ }"), other.fingerprint(chat, b"{}")})
        == 4
    )


crowds = st.lists(st.sets(st.sampled_from("abcdefgh"), max_size=6), max_size=10)


@given(crowds)
def test_one_that_kills_alone_kills_two_and_in_company_never_more_than_four(companions):
    known = Culprits(Clock())
    death_count = 0
    for others in companions:
        if known.is_refused(K):
            break
        known.died({K, *prints("".join(others))})
        death_count += 1
    assert death_count <= culprits.DEATHS_MAX
    if all(not others for others in companions[:2]):
        assert death_count <= 2


@given(crowds)
def test_whoever_was_at_one_death_only_is_never_refused(companions):
    known = Culprits(Clock())
    for others in companions:
        known.died({K, *prints("".join(others))})
    for name in "abcdefgh":
        if sum(name in others for others in companions) <= 1:
            assert not known.is_refused(Fingerprint(name.encode()))


@given(st.lists(st.binary(min_size=1, max_size=2), max_size=200))
def test_memory_is_bounded(names):
    known = Culprits(Clock())
    for name in names:
        known.died([Fingerprint(name)])
    assert sum(known.is_suspect(Fingerprint(name)) for name in set(names)) <= culprits.DEATHS_KEPT_MAX
