"""Whose requests were given up, by their clients or here, before their nodes had ended them: engines may still die of those.

Decides for how long, and how many of one engine are remembered, and when a node's word says that an engine has died which nobody stayed
with. It must not know why somebody left, nor what follows from a death.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from potluck_coordinator.domain.catalogue import ATTACH_KIND
from potluck_protocol.values import EngineState, FailureKind

if TYPE_CHECKING:
    from collections.abc import Callable

    from potluck_protocol.culprits import Fingerprint
    from potluck_protocol.values import EngineStatus, ReplicaId

LEFT_SECONDS: Final = 120.0
"""For how long an engine may die of a request that was given up: hung work is ended by the node well before that."""
LEAVERS_MAX: Final = 256
"""Of one replica; the one that left longest ago makes room. To judge a death costs the square of those that were there."""
_DEATHS_BY_REQUESTS: Final = frozenset({FailureKind.OUT_OF_MEMORY, FailureKind.CUDA_ERROR, FailureKind.CRASHED, FailureKind.HUNG})
"""The kinds that a node blames on requests, too, where it has some to end."""


def has_died(before: EngineStatus | None, now: EngineStatus) -> bool:
    """Whether an engine that served has ended as engines do of requests; of a server that its owner runs nobody can tell."""
    served = before is not None and before.state is EngineState.READY
    ended = now.state is not EngineState.READY and now.failure_kind in _DEATHS_BY_REQUESTS
    return served and ended and now.engine_kind != ATTACH_KIND


class Leavers:
    """Who left each replica lately.

    Args:
        now: monotonic seconds.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._left_at: dict[ReplicaId, dict[Fingerprint, float]] = {}
        """Both in the order of the last time."""

    def left(self, replica_id: ReplicaId, fingerprint: Fingerprint) -> None:
        """The replica's engine may be at this request, for which nobody waits any more."""
        now = self._now()
        of_replica = self._left_at.pop(replica_id, {})
        of_replica.pop(fingerprint, None)
        of_replica[fingerprint] = now
        if len(of_replica) > LEAVERS_MAX:
            del of_replica[next(iter(of_replica))]
        self._left_at[replica_id] = of_replica
        while now - next(reversed(self._left_at[oldest := next(iter(self._left_at))].values())) >= LEFT_SECONDS:
            del self._left_at[oldest]

    def take(self, replica_id: ReplicaId) -> frozenset[Fingerprint]:
        """Of whom the replica's engine, which has died, may have died; its next one was left by nobody yet."""
        now = self._now()
        return frozenset(fingerprint for fingerprint, at in self._left_at.pop(replica_id, {}).items() if now - at < LEFT_SECONDS)
