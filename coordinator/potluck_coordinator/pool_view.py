"""The replicas of one gateway's nodes as other gateways see them: numpy columns, one row for each.

Decides what of a replica crosses from gateway to gateway, and which rows changed: of ten thousand replicas most are as they were, and only
the others are read. What many replicas have in common, as their model and its endpoints, is told once. Times are ages, for clocks of two
machines have nothing in common. It must not know who sends it or why.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter, itemgetter
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from potluck_coordinator.domain.placement import ReplicaView
from potluck_coordinator.domain.speeds import Speeds
from potluck_protocol.values import AccountId, Endpoint, ModelId, NodeId, ReplicaId

if TYPE_CHECKING:
    from numpy.typing import NDArray

_FLAGS: Final = ("ready", "node_paused", "node_suspect", "link_up", "leaving", "half_open", "is_trusted")
_COUNTS: Final = (
    "slot_count",
    "in_flight_count",
    "withheld_slot_count",
    "context_length_tokens",
    "kv_capacity_tokens",
    "kv_used_tokens",
    "foreign_waiting_count",
    "foreign_running_count",
)
_FIGURES: Final = (
    "committed_tokens",
    "dispatched_tokens",
    "prefill_backlog_tokens",
    "weight",
    "round_trip_seconds",
    "losses_per_second",
)
_SPEEDS: Final = ("prefill_tokens_per_second", "decode_base_seconds", "decode_each_seconds", "batch_mean", "told_token_seconds")
_SAMPLES: Final = ("prefill_sample_count", "decode_sample_count")
_ROW: Final = np.dtype(
    [
        ("epoch", "i8"),
        ("trait", "i4"),
        *((name, "?") for name in _FLAGS),
        *((name, "i8") for name in (*_COUNTS, *_SAMPLES)),
        *((name, "f8") for name in (*_FIGURES, *_SPEEDS)),
    ]
)
_AGES: Final = np.dtype([("heard", "f8"), ("prefill", "f8"), ("learned", "f8")])
NEVER: Final = -1.0
"""The age of what has not happened."""


class Trait(NamedTuple):
    """What many replicas have in common."""

    model_id: ModelId
    owner_account_id: AccountId
    endpoints: tuple[Endpoint, ...]
    engine_kind: str
    drained: str


class SharedReplica(NamedTuple):
    """One replica, and under which epoch of its node's it is this gateway's."""

    view: ReplicaView
    epoch: int


@dataclass(frozen=True, eq=False, slots=True)
class GatewayView:
    """One gateway's replicas.

    Attributes:
        names: the replica and its node, of each row.
        rows: shape (replicas,), what decides whether a replica has changed.
        ages: shape (replicas,), in seconds.
        traits: by the number in each row.
        starts_seen: of the attempts that other gateways (by their epochs) have sent here ever, those that are in it.
    """

    names: tuple[tuple[ReplicaId, NodeId], ...]
    rows: NDArray[np.void]
    ages: NDArray[np.void]
    traits: tuple[Trait, ...]
    starts_seen: Mapping[int, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def says_the_same(self, other: GatewayView) -> bool:
        """But for ages."""
        return self.starts_seen == other.starts_seen and not self.changed_since(other).size and len(self) == len(other)

    def changed_since(self, other: GatewayView | None) -> NDArray[np.intp]:
        """The numbers of the rows that are not what they were in the other view; of one with other replicas, all."""
        if other is None or self.traits != other.traits or self.names != other.names:
            return np.arange(len(self.rows))
        return np.flatnonzero(self.rows != other.rows)

    def replicas(self, now: float, numbers: Iterable[int] | None = None) -> list[SharedReplica]:
        """All rows, or those of these numbers, as they were read; `now` is the reader's clock, in monotonic seconds."""
        chosen = range(len(self.rows)) if numbers is None else list(numbers)
        rows, ages = self.rows[chosen].tolist(), self.ages[chosen].tolist()
        return [
            _replica(row, self.traits[row[1]], self.names[number], [_moment(age, now) for age in each])
            for number, row, each in zip(chosen, rows, ages, strict=True)
        ]


@dataclass(frozen=True, eq=False, slots=True)
class PoolView:
    """What every gateway told last, by its epoch; a higher version replaces a lower one."""

    version: int
    gateways: Mapping[int, GatewayView]


def gateway_view(replicas: Iterable[SharedReplica], starts_seen: Mapping[int, int], now: float) -> GatewayView:
    """The view of these replicas, whose times are by a clock that says `now`, in monotonic seconds."""
    shared = tuple(replicas)
    traits: dict[Trait, int] = {}
    rows, ages = [], []
    for view, epoch in shared:
        trait = traits.setdefault(Trait(*_of_trait(view)), len(traits))
        rows.append((epoch, trait, *_of_flags_and_counts(view), *_of_samples(view.speeds), *_of_figures(view), *_of_speeds(view.speeds)))
        since = (view.heard_at_seconds, view.prefill_since_seconds, view.speeds.learned_at_seconds)
        ages.append(tuple(now - at if at else NEVER for at in since))
    names = tuple((view.replica_id, view.node_id) for view, _ in shared)
    return GatewayView(names, np.array(rows, _ROW), np.array(ages, _AGES), tuple(traits), dict(starts_seen))


# Thousands of rows are made and read a few times a second: these take what they take of one at once.
_of_flags_and_counts: Final = attrgetter(*_FLAGS, *_COUNTS)
_of_samples: Final = attrgetter(*_SAMPLES)
_of_figures: Final = attrgetter(*_FIGURES)
_of_speeds: Final = attrgetter(*_SPEEDS)
_of_trait: Final = attrgetter(*Trait._fields)
_READ: Final = (
    *("epoch", "trait", *_FLAGS, *_COUNTS, *_SAMPLES, *_FIGURES, *_SPEEDS),
    *(*Trait._fields, "replica_id", "node_id", "heard_at_seconds", "prefill_since_seconds", "learned_at_seconds"),
)
"""A row with what belongs to it, in this order."""
_to_speeds: Final = itemgetter(*(_READ.index(name) for name in Speeds._fields))
_to_view: Final = itemgetter(*((*_READ, "speeds", "is_remote").index(name) for name in ReplicaView._fields))


def _replica(row: tuple[Any, ...], trait: Trait, names: tuple[ReplicaId, NodeId], moments: list[float]) -> SharedReplica:
    read = (*row, *trait, *names, *moments)
    is_remote = False  # whoever reads it says so
    return SharedReplica(ReplicaView(*_to_view((*read, Speeds(*_to_speeds(read)), is_remote))), row[0])


def _moment(age_seconds: float, now: float) -> float:
    return 0.0 if age_seconds == NEVER else now - age_seconds
