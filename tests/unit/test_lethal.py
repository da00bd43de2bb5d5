"""Which requests are refused for good, by whose engines died of them alone, and which are forgotten."""

from __future__ import annotations

from dataclasses import replace

import pytest

from potluck_coordinator.domain import lethal
from potluck_coordinator.domain.lethal import (
    DEATHS_HEARD_MAX,
    DEATHS_HEARD_SECONDS,
    SUSPECT_KEPT_MS,
    LethalRequest,
    LoneDeath,
    after_death,
    forgotten,
    is_heard,
)
from potluck_protocol.culprits import Fingerprint
from potluck_protocol.values import AccountId, AttemptId

K = Fingerprint(b"k")


def after(*deaths: str) -> LethalRequest:
    """Each death is an attempt's name and an owner; with "!", of the only one who has the model."""
    known = None
    for number, death in enumerate(deaths):
        attempt_id, owner = death.rstrip("!").split()
        known = after_death(known, LoneDeath(AttemptId(attempt_id), K, AccountId(owner), death.endswith("!")), 1000 + number)
    assert known is not None
    return known


@pytest.mark.parametrize(
    ("deaths", "refused_at"),
    [
        (("a1 ann",), None),
        (("a1 ann!",), None),
        (("a1 ann", "a2 bob"), 1001),
        (("a1 ann", "a2 ann"), None),  # one owner's word, with others to be asked
        (("a1 ann", "a2 ann", "a3 ann", "a4 bob"), 1003),
        (("a1 ann!", "a2 ann!"), 1001),  # nobody else can be asked
        (("a1 ann!", "a1 ann!"), None),  # one death, told again
        (("a1 ann", "a2 bob", "a3 cid"), 1001),
    ],
)
def test_by_whose_engines_died(deaths, refused_at):
    assert after(*deaths).refused_at_unix_ms == refused_at


def test_the_oldest_make_room_and_those_only_suspected_first(monkeypatch):
    monkeypatch.setattr(lethal, "LETHAL_MAX", 2)
    suspect = after("a1 ann")
    known = [
        replace(suspect, fingerprint=Fingerprint(name), died_at_unix_ms=at, refused_at_unix_ms=refused)
        for name, at, refused in ((b"old refused", 1, 5), (b"new refused", 1, 9), (b"old", 2, None), (b"new", 3, None))
    ]
    assert set(forgotten(known, 1000)) == {b"old", b"new"}
    newest = replace(known[0], fingerprint=Fingerprint(b"newest refused"), refused_at_unix_ms=10)
    assert set(forgotten([*known, newest], 1000)) == {b"old", b"new", b"old refused"}
    assert forgotten(known[:2], 1000) == ()
    assert forgotten(known[1:3], 1000) == ()


def test_a_suspect_is_forgotten_by_and_by_and_what_is_refused_never():
    suspect, refused = after("a1 ann"), after("a1 ann", "a2 bob")
    for later_ms, gone in ((SUSPECT_KEPT_MS - 1, ()), (SUSPECT_KEPT_MS, (K,)), (100 * SUSPECT_KEPT_MS, (K,))):
        assert forgotten([suspect], suspect.died_at_unix_ms + later_ms) == gone
        assert forgotten([refused], suspect.died_at_unix_ms + later_ms) == ()
    death = LoneDeath(AttemptId("a2"), K, AccountId("bob"), is_only_owner=False)
    at = suspect.died_at_unix_ms + SUSPECT_KEPT_MS
    assert after_death(suspect, death, at - 1).refused_at_unix_ms == at - 1
    assert after_death(suspect, death, at) == LethalRequest(K, AttemptId("a2"), AccountId("bob"), at)
    assert after_death(refused, death, at) == refused


def test_an_owner_whose_nodes_claim_many_deaths_pushes_out_his_own_suspects_only(monkeypatch):
    monkeypatch.setattr(lethal, "SUSPECTS_PER_OWNER_MAX", 2)
    ann, bob = after("a1 ann"), after("a1 bob")
    known = [replace(ann, fingerprint=Fingerprint(b"%d" % at), died_at_unix_ms=at) for at in range(4)]
    others = [replace(bob, fingerprint=Fingerprint(b"bob's")), replace(ann, fingerprint=Fingerprint(b"refused"), refused_at_unix_ms=1)]
    assert set(forgotten([*others, *known], 1000)) == {b"0", b"1"}


def test_of_one_node_so_many_deaths_are_heard_in_so_long():
    heard_at = [float(second) for second in range(DEATHS_HEARD_MAX)]
    assert is_heard(heard_at[1:], 9.0)
    assert not is_heard(heard_at, DEATHS_HEARD_SECONDS - 0.1)
    assert is_heard(heard_at, DEATHS_HEARD_SECONDS)
