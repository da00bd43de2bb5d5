"""When a card climbs the ladder of heat and comes down again: examples, and a card that follows its cap as a 3090 does."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest

from potluck_node.domain.hardware import CardIdentity, CardReading
from potluck_node.domain.thermal import (
    DRAIN_SECONDS,
    DWELL_SECONDS,
    PATIENCE_SECONDS,
    PATIENCE_SECONDS_MAX,
    SAMPLES_MAX,
    CardLook,
    HeatLimits,
    ThermalState,
    limit_celsius,
    next_state,
    throttle_point_celsius,
)
from potluck_node.domain.thermal_ladder import PowerRange, ThermalRung, base_cap_milliwatts, cap_at, caps_milliwatts, rungs_of, slots_at

LOOK_SECONDS = 5.0
RTX_3090 = PowerRange(100_000, 350_000, 385_000)
NO_LIMITS = HeatLimits()
R = ThermalRung


def look(celsius: int | None, **facts: object) -> CardLook:
    return CardLook(**{"temperature_celsius": celsius, "throttle_point_celsius": 83, "power": RTX_3090, "slot_count": 8, **facts})


def looks(*celsius: int | None, **facts: object) -> list[CardLook]:
    return [look(one, **facts) for one in celsius]


def walk(seen: Iterable[CardLook], state: ThermalState | None = None, limits: HeatLimits = NO_LIMITS) -> list[ThermalState]:
    """The states after each look, five seconds apart."""
    states = [state or ThermalState()]
    for one in seen:
        now_seconds = (states[-1].looked_at_seconds or 0.0) + LOOK_SECONDS
        states.append(next_state(states[-1], one, limits, now_seconds))
    return states[1:]


def rungs(states: list[ThermalState]) -> list[ThermalRung]:
    """Those that were stood on, each once in a row."""
    found: list[ThermalRung] = []
    for state in states:
        if not found or found[-1] is not state.rung:
            found.append(state.rung)
    return found


def line(start: float, rate_per_second: float, seconds: float) -> list[int]:
    return [round(start + rate_per_second * LOOK_SECONDS * number) for number in range(int(seconds / LOOK_SECONDS))]


def standing_on(rung: ThermalRung) -> ThermalState:
    return ThermalState(rung, changed_at_seconds=0.0, looked_at_seconds=1_000.0)


def test_a_card_that_is_warm_and_steady_is_left_alone():
    assert rungs(walk(looks(*[78] * 720))) == [R.COOL]


@pytest.mark.parametrize(("celsius", "expected"), [(81, R.COOL), (82, R.PAUSE), (83, R.PAUSE)])
def test_steady_heat_counts_from_a_degree_below_the_limit(celsius, expected):
    assert walk(looks(*[celsius] * 100))[-1].rung is expected


def test_a_card_that_gets_work_and_levels_off_below_its_limit_is_left_alone():
    assert rungs(walk(looks(*line(35, 0.9, 40), *[70] * 100))) == [R.COOL]


def test_a_card_that_heats_as_a_recorded_one_did_sheds_power_and_then_slots_before_its_throttle_point():
    """72, 76 and 79 °C at intervals of 23 s, and 87 at last (club-3090, issue 104)."""
    states = walk(looks(*line(66, 0.15, 80), *line(78, 0.087, 60)))
    reached = [state.rung for state in states if state.samples[-1][1] < 83]
    assert rungs(states)[:2] == [R.COOL, R.CAP_1]
    assert reached[-1] >= R.HALF


def test_a_card_that_heats_so_fast_that_no_further_step_would_come_in_time_loses_slots_at_once():
    """65, 73, 82 °C at intervals of 23 s: the fastest that was recorded (same place)."""
    states = walk(looks(*line(60, 0.37, 65)))
    assert R.HALF in [state.rung for state in states if state.samples[-1][1] < 83]


def test_at_its_throttle_point_a_card_climbs_to_the_last_rung_one_change_a_dwell():
    states = walk(looks(*[85] * 60))
    assert rungs(states) == [R.CAP_1, R.CAP_2, R.CAP_3, R.HALF, R.QUARTER, R.ONE, R.DRAIN, R.PAUSE]
    times = sorted({state.changed_at_seconds for state in states})
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert gaps == [DWELL_SECONDS] * 6 + [DRAIN_SECONDS]


def test_what_may_come_drains_no_card():
    states = walk(looks(*line(60, 0.2, 105), *[81] * 100), standing_on(R.ONE))
    assert rungs(states) == [R.ONE]


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"throttle_reasons": ("software_thermal",)}, R.CAP_1),
        ({"throttle_reasons": ("hardware_thermal", "hardware_slowdown")}, R.DRAIN),
        ({"throttle_reasons": ("power_cap",)}, R.COOL),
        ({"throttle_reasons": ("power_brake", "sync_boost")}, R.COOL),
        ({"lost": True}, R.PAUSE),
    ],
)
def test_what_the_driver_says_counts_at_once(facts, expected):
    assert walk([look(60, **facts)])[-1].rung is expected


@pytest.mark.parametrize(
    ("facts", "limits", "expected"),
    [
        ({"power": None}, NO_LIMITS, [R.COOL, R.HALF, R.QUARTER, R.ONE, R.DRAIN, R.PAUSE]),
        ({"slot_count": 1}, NO_LIMITS, [R.COOL, R.CAP_1, R.CAP_2, R.CAP_3, R.DRAIN, R.PAUSE]),
        ({"slot_count": 2}, NO_LIMITS, [R.COOL, R.CAP_1, R.CAP_2, R.CAP_3, R.HALF, R.DRAIN, R.PAUSE]),
        ({"slot_count": 4}, NO_LIMITS, [R.COOL, R.CAP_1, R.CAP_2, R.CAP_3, R.HALF, R.QUARTER, R.DRAIN, R.PAUSE]),
        ({"slot_count": 4}, HeatLimits(power_limit_milliwatts=230_000), [R.COOL, R.CAP_3, R.HALF, R.QUARTER, R.DRAIN, R.PAUSE]),
        (
            {"power": PowerRange(220_000, 350_000, 350_000)},
            NO_LIMITS,
            [R.COOL, R.CAP_1, R.CAP_2, R.HALF, R.QUARTER, R.ONE, R.DRAIN, R.PAUSE],
        ),
    ],
)
def test_rungs_that_would_change_nothing_are_not_there(facts, limits, expected):
    one = look(85, **facts)
    assert list(rungs_of(one.power, limits.power_limit_milliwatts, one.slot_count)) == expected
    assert rungs(walk([one] * 100, limits=limits)) == expected[1:]


def test_a_card_comes_down_a_rung_at_a_time_after_it_was_cool_for_long():
    states = walk(looks(*[60] * 400), standing_on(R.PAUSE))
    assert rungs(states) == [R.PAUSE, R.DRAIN, R.ONE, R.QUARTER, R.HALF, R.CAP_3, R.CAP_2, R.CAP_1, R.COOL]
    times = sorted({state.changed_at_seconds for state in states[1:]})[1:]
    assert {later - earlier for earlier, later in itertools.pairwise(times)} == {PATIENCE_SECONDS}


@pytest.mark.parametrize("celsius", [76, 79, 81])
def test_between_cool_and_hot_a_card_stays_where_it_is(celsius):
    assert rungs(walk(looks(*[celsius] * 720), standing_on(R.CAP_2))) == [R.CAP_2]


def test_a_moment_of_warmth_begins_the_wait_anew():
    states = walk(looks(*[60] * 20, 78, *[60] * 20), standing_on(R.CAP_2))
    assert rungs(states) == [R.CAP_2]


def test_a_card_that_is_hot_again_right_after_it_got_more_waits_twice_as_long_until_it_has_been_well_for_long():
    state, waits = standing_on(R.CAP_1), []
    for _ in range(6):
        states = walk(looks(*[60] * 400), state)
        recovered = next(one for one in states if one.rung is R.COOL)
        waits.append(recovered.patience_seconds)
        assert recovered.changed_at_seconds - state.changed_at_seconds >= recovered.patience_seconds
        state = walk(looks(85), walk(looks(*[70] * 5), recovered)[-1])[-1]
        assert state.rung is R.CAP_1
    assert waits == [PATIENCE_SECONDS * factor for factor in (1, 2, 4, 8)] + [PATIENCE_SECONDS_MAX] * 2
    rested = walk(looks(*[60] * 1000), state)[-1]
    assert walk(looks(85), rested)[-1].patience_seconds == PATIENCE_SECONDS


@pytest.mark.parametrize(
    ("relapsed_rung", "waits"),
    [
        (None, [PATIENCE_SECONDS] * 3),
        (R.COOL, [PATIENCE_SECONDS, PATIENCE_SECONDS, PATIENCE_SECONDS_MAX]),
        (R.CAP_1, [PATIENCE_SECONDS, PATIENCE_SECONDS_MAX, PATIENCE_SECONDS_MAX]),
    ],
)
def test_only_where_a_card_was_soon_hot_again_does_it_come_down_late(relapsed_rung, waits):
    state = replace(standing_on(R.CAP_3), patience_seconds=PATIENCE_SECONDS_MAX, relapsed_rung=relapsed_rung)
    changes = sorted({one.changed_at_seconds for one in walk(looks(*[60] * 1000), state)})[1:]
    assert [later - earlier for earlier, later in itertools.pairwise([1_005.0, *changes])] == waits, "since it was first seen cool"


def test_a_relapse_is_forgotten_only_where_the_card_did_well_on_that_rung():
    relapsed = replace(standing_on(R.CAP_2), patience_seconds=PATIENCE_SECONDS_MAX, relapsed_rung=R.COOL)
    well_above = walk(looks(*[60] * 150), relapsed)[-1]
    assert well_above.rung is R.CAP_1
    assert walk(looks(85), well_above)[-1].relapsed_rung is R.COOL
    well = walk(looks(*[60] * 700), relapsed)[-1]
    assert well.rung is R.COOL
    assert walk(looks(85), well)[-1].relapsed_rung is None


def test_however_often_a_card_is_looked_at_only_so_many_looks_are_kept():
    state = ThermalState()
    for number in range(200):
        state = next_state(state, look(60), NO_LIMITS, number * 0.1)
    assert len(state.samples) == SAMPLES_MAX


def test_a_card_whose_engine_has_gone_is_its_owners_again_at_once_unless_heat_was_why_the_engine_went():
    gone = look(85, slot_count=0)
    assert walk([gone], standing_on(R.HALF))[-1].rung is R.COOL
    assert walk([gone], standing_on(R.PAUSE))[-1].rung is R.PAUSE


SILENT = look(None, throttle_point_celsius=None)


@pytest.mark.parametrize("rung", R)
def test_a_card_that_tells_its_temperature_no_more_gets_nothing_back(rung):
    told = walk([look(79)], standing_on(rung))[-1]
    assert rungs(walk([SILENT] * 1_000, told)) == [rung]


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        ([replace(SILENT, throttle_reasons=("power_cap",))] * 100, R.HALF),
        ([replace(SILENT, throttle_reasons=("software_thermal",))] * 4, R.QUARTER),
        ([replace(SILENT, throttle_reasons=("hardware_thermal",)), *[SILENT] * 100], R.DRAIN),
        ([replace(SILENT, lost=True), *[SILENT] * 100], R.PAUSE),
        # Nobody's engine is there for a while; the next one is not to get everything.
        ([replace(SILENT, slot_count=0, power=None)] * 100, R.HALF),
        ([replace(SILENT, slot_count=0, power=None), look(60, slot_count=0)], R.COOL),
        (looks(*[60] * 24), R.HALF),
        (looks(*[60] * 25), R.CAP_3),
        ([*looks(*[60] * 13), *[SILENT] * 100, *looks(*[60] * 12)], R.HALF),
        ([*looks(*[60] * 13), *[SILENT] * 100, *looks(*[60] * 13)], R.CAP_3),
        ([*looks(*[60] * 13), SILENT, *looks(*[60] * 6), SILENT, *looks(*[60] * 7)], R.HALF),
        ([*looks(*[60] * 13), SILENT, *looks(*[60] * 6), SILENT, *looks(*[60] * 8)], R.CAP_3),
        # The wait begins anew where heat was heard of in between.
        ([*looks(*[60] * 20), replace(SILENT, throttle_reasons=("software_thermal",)), SILENT, *looks(*[60] * 20)], R.QUARTER),
        ([*looks(*[60] * 20), look(79), SILENT, *looks(*[60] * 24)], R.HALF),
    ],
)
def test_time_without_a_temperature_counts_for_nothing_but_heat_that_the_driver_names_does(seen, expected):
    assert walk(seen, walk([look(79)], standing_on(R.HALF))[-1])[-1].rung is expected


def test_what_a_card_got_back_does_not_count_twice_after_a_silence():
    """It had been cool for long when it came down; only from then on is it waited for the next."""
    came_down = walk(looks(79, *[60] * 25), standing_on(R.HALF))[-1]
    assert came_down.rung is R.CAP_3
    assert walk([*[SILENT] * 100, *looks(*[60] * 24)], came_down)[-1].rung is R.CAP_3
    assert walk([*[SILENT] * 100, *looks(*[60] * 25)], came_down)[-1].rung is R.CAP_2


def test_a_card_that_never_told_its_temperature_goes_by_what_the_driver_says():
    assert rungs(walk([SILENT] * 1_000)) == [R.COOL]
    drained = walk([replace(SILENT, throttle_reasons=("hardware_thermal",))])[-1]
    assert rungs(walk([SILENT] * 400, drained)) == [R.DRAIN, R.ONE, R.QUARTER, R.HALF, R.CAP_3, R.CAP_2, R.CAP_1, R.COOL]
    # From the first temperature on that counts, and what nobody knew before does not.
    assert rungs(walk([*[SILENT] * 20, *looks(*[60] * 24)], drained)) == [R.DRAIN]


def test_a_card_that_is_back_gets_its_work_back_a_rung_at_a_time():
    states = walk([*[look(None, lost=True)] * 3, *looks(*[50] * 300)])
    assert rungs(states)[:3] == [R.PAUSE, R.DRAIN, R.ONE]
    assert states[-1].rung is R.COOL


def test_seconds_slowed_down_by_heat_are_counted_and_others_are_not():
    hot, capped = look(84, throttle_reasons=("software_thermal", "power_cap")), look(70, throttle_reasons=("power_cap",))
    states = walk([capped, hot, hot, hot, capped])
    assert states[-1].throttle_seconds == 3 * LOOK_SECONDS
    assert next_state(states[-1], hot, NO_LIMITS, 10_000.0).throttle_seconds == 3 * LOOK_SECONDS + 15, "what was not seen is not told"


@pytest.mark.parametrize(
    ("identity", "reading", "expected"),
    [
        (CardIdentity(target_celsius=83, operating_max_celsius=93, slowdown_celsius=95), CardReading(60), 83),
        (CardIdentity(operating_max_celsius=93, slowdown_celsius=95), CardReading(60), 83),
        (CardIdentity(slowdown_celsius=95), CardReading(60), 85),
        (CardIdentity(), CardReading(60, thermal_margin_celsius=25), 85),
        (CardIdentity(), CardReading(60), 83),
        (CardIdentity(target_celsius=83), CardReading(None), None),
    ],
)
def test_a_cards_own_word_says_where_it_slows_down(identity, reading, expected):
    assert throttle_point_celsius(identity, reading) == expected


@pytest.mark.parametrize(("owner", "own", "expected"), [(None, 83, 83), (75, 83, 75), (90, 83, 83), (70, None, 70), (None, None, 83)])
def test_the_lower_of_the_owners_degrees_and_the_cards_counts(owner, own, expected):
    assert limit_celsius(look(60, throttle_point_celsius=own), HeatLimits(owner)) == expected


@pytest.mark.parametrize(
    ("power", "owner_milliwatts", "base", "caps"),
    [
        (RTX_3090, None, 350_000, [280_000, 230_000, 190_000]),
        (RTX_3090, 300_000, 300_000, [280_000, 230_000, 190_000]),
        (RTX_3090, 220_000, 220_000, [190_000]),
        (RTX_3090, 190_000, 190_000, []),
        (RTX_3090, 50_000, 100_000, []),
        (RTX_3090, 900_000, 350_000, [280_000, 230_000, 190_000]),
        (PowerRange(100_000, 350_000, 385_000, found_milliwatts=260_000), None, 260_000, [230_000, 190_000]),
        (PowerRange(200_000, 700_000, 700_000), None, 700_000, [560_000, 460_000, 380_000]),
    ],
)
def test_caps_are_shares_of_what_a_card_is_made_for_below_what_its_owner_allows(power, owner_milliwatts, base, caps):
    assert base_cap_milliwatts(power, owner_milliwatts) == base
    assert list(caps_milliwatts(power, owner_milliwatts).values()) == caps
    assert cap_at(R.PAUSE, power, owner_milliwatts) == min([base, *caps])


@pytest.mark.parametrize(
    ("slot_count", "expected"), [(8, [8, 8, 4, 2, 1, 0, 0]), (3, [3, 3, 1, 1, 1, 0, 0]), (1, [1, 1, 1, 1, 1, 0, 0]), (0, [0] * 7)]
)
def test_slots_of_a_rung(slot_count, expected):
    assert [slots_at(rung, slot_count) for rung in (R.COOL, R.CAP_3, R.HALF, R.QUARTER, R.ONE, R.DRAIN, R.PAUSE)] == expected


class Cooler:
    """A 3090 that follows its power: kelvin a watt over the air around it, reached in about a minute.

    Fitted to club-3090, issue 104: 72, 76, 79 °C at 270, 280, 290 W, 23.2 s after another, and 87.5 °C at 302 W at last.
    """

    KELVIN_PER_WATT, SETTLING_SECONDS, IDLE_WATTS = 0.157, 58.0, 30.0

    def __init__(self, air_celsius: float, kelvin_per_watt: float = KELVIN_PER_WATT, settling_seconds: float = SETTLING_SECONDS) -> None:
        self.air_celsius = air_celsius
        self.kelvin_per_watt = kelvin_per_watt
        self.settling_seconds = settling_seconds
        self.celsius = air_celsius + self.kelvin_per_watt * self.IDLE_WATTS

    def after(self, seconds: float, watts: float) -> int:
        goal = self.air_celsius + self.kelvin_per_watt * watts
        self.celsius += (goal - self.celsius) * min(1.0, seconds / self.settling_seconds)
        return round(self.celsius)


def cooled(
    air_celsius: Callable[[float], float],
    hours: float,
    power: PowerRange | None = RTX_3090,
    *,
    cooler: Cooler | None = None,
    is_busy: Callable[[float], bool] = lambda _: True,
) -> list[ThermalState]:
    """A card under as much load as it may take; without the right to cap it, as much as its slots take."""
    cooler, state, states = cooler or Cooler(air_celsius(0.0)), ThermalState(), []
    for number in range(int(hours * 3600 / LOOK_SECONDS)):
        now_seconds = number * LOOK_SECONDS
        cooler.air_celsius = air_celsius(now_seconds)
        load = slots_at(state.rung, 8) / 8 * is_busy(now_seconds)
        cap_watts = (cap_at(state.rung, power, None) if power else 350_000) / 1000
        # One answer at a time takes most of what eight do: decoding waits for the memory.
        watts = cooler.IDLE_WATTS + (min(cap_watts, 350.0) - cooler.IDLE_WATTS) * (0.0 if not load else 0.6 + 0.4 * load)
        state = next_state(state, look(cooler.after(LOOK_SECONDS, watts), power=power), NO_LIMITS, now_seconds)
        states.append(state)
    return states


@pytest.mark.parametrize("air_celsius", [20, 30, 35, 40, 45, 50])
def test_under_full_load_a_card_settles_below_its_throttle_point_and_hardly_moves(air_celsius):
    states = cooled(lambda _: air_celsius, hours=3)
    hottest = max(state.samples[-1][1] for state in states)
    last_hour = states[-720:]
    assert hottest <= 83
    assert len(rungs(last_hour)) <= 5, "it looks at most every half hour whether it may do more"
    assert min(state.rung for state in last_hour) < R.DRAIN
    assert (states[-1].rung is R.COOL) == (air_celsius <= 27 or len(rungs(states)) == 1)


@pytest.mark.parametrize(
    ("kelvin_per_watt", "settling_seconds", "busy_seconds", "rest_seconds"),
    [(0.14, 30.0, 1, 0), (0.14, 58.0, 180, 120), (0.16, 58.0, 180, 120), (0.145, 30.0, 1, 0), (0.15, 58.0, 60, 60)],
)
def test_a_card_that_is_hot_only_with_everything_tries_that_every_half_hour_at_most(
    kelvin_per_watt, settling_seconds, busy_seconds, rest_seconds
):
    """The rungs on the way there count for nothing: that it does well on them says nothing of the last one."""
    cooler = Cooler(35.0, kelvin_per_watt, settling_seconds)
    states = cooled(lambda _: 35.0, 8, cooler=cooler, is_busy=lambda seconds: seconds % (busy_seconds + rest_seconds) < busy_seconds)
    settled = rungs(states[2160:])
    assert settled.count(R.COOL) <= 11, "in five hours"
    assert len(settled) <= 5 * 11


def test_a_heat_wave_comes_and_goes():
    """25 °C in the case, an hour at 45, and 25 again."""
    states = cooled(lambda seconds: 45 if 3600 <= seconds < 7200 else 25, hours=4)
    hour = 720
    assert max(states[hour:], key=lambda state: state.rung).rung >= R.CAP_3
    assert max(state.samples[-1][1] for state in states) <= 85
    assert states[-1].rung is R.COOL


def test_without_the_right_to_cap_slots_do_it():
    states = cooled(lambda _: 35, hours=3, power=None)
    assert set(rungs(states)) <= {R.COOL, R.HALF, R.QUARTER, R.ONE}
    assert max(state.samples[-1][1] for state in states[240:]) <= 83
