"""Whoever demands trusted nodes gets one or none: which replicas are trusted, and that no draw leads anywhere else."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random
from types import SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from potluck_coordinator.domain.decisions import Step, StepKind, Story, trust_loss_count
from potluck_coordinator.domain.forecast import Work
from potluck_coordinator.domain.placement import NOT_TRUSTED, Draw, is_free, place, rejection
from potluck_coordinator.domain.trust import trusted_replicas
from potluck_coordinator.gateway.placing import Placing
from potluck_protocol.clock import SystemClock
from potluck_protocol.values import (
    AccountId,
    DesiredEngine,
    DesiredState,
    Endpoint,
    GroupPlace,
    ModelFile,
    ModelId,
    NodeId,
    ReplicaId,
    RequestId,
)
from tests.support.replicas import MODEL, replica_view, roster_of
from tests.support.request_path import request_by

CHAT = Endpoint.CHAT_COMPLETIONS
FILE = ModelFile(MODEL, "path:/models", "tiny.gguf", "0" * 64, 1000)


@pytest.mark.parametrize(
    ("changes", "excluded", "demands", "reason"),
    [
        ({"is_trusted": True}, (), True, None),
        ({}, (), False, None),
        ({"is_trusted": True}, (), False, None),
        ({}, (), True, NOT_TRUSTED),
        # Whatever else is wrong with it: its owner is told first what he can do nothing about alone.
        ({"link_up": False}, (), True, NOT_TRUSTED),
        ({"engine_kind": "attach"}, (), True, NOT_TRUSTED),
        ({"is_trusted": True, "node_paused": True}, (), True, "paused"),
        ({}, ("a",), True, "tried before"),
    ],
)
def test_who_may_take_a_request_that_demands_trust(changes, excluded, demands, reason):
    assert rejection(replica_view("a", **changes), CHAT, frozenset(map(NodeId, excluded)), trusted_only=demands) == reason


def engine(replica_id, rank=None):
    group = None if rank is None else GroupPlace(replica_id, 1, rank, "10.0.0.1", 29600, "10.0.0.2", (1, 1))
    return DesiredEngine(ReplicaId(replica_id), FILE, "scripted", 2, 512, group=group)


def state(*engines):
    return DesiredState(1, engines)


@pytest.mark.parametrize(
    ("desired", "trusted", "replicas"),
    [
        ({}, "a", ()),
        ({"a": state(engine("a/x"), engine("a/y")), "b": state(engine("b/x"))}, "a", ("a/x", "a/y")),
        ({"a": state(engine("a/x")), "b": state(engine("b/x"))}, "", ()),
        ({"a": state(engine("a/x"))}, "ab", ("a/x",)),
        # Over two nodes: what is asked passes through both.
        ({"a": state(engine("g", 0), engine("a/x")), "b": state(engine("g", 1))}, "a", ("a/x",)),
        ({"a": state(engine("g", 0)), "b": state(engine("g", 1), engine("b/x"))}, "b", ("b/x",)),
        ({"a": state(engine("g", 0)), "b": state(engine("g", 1))}, "ab", ("g",)),
    ],
)
def test_a_replica_is_trusted_where_every_node_with_a_part_in_it_is(desired, trusted, replicas):
    assert trusted_replicas({NodeId(name): wish for name, wish in desired.items()}, frozenset(map(NodeId, trusted))) == set(replicas)


views = st.builds(
    replica_view,
    name=st.text("abcdefgh", min_size=1, max_size=4),
    is_trusted=st.booleans(),
    ready=st.booleans(),
    link_up=st.booleans(),
    node_paused=st.booleans(),
    slot_count=st.integers(1, 8),
    in_flight_count=st.integers(0, 9),
    prefill_backlog_tokens=st.sampled_from([0.0, 1000.0]),
    kv_capacity_tokens=st.sampled_from([0, 3000]),
    committed_tokens=st.floats(0, 4000),
    context_length_tokens=st.sampled_from([0, 512, 4096]),
    engine_kind=st.sampled_from(["vllm", "attach"]),
)


@given(
    replicas=st.lists(views, max_size=14, unique_by=lambda view: view.node_id),
    excluded=st.sets(st.text("abcdefgh", min_size=1, max_size=1).map(NodeId)).map(frozenset),
    warm=st.lists(st.integers(0, 13), max_size=6, unique=True),
    kinds=st.sampled_from([None, frozenset({"vllm"})]),
    prompt_tokens=st.sampled_from([1.0, 400.0, 3500.0]),
    seed=st.integers(0, 2**32),
)
@example([replica_view("a"), replica_view("b", is_trusted=True, in_flight_count=4)], frozenset(), [0], None, 400.0, 0)
@example([replica_view("a", kv_capacity_tokens=3000)], frozenset(), [], None, 3500.0, 0)
def test_no_draw_leads_a_request_that_demands_trust_anywhere_else(replicas, excluded, warm, kinds, prompt_tokens, seed):
    chance, work = Random(seed).random, Work(prompt_tokens, 100.0)
    holders = {replicas[index].replica_id: 300.0 for index in warm if index < len(replicas)}

    def drawn(trusted_only: bool) -> Draw:
        return roster_of(replicas).draw(
            MODEL, work, endpoint=CHAT, excluded=excluded, engine_kinds=kinds, trusted_only=trusted_only, warm=holders, chance=chance
        )

    draw = drawn(True)
    placement = place(draw, work, chance(), 0.0)
    assert all(offer.replica.is_trusted for offer in draw.offers)
    assert placement.chosen is None or placement.chosen.is_trusted
    counts = Counter[str]()
    for candidate in placement.candidates:
        counts[candidate.reason] += candidate.replica_count
    assert counts[NOT_TRUSTED] == sum(not view.is_trusted and view.node_id not in excluded for view in replicas)
    assert counts.total() == len(replicas), "everybody is told of"
    # The others' share of the pool is none of its concern: with them gone it finds what it finds beside them.
    able = [view for view in replicas if view.is_trusted and rejection(view, CHAT, excluded, 0, kinds) is None]
    assert bool(draw.offers) >= any(map(is_free, able))
    # And who demands nothing is kept from nobody.
    assert all(candidate.reason != NOT_TRUSTED for candidate in place(drawn(False), work, chance(), 0.0).candidates)


def test_how_often_replicas_of_a_model_were_left_out_for_want_of_trust_is_kept():
    work = Work(100.0, 100.0)

    def story(model_id: str, trusted_only: bool) -> Story:
        drawn = roster_of([replica_view("a"), replica_view("b"), replica_view("c", is_trusted=True)]).draw(
            MODEL, work, endpoint=CHAT, trusted_only=trusted_only, chance=lambda: 0.0
        )
        placed = Step(StepKind.PLACED, 0.0, placement=place(drawn, work, 0.0, 0.0))
        return Story(RequestId("r"), AccountId("a"), ModelId(model_id), 0, 0.0, (placed, Step(StepKind.ANSWERED, 1.0)))

    stories = [story("tiny", True), story("tiny", False), story("tiny", True), story("other", True)]
    assert trust_loss_count(stories, MODEL) == 2
    assert trust_loss_count(stories, ModelId("nobodys")) == 0


def placing_over(*replicas):
    links = SimpleNamespace(roster=lambda: roster_of(replicas), measures=SimpleNamespace(warm=lambda *_: {}))
    quarantine = SimpleNamespace(shunned=lambda *_: (frozenset(),))
    return Placing(links, quarantine, SystemClock(), Random(1).random)  # type: ignore[arg-type]


def asked(*, trusted_only: bool, **fields):
    return replace(request_by(**fields), trusted_only=trusted_only)


def test_admission_counts_the_room_of_trusted_replicas_alone():
    placing = placing_over(
        replica_view("a", slot_count=8, kv_capacity_tokens=9000, committed_tokens=100.0),
        replica_view("b", slot_count=4, in_flight_count=3, kv_capacity_tokens=1000, committed_tokens=700.0, is_trusted=True),
        replica_view("c", slot_count=4, node_paused=True, kv_capacity_tokens=5000, is_trusted=True),
    )
    free, demanding = asked(trusted_only=False), asked(trusted_only=True)
    assert placing.slots(free, frozenset()) == (12, 9)
    assert placing.slots(demanding, frozenset()) == (4, 1)
    assert placing.slots(demanding, frozenset({NodeId("b")})) == (0, 0)
    whole = placing.capacity(MODEL)
    assert placing.within_reach(free, frozenset(), whole) is whole
    trusted = whole._replace(slot_count=4, in_flight_count=3, kv_tokens=1000, committed_tokens=700.0)
    assert placing.within_reach(demanding, frozenset(), whole) == trusted
    assert placing.knows_others(free, frozenset({NodeId("b"), NodeId("c")}))
    assert placing.knows_others(demanding, frozenset({NodeId("a")}))
    assert not placing.knows_others(demanding, frozenset({NodeId("b")})), "one that its owner paused is not about to help"


def test_the_room_that_is_asked_for_is_that_of_trusted_replicas():
    """An untrusted one with a long context must not make all trusted ones too short."""
    placing = placing_over(replica_view("a", context_length_tokens=8192), replica_view("b", context_length_tokens=512, is_trusted=True))
    request = asked(trusted_only=True, completion_tokens_max=4000, prompt_tokens_min=100)
    placement = placing.place(request, frozenset(), Work(100.0, 100.0))
    assert placement.chosen is not None
    assert placement.chosen.node_id == "b"
    assert placing.slots(request, frozenset())[0] == 4
