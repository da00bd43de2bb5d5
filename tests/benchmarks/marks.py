"""The marks that Potluck's relay is held against, each a ratio to a peer of the same run.

One table says all of them. Decides when a mark is met. Pure: it must not know how anything is measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from tests.benchmarks.arithmetic import Estimate, differences, estimate, ratios, total
from tests.benchmarks.loss_traces import CUT, DOUBLED, HUNG, REFUSED, LossRow
from tests.benchmarks.turns import Turn

OURS: Final = "Potluck"
ENGINE: Final = "direct"
FLOOR: Final = "gRPC relay"
"""Does nothing but pass bytes over a link like ours: what it spends, nothing in Python that has such a link can save."""
AGENT: Final = ("agent",)


@dataclass(frozen=True, slots=True)
class Rounds:
    """Every contender's turns, round by round, and which of its processes count as its relay."""

    turns: Mapping[str, Sequence[Turn]]
    relay_groups: Mapping[str, tuple[str, ...]]

    def cost(self, name: str, workload: str, groups: tuple[str, ...] = ()) -> list[float]:
        """CPU microseconds per unit of the relay, or of these groups, in each round."""
        return [total(turn.cpu[workload], groups or self.relay_groups[name]) for turn in self.turns[name]]

    def times(self, name: str, key: str) -> list[float]:
        return [turn.times[key] for turn in self.turns[name]]

    def added(self, name: str, key: str) -> list[float]:
        """What a contender adds to the engine's own time, in each round."""
        return differences(self.times(name, key), self.times(ENGINE, key))


@dataclass(frozen=True, slots=True)
class Mark:
    """Ours to a peer's, which must not exceed a bound."""

    name: str
    peer: str
    bound: float
    values: Callable[[Rounds, str], list[float]]
    """Of a contender, in each round."""


def _cpu(name: str, workload: str, peer: str, bound: float, groups: tuple[str, ...] = ()) -> Mark:
    return Mark(name, peer, bound, lambda rounds, who: rounds.cost(who, workload, groups if who in (OURS, FLOOR) else ()))


def _added(name: str, key: str, peer: str, bound: float) -> Mark:
    return Mark(name, peer, bound, lambda rounds, who: rounds.added(who, key))


MARKS: Final = (
    _added("added latency, an idle request", "request_ms", "LiteLLM", 0.12),
    _added("added latency, an idle request", "request_ms", "Ray Serve, HAProxy", 1.3),
    _added("added latency, an idle request", "request_ms", "vllm-router", 6),
    _added("added time to first token, idle", "first_token_ms", "vllm-router", 3),
    _cpu("CPU per token, 8 streams (flushed as they come)", "few", "sglang-router", 2),
    _cpu("CPU per token, 64 streams (coalesced)", "paced", "sglang-router", 1.1),
    _cpu("CPU per token, 64 streams (coalesced)", "paced", "LiteLLM", 0.05),
    _cpu("CPU per request, 32 at once", "crowd", "sglang-router", 2.5),
    _cpu("CPU per request, 32 at once", "crowd", "LiteLLM", 0.03),
    _cpu("CPU per request, 220 KB prompt", "long prompt", "vllm-router", 0.6),
    _cpu("agent's CPU per token, 64 streams", "paced", "aiohttp relay", 1.5, AGENT),
    _cpu("agent's CPU per request, 32 at once", "crowd", "aiohttp relay", 1.5, AGENT),
    Mark("one-way token delay, p50, 16 streams", "vllm-router", 1.5, lambda rounds, who: rounds.times(who, "delay_p50_ms")),
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a mark."""

    name: str
    bound: float
    unit: str
    estimate: Estimate | None
    """None: not measured, because a peer could not be run."""
    floor: Estimate | None = None
    """The floor's to the same peer, where it ran too."""

    @property
    def met(self) -> bool | None:
        """By the pessimistic end of the interval, so that a lucky round decides nothing; None where not measured."""
        return None if self.estimate is None else self.estimate.high <= self.bound


_ENDLESS: Final = Estimate(math.inf, math.inf, math.inf)


def verdicts(rounds: Rounds) -> list[Verdict]:
    """Every mark of the table, in its order."""
    return [
        Verdict(f"{mark.name}, to {mark.peer}", mark.bound, "x", _ratio(mark, rounds, OURS), _ratio(mark, rounds, FLOOR)) for mark in MARKS
    ]


def _ratio(mark: Mark, rounds: Rounds, who: str) -> Estimate | None:
    if any(not rounds.turns.get(name) for name in (who, ENGINE, mark.peer)):
        return None
    theirs = mark.values(rounds, mark.peer)
    if not all(value > 0 for value in theirs):
        # It added nothing that could be measured.
        return _ENDLESS
    return estimate(ratios(mark.values(rounds, who), theirs))


def stumbles_verdict(stumbles: Mapping[str, int]) -> Verdict:
    """Every request of the rounds is answered, and whole."""
    count = stumbles.get(OURS, 0)
    return Verdict("turns with an answer refused or not whole", 0, "", Estimate(count, count, count))


DETECTION_SECONDS_MAX: Final = 2.0
HARMS: Final = (REFUSED, CUT, DOUBLED, HUNG)


def loss_verdicts(losses: Sequence[LossRow]) -> list[Verdict]:
    """What Potluck's clients may see of a loss: nothing, and of a freeze nothing for long."""
    ours = [row for row in losses if row.contender == OURS]
    harmed = [sum(row.figures.ends[word] for word in HARMS) + row.figures.probe_failed_count for row in ours]
    found: list[Verdict] = []
    for row, count in zip(ours, harmed, strict=True):
        found.append(Verdict(f"answers harmed, {row.blow} of one of two {row.lost}s", 0, "", Estimate(count, count, count)))
    for row in ours:
        if row.is_freeze:
            seconds = row.figures.noticed_after_seconds
            value = Estimate(seconds, seconds, seconds) if seconds is not None else _ENDLESS
            found.append(Verdict(f"seconds until streams went on, {row.blow} of one of two {row.lost}s", DETECTION_SECONDS_MAX, "s", value))
    return found
