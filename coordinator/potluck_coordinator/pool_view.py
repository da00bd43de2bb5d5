"""The replicas of one gateway's nodes as other gateways see them: numpy columns, one row for each.

Decides what of a replica crosses from gateway to gateway, and which rows changed: of ten thousand replicas most are as they were, and only
the others are read. What many replicas have in common, as their model and its endpoints, is told once. Times are ages, for clocks of two
machines have nothing in common. It must not know who sends it or why.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
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
_SPEEDS: Final = (
    "prefill_tokens_per_second",
    "decode_base_seconds",
    "decode_each_seconds",
    "prefill_sample_count",
    "decode_sample_count",
    "batch_mean",
    "told_token_seconds",
)
_ROW: Final = np.dtype(
    [
        ("epoch", "i8"),
        ("trait", "i4"),
        *((name, "?") for name in _FLAGS),
        *((name, "i8") for name in _COUNTS),
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


@dataclass(frozen=True, slots=True)
class SharedReplica:
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

    def replica(self, number: int, now: float) -> SharedReplica:
        """One row as it was read; `now` is the reader's clock, in monotonic seconds."""
        row: Any = self.rows[number]
        ages: Any = self.ages[number]
        trait, (replica_id, node_id) = self.traits[int(row["trait"])], self.names[number]
        speeds: dict[str, Any] = {name: row[name].item() for name in _SPEEDS}
        speeds["prefill_sample_count"] = int(speeds["prefill_sample_count"])
        speeds["decode_sample_count"] = int(speeds["decode_sample_count"])
        view = ReplicaView(
            replica_id=replica_id,
            node_id=node_id,
            model_id=trait.model_id,
            owner_account_id=trait.owner_account_id,
            endpoints=trait.endpoints,
            engine_kind=trait.engine_kind,
            drained=trait.drained,
            speeds=Speeds(**speeds, learned_at_seconds=_moment(ages["learned"].item(), now)),
            heard_at_seconds=_moment(ages["heard"].item(), now),
            prefill_since_seconds=_moment(ages["prefill"].item(), now),
            **{name: row[name].item() for name in (*_FLAGS, *_COUNTS, *_FIGURES)},
        )
        return SharedReplica(view, int(row["epoch"]))

    def replicas(self, now: float) -> Iterator[SharedReplica]:
        """All rows."""
        return (self.replica(number, now) for number in range(len(self.rows)))


@dataclass(frozen=True, eq=False, slots=True)
class PoolView:
    """What every gateway told last, by its epoch; a higher version replaces a lower one."""

    version: int
    gateways: Mapping[int, GatewayView]


def gateway_view(replicas: Iterable[SharedReplica], starts_seen: Mapping[int, int], now: float) -> GatewayView:
    """The view of these replicas, whose times are by a clock that says `now`, in monotonic seconds."""
    shared = tuple(replicas)
    rows, ages = np.zeros(len(shared), _ROW), np.zeros(len(shared), _AGES)
    traits: dict[Trait, int] = {}
    for number, (view, epoch) in enumerate((each.view, each.epoch) for each in shared):
        trait = Trait(view.model_id, view.owner_account_id, view.endpoints, view.engine_kind, view.drained)
        rows[number] = (
            epoch,
            traits.setdefault(trait, len(traits)),
            *(getattr(view, name) for name in (*_FLAGS, *_COUNTS, *_FIGURES)),
            *(getattr(view.speeds, name) for name in _SPEEDS),
        )
        since = (view.heard_at_seconds, view.prefill_since_seconds, view.speeds.learned_at_seconds)
        ages[number] = tuple(now - at if at else NEVER for at in since)
    names = tuple((each.view.replica_id, each.view.node_id) for each in shared)
    return GatewayView(names, rows, ages, tuple(traits), dict(starts_seen))


def _moment(age_seconds: float, now: float) -> float:
    return 0.0 if age_seconds == NEVER else now - age_seconds
