"""The words of a scenario: who is there, who asks, what goes wrong, and for how long.

Decides nothing; `scenario_file` reads these from TOML, and what a key means stands beside it here. All shares are from 0 to 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from potluck_coordinator.simulation.engine_model import EngineModel
from potluck_coordinator.simulation.heat import HeatModel


@dataclass(frozen=True, slots=True)
class Line:
    """A home's line to the coordinator."""

    round_trip_ms: float = 30.0
    """The median over homes."""
    spread: float = 0.4
    """Of the round trip's logarithm: homes differ."""
    upload_mbit: float = 10.0


@dataclass(frozen=True, slots=True)
class Churn:
    """How long a node stays and stays away: log-normal sessions with hours of the day in which homes rather go."""

    session_hours: float = 0.0
    """The median; 0: it stays."""
    session_spread: float = 1.0
    away_hours: float = 2.0
    goodbye_share: float = 0.7
    """Of the departures: those that say goodbye and finish nothing; the others just stop."""
    hourly: tuple[float, ...] = ()
    """24 factors on how readily a node leaves, by hour of the day; empty: the same all day."""
    trace: str = ""
    """A CSV file of node number, hour it came, hour it left, instead of the above."""


@dataclass(frozen=True, slots=True)
class NodeClass:
    """Nodes that are alike."""

    name: str
    count: int
    engine: EngineModel
    heat: HeatModel = field(default_factory=HeatModel)
    line: Line = field(default_factory=Line)
    churn: Churn = field(default_factory=Churn)
    slot_count: int = 8
    """Requests at a time, as its operator's catalogue says."""
    context_tokens: int = 8192
    """Of one request, prompt and answer together."""
    power_is_set: bool = True
    """Whether the agent may set its cards' power cap."""

    @property
    def request_tokens_max(self) -> int:
        """What one request may have here: engines start with no more context than their cache holds."""
        return min(self.context_tokens, self.engine.kv_tokens)


@dataclass(frozen=True, slots=True)
class Users:
    """People, or programs, that ask alike. Open loop, but for `people`: who comes does not wait for who is served. A session's turns do."""

    name: str
    account_count: int = 1
    requests_per_second: float = 0.0
    """Single requests, of all the accounts together."""
    sessions_per_hour: float = 0.0
    """Sessions that begin, of all the accounts together."""
    people: int = 0
    """So many who are always there, each with one session after the other: the only ones who wait for their answers before they go on, and
    who come back to a conversation that they had given up."""
    turns_mean: float = 4.0
    think_seconds: float = 20.0
    prompt_tokens: float = 400.0
    prompt_spread: float = 0.6
    answer_tokens: float = 250.0
    answer_spread: float = 0.6
    answer_tokens_max: int = 2000
    shared_prefix_tokens: int = 0
    """With which every prompt of these users begins: a system prompt."""
    tier: str = "flex"
    weight: float = 1.0
    hourly: tuple[float, ...] = ()
    """24 factors on the rates, by hour of the day; empty: the same all day."""
    from_seconds: float = 0.0
    for_seconds: float = 0.0
    """0: until the end."""
    patience_seconds: float = 120.0
    """For the first token; then its client goes away."""
    retries_max: int = 3
    """Of a refused or failed request, each after the time that its refusal names, or after five seconds."""
    away_seconds: float = 300.0
    """The mean, after which one of `people` who gave up comes back to the same conversation."""


@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong, in events an hour over the whole pool unless said otherwise."""

    deaths_per_hour: float = 0.0
    """A node's processes are killed; it is back after a minute."""
    freezes_per_hour: float = 0.0
    freeze_seconds: float = 20.0
    cuts_per_hour: float = 0.0
    cut_seconds: float = 5.0
    """The mean: many cuts are shorter than the link's grace."""
    garbled_per_hour: float = 0.0
    """Half a minute in which a node's frames come twice, or in the wrong order."""
    slow_per_hour: float = 0.0
    slow_seconds: float = 180.0
    slow_share: float = 0.5
    """Of its speed that a slow node has."""
    skewed_share: float = 0.0
    """Of the nodes: those whose clock runs up to a twentieth too fast or too slow."""
    coordinator_restarts_per_hour: float = 0.0
    coordinator_restart_seconds: float = 5.0


@dataclass(frozen=True, slots=True)
class Objective:
    """What counts as served well."""

    first_token_seconds: float = 2.0
    token_seconds: float = 0.1
    """Between two tokens of an answer, in the mean."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """One world."""

    name: str
    about: str
    hours: float
    nodes: tuple[NodeClass, ...]
    users: tuple[Users, ...]
    faults: Faults = field(default_factory=Faults)
    objective: Objective = field(default_factory=Objective)
    begins_at_hour: float = 0.0
    """Of the week, from Monday 0:00."""
    warm_up_seconds: float = 0.0
    """Requests that arrive before count in no figure."""
    heat_step_seconds: float = 5.0
    """Between two looks at the cards; the time in which a figure may be old."""
    queue_wait_seconds: float = 30.0
    """How long a request may wait in the pool's own queue, as its operator sets it; peers have no such bound."""
    policies: tuple[str, ...] = ("round-robin", "least-connections", "power-of-two", "ours")
    """Those that a run compares unless it is told which."""

    @property
    def seconds(self) -> float:
        """How long it lasts."""
        return self.hours * 3600

    @property
    def request_tokens_max(self) -> int:
        """What no node takes more of, prompt and answer together: the context that its catalogue would name."""
        return max(node_class.request_tokens_max for node_class in self.nodes)
