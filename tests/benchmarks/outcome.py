"""Everything that one run of the benchmark found, and the JSON document of it, there and back.

Decides nothing but names. It must not know how anything was measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, Final

import msgspec

from tests.benchmarks.loss_traces import LossRow
from tests.benchmarks.marks import Rounds, Verdict, loss_verdicts, stumbles_verdict, verdicts

BUSY_SHARE_MAX: Final = 0.10
"""Beyond this the machine was not ours alone, and the figures are provisional."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What is read of a contender's processes beside the rounds, by group."""

    resident_bytes: Mapping[str, int]
    idle_cpu_ms_per_second: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run. Contenders are in the order they are shown in."""

    rounds: Rounds
    standings: Mapping[str, Standing]
    losses: Sequence[LossRow]
    absent: Mapping[str, str]
    """Contenders that could not be measured, and why."""
    stumbles: Mapping[str, int]
    """Turns of a contender in which it broke an answer off or refused one, and which were run again."""
    versions: Mapping[str, str]
    """Of the contenders and of the machine."""
    command: str
    seed: int
    pinned: bool
    seconds: float

    @property
    def round_count(self) -> int:
        return max((len(turns) for turns in self.rounds.turns.values()), default=0)

    @property
    def foreign_cpu_share(self) -> float:
        """How much of the machine others used, on average over the runs."""
        shares = [turn.foreign_cpu_share for turns in self.rounds.turns.values() for turn in turns]
        return fmean(shares) if shares else 0.0

    @property
    def is_provisional(self) -> bool:
        return self.foreign_cpu_share > BUSY_SHARE_MAX

    @property
    def verdicts(self) -> list[Verdict]:
        """Every mark, the losses' behind the others."""
        rounds = [*verdicts(self.rounds), stumbles_verdict(self.stumbles)] if self.rounds.turns else []
        return [*rounds, *loss_verdicts(self.losses)]


def document(outcome: Outcome) -> dict[str, object]:
    """The whole outcome as JSON values."""
    return {
        "command": outcome.command,
        "seed": outcome.seed,
        "seconds": outcome.seconds,
        "versions": dict(outcome.versions),
        "pinned": outcome.pinned,
        "foreign_cpu_share": outcome.foreign_cpu_share,
        "provisional": outcome.is_provisional,
        "marks": [_mark(verdict) for verdict in outcome.verdicts],
        "rounds": {name: [asdict(turn) for turn in turns] for name, turns in outcome.rounds.turns.items()},
        "relay_groups": {name: list(groups) for name, groups in outcome.rounds.relay_groups.items()},
        "standings": {name: asdict(standing) for name, standing in outcome.standings.items()},
        "losses": [asdict(row) for row in outcome.losses],
        "absent": dict(outcome.absent),
        "stumbles": dict(outcome.stumbles),
    }


def outcome_of(found: Mapping[str, Any]) -> Outcome:
    """What such values say; marks are judged anew. Raises msgspec.ValidationError where they are none of a run's."""
    rounds = {"turns": found.get("rounds"), "relay_groups": found.get("relay_groups")}
    return msgspec.convert({**found, "rounds": rounds}, Outcome)


def _mark(verdict: Verdict) -> dict[str, object]:
    found = None if verdict.estimate is None else asdict(verdict.estimate)
    # JSON has no word for what is endless.
    finite = found and {name: value if math.isfinite(value) else None for name, value in found.items()}
    return {"name": verdict.name, "bound": verdict.bound, "unit": verdict.unit, "estimate": finite, "met": verdict.met}
