"""The policies that others have: who takes a request, chosen at once by counts alone, and a queue without end inside every engine.

Decides as they do by default: round robin; least connections, as HAProxy has it; the better of two drawn nodes, as SGLang's and vLLM's
routers have it. Each knows its own counts without delay, and leaves nodes out that do not answer probes, which is their best case. They
refuse only where no node is there, and an answer that breaks off is an error for its client.
"""

from __future__ import annotations

from collections import OrderedDict
from random import Random

from potluck_coordinator.simulation.asking import Request
from potluck_coordinator.simulation.node_model import Node
from potluck_coordinator.simulation.policy import Attempt, Beliefs, Go, Refuse, Verdict
from potluck_protocol.values import NodeId

RETRY_AFTER_SECONDS = 5.0


class Balancer:
    """What they share: the nodes that are there, and how many requests each has."""

    name = ""
    keeps_leases = False
    beliefs: Beliefs | None = None

    def __init__(self, random: Random) -> None:
        self._random = random
        self._counts: OrderedDict[NodeId, int] = OrderedDict()
        self._away: dict[NodeId, int] = {}
        self._nodes: list[NodeId] = []

    def choose(self) -> NodeId:
        """Among one node or more."""
        raise NotImplementedError

    def arrive(self, request: Request, now: float) -> Verdict:  # noqa: ARG002 - they look at neither
        return Go(self.choose()) if self._nodes else Refuse(RETRY_AFTER_SECONDS, "no server is available")

    def next_up(self, now: float) -> tuple[Request, NodeId] | None:  # noqa: ARG002
        return None

    def heard(self, now: float) -> None: ...

    def sweep(self, now: float) -> list[tuple[Request, Refuse]]:  # noqa: ARG002
        return []

    def waiting(self) -> list[Request]:
        return []

    def left(self, request: Request) -> None: ...

    def began(self, attempt: Attempt, now: float) -> None:  # noqa: ARG002
        self._count(attempt.node_id, 1)

    def first_token(self, attempt: Attempt, now: float) -> None: ...

    def over(self, attempt: Attempt, now: float, *, whole: bool) -> None:  # noqa: ARG002
        self._count(attempt.node_id, -1)

    def joined(self, node: Node, now: float) -> None:  # noqa: ARG002
        self._away.pop(node.node_id, None)
        self._counts[node.node_id] = 0
        self._nodes = list(self._counts)

    def orders(self, node: Node, now: float) -> None: ...

    def suspected(self, node_id: NodeId, *, suspect: bool) -> None:
        if suspect and node_id in self._counts:
            self._away[node_id] = self._counts.pop(node_id)
        elif not suspect and node_id in self._away:
            self._counts[node_id] = self._away.pop(node_id)
        self._nodes = list(self._counts)

    def gone(self, node_id: NodeId, now: float) -> None:  # noqa: ARG002
        self._away.pop(node_id, None)
        self._counts.pop(node_id, None)
        self._nodes = list(self._counts)

    def _count(self, node_id: NodeId, change: int) -> None:
        counts = self._counts if node_id in self._counts else self._away
        if node_id in counts:
            counts[node_id] += change


class RoundRobin(Balancer):
    """One after the other."""

    name = "round-robin"

    def choose(self) -> NodeId:
        node_id = next(iter(self._counts))
        self._counts.move_to_end(node_id)
        return node_id


class LeastConnections(Balancer):
    """Whoever has the fewest requests, of equals the one that got none for longest."""

    name = "least-connections"

    def choose(self) -> NodeId:
        node_id = min(self._counts, key=self._counts.__getitem__)
        self._counts.move_to_end(node_id)
        return node_id


class PowerOfTwo(Balancer):
    """Of two drawn nodes the one with fewer requests."""

    name = "power-of-two"

    def choose(self) -> NodeId:
        one, other = self._random.choice(self._nodes), self._random.choice(self._nodes)
        return one if self._counts[one] <= self._counts[other] else other
