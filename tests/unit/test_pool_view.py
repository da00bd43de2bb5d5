"""What crosses from gateway to gateway: every field of a replica, and only the rows that changed are read again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck_coordinator.domain.placement import ReplicaView
from potluck_coordinator.domain.speeds import Speeds
from potluck_coordinator.pool_view import SharedReplica, gateway_view
from potluck_protocol.values import AccountId, Endpoint, NodeId, ReplicaId
from tests.support.replicas import replica_view

WHOLE = st.integers(0, 2**40)
REAL = st.floats(0, 1e9)
PAST = st.floats(1.0, 999.0)
TEXT = st.text(max_size=40)


def views() -> st.SearchStrategy[ReplicaView]:
    names = {"replica_id": TEXT, "node_id": TEXT, "model_id": TEXT, "owner_account_id": TEXT, "engine_kind": TEXT, "drained": TEXT}
    kinds = {"bool": st.booleans(), "int": WHOLE, "float": REAL}
    special = {
        "endpoints": st.sets(st.sampled_from(Endpoint)).map(tuple),
        "heard_at_seconds": PAST,
        "prefill_since_seconds": st.just(0.0) | PAST,
        "is_remote": st.just(False),  # whoever reads it says so
        "speeds": st.builds(Speeds, REAL, REAL, REAL, WHOLE, WHOLE, st.just(0.0) | PAST, REAL, REAL),
    }
    known = names | special
    types = {name: kind.__forward_arg__ for name, kind in ReplicaView.__annotations__.items()}
    values = {name: known[name] if name in known else kinds[kind] for name, kind in types.items()}
    return st.builds(ReplicaView, **values)


@given(st.lists(st.builds(SharedReplica, views(), WHOLE), max_size=5))
def test_every_field_arrives_as_it_was(shared):
    view = gateway_view(shared, {7: 3}, now=1000.0)
    arrived = view.replicas(now=1000.0)
    assert len(arrived) == len(view) == len(shared)
    for before, after in zip(shared, arrived, strict=True):
        assert after.epoch == before.epoch
        for name, said, read in zip(ReplicaView._fields, before.view, after.view, strict=True):
            assert read == (pytest.approx(said) if name.endswith("_seconds") or name == "speeds" else said), name


def test_times_are_ages_and_arrive_by_the_readers_clock():
    view = gateway_view([SharedReplica(replica_view(heard_at_seconds=90.0, prefill_since_seconds=0.0), 1)], {}, now=100.0)
    (arrived,) = view.replicas(now=5_000.0)
    assert arrived.view.heard_at_seconds == 4_990.0
    assert arrived.view.prefill_since_seconds == 0.0


def pool(count: int = 6, **changes: object) -> list[SharedReplica]:
    return [SharedReplica(replica_view(f"n{number}", **changes), epoch=number) for number in range(count)]


@pytest.mark.parametrize(
    "change",
    [
        {"in_flight_count": 2},
        {"ready": False},
        {"committed_tokens": 12.5},
        {"drained": "too slow"},
        {"owner_account_id": AccountId("other")},
        {"speeds": Speeds(1.0, 2.0, 3.0)},
    ],
)
def test_a_row_that_changed_is_told_from_those_that_did_not(change):
    before, after = pool(), pool()
    after[3] = SharedReplica(after[3].view._replace(**change), after[3].epoch)
    old, new = gateway_view(before, {}, 10.0), gateway_view(after, {}, 10.5)
    assert not new.says_the_same(old)
    changed = list(new.changed_since(old))
    assert 3 in changed
    # Traits are told once for all: one more of them is news of everybody.
    assert changed == ([3] if not {"drained", "owner_account_id"} & change.keys() else list(range(6)))
    assert [read.view for read in new.replicas(10.5, [3, 0])] == [after[3].view, after[0].view]


def test_ages_alone_are_no_change_and_other_replicas_are():
    old = gateway_view(pool(heard_at_seconds=1.0), {}, 10.0)
    assert gateway_view(pool(heard_at_seconds=9.0), {}, 11.0).says_the_same(old)
    assert not gateway_view(pool(heard_at_seconds=9.0), {5: 1}, 11.0).says_the_same(old)
    assert not gateway_view(pool(7), {}, 10.0).says_the_same(old)
    assert not gateway_view([], {}, 10.0).says_the_same(old)
    moved = [SharedReplica(replica_view("moved"), 0), *pool()[1:]]
    assert list(gateway_view(moved, {}, 10.0).changed_since(old)) == [0, 1, 2, 3, 4, 5]
    assert list(old.changed_since(None)) == [0, 1, 2, 3, 4, 5]


def test_names_of_any_length_arrive_whole():
    view = gateway_view([SharedReplica(replica_view(replica_id=ReplicaId("r" * 500), node_id=NodeId("n" * 300)), 1)], {}, 1.0)
    (arrived,) = view.replicas(1.0)
    assert (arrived.view.replica_id, arrived.view.node_id) == ("r" * 500, "n" * 300)
