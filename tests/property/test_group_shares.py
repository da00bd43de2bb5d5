"""What the owners of a group's stages are paid: all of the price, by what their engines counted, and little more for a lie."""

from __future__ import annotations

from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from potluck_coordinator.domain.grouping.shares import BAND_PERCENT, payee_shares, stage_weight
from potluck_coordinator.domain.grouping.words import Stage
from potluck_coordinator.domain.payees import split
from potluck_protocol.values import AccountId, NodeId

BAND = Fraction(BAND_PERCENT, 100)
planned_sizes = st.integers(1_000, 10**12)
words = st.one_of(st.none(), st.integers(-(10**13), 10**13))


@st.composite
def groups(draw, count_min=2):
    """Stages of owners of their own, and what each of them says."""
    sizes = draw(st.lists(planned_sizes, min_size=count_min, max_size=8))
    stages = [
        Stage(NodeId(f"n{rank}"), AccountId(f"owner{rank}"), f"10.0.0.{rank}", 29600, 1, size, 0, size) for rank, size in enumerate(sizes)
    ]
    return stages, [draw(words) for _ in stages]


def shares(stages, said):
    counted = {stage.node_id: word for stage, word in zip(stages, said, strict=True) if word is not None}
    found = {share.account_id: share.weight for share in payee_shares(stages, counted)}
    return [Fraction(found[stage.owner_account_id], sum(found.values())) for stage in stages]


@given(groups(), st.integers(0, 10**12))
def test_the_parts_are_the_price_to_the_last_micro_credit(group, price_micro_credits):
    stages, said = group
    counted = {stage.node_id: word for stage, word in zip(stages, said, strict=True) if word is not None}
    parts = split(price_micro_credits, [share.weight for share in payee_shares(stages, counted)])
    assert sum(parts) == price_micro_credits
    assert all(part >= 0 for part in parts)


@given(groups())
def test_without_a_count_everyone_has_the_planned_share(group):
    stages, _ = group
    whole = sum(stage.weight_bytes for stage in stages)
    assert shares(stages, [None] * len(stages)) == [Fraction(stage.weight_bytes, whole) for stage in stages]


@given(groups(), st.data())
def test_who_counted_more_gets_no_less_and_the_others_no_more(group, data):
    stages, said = group
    said[0] = data.draw(st.integers(-(10**13), 10**13))
    before = shares(stages, said)
    after = shares(stages, [said[0] + data.draw(st.integers(0, 10**13)), *said[1:]])
    assert after[0] >= before[0]
    assert all(late <= early for late, early in zip(after[1:], before[1:], strict=True))


@given(groups(), words, words)
def test_a_liar_gains_little(group, truth, lie):
    """Whatever is said instead of whatever is true, the share grows by the width of the band at most; a few bytes are for rounding down."""
    stages, said = group
    honest, lying = shares(stages, [truth, *said[1:]])[0], shares(stages, [lie, *said[1:]])[0]
    assert lying <= honest * (1 + BAND) / (1 - BAND) * Fraction(1_002, 1_000)


@given(groups(), words)
def test_nor_does_it_take_more_than_the_band_from_others_who_say_nothing(group, lie):
    stages, _ = group
    planned, lying = (shares(stages, [word] + [None] * (len(stages) - 1))[0] for word in (None, lie))
    assert lying <= planned * (1 + BAND)


@given(planned_sizes, st.integers(0, 10**13))
def test_a_count_near_the_plan_is_paid_as_it_is(planned_bytes, counted_bytes):
    weight = stage_weight(planned_bytes, counted_bytes)
    if abs(counted_bytes - planned_bytes) <= planned_bytes * BAND - 1:
        assert weight == counted_bytes
    assert abs(weight - planned_bytes) <= planned_bytes * BAND + 1
