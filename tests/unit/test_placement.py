"""Where a request goes, what each term of its cost is, and what the losers are told."""

from __future__ import annotations

from collections import Counter
from itertools import cycle
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck_coordinator.domain.cost import cost
from potluck_coordinator.domain.forecast import Work
from potluck_coordinator.domain.placement import (
    BACKLOG_SECONDS_MAX,
    EXPLORE_SHARE,
    TIE_SHARE,
    Draw,
    Offer,
    ReplicaView,
    has_slot,
    is_free,
    lacks_room,
    likeness,
    place,
    rejection,
    slots_beside_owner,
    tokens_wanted,
)
from potluck_coordinator.domain.speeds import Speeds
from potluck_protocol.values import AccountId, Endpoint, ModelId, NodeId, ReplicaId
from tests.support.replicas import MODEL, replica_view, roster_of

CHAT = Endpoint.CHAT_COMPLETIONS
WORK = Work(400.0, 100.0)


def placed(replicas, work=WORK, excluded=frozenset(), tokens_min=0, chance=0.0, warm=None, engine_kinds=None):
    drawn = roster_of(replicas).draw(
        MODEL,
        work,
        endpoint=CHAT,
        excluded=excluded,
        tokens_min=tokens_min,
        engine_kinds=engine_kinds,
        warm=warm or {},
        chance=cycle([chance]).__next__,
    )
    return place(drawn, work, chance, 0.0)


def reasons(placement):
    counts = {}
    for candidate in placement.candidates:
        counts[candidate.reason] = counts.get(candidate.reason, 0) + candidate.replica_count
    return sorted(counts.items())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"link_up": False}, "disconnected"),
        ({"node_suspect": True}, "suspect"),
        ({"node_paused": True}, "paused"),
        ({"leaving": True}, "leaving"),
        ({"ready": False}, "not ready"),
        ({"drained": "slow for a week"}, "slow for a week"),
        ({"in_flight_count": 4}, "busy"),
        ({"prefill_backlog_tokens": 1000.0}, "busy"),
        ({"endpoints": (Endpoint.EMBEDDINGS,)}, "without /v1/chat/completions"),
        ({"context_length_tokens": 100}, "with a context of 100 tokens, too short for it"),
    ],
)
def test_each_reason_to_lose(changes, reason):
    placement = placed([replica_view("a", **changes), replica_view("b", in_flight_count=3)], tokens_min=200)
    assert placement.chosen is not None
    assert placement.chosen.node_id == "b"
    assert reasons(placement) == sorted([(reason, 1), ("chosen", 1)])


def test_only_engines_that_can_go_on_with_a_text_get_one():
    replicas = [replica_view("a", engine_kind="attach"), replica_view("b", engine_kind="vllm", in_flight_count=3)]
    placement = placed(replicas, engine_kinds=frozenset({"vllm", "llamacpp"}))
    assert placement.chosen == replicas[1]
    assert reasons(placement) == [("cannot go on with another's text", 1), ("chosen", 1)]


SPEEDS = Speeds(1000.0, 0.010, 0.001)


@pytest.mark.parametrize(
    ("worse", "term", "seconds"),
    [
        ({"round_trip_seconds": 0.130}, "line_seconds", 0.1),
        # 200 tokens before it, at a thousand a second.
        ({"prefill_backlog_tokens": 200.0, "prefill_since_seconds": 0.0}, "waiting_seconds", 0.2),
        ({"foreign_waiting_count": 1}, "waiting_seconds", 0.512),
        ({"speeds": Speeds(500.0, 0.010, 0.001)}, "reading_seconds", 0.4),
        ({"speeds": Speeds(1000.0, 0.012, 0.001)}, "writing_seconds", 0.2),
        # Two more in the batch, a millisecond a token each.
        ({"in_flight_count": 2}, "writing_seconds", 0.2),
        ({"foreign_running_count": 2}, "writing_seconds", 0.2),
        ({"weight": 0.5}, "reading_seconds", 0.4),
        # From a quarter of the cache to three quarters: 0.15 x (3 - 1/3).
        ({"kv_capacity_tokens": 2000, "committed_tokens": 1000.0}, "cache_seconds", 0.45 - 0.15 * 500 / 1500),
        ({"kv_capacity_tokens": 2000, "kv_used_tokens": 600, "dispatched_tokens": 400.0}, "cache_seconds", 0.45 - 0.15 * 500 / 1500),
        # One chance in a hundred each second, of 1.5 s; then 4 s and 450 tokens again.
        ({"losses_per_second": 0.01}, "loss_seconds", 0.01 * 1.5 * 4.45),
    ],
)
def test_each_term_decides_and_is_told(worse, term, seconds):
    good = replica_view("good", speeds=SPEEDS, **({"kv_capacity_tokens": 2000} if "kv_capacity_tokens" in worse else {}))
    bad = good._replace(replica_id=ReplicaId("bad"), node_id=NodeId("bad"), **worse)
    for order in ([good, bad], [bad, good]):
        placement = place(Draw(tuple(Offer(replica, "by chance") for replica in order), ()), WORK, 0.0, 0.0)
        assert placement.chosen == good
    costs = {candidate.node_id: candidate.cost for candidate in placement.candidates}
    assert getattr(costs["bad"], term) - getattr(costs["good"], term) == pytest.approx(seconds, rel=0.02)
    assert reasons(placement) == [("chosen", 1), ("slower", 1)]


def test_what_was_dispatched_is_read_meanwhile_but_never_for_certain():
    replica = replica_view(speeds=SPEEDS, prefill_backlog_tokens=1000.0, prefill_since_seconds=10.0)
    assert [cost(replica, WORK, now).waiting_seconds for now in (10.0, 10.5, 11.0, 60.0)] == [1.0, 0.5, 0.25, 0.25]


def test_a_cache_is_worth_the_reading_that_it_saves_and_no_more():
    cold = replica_view("cold", speeds=SPEEDS)
    warm = replica_view("warm", speeds=SPEEDS, prefill_backlog_tokens=300.0)
    assert placed([cold, warm], warm={warm.replica_id: 390.0}).chosen == warm
    late = warm._replace(prefill_backlog_tokens=600.0)
    assert is_free(late) is False
    assert has_slot(late)
    placement = placed([cold, late], warm={late.replica_id: 390.0})
    assert placement.chosen == cold, "waiting for 600 tokens to be read costs more than reading 390"
    assert [candidate.origin for candidate in placement.candidates if candidate.node_id == "warm"] == ["warm"]


def test_a_replica_that_is_behind_gets_nothing_more_but_what_it_has_cached():
    rate = SPEEDS.prefill_tokens_per_second
    behind = replica_view("a", speeds=SPEEDS, prefill_backlog_tokens=rate * BACKLOG_SECONDS_MAX + 1)
    assert not is_free(behind)
    assert is_free(behind._replace(prefill_backlog_tokens=rate * BACKLOG_SECONDS_MAX))
    assert placed([behind]).chosen is None
    assert placed([behind], warm={behind.replica_id: 300.0}).chosen == behind


def test_costs_that_hardly_differ_are_the_same():
    """Nobody foresees two percent, and gateways that chose alike would make a herd."""
    first = replica_view("first", speeds=SPEEDS)
    total = cost(first, WORK, 0.0).total_seconds
    near = first._replace(node_id=NodeId("near"), replica_id=ReplicaId("near"), round_trip_seconds=0.03 + total * TIE_SHARE * 0.9)
    far = first._replace(node_id=NodeId("far"), replica_id=ReplicaId("far"), round_trip_seconds=0.03 + total * TIE_SHARE * 1.1)
    draw = Draw(tuple(Offer(replica, "by chance") for replica in (first, near, far)), ())
    assert {place(draw, WORK, chance, 0.0).chosen.node_id for chance in (0.0, 0.3, 0.6, 0.99)} == {"first", "near"}
    assert reasons(place(draw, WORK, 0.0, 0.0)) == [("as good", 1), ("chosen", 1), ("slower", 1)]


def test_of_equals_the_one_that_holds_more_of_the_prompt_is_taken():
    replicas = [replica_view(name, speeds=Speeds(100_000.0, 0.05, 0.0)) for name in "abc"]
    for chance in (0.0, 0.5, 0.99):
        assert placed(replicas, chance=chance, warm={ReplicaId("b/tiny"): 300.0}).chosen == replicas[1]


def test_one_that_explores_looks_away_from_caches():
    replicas = (replica_view("warm", speeds=SPEEDS, in_flight_count=1), replica_view("cold", speeds=SPEEDS))
    draw = Draw((Offer(replicas[0], "warm", 390.0), Offer(replicas[1], "by chance")), ())
    assert place(draw, WORK, 0.0, 0.0).chosen == replicas[0]
    placement = place(draw, WORK, 0.0, 0.0, curiosity=0.0)
    assert (placement.chosen, placement.explores) == (replicas[1], True)


@pytest.mark.parametrize(
    ("changes", "tried"),
    [
        ({"speeds": Speeds(1000.0, 0.1, 0.0)}, True),  # a guess: nobody has ever tried it
        ({"speeds": Speeds(1000.0, 0.1, 0.0, 9, 9, 960.0)}, True),
        ({"speeds": Speeds(1000.0, 0.1, 0.0, 9, 9, 980.0)}, False),  # twenty seconds ago it was so slow
        ({"speeds": Speeds(1000.0, 0.1, 0.0, 9, 9, 960.0), "in_flight_count": 1}, False),  # it is being tried
        ({"speeds": Speeds(1000.0, 0.2, 0.0, 9, 9, 960.0)}, False),  # that would be too long for a client
    ],
)
def test_one_that_explores_tries_an_idle_replica_that_was_slow_long_ago(changes, tried):
    known = replica_view("known", speeds=Speeds(1000.0, 0.05, 0.0, 9, 9, 995.0), in_flight_count=1)
    draw = Draw((Offer(known, "least work"), Offer(replica_view("other", **changes), "least work")), ())
    assert place(draw, WORK, 0.0, 1000.0).chosen == known
    placement = place(draw, WORK, 0.0, 1000.0, curiosity=0.0)
    assert placement.chosen.node_id == ("other" if tried else "known")
    assert (("quicker; another was not tried for long", 1) in reasons(placement)) is tried
    assert place(draw, WORK, 0.0, 1000.0, curiosity=EXPLORE_SHARE).chosen.node_id == (
        "known" if changes["speeds"].decode_sample_count else "other"
    )


def test_equals_share_the_work_by_chance():
    roster, chance = roster_of([replica_view(name) for name in "abcdefgh"]), Random(1).random
    choices = Counter(place(roster.draw(MODEL, WORK, endpoint=CHAT, chance=chance), WORK, chance(), 0.0).chosen.node_id for _ in range(800))
    assert set(choices) == set("abcdefgh")
    assert max(choices.values()) < 150


SHARED = {"slot_count": 8, "context_length_tokens": 8192, "kv_capacity_tokens": 10_000}


@pytest.mark.parametrize(
    ("changes", "work", "lacks"),
    [
        ({"in_flight_count": 1, "committed_tokens": 8000.0}, Work(900.0, 100.0), False),
        ({"in_flight_count": 1, "committed_tokens": 8000.0}, Work(900.0, 101.0), True),
        # By the high expectation, where there is one.
        ({"in_flight_count": 1, "committed_tokens": 8000.0}, Work(900.0, 50.0, 101.0), True),
        # The engine's word, and what it cannot know of yet, where they say more.
        ({"in_flight_count": 1, "kv_used_tokens": 5000, "dispatched_tokens": 3000.0}, Work(900.0, 101.0), True),
        # Alone it has everything.
        ({"committed_tokens": 0.0}, Work(9000.0, 999.0), False),
        # No request takes more than a context.
        ({"in_flight_count": 1, "committed_tokens": 800.0}, Work(90_000.0, 999.0), False),
        # Each slot has a cache of its own.
        ({"in_flight_count": 7, "committed_tokens": 57_000.0, "kv_capacity_tokens": 65_536}, Work(8000.0, 192.0), False),
        ({"in_flight_count": 7, "committed_tokens": 57_000.0, "kv_capacity_tokens": 0}, Work(8000.0, 192.0), False),
    ],
)
def test_a_shared_cache_is_not_filled(changes, work, lacks):
    assert lacks_room(replica_view(**(SHARED | changes)), work) is lacks


def test_a_long_request_finds_the_one_with_room_among_many_without():
    full = [
        replica_view(f"full{number}", in_flight_count=1, committed_tokens=8500.0, **SHARED, speeds=Speeds(9000.0, 0.001, 0.0))
        for number in range(60)
    ]
    roomy = replica_view("roomy", in_flight_count=5, committed_tokens=500.0, **SHARED)
    placement = placed([*full, roomy], Work(3000.0, 200.0))
    assert placement.chosen == roomy
    assert reasons(placement)[-1][0] == "short of cache"
    assert sum(candidate.replica_count for candidate in placement.candidates) == 61


@pytest.mark.parametrize(
    ("in_flight_count", "waiting_count", "slot_count"), [(2, None, 4), (2, 0, 4), (2, 1, 2), (4, 9, 4), (0, 9, 1), (6, 1, 4)]
)
def test_an_engine_in_which_requests_wait_gets_no_more_of_the_pools_but_one(in_flight_count, waiting_count, slot_count):
    assert slots_beside_owner(4, in_flight_count, waiting_count) == slot_count


def test_an_excluded_node_stays_excluded():
    replicas = [replica_view("a"), replica_view("b")]
    assert placed(replicas, excluded=frozenset({NodeId("a")})).chosen == replicas[1]
    placement = placed(replicas, excluded=frozenset({NodeId("a"), NodeId("b")}), warm={ReplicaId("a/tiny"): 300.0})
    assert placement.chosen is None
    assert placement.explanation() == "2 tried before"


DECIDES_ABILITY = {
    "ready": False,
    "node_paused": True,
    "node_suspect": True,
    "link_up": False,
    "leaving": True,
    "drained": "slow for a week",
    "endpoints": (Endpoint.EMBEDDINGS,),
    "context_length_tokens": 9,
    "engine_kind": "vllm",
    "is_trusted": True,
    "is_remote": True,
}
SAYS_NOTHING_OF_IT = {
    "replica_id": ReplicaId("b"),
    "node_id": NodeId("b"),
    "model_id": ModelId("b"),
    "owner_account_id": AccountId("b"),
    "speeds": SPEEDS,
    "half_open": True,
}


@pytest.mark.parametrize("field", ReplicaView._fields)
def test_replicas_are_alike_that_can_take_the_same_requests_but_for_their_load(field):
    plain = replica_view()
    value = DECIDES_ABILITY.get(field, SAYS_NOTHING_OF_IT.get(field, 7))
    changed = plain._replace(**{field: value})
    assert changed != plain
    assert (likeness(plain) == likeness(changed)) is (field not in DECIDES_ABILITY)


def test_without_replicas_it_says_so():
    assert placed([]).explanation() == "no node has this model"


views = st.builds(
    replica_view,
    name=st.text("abcdefgh", min_size=1, max_size=4),
    ready=st.booleans(),
    link_up=st.booleans(),
    node_paused=st.booleans(),
    node_suspect=st.booleans(),
    slot_count=st.integers(1, 64),
    in_flight_count=st.integers(0, 70) | st.integers(0, 2),
    prefill_backlog_tokens=st.sampled_from([0.0, 10.0, 1000.0]),
    kv_capacity_tokens=st.sampled_from([0, 5000]),
    context_length_tokens=st.sampled_from([0, 4096]),
    committed_tokens=st.floats(0, 6000),
)


@given(
    st.lists(views, max_size=12, unique_by=lambda view: view.node_id),
    st.sets(st.text("abcdefgh", min_size=1, max_size=1).map(NodeId)).map(frozenset),
    st.floats(0, 1, exclude_max=True),
)
def test_the_choice_is_able_cheapest_of_the_least_drained_and_every_loser_is_explained(replicas, excluded, chance):
    placement = placed(replicas, excluded=excluded, chance=chance)
    able = [replica for replica in replicas if rejection(replica, CHAT, excluded) is None]
    usable = [replica for replica in able if is_free(replica) and not lacks_room(replica, WORK)]
    assert (placement.chosen is None) == (not usable)
    assert sum(candidate.replica_count for candidate in placement.candidates) == len(replicas)
    assert all(candidate.reason and candidate.replica_count > 0 for candidate in placement.candidates)
    assert sum(candidate.chosen for candidate in placement.candidates) == bool(usable)
    assert sum(candidate.replica_count for candidate in placement.candidates if candidate.reason == "tried before") == sum(
        replica.node_id in excluded for replica in replicas
    )
    if placement.chosen is not None:
        assert placement.chosen in usable
        least = min(cost(replica, WORK, 0.0).total_seconds for replica in usable)
        # At most twelve of these few: four are the least drained by buckets of two percent.
        assert cost(placement.chosen, WORK, 0.0).total_seconds <= least * (1 + TIE_SHARE) * 1.03


@pytest.mark.parametrize(
    ("contexts", "prompt", "asked", "wanted"),
    [
        ((2048, 8192), 1000, None, 1001),
        ((2048, 8192), 1000, 4000, 5000),
        # Nobody has room for so long an answer; an engine may cut it, and nobody is left out of what others could not do either.
        ((2048, 4096), 1000, 4000, 1000),
        ((2048, 4096), 4096, None, 4096),
        # An embedding wants room for its input alone.
        ((512,), 512, 0, 512),
        # It does not say.
        ((0, 2048), 1000, 4000, 5000),
        ((), 10, 10, 10),
    ],
)
def test_room_is_asked_for_as_far_as_somebody_has_it(contexts, prompt, asked, wanted):
    assert tokens_wanted(contexts, prompt, asked) == wanted


def test_an_engine_that_does_not_tell_its_context_takes_everything():
    assert placed([replica_view("old")], tokens_min=6000).chosen is not None


@pytest.mark.parametrize("chance", [0.0, 0.4, 0.99])
def test_of_equals_the_gateways_own_is_chosen_and_a_better_one_wherever_it_is(chance):
    own, other = replica_view("own"), replica_view("other", is_remote=True)
    rest = [replica_view(f"other{number}", is_remote=True) for number in range(2)]
    assert placed([other, own, *rest], chance=chance).chosen is own
    busy = replica_view("own", in_flight_count=3, committed_tokens=2_000.0, prefill_backlog_tokens=2_000.0)
    assert placed([other, busy], chance=chance).chosen is other
