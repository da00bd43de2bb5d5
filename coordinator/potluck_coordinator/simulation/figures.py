"""What a run came to, in figures.

Decides how each figure is made from what happened; none is an opinion. Requests that arrived in the warm-up are in no figure, nor are those
that were still open at the end.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from potluck_coordinator.domain.fairness import service
from potluck_coordinator.simulation.asking import Outcome, Request
from potluck_coordinator.simulation.scenario import Objective

if TYPE_CHECKING:
    from potluck_coordinator.simulation.world import World


@dataclass(frozen=True, slots=True)
class Look:
    """The pool at one moment, for plots."""

    at_seconds: float
    celsius_max: float
    clock_share_min: float
    up_count: int
    running_count: int
    waiting_in_engines_count: int
    waiting_count: int
    """In the coordinator."""
    open_count: int


@dataclass(frozen=True, slots=True)
class Spread:
    """Percentiles of a duration in seconds; None where nothing was measured."""

    p50: float | None
    p95: float | None
    p99: float | None


@dataclass(frozen=True, slots=True)
class UsersFigures:
    """What one entry of the scenario's users got."""

    asked_count: int
    served_count: int
    refused_count: int
    good_count: int
    first_token_seconds: Spread


@dataclass(frozen=True, slots=True)
class Figures:
    """One run's. Counts are of requests, unless the name says otherwise."""

    scenario: str
    policy: str
    seed: int
    seconds: float
    asked_count: int
    served_count: int
    refused_count: int
    """With a time to come back."""
    too_long_count: int
    """Refused for good: no context has room for their prompts."""
    failed_count: int
    left_count: int
    retry_count: int
    good_count: int
    """Served, with the first token and the time between tokens within the objective."""
    goodput_per_second: float
    first_token_seconds: Spread
    token_seconds: Spread
    users: dict[str, UsersFigures]
    session_count: int
    finished_session_count: int
    answer_tokens: int
    """That clients of served requests got."""
    made_tokens: int
    """That engines made."""
    cached_share: float
    """Of prompt tokens, those that an engine had kept."""
    preempted_count: int
    uptime_share: float
    """Of the time that owners had their nodes running: with a live engine."""
    engine_death_count: int
    throttled_seconds: float
    """Over all nodes: their own governor took clock away while they worked."""
    first_throttle_seconds: float | None
    celsius_max: float
    clock_share_min: float
    jain: float | None
    """Of the service that accounts got by their weights; None for one account."""
    lost_attempt_count: int
    refused_frame_count: int
    fault_count: int
    departure_count: int
    break_counts: dict[str, int]
    """Of invariants; empty: all held."""
    breaks: tuple[str, ...]
    event_count: int
    wall_seconds: float
    cpu_seconds: float
    """Of this process; less than the former where others share its processors."""
    looks: tuple[Look, ...]

    def as_json(self, *, looks: bool = False) -> dict[str, Any]:
        """For programs; the points of the plots only if they are asked for. What differs between two equal runs is in "timing"."""
        values = asdict(self)
        values["timing"] = {name: values.pop(name) for name in ("wall_seconds", "cpu_seconds")}
        if not looks:
            del values["looks"]
        return values


def percentile(ordered: Sequence[float], share: float) -> float | None:
    """Of sorted values, the one that so many are not above."""
    return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)] if ordered else None


def spread(values: Iterable[float]) -> Spread:
    """The percentiles of unsorted values."""
    ordered = sorted(values)
    return Spread(percentile(ordered, 0.5), percentile(ordered, 0.95), percentile(ordered, 0.99))


def jain_index(shares: Sequence[float]) -> float | None:
    """1 where everyone has the same, 1/n where one has all."""
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if len(shares) > 1 and squares > 0 else None


def is_good(request: Request, objective: Objective) -> bool:
    """Served within the objective."""
    if request.outcome is not Outcome.SERVED or request.first_token_at is None:
        return False
    in_time = request.first_token_at - request.arrived_at <= objective.first_token_seconds
    return in_time and (request.token_seconds or 0.0) <= objective.token_seconds


def service_by_account(requests: Iterable[Request]) -> dict[str, float]:
    """What each account got, in the live fairness's words, by its weight."""
    given: defaultdict[str, float] = defaultdict(float)
    for request in requests:
        got = service(request.prompt_tokens if request.first_token_at is not None else 0, request.delivered_tokens)
        given[request.account_id] += got / request.weight
    return dict(given)


def figures_of(world: World, wall_seconds: float, cpu_seconds: float) -> Figures:
    """The figures of a world whose time is over."""
    scenario, nodes, crowds = world.scenario, world.nodes, world.crowds.values()
    counted = [request for request in world.requests if request.arrived_at >= scenario.warm_up_seconds]
    outcomes = {outcome: [request for request in counted if request.outcome is outcome] for outcome in Outcome}
    served = outcomes[Outcome.SERVED]
    started = [request for request in counted if request.first_token_at is not None]
    good_count = sum(is_good(request, scenario.objective) for request in served)
    read, hit = sum(node.counts.read_tokens for node in nodes), sum(node.counts.hit_tokens for node in nodes)
    throttled_at = [node.cards.throttled_at for node in nodes if node.cards.throttled_at is not None]
    return Figures(
        scenario=scenario.name,
        policy=world.policy_name,
        seed=world.seed,
        seconds=scenario.seconds,
        asked_count=len(counted) - len(outcomes[Outcome.OPEN]),
        served_count=len(served),
        refused_count=len(outcomes[Outcome.REFUSED]),
        too_long_count=len(outcomes[Outcome.TOO_LONG]),
        failed_count=len(outcomes[Outcome.FAILED]),
        left_count=len(outcomes[Outcome.LEFT]),
        retry_count=sum(crowd.retry_count for crowd in crowds),
        good_count=good_count,
        goodput_per_second=good_count / (scenario.seconds - scenario.warm_up_seconds),
        first_token_seconds=spread((request.first_token_at or 0.0) - request.arrived_at for request in started),
        token_seconds=spread(request.token_seconds for request in served if request.token_seconds is not None),
        users={name: _users_figures([one for one in counted if one.users_name == name], scenario.objective) for name in world.crowds},
        session_count=sum(crowd.session_count for crowd in crowds),
        finished_session_count=sum(crowd.finished_session_count for crowd in crowds),
        answer_tokens=sum(request.delivered_tokens for request in served),
        made_tokens=round(sum(node.counts.made_tokens for node in nodes)),
        cached_share=hit / (hit + read) if hit + read else 0.0,
        preempted_count=sum(node.counts.preempted_count for node in nodes),
        uptime_share=sum(node.counts.up_seconds for node in nodes) / max(1e-9, sum(node.counts.here_seconds for node in nodes)),
        engine_death_count=sum(node.death_count for node in nodes),
        throttled_seconds=sum(node.cards.throttled_seconds for node in nodes),
        first_throttle_seconds=min(throttled_at, default=None),
        celsius_max=max(node.cards.celsius_max for node in nodes),
        clock_share_min=min(node.cards.clock_share_min for node in nodes),
        jain=jain_index(list(service_by_account(counted).values())),
        lost_attempt_count=world.coordinator.lost_attempt_count,
        refused_frame_count=world.coordinator.refused_frame_count,
        fault_count=world.misfortune.count,
        departure_count=sum(homes.departure_count for homes in world.homes),
        break_counts={invariant.value: number for invariant, number in world.invariants.counts.items()},
        breaks=tuple(world.invariants.breaks),
        event_count=world.agenda.event_count,
        wall_seconds=wall_seconds,
        cpu_seconds=cpu_seconds,
        looks=tuple(world.looks),
    )


def _users_figures(requests: Sequence[Request], objective: Objective) -> UsersFigures:
    started = [request for request in requests if request.first_token_at is not None]
    return UsersFigures(
        asked_count=sum(request.outcome is not Outcome.OPEN for request in requests),
        served_count=sum(request.outcome is Outcome.SERVED for request in requests),
        refused_count=sum(request.outcome is Outcome.REFUSED for request in requests),
        good_count=sum(is_good(request, objective) for request in requests),
        first_token_seconds=spread((request.first_token_at or 0.0) - request.arrived_at for request in started),
    )
