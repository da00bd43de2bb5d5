"""Whatever a card's heat does: no change within the dwell, no less taken away for more heat, no flapping, and a way back."""

from __future__ import annotations

import itertools
from dataclasses import replace

from hypothesis import assume, given
from hypothesis import strategies as st

from potluck_node.domain.thermal import (
    COOL_MARGIN_CELSIUS,
    DWELL_SECONDS,
    PATIENCE_SECONDS,
    PATIENCE_SECONDS_MAX,
    SAMPLES_MAX,
    CardLook,
    HeatLimits,
    ThermalState,
    limit_celsius,
    next_state,
)
from potluck_node.domain.thermal_ladder import PowerRange, ThermalRung, base_cap_milliwatts, cap_at, slots_at

LOOK_SECONDS = 5.0
CHANGES_AN_HOUR_MAX = len(ThermalRung) - 1

celsius = st.integers(20, 100)
reasons = st.lists(
    st.sampled_from(["power_cap", "software_thermal", "hardware_thermal", "hardware_slowdown", "power_brake", "sync_boost"]),
    max_size=3,
    unique=True,
).map(tuple)
powers = st.builds(
    lambda lowest, above, further, found: PowerRange(
        lowest, lowest + above, lowest + above + further, None if found is None else lowest + round((above + further) * found)
    ),
    st.integers(50_000, 300_000),
    st.integers(0, 400_000),
    st.integers(0, 100_000),
    st.none() | st.floats(0, 1),
)
limits = st.builds(HeatLimits, st.none() | st.integers(40, 95), st.none() | st.integers(50_000, 1_000_000))
cards = st.builds(CardLook, throttle_point_celsius=st.none() | st.integers(60, 95), power=st.none() | powers, slot_count=st.integers(1, 64))
looks = st.builds(
    CardLook,
    temperature_celsius=st.none() | celsius,
    throttle_point_celsius=st.none() | st.integers(60, 95),
    throttle_reasons=st.just(()) | reasons,
    lost=st.integers(0, 20).map(lambda number: number == 0),
    power=st.none() | powers,
    slot_count=st.integers(0, 64),
)
gaps = st.floats(0.1, 40)
histories = st.lists(st.tuples(gaps, looks), min_size=1, max_size=60)
stretches = st.lists(st.tuples(looks, st.integers(1, 40)), min_size=1, max_size=8).map(
    lambda runs: [(LOOK_SECONDS, look) for look, count in runs for _ in range(count)]
)
"""Looks that stay as they are for up to three minutes, which is long enough to come down."""


def walked(history: list[tuple[float, CardLook]], owner: HeatLimits, state: ThermalState | None = None) -> list[ThermalState]:
    states, now_seconds = [state or ThermalState()], 0.0
    for gap_seconds, look in history:
        now_seconds += gap_seconds
        states.append(next_state(states[-1], look, owner, now_seconds))
    return states


def warm_on(rung: ThermalRung) -> ThermalState:
    """A card that was neither cool nor hot just now."""
    begun = ThermalState(rung, changed_at_seconds=0.0, looked_at_seconds=0.0)
    return next_state(begun, CardLook(temperature_celsius=79, throttle_point_celsius=83, slot_count=8), HeatLimits(), 0.0)


def steadily(card: CardLook, temperatures: list[int], owner: HeatLimits, state: ThermalState | None = None) -> list[ThermalState]:
    states, now_seconds = [state or ThermalState()], 0.0 if state is None else state.looked_at_seconds or 0.0
    for temperature in temperatures:
        now_seconds += LOOK_SECONDS
        states.append(next_state(states[-1], replace(card, temperature_celsius=temperature), owner, now_seconds))
    return states


@given(histories, limits)
def test_nothing_changes_twice_within_the_dwell_but_for_an_emergency_and_an_engine_that_has_gone(history, owner):
    states = walked(history, owner)
    changed_at_seconds: float | None = None
    for (_, look), before, after in zip(history, states, states[1:], strict=False):
        if after.rung is before.rung:
            continue
        emergency = look.lost or ("hardware_thermal" in look.throttle_reasons and after.rung is ThermalRung.DRAIN)
        released = look.slot_count == 0 and after.rung is ThermalRung.COOL
        if changed_at_seconds is not None and not emergency and not released:
            assert after.looked_at_seconds - changed_at_seconds >= DWELL_SECONDS
        changed_at_seconds = after.looked_at_seconds


@given(histories, limits)
def test_what_was_taken_away_comes_back_one_rung_at_a_time_and_only_to_a_cool_card(history, owner):
    states = walked(history, owner)
    for (_, look), before, after in zip(history, states, states[1:], strict=False):
        if after.rung >= before.rung or look.slot_count == 0:
            continue
        skipped = {rung for rung in ThermalRung if after.rung < rung < before.rung}
        assert all(slots_at(rung, look.slot_count) == slots_at(rung - 1, look.slot_count) for rung in skipped if rung >= ThermalRung.HALF)
        assert look.temperature_celsius is None or look.temperature_celsius <= limit_celsius(look, owner) - COOL_MARGIN_CELSIUS
        assert not {"software_thermal", "hardware_thermal"}.intersection(look.throttle_reasons)


@given(histories | stretches, limits, st.sampled_from(ThermalRung))
def test_no_look_without_a_temperature_gives_back_what_was_taken_from_a_card_that_has_told_one(history, owner, rung):
    states = walked(history, owner, warm_on(rung))
    for (_, look), before, after in zip(history, states, states[1:], strict=False):
        assert after.rung >= before.rung or look.temperature_celsius is not None


@given(cards, limits, st.lists(st.tuples(gaps, st.booleans()), max_size=200))
def test_a_card_is_waited_for_as_long_as_it_was_seen_cool_and_no_shorter_for_what_was_not_seen(card, owner, seen):
    history = [(gap_seconds, replace(card, temperature_celsius=20 if tells else None)) for gap_seconds, tells in seen]
    states, cool_seconds, told = walked(history, owner, warm_on(ThermalRung.PAUSE)), 0.0, False
    for (gap_seconds, look), before, after in zip(history, states, states[1:], strict=False):
        tells = look.temperature_celsius is not None
        cool_seconds += gap_seconds if told and tells else 0.0
        told = tells
        if after.rung is not before.rung:
            assert cool_seconds >= PATIENCE_SECONDS - 1e-6
            cool_seconds = 0.0


@given(histories, limits, looks, gaps, st.integers(1, 40))
def test_of_two_newest_looks_the_hotter_never_leaves_the_card_more(history, owner, look, gap_seconds, more):
    assume(look.temperature_celsius is not None)
    assume(look.slot_count > 0)
    state = walked(history, owner)[-1]
    now_seconds = state.looked_at_seconds + gap_seconds
    hotter = replace(look, temperature_celsius=look.temperature_celsius + more)
    assert next_state(state, hotter, owner, now_seconds).rung >= next_state(state, look, owner, now_seconds).rung


@given(cards, limits, st.integers(20, 70), st.lists(st.integers(0, 3), min_size=1, max_size=80), st.integers(0, 20))
def test_of_two_cards_that_heat_alike_the_hotter_gives_up_power_no_later(card, owner, start, rises, more):
    cooler = [start + sum(rises[:number]) for number in range(len(rises))]

    def first_step(temperatures: list[int]) -> int:
        states = steadily(card, temperatures, owner)
        return next((number for number, state in enumerate(states) if state.rung is not ThermalRung.COOL), len(states))

    assert first_step([one + more for one in cooler]) <= first_step(cooler)


@given(histories, limits, cards)
def test_every_card_comes_back_to_full_power_when_it_is_cold_for_long(history, owner, card):
    state = walked(history, owner)[-1]
    # The first wait may be the longest that there is; no later one is longer than the usual.
    seconds = PATIENCE_SECONDS_MAX + (PATIENCE_SECONDS + LOOK_SECONDS) * len(ThermalRung)
    cold = [20] * int(seconds / LOOK_SECONDS + len(ThermalRung) + 2)
    states = steadily(card, cold, owner, state)
    assert states[-1].rung is ThermalRung.COOL
    assert all(later.rung <= earlier.rung for earlier, later in itertools.pairwise(states))


@given(cards, limits, st.integers(30, 98), st.lists(st.sampled_from([-1, 0, 1]), min_size=1, max_size=24), st.sampled_from(ThermalRung))
def test_a_ripple_of_a_degree_at_any_level_moves_a_card_one_way_or_not_at_all(card, owner, level, ripple, rung):
    hour = int(3600 / LOOK_SECONDS)
    begun = ThermalState(rung, changed_at_seconds=0.0, looked_at_seconds=0.0)
    states = steadily(card, [level + ripple[number % len(ripple)] for number in range(hour)], owner, begun)
    steps = [after.rung - before.rung for before, after in itertools.pairwise(states) if after.rung is not before.rung]
    assert len(steps) <= CHANGES_AN_HOUR_MAX
    assert all(step > 0 for step in steps) or all(step < 0 for step in steps)


@given(st.sampled_from(ThermalRung), st.sampled_from(ThermalRung), powers, st.none() | st.integers(50_000, 1_000_000), st.integers(0, 64))
def test_caps_stay_within_what_the_card_takes_and_its_owner_allows_and_only_sink_with_the_rungs(one, other, power, owner, slot_count):
    lower, higher = sorted((one, other))
    cap = cap_at(higher, power, owner)
    assert power.lowest_milliwatts <= cap <= max(power.lowest_milliwatts, min(power.highest_milliwatts, power.usual_milliwatts))
    assert owner is None or cap <= max(owner, power.lowest_milliwatts)
    assert cap <= cap_at(lower, power, owner)
    assert cap_at(ThermalRung.COOL, power, owner) == base_cap_milliwatts(power, owner)
    assert slots_at(higher, slot_count) <= slots_at(lower, slot_count) <= slot_count


@given(histories, limits)
def test_what_is_remembered_of_a_card_is_bounded_and_its_seconds_only_grow(history, owner):
    states = walked(history, owner)
    assert all(len(state.samples) <= SAMPLES_MAX for state in states)
    assert all(later.throttle_seconds >= earlier.throttle_seconds for earlier, later in itertools.pairwise(states))
    assert all(PATIENCE_SECONDS <= state.patience_seconds <= PATIENCE_SECONDS_MAX for state in states)
