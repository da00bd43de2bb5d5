"""What a decision gets to see of many replicas: few of them, the right ones, and the rest as counts that are true."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck_coordinator.domain import drain_order
from potluck_coordinator.domain.cost import cost
from potluck_coordinator.domain.drain_order import BUCKET_RATIO, DrainOrder, bucket_of
from potluck_coordinator.domain.forecast import Forecast, Work
from potluck_coordinator.domain.placement import is_free
from potluck_coordinator.domain.speeds import Speeds
from potluck_coordinator.gateway.roster import CHANCE_MAX, LEAST_MAX, WARM_MAX, Roster
from potluck_protocol.values import Endpoint, NodeId, ReplicaId
from tests.support.replicas import MODEL, replica_view, roster_of

CHAT = Endpoint.CHAT_COMPLETIONS
WORK = Work(256.0, 256.0)


def drawn(roster, work=WORK, seed=0, **changes):
    return roster.draw(MODEL, work, endpoint=CHAT, chance=Random(seed).random, **changes)


def speeds_of(scale):
    return Speeds(1000.0 * scale, 0.03 / scale, 0.001)


def test_a_decision_looks_at_no_more_replicas_in_a_large_pool():
    chance = Random(3)
    roster = roster_of(replica_view(f"n{number}", speeds=speeds_of(chance.uniform(0.2, 3))) for number in range(2000))
    warm = {ReplicaId(f"n{number}/tiny"): 200.0 for number in range(9)}
    for seed in range(20):
        offers = drawn(roster, seed=seed, warm=warm).offers
        origins = Counter(offer.origin for offer in offers)
        assert origins["warm"] == WARM_MAX
        assert origins["least work"] == LEAST_MAX
        assert 0 < origins["by chance"] <= CHANCE_MAX
        assert len({offer.replica.node_id for offer in offers}) == len(offers)
        assert {offer.replica.replica_id: offer.cached_tokens for offer in offers if offer.origin == "warm"} == dict(list(warm.items())[:4])


def test_the_least_drained_are_the_cheapest_for_a_usual_request():
    chance = Random(4)
    views = [
        replica_view(f"n{number}", speeds=speeds_of(chance.uniform(0.2, 3)), in_flight_count=chance.randrange(5)) for number in range(500)
    ]
    offers = drawn(roster_of(views)).offers
    costs = sorted(cost(view, WORK, 0.0).total_seconds for view in views if is_free(view))
    for offer in offers:
        if offer.origin == "least work":
            assert cost(offer.replica, WORK, 0.0).total_seconds <= costs[LEAST_MAX - 1] * BUCKET_RATIO


@pytest.mark.parametrize(("work", "name"), [(Work(4000.0, 10.0), "reads"), (Work(30.0, 900.0), "writes")])
def test_long_prompts_find_who_reads_well_and_long_answers_who_writes_well(work, name):
    """Among so many ordinary ones neither would be found by what a usual request costs."""
    usual = [replica_view(f"n{number}") for number in range(300)]
    reads = replica_view("reads", speeds=Speeds(6000.0, 0.06, 0.001))
    writes = replica_view("writes", speeds=Speeds(300.0, 0.01, 0.001))
    offers = drawn(roster_of([*usual, reads, writes]), work).offers
    assert name in {offer.replica.node_id for offer in offers if offer.origin == "least work"}


def test_candidates_by_chance_come_from_everywhere():
    views = [replica_view(f"n{number}", context_length_tokens=2048 + number % 3, slot_count=4) for number in range(60)]
    roster, seen = roster_of(views), Counter()
    for seed in range(900):
        seen.update(offer.replica.node_id for offer in drawn(roster, seed=seed).offers)
    assert len(seen) == 60


def test_what_is_not_drawn_is_counted_with_its_reason():
    views = [replica_view(f"free{number}") for number in range(40)]
    views += [replica_view(f"busy{number}", in_flight_count=4) for number in range(7)]
    views += [replica_view(f"off{number}", node_paused=True) for number in range(5)]
    roster = roster_of(views)
    draw = drawn(roster, excluded=frozenset({NodeId("free3"), NodeId("busy2"), NodeId("off1"), NodeId("nobody")}))
    counts = {candidate.reason: candidate.replica_count for candidate in draw.rest}
    assert counts == {"tried before": 3, "busy": 6, "paused": 4, "not drawn": 39 - len(draw.offers)}
    assert all(candidate.replica_id is None for candidate in draw.rest)


def test_a_request_of_nobodys_model_sees_nobody():
    assert drawn(Roster()) == ((), ())


steps = st.lists(
    st.tuples(
        st.sampled_from("abcdef"),
        st.lists(
            st.tuples(st.sampled_from("xyz"), st.integers(0, 5), st.booleans(), st.integers(0, 9000)),
            max_size=3,
            unique_by=lambda part: part[0],
        ),
    ),
    max_size=30,
)


@given(steps, st.sets(st.sampled_from("abcdef").map(NodeId)).map(frozenset))
def test_sums_and_orders_are_those_of_the_replicas_that_are_there(steps, excluded):
    roster, there = Roster(), {}
    for name, parts in steps:
        views = [
            replica_view(
                name, in_flight_count=count, node_paused=paused, committed_tokens=float(tokens), kv_capacity_tokens=tokens
            )._replace(replica_id=ReplicaId(f"{name}/{part}"), context_length_tokens=count % 2)
            for part, count, paused, tokens in parts
        ]
        there[name] = views
        roster.enter(NodeId(name), views)
    known = [view for views in there.values() for view in views]
    kinds = roster.kinds(MODEL)
    assert sorted(view.replica_id for kind in kinds for view in kind.replicas()) == sorted(view.replica_id for view in known)
    assert roster.replica_count(MODEL) == len(known)
    for kind in kinds:
        of_kind = tuple(kind.replicas())
        assert kind.free_count == sum(map(is_free, of_kind))
        assert kind.slot_count == sum(view.slot_count for view in of_kind)
        assert kind.free_slot_count == sum(max(0, view.slot_count - view.in_flight_count) for view in of_kind)
        assert kind.in_flight_count == sum(view.in_flight_count for view in of_kind)
        assert kind.committed_tokens == sum(view.committed_tokens for view in of_kind)
        assert kind.tells_capacity == all(view.kv_capacity_tokens for view in of_kind)
        out = [view for view in of_kind if view.node_id in excluded]
        assert roster.count_on(kind, excluded)[:2] == (len(out), sum(map(is_free, out)))
    offers = drawn(roster, excluded=excluded).offers
    usable = {view.replica_id for view in known if is_free(view) and view.node_id not in excluded}
    assert {offer.replica.replica_id for offer in offers} <= usable
    assert len(offers) >= min(LEAST_MAX, len(usable))
    for name in there:
        roster.enter(NodeId(name), [])
    assert (roster.kinds(MODEL), roster._nodes, roster._replicas) == ((), {}, {})


def test_a_replica_that_serves_another_model_now_is_no_longer_of_the_first():
    roster = roster_of([replica_view("a")])
    roster.enter(NodeId("a"), [replica_view("a")._replace(model_id="other")])
    assert (roster.kinds(MODEL), len(roster.kinds("other"))) == ((), 1)


def test_the_order_follows_what_is_usual():
    views = [replica_view("reads", speeds=Speeds(6000.0, 0.06, 0.0)), replica_view("writes", speeds=Speeds(300.0, 0.01, 0.0))]
    for usual, first in ((Forecast(4.0, 10.0, 4000.0), "reads"), (Forecast(4.0, 900.0, 30.0), "writes")):
        roster = Roster(lambda _, usual=usual: usual)
        for view in views:
            roster.enter(view.node_id, [view])
        (kind,) = roster.kinds(MODEL)
        assert next(kind.least(1, lambda: 0.0))[1].replica.node_id == first


class TestDrainOrder:
    def test_buckets_are_as_wide_as_promised(self):
        assert bucket_of(0.0) == bucket_of(drain_order.SECONDS_MIN) == 0
        assert bucket_of(1e12) == drain_order.BUCKETS_MAX - 1
        assert all(bucket_of(seconds * BUCKET_RATIO**2) > bucket_of(seconds) for seconds in (0.002, 1.0, 77.0, 9e4))

    @given(st.lists(st.tuples(st.integers(0, 9), st.none() | st.floats(0, 1e6))))
    def test_it_holds_what_was_put_and_gives_the_least_first(self, steps):
        order, there = DrainOrder(), {}
        for thing, seconds in steps:
            if seconds is None:
                order.drop(thing)
                there.pop(thing, None)
            else:
                order.put(thing, seconds)
                there[thing] = seconds
        found = list(order.ascending(Random(1).random))
        assert sorted(thing for _, thing in found) == sorted(there)
        assert [bucket for bucket, _ in found] == sorted(bucket_of(seconds) for seconds in there.values())
        assert order.least() == (min(map(bucket_of, there.values())) if there else drain_order.BUCKETS_MAX)
        assert len(order) == len(there)


def test_whose_client_waits_in_the_middle_of_an_answer_is_shown_replicas_that_have_much_to_read():
    behind = [replica_view(f"b{number}", prefill_backlog_tokens=1e6) for number in range(10)]
    full = replica_view("full", prefill_backlog_tokens=1e6, slot_count=2, in_flight_count=2)
    roster = roster_of([*behind, full])
    assert drawn(roster).offers == ()
    late = drawn(roster, takes_any_slot=True, excluded=frozenset({NodeId("b0")}))
    assert [offer.replica.node_id for offer in late.offers] == [f"b{number}" for number in range(1, 1 + LEAST_MAX)]
    assert {offer.origin for offer in late.offers} == {"behind"}
    assert sum(candidate.replica_count for candidate in late.rest) + len(late.offers) == 11
    read = replica_view("b3")
    roster.enter(read.node_id, [read])
    assert [offer.replica.node_id for offer in drawn(roster).offers] == ["b3"]
    assert "b3" not in {offer.replica.node_id for offer in drawn(roster, takes_any_slot=True).offers if offer.origin == "behind"}
    roster.enter(NodeId("b1"), [])
    assert [kind.reluctant_count for kind in roster.kinds(MODEL)] == [8]


def test_whose_client_waits_in_the_middle_of_an_answer_gets_slots_that_stay_empty_for_their_pace():
    paced = replica_view("paced", slot_count=3, in_flight_count=3, withheld_slot_count=2)
    roster = roster_of([paced])
    assert drawn(roster).offers == ()
    assert [offer.replica.node_id for offer in drawn(roster, takes_any_slot=True).offers] == ["paced"]
    roster.enter(paced.node_id, [paced._replace(in_flight_count=5)])
    assert drawn(roster, takes_any_slot=True).offers == (), "all that the engine has are taken"
