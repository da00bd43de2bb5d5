"""What a policy of the pool is asked, and what it is told.

Decides nothing: `peers`, `oracle` and `ours` do. A policy knows what a coordinator knows: its own counts, what nodes said of themselves,
and the times of tokens; never how long an answer will be or how fast a node is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from potluck_coordinator.domain.admission import Capacity
from potluck_coordinator.domain.speeds import Speeds
from potluck_coordinator.gateway.relay import Relay
from potluck_coordinator.simulation.asking import Request
from potluck_coordinator.simulation.node_model import Node
from potluck_protocol.values import NodeId


@dataclass(frozen=True, slots=True)
class Go:
    """Send it there now."""

    node_id: NodeId


@dataclass(frozen=True, slots=True)
class Hold:
    """Keep it; the policy says later whose turn it is."""


@dataclass(frozen=True, slots=True)
class Refuse:
    """Tell its client to come back."""

    retry_after_seconds: float
    reason: str = ""


Verdict = Go | Hold | Refuse


class Attempt:
    """One try of a request on one node, as the coordinator knows it."""

    __slots__ = (
        "answered_tokens",
        "attempt_id",
        "began_at",
        "cached_tokens",
        "first_index",
        "first_token_at",
        "node_id",
        "prompt_tokens",
        "relay",
        "request",
    )

    def __init__(self, attempt_id: int, request: Request, node_id: NodeId, prompt_tokens: int, relay: Relay, now: float) -> None:
        self.attempt_id = attempt_id
        self.request = request
        self.node_id = node_id
        self.prompt_tokens = prompt_tokens
        self.relay = relay
        self.began_at = now
        self.first_index = request.delivered_tokens
        self.first_token_at: float | None = None
        self.answered_tokens = 0
        self.cached_tokens = 0
        """By the engine's count, at a whole answer's end."""


class Beliefs(Protocol):
    """What a policy may give as a reason for which somebody waits; the world checks each as far as it can."""

    def speeds(self, node_id: NodeId) -> Speeds | None:
        """Of a node, as learned; None: it knows no such node."""

    def lacks_room(self, request: Request, node_id: NodeId) -> bool:
        """Whether the request would fill the node's cache."""

    def is_kept_from(self, request: Request, capacity: Capacity, now: float) -> bool:
        """Whether what is free of so much is somebody else's."""


class Policy(Protocol):
    """Who takes which request, when."""

    name: str
    beliefs: Beliefs | None
    """None: it keeps requests from free nodes as it likes."""
    keeps_leases: bool
    """It knows suspect from lost nodes, and has an answer that broke off continued elsewhere; else its client gets an error."""

    def arrive(self, request: Request, now: float) -> Verdict: ...

    def next_up(self, now: float) -> tuple[Request, NodeId] | None:
        """Asked whenever something may have become free, until it has nobody more."""

    def heard(self, now: float) -> None:
        """Told every second: the nodes' heartbeats have come."""

    def sweep(self, now: float) -> list[tuple[Request, Refuse]]:
        """Asked after that, once all have been served who could be: who has waited for too long."""

    def waiting(self) -> list[Request]:
        """Some of those that wait, each of which is next for some node; empty: nobody waits."""

    def left(self, request: Request) -> None:
        """One that waits went away."""

    def began(self, attempt: Attempt, now: float) -> None: ...

    def first_token(self, attempt: Attempt, now: float) -> None: ...

    def over(self, attempt: Attempt, now: float, *, whole: bool) -> None: ...

    def joined(self, node: Node, now: float) -> None: ...

    def orders(self, node: Node, now: float) -> None:
        """A node offers other slots than before, or none."""

    def suspected(self, node_id: NodeId, *, suspect: bool) -> None: ...

    def gone(self, node_id: NodeId, now: float) -> None: ...
