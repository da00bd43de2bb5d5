"""The policies by their names, and which of them have agents that look after their cards.

Decides nothing else. It must not know scenarios' files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random
from typing import Final

from potluck_coordinator.simulation.card_model import CardPolicy
from potluck_coordinator.simulation.node_side import LiveCardPolicy
from potluck_coordinator.simulation.oracle import Oracle
from potluck_coordinator.simulation.ours import Ours
from potluck_coordinator.simulation.peers import LeastConnections, PowerOfTwo, RoundRobin
from potluck_coordinator.simulation.policy import Policy
from potluck_coordinator.simulation.scenario import NodeClass, Scenario

MAKERS: Final[Mapping[str, Callable[[Random, Scenario], Policy]]] = {
    RoundRobin.name: lambda random, _: RoundRobin(random),
    LeastConnections.name: lambda random, _: LeastConnections(random),
    PowerOfTwo.name: lambda random, _: PowerOfTwo(random),
    Ours.name: Ours,
    Oracle.name: Oracle,
}
NAMES: Final = tuple(MAKERS)


def policy_of(name: str, random: Random, scenario: Scenario) -> Policy:
    """A new one of that name, for one run."""
    return MAKERS[name](random, scenario)


def card_policy_of(name: str, node_class: NodeClass) -> Callable[[], CardPolicy | None]:
    """Makes each node's: only our agents have one, and the oracle's."""
    if name not in {Ours.name, Oracle.name}:
        return lambda: None
    return lambda: LiveCardPolicy(node_class)
