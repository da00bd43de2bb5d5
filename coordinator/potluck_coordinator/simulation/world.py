"""One simulated world, from its scenario, its seed and its policy to its figures.

Decides only how the parts are put together and in which order they begin; each has a generator of its own, so that policies meet the same
users, homes and faults.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from random import Random
from time import perf_counter, process_time
from typing import Final

from potluck_coordinator.domain.nodes import LivenessLimits
from potluck_coordinator.simulation.agenda import Agenda
from potluck_coordinator.simulation.asking import Request
from potluck_coordinator.simulation.coordinator_model import CoordinatorModel
from potluck_coordinator.simulation.faults import Misfortune
from potluck_coordinator.simulation.figures import Figures, Look, figures_of
from potluck_coordinator.simulation.holding_back import HoldingBack
from potluck_coordinator.simulation.homes import Homes
from potluck_coordinator.simulation.invariants import Invariants
from potluck_coordinator.simulation.lease_record import LeaseRecord
from potluck_coordinator.simulation.node_model import Node
from potluck_coordinator.simulation.policies import card_policy_of, policy_of
from potluck_coordinator.simulation.scenario import Scenario
from potluck_coordinator.simulation.users import Crowd
from potluck_protocol.values import NodeId

SWEEP_SECONDS: Final = 1.0
LOOK_SECONDS_MIN: Final = 10.0
"""Between two points of a plot."""
LOOKS_MAX: Final = 720
Progress = Callable[[float], None]


class World:
    """Everything there is. `run` is called once."""

    def __init__(self, scenario: Scenario, policy_name: str, seed: int) -> None:
        self.scenario = scenario
        self.policy_name = policy_name
        self.seed = seed
        self.agenda = Agenda()
        self.invariants = Invariants()
        self._holding_back = HoldingBack(self.invariants, scenario.heat_step_seconds)
        self.requests: list[Request] = []
        self.looks: list[Look] = []
        self.limits = LivenessLimits()
        random = Random(f"{scenario.name}/{seed}")
        self.policy = policy_of(policy_name, Random(random.getrandbits(64)), scenario)
        # Whoever grants no leases has nodes that keep to none.
        node_limits = self.limits if self.policy.keeps_leases else replace(self.limits, lease_ttl_seconds=math.inf)
        record = LeaseRecord(self.agenda, self.invariants, node_limits.lease_ttl_seconds, lambda: self.coordinator.doubted_at)
        self.coordinator = CoordinatorModel(self.agenda, self.policy, self.invariants, self.limits, scenario, record, self._ended)
        self.nodes: list[Node] = []
        self.homes: list[Homes] = []
        for node_class in scenario.nodes:
            node_random = Random(random.getrandbits(64))
            card_policy = card_policy_of(policy_name, node_class)
            nodes = [
                Node(NodeId(f"{node_class.name}-{number}"), node_class, self.agenda, node_random, card_policy(), node_limits)
                for number in range(node_class.count)
            ]
            for node in nodes:
                node.coordinator = self.coordinator
                node.record = record
            self.nodes += nodes
            self.homes.append(Homes(node_class.churn, scenario, self.agenda, Random(random.getrandbits(64)), nodes))
        self.misfortune = Misfortune(
            scenario.faults, scenario.seconds, self.agenda, Random(random.getrandbits(64)), self.nodes, self.coordinator
        )
        numbers = count(1)
        self.crowds = {
            users.name: Crowd(users, scenario, self.agenda, Random(random.getrandbits(64)), numbers, self._ask) for users in scenario.users
        }

    def run(self, progress: Progress | None = None) -> Figures:
        """Lets the scenario's time pass; `progress` is called with the share of it that has."""
        began_at, cpu_began_at = perf_counter(), process_time()
        for homes in self.homes:
            homes.begin()
        self.misfortune.begin()
        for crowd in self.crowds.values():
            crowd.begin()
        self.agenda.after(self.scenario.heat_step_seconds, self._look_at_cards)
        self.agenda.after(SWEEP_SECONDS, self._sweep)
        self.agenda.at(0.0, self._look)
        steps = 100
        for step in range(1, steps + 1):
            self.agenda.run_until(self.scenario.seconds * step / steps)
            if progress is not None:
                progress(step / steps)
        for node in self.nodes:
            node.stream_out()
            node.count()
        return figures_of(self, perf_counter() - began_at, process_time() - cpu_began_at)

    def _ask(self, request: Request) -> None:
        self.requests.append(request)
        self.coordinator.arrive(request)

    def _ended(self, request: Request) -> None:
        self.crowds[request.users_name].ended(request)

    def _look_at_cards(self) -> None:
        for node in self.nodes:
            node.look_at_cards(self.scenario.heat_step_seconds)
        self._holding_back.look(self.nodes, self.agenda.now)
        self.agenda.after(self.scenario.heat_step_seconds, self._look_at_cards)

    def _sweep(self) -> None:
        self.coordinator.sweep()
        self.agenda.after(SWEEP_SECONDS, self._sweep)

    def _look(self) -> None:
        """A point of the plots."""
        up = [node for node in self.nodes if node.engine is not None]
        self.looks.append(
            Look(
                at_seconds=self.agenda.now,
                celsius_max=max(node.cards.celsius for node in self.nodes),
                clock_share_min=min(
                    (node.cards for node in self.nodes), key=lambda cards: cards.watts_limit / cards.model.full_watts
                ).speed_shares[0],
                up_count=len(up),
                running_count=sum(node.engine.running_count for node in up if node.engine is not None),
                waiting_in_engines_count=sum(node.engine.waiting_count for node in up if node.engine is not None),
                waiting_count=len(self.policy.waiting()),
                open_count=len(self.coordinator.attempts),
            )
        )
        self.agenda.after(max(LOOK_SECONDS_MIN, self.scenario.seconds / LOOKS_MAX), self._look)
