"""When a card gets less to do because it is hot, and when it gets more again.

Decides which rung of `thermal_ladder` a card stands on, from its looks so far. It climbs before the card slows down by itself: where the
rise of the last minute would reach that point soon. It comes down a rung at a time, only after the card was well below that point for
long, and for ever longer to a rung on which it was soon hot again; between the two nothing happens, so that a ripple moves nothing.
A card that tells its temperature no more may be as hot as it was: it gets nothing back until it tells one again. It must not know drivers,
engines or clocks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from potluck_node.domain.hardware import CardIdentity, CardReading, ThrottleReason
from potluck_node.domain.thermal_ladder import SLOT_RUNGS, PowerRange, ThermalRung, rungs_of

THROTTLE_POINT_CELSIUS: Final = 83
"""Where GeForce cards are steered to from the factory, for a card that tells no threshold at all."""
HEADROOM_CELSIUS: Final = 10
"""To the card's own slowdown threshold, 95 °C on most 3090s: at 85 °C the pool that this one learns from had lost 40 % of its clocks, and
at 87 °C another's 3090 took 302 W of 350 and lost clocks, though its driver named no thermal reason (club-3090, issue 104)."""
HOT_MARGIN_CELSIUS: Final = 1
"""Below the throttle point: thermometers count in whole degrees."""
NEAR_CELSIUS: Final = 12
"""So far below it, and less, a rise counts. An idle card that gets work is ten degrees hotter at once, and levels off by itself."""
COOL_MARGIN_CELSIUS: Final = 8
"""So far below it a card is cool. The step between two caps of a 3090, 30 W, is worth 5 °C or more in a quarter of a minute (issue 104)."""
RISE_CELSIUS_MIN: Final = 3
"""A smaller rise is a ripple."""
TREND_SECONDS: Final = 30.0
"""How far back looks are compared: half of what a 3090's cooler takes to follow its power."""
TREND_SECONDS_MIN: Final = 10.0
"""Looks that are closer together than this show no trend."""
HORIZON_SECONDS: Final = 40.0
"""A throttle point that would be reached within this time is acted on. A card nears its last temperature ever more slowly: one that levels
off below its throttle point never seems to reach it sooner than its cooler takes to settle, a minute, less what the trend lags."""
DWELL_SECONDS: Final = 20.0
"""Between two changes, so that the first one shows: four looks."""
URGENT_SECONDS: Final = 25.0
"""A throttle point that is nearer than this is reached before another step can be taken, a dwell and a look later: slots go at once."""
DRAIN_SECONDS: Final = 60.0
"""What a drained card gets to finish its answers and cool before its engine is stopped."""
PATIENCE_SECONDS: Final = 120.0
"""How long a card is cool before it gets more to do: twice what its cooler needs to settle."""
PATIENCE_SECONDS_MAX: Final = 1_800.0
RELAPSE_SECONDS: Final = 600.0
"""A card that is hot again so soon after it got more to do will wait for twice as long before it comes there the next time."""
GAP_SECONDS_MAX: Final = 15.0
"""Of the time between two looks, more than this was not seen, and counts for nothing."""
SAMPLES_MAX: Final = 64
HEAT_REASONS: Final = frozenset({ThrottleReason.SOFTWARE_THERMAL.value, ThrottleReason.HARDWARE_THERMAL.value})


@dataclass(frozen=True, slots=True)
class CardLook:
    """One card at one moment. None stands for a fact that is not known."""

    temperature_celsius: int | None = None
    throttle_point_celsius: int | None = None
    """Where it would slow down by itself; see `throttle_point_celsius`."""
    throttle_reasons: tuple[str, ...] = ()
    lost: bool = False
    power: PowerRange | None = None
    """None also where this agent may not set a cap."""
    slot_count: int = 0
    """Of the engine on it that has the most; 0: this node has none there."""


@dataclass(frozen=True, slots=True)
class HeatLimits:
    """The owner's."""

    temperature_celsius_max: int | None = None
    power_limit_milliwatts: int | None = None


@dataclass(frozen=True, slots=True)
class ThermalState:
    """What is remembered of a card from look to look."""

    rung: ThermalRung = ThermalRung.COOL
    changed_at_seconds: float | None = None
    samples: tuple[tuple[float, int], ...] = ()
    """Seconds and °C of the last looks, oldest first; SAMPLES_MAX at most."""
    looked_at_seconds: float | None = None
    temperature_at_seconds: float | None = None
    """When it last told its temperature; None: it never did, and the driver's reasons are all that there is to go by."""
    cool_since_seconds: float | None = None
    """Moved on by the time in which it told no temperature: nobody knows what that was."""
    recovered_at_seconds: float | None = None
    """When it last came down a rung."""
    relapsed_rung: ThermalRung | None = None
    """Where it was soon hot again when it last came down; None: it did well."""
    patience_seconds: float = PATIENCE_SECONDS
    """How long it is cool before it comes down there, or below."""
    throttle_seconds: float = 0.0
    """How long it was slowed down by heat in all, as far as was seen."""


def throttle_point_celsius(identity: CardIdentity, reading: CardReading) -> int | None:
    """Where a card begins to slow down by itself, by its own word; None where it has no thermometer."""
    if reading.temperature_celsius is None:
        return None
    told = [identity.target_celsius]
    told += [None if limit is None else limit - HEADROOM_CELSIUS for limit in (identity.slowdown_celsius, identity.operating_max_celsius)]
    known = [limit for limit in told if limit is not None]
    if known:
        return min(known)
    if reading.thermal_margin_celsius is not None:
        return reading.temperature_celsius + reading.thermal_margin_celsius
    return THROTTLE_POINT_CELSIUS


def next_state(state: ThermalState, look: CardLook, limits: HeatLimits, now_seconds: float) -> ThermalState:
    """The card after one more look."""
    state = _with_look(state, look, limits, now_seconds)
    if look.slot_count == 0 and not look.lost and state.rung < ThermalRung.DRAIN:
        # What heats it now is not the pool's work, and its owner is not to be slowed down by us: without an engine a card gets its cap back
        # on any rung. A silent one keeps its rung, or the next engine on it would get everything.
        return state if state.rung is ThermalRung.COOL or is_silent(state) else _at(state, ThermalRung.COOL, now_seconds)
    wanted = _hotter(state, look, limits, now_seconds)
    if wanted is not None and wanted > state.rung:
        return _climbed(state, wanted, now_seconds)
    below = [rung for rung in _rungs(look, limits) if rung < state.rung]
    if below and _may_recover(state, below[-1], now_seconds):
        return replace(_at(state, below[-1], now_seconds), recovered_at_seconds=now_seconds)
    return state


def is_silent(state: ThermalState) -> bool:
    """Whether a card that has told its temperature did not at the last look."""
    return state.temperature_at_seconds is not None and state.temperature_at_seconds != state.looked_at_seconds


def limit_celsius(look: CardLook, limits: HeatLimits) -> int:
    """What a card is kept below: the owner's word or the card's own, whichever is lower."""
    own = THROTTLE_POINT_CELSIUS if look.throttle_point_celsius is None else look.throttle_point_celsius
    return own if limits.temperature_celsius_max is None else min(own, limits.temperature_celsius_max)


def seconds_to_limit(state: ThermalState, limit: int) -> float | None:
    """When the limit is reached if the last minute's rise near it goes on; None where there was none."""
    if not state.samples:
        return None
    now_seconds, newest = state.samples[-1]
    before = [
        (celsius, at_seconds)
        for at_seconds, celsius in state.samples
        if now_seconds - at_seconds >= TREND_SECONDS_MIN and celsius >= limit - NEAR_CELSIUS
    ]
    if not before or newest < limit - NEAR_CELSIUS:
        return None
    # Of equally cool looks the latest: from there on it rises.
    coolest, since_seconds = min(before, key=lambda sample: (sample[0], -sample[1]))
    rise = newest - coolest
    return None if rise < RISE_CELSIUS_MIN else max(0.0, (limit - newest) * (now_seconds - since_seconds) / rise)


def _with_look(state: ThermalState, look: CardLook, limits: HeatLimits, now_seconds: float) -> ThermalState:
    samples = tuple(sample for sample in state.samples if now_seconds - sample[0] <= TREND_SECONDS)
    if look.temperature_celsius is not None:
        samples = (*samples, (now_seconds, look.temperature_celsius))[-SAMPLES_MAX:]
    elapsed_seconds = 0.0 if state.looked_at_seconds is None else min(GAP_SECONDS_MAX, max(0.0, now_seconds - state.looked_at_seconds))
    return replace(
        state,
        samples=samples,
        looked_at_seconds=now_seconds,
        temperature_at_seconds=state.temperature_at_seconds if look.temperature_celsius is None else now_seconds,
        cool_since_seconds=_cool_since_seconds(state, look, now_seconds) if _is_cool(look, limits) else None,
        throttle_seconds=state.throttle_seconds + (elapsed_seconds if HEAT_REASONS.intersection(look.throttle_reasons) else 0.0),
    )


def _cool_since_seconds(state: ThermalState, look: CardLook, now_seconds: float) -> float | None:
    """Since when a card counts as cool that this look does not show to be hot; None where it was not seen cool since it was hot."""
    since_seconds, told_at_seconds = state.cool_since_seconds, state.temperature_at_seconds
    if look.temperature_celsius is None:
        # One that never told a temperature can be judged by the driver's reasons alone.
        return now_seconds if told_at_seconds is None and since_seconds is None else since_seconds
    if since_seconds is None or told_at_seconds is None:
        return now_seconds
    if not is_silent(state):
        return since_seconds
    # What it had been cool for before it fell silent still counts, from its last change on, as ever.
    counted_since_seconds = max(since_seconds, state.changed_at_seconds or since_seconds)
    return min(now_seconds, counted_since_seconds + now_seconds - told_at_seconds)


def _is_cool(look: CardLook, limits: HeatLimits) -> bool:
    if look.lost or HEAT_REASONS.intersection(look.throttle_reasons):
        return False
    return look.temperature_celsius is None or look.temperature_celsius <= limit_celsius(look, limits) - COOL_MARGIN_CELSIUS


def _hotter(state: ThermalState, look: CardLook, limits: HeatLimits, now_seconds: float) -> ThermalRung | None:
    """The rung that the heat asks for now; None where it asks for none."""
    if look.lost:
        return ThermalRung.PAUSE
    if ThrottleReason.HARDWARE_THERMAL in look.throttle_reasons and state.rung < ThermalRung.DRAIN:
        return ThermalRung.DRAIN
    dwell_seconds = DRAIN_SECONDS if state.rung is ThermalRung.DRAIN else DWELL_SECONDS
    if state.changed_at_seconds is not None and now_seconds - state.changed_at_seconds < dwell_seconds:
        return None
    rungs = _rungs(look, limits)
    above = next((rung for rung in rungs if rung > state.rung), None)
    limit = limit_celsius(look, limits)
    asked = [above] if above is not None and _is_at_limit(look, limit) else []
    to_limit_seconds = seconds_to_limit(state, limit)
    # What may come takes no answer away: only heat that is there drains a card.
    if above is not None and above < ThermalRung.DRAIN and to_limit_seconds is not None:
        if to_limit_seconds <= HORIZON_SECONDS:
            asked.append(above)
        if to_limit_seconds <= URGENT_SECONDS:
            asked += [rung for rung in SLOT_RUNGS if rung in rungs and rung > state.rung][:1]
    return max(asked, default=None)


def _is_at_limit(look: CardLook, limit: int) -> bool:
    if HEAT_REASONS.intersection(look.throttle_reasons):
        return True
    return look.temperature_celsius is not None and look.temperature_celsius >= limit - HOT_MARGIN_CELSIUS


def _may_recover(state: ThermalState, rung: ThermalRung, now_seconds: float) -> bool:
    if is_silent(state) or state.cool_since_seconds is None or state.changed_at_seconds is None:
        return False
    relapsed = state.relapsed_rung is not None and rung <= state.relapsed_rung
    patience_seconds = state.patience_seconds if relapsed else PATIENCE_SECONDS
    return now_seconds - max(state.cool_since_seconds, state.changed_at_seconds) >= patience_seconds


def _rungs(look: CardLook, limits: HeatLimits) -> tuple[ThermalRung, ...]:
    return rungs_of(look.power, limits.power_limit_milliwatts, look.slot_count)


def _climbed(state: ThermalState, rung: ThermalRung, now_seconds: float) -> ThermalState:
    # One relapse counts once, however many steps follow it.
    after = replace(_at(state, rung, now_seconds), recovered_at_seconds=None)
    if state.recovered_at_seconds is None:
        return after
    if now_seconds - state.recovered_at_seconds < RELAPSE_SECONDS:
        return replace(after, relapsed_rung=state.rung, patience_seconds=min(PATIENCE_SECONDS_MAX, 2 * state.patience_seconds))
    if state.relapsed_rung is None or state.rung <= state.relapsed_rung:
        # It did well for long where it had not done.
        return replace(after, relapsed_rung=None, patience_seconds=PATIENCE_SECONDS)
    return after


def _at(state: ThermalState, rung: ThermalRung, now_seconds: float) -> ThermalState:
    return replace(state, rung=rung, changed_at_seconds=now_seconds)
