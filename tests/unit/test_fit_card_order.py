"""In which order the fit looks at cards, which of them it groups, and that neither the driver's count nor a box's size matters."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import combinations
from time import process_time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potluck_coordinator.architectures import known_architecture
from potluck_coordinator.domain.fit.card_groups import LINKS_BEST_FIRST, card_groups
from potluck_coordinator.domain.fit.card_order import CARDS_LOOKED_AT_MAX, in_order
from potluck_coordinator.domain.fit.cards import CARD_MODELS
from potluck_coordinator.domain.fit.engines import VLLM
from potluck_coordinator.domain.fit.fitting import fit
from potluck_coordinator.domain.fit.hardware import NodeCard, NodeHardware
from potluck_coordinator.domain.fit.interconnect import group_link
from potluck_coordinator.domain.planning.sizing import Misfit, Sizer
from potluck_protocol.values import Accelerator
from tests.support.planning import GIB, card_entry, node

CARD = NodeCard(CARD_MODELS["rtx3090"])
AWQ_32B = known_architecture("qwen2.5-32b-instruct-awq")
FP16_32B = known_architecture("qwen2.5-32b-instruct")
SIZE_SECONDS_MAX = 0.5
"""Of the processor, for one model on one node: on a machine with nothing else to do it takes a tenth of that."""


def alike(count, **pairs):
    return NodeHardware((CARD,) * count, **pairs)


def counted_as(box, places):
    """The box whose driver counts the cards otherwise."""

    def moved(pairs):
        return tuple((places.index(one), places.index(other)) for one, other in pairs)

    cards = tuple(box.cards[place] for place in places)
    return NodeHardware(cards, nvlink_pairs=moved(box.nvlink_pairs), pcie_peer_pairs=moved(box.pcie_peer_pairs))


def answers(architecture, box):
    report = fit(architecture, [box], engine_kind=VLLM, context_length_tokens=2048, sequence_count_wanted=1)
    return report.verdict, sorted(
        (one.shape.label, one.verdict, one.reason, one.kv_capacity_tokens, one.total_decode) for one in report.shapes
    )


@pytest.mark.parametrize(("count", "graph_count"), [(2, 2), (3, 4), (4, 11), (5, 34)])
def test_a_few_cards_come_in_as_many_orders_as_there_are_ways_to_join_them(count, graph_count):
    pairs = list(combinations(range(count), 2))
    choices = ([pair for number, pair in enumerate(pairs) if bits >> number & 1] for bits in range(1 << len(pairs)))
    assert len({in_order(alike(count, pcie_peer_pairs=tuple(chosen))).reached for chosen in choices}) == graph_count


def ring(count, first=0):
    return [(first + place, first + (place + 1) % count) for place in range(count)]


@pytest.mark.parametrize(
    ("count", "pairs"),
    [
        (16, [*ring(4), *ring(5, 4), *ring(7, 9)]),
        (10, [*ring(5), *((place, place + 5) for place in range(5)), *((5 + place, 5 + (place + 2) % 5) for place in range(5))]),
        (16, [(one, other) for one, other in combinations(range(16), 2) if one // 4 == other // 4 or one % 4 == other % 4]),
        (12, [*ring(3), *ring(3, 3), (0, 3), (1, 4), (2, 5), *((6 + one, 9 + other) for one in range(3) for other in range(3))]),
    ],
)
def test_cards_that_have_equally_many_joined_are_told_apart_by_how(count, pairs):
    box, draw = alike(count, pcie_peer_pairs=tuple(pairs)), random.Random(1)
    orders = {in_order(counted_as(box, draw.sample(range(count), count))).reached for _ in range(20)}
    assert len(orders) == 1


@pytest.mark.parametrize("places", [(1, 3, 2, 0), (3, 2, 1, 0), (2, 0, 3, 1)])
def test_a_card_is_known_by_its_partner_too(places):
    narrow, capped = replace(CARD, pcie_width=4), replace(CARD, power_limit_watts=100)
    box = NodeHardware((narrow, capped, capped, capped), nvlink_pairs=((0, 1), (2, 3)))
    assert answers(FP16_32B, counted_as(box, list(places))) == answers(FP16_32B, box)


@pytest.mark.parametrize("pairs", [((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 3), (1, 2))])
def test_cards_that_reach_each_other_over_pcie_work_together(pairs):
    box = alike(4, pcie_peer_pairs=pairs)
    assert card_groups(box, 2) == pairs
    assert answers(AWQ_32B, box) == answers(AWQ_32B, alike(4, pcie_peer_pairs=((0, 1), (2, 3))))


@pytest.mark.parametrize(
    ("names", "changes", "group_size", "groups"),
    [
        # A card that has one partner gets that one, and an island is not split.
        (["rtx3090"] * 4, {"pcie_peer_pairs": ((0, 1), (1, 2), (2, 3))}, 2, [(0, 1), (2, 3)]),
        (["rtx3090"] * 4, {"pcie_peer_pairs": ((1, 2), (2, 3), (1, 3))}, 3, [(1, 2, 3)]),
        (
            ["rtx3090"] * 8,
            {"pcie_peer_pairs": tuple(p for p in combinations(range(8), 2) if not sum(p) % 2)},
            4,
            [(0, 2, 4, 6), (1, 3, 5, 7)],
        ),
        (["rtx3090"] * 5, {"pcie_peer_pairs": ((0, 1), (2, 3), (3, 4), (2, 4))}, 3, [(2, 3, 4)]),
        # Nor is it for the sake of bridges in two of them.
        (
            ["rtx3090"] * 8,
            {"nvlink_pairs": ((0, 1), (4, 5)), "pcie_peer_pairs": tuple(p for p in combinations(range(8), 2) if p[0] // 4 == p[1] // 4)},
            4,
            [(4, 5, 6, 7), (0, 1, 2, 3)],
        ),
        # Bridges come before PCIe, and like cards before either.
        (["rtx3090"] * 4, {"nvlink_pairs": ((0, 3),), "pcie_peer_pairs": ((0, 1), (1, 2), (2, 3))}, 2, [(0, 3), (1, 2)]),
        (["rtx3090"] * 5, {"nvlink_pairs": ((3, 4),), "pcie_peer_pairs": ((0, 1),)}, 3, [(2, 3, 4)]),
        (["rtx3090", "rtx3060"] * 2, {"pcie_peer_pairs": ((0, 1), (2, 3))}, 2, [(0, 2), (1, 3)]),
    ],
)
def test_islands_of_cards_stay_whole(names, changes, group_size, groups):
    box = NodeHardware(tuple(NodeCard(CARD_MODELS[name]) for name in names), **changes)
    assert list(card_groups(box, group_size)) == groups


@st.composite
def boxes_of_islands(draw):
    """Up to eight like cards; those of one island reach each other, and each has a bridge to one other of them at the most."""
    count = draw(st.integers(2, 8))
    islands = draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
    order = draw(st.permutations(range(count)))
    bridged = zip(order[::2], order[1::2], strict=False)
    return NodeHardware(
        (CARD,) * count,
        nvlink_pairs=tuple(pair for pair in bridged if islands[pair[0]] == islands[pair[1]]),
        pcie_peer_pairs=tuple(pair for pair in combinations(range(count), 2) if islands[pair[0]] == islands[pair[1]]),
    )


@given(boxes_of_islands(), st.integers(1, 8))
def test_no_group_of_the_cards_that_are_left_is_better(box, group_size):
    def rank(group):
        return LINKS_BEST_FIRST.index(group_link(box, group).kind)

    left = set(range(len(box.cards)))
    for group in card_groups(box, group_size):
        assert rank(group) == min(map(rank, combinations(sorted(left), group_size)))
        left -= set(group)
    assert len(left) < group_size


@given(st.lists(st.sampled_from(["rtx3090", "rtx3090ti", "a5000", "l4"]), min_size=2, max_size=6), st.data())
def test_of_equally_large_cards_those_of_the_fewest_models_work_together(names, data):
    likes = [pair for pair in combinations(range(len(names)), 2) if names[pair[0]] == names[pair[1]]]
    bridges = data.draw(st.lists(st.sampled_from(likes), unique=True)) if likes else []
    box = NodeHardware(tuple(NodeCard(CARD_MODELS[name]) for name in names), nvlink_pairs=tuple(bridges))
    group_size = data.draw(st.integers(2, len(names)))

    def model_count(group):
        return len({names[card] for card in group})

    assert model_count(card_groups(box, group_size)[0]) == min(map(model_count, combinations(range(len(names)), group_size)))


@pytest.mark.parametrize("kind", ["nvlink_pairs", "pcie_peer_pairs"])
def test_a_pair_stays_whole_though_somebody_s_desktop_is_on_one_of_its_cards(kind):
    used = replace(CARD, memory_usable_bytes=22 * GIB)
    assert card_groups(NodeHardware((CARD, used) * 2, **{kind: ((0, 1), (2, 3))}), 2) == ((0, 1), (2, 3))


def test_of_too_many_cards_the_largest_are_looked_at_with_those_that_they_are_joined_with():
    small = NodeCard(CARD_MODELS["rtx3060"])
    box = NodeHardware((*[small] * 10, *[CARD] * 20), nvlink_pairs=((10, 29),))
    looked_at = in_order(box).indices
    assert len(looked_at) == CARDS_LOOKED_AT_MAX
    assert {10, 29} <= set(looked_at) <= set(range(10, 30))


def told(count, join):
    """A node of so many cards that are joined so."""
    uuids = [f"GPU-{number}" for number in range(count)]
    peers = {
        kind: [tuple(uuids[other] for other in range(count) if joined(one, other)) for one in range(count)] for kind, joined in join.items()
    }
    return node(
        "a",
        memory_gib=512,
        cards=tuple(
            Accelerator("NVIDIA GeForce RTX 3090", uuid, 24 * GIB, "8.6", **{kind: said[place] for kind, said in peers.items()})
            for place, uuid in enumerate(uuids)
        ),
    )


JOINED = {
    "none": {},
    "all": dict.fromkeys(("nvlink_peer_uuids", "pcie_peer_uuids"), lambda one, other: one != other),
    "across": {"pcie_peer_uuids": lambda one, other: bool((one ^ other) & 1) and one ^ 1 != other},
    "any": {"pcie_peer_uuids": lambda one, other: hash((min(one, other), max(one, other))) % 2 == 0 and one != other},
}


@pytest.mark.timed
@pytest.mark.parametrize("join", JOINED)
@pytest.mark.parametrize("size", ["8b", "70b"])
def test_no_node_s_word_keeps_the_plan_waiting(join, size):
    entry, sizer, box = card_entry(size), Sizer(), told(64, JOINED[join])
    in_order.cache_clear()
    began = process_time()
    kind = sizer.kind_of(box)
    sized = sizer.size(entry, kind, kind.whole_room)
    assert process_time() - began < SIZE_SECONDS_MAX
    assert not isinstance(sized, Misfit)
