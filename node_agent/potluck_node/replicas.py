"""Where the link meets the engines: what the agent's network half may ask of the half that runs engines.

Decides only the shape of that meeting. It must not know how an engine is started (the supervisor's business) nor how a frame is sent (the
link's).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from potluck_node.engines.base import EngineAddress
from potluck_protocol.values import DesiredState, EngineStatus, FailureKind, ReplicaId


@dataclass(frozen=True, slots=True)
class Residence:
    """Where an engine that this node started lives."""

    process_id: int
    """Its own, or that of the process which started it and all the others."""
    card_uuids: tuple[str, ...] = ()
    """The cards that it was given; empty: it works without."""


class Replicas(Protocol):
    """The engines of this node, seen from the link."""

    def set_desired(self, desired: DesiredState) -> None:
        """Takes a new wish. The caller has already dropped wishes of an older revision."""
        ...

    def set_paused(self, paused: bool) -> None:
        """The owner wants the machine back (or gives it again): while paused nothing runs.

        Pausing comes after the attempts' end, or after the owner's limit for them.
        """
        ...

    def statuses(self) -> tuple[EngineStatus, ...]:
        """Every replica as it stands now, wished or on its way out; a cheap read. `running_count` may be 0: `report` fills it in."""
        ...

    def slot_count_of(self, replica_id: ReplicaId) -> int:
        """As its status says; 0 where there is no such replica. Asked for each attempt."""
        ...

    def ready_address(self, replica_id: ReplicaId) -> EngineAddress | None:
        """Where the replica's engine answers, and only while it is READY."""
        ...

    def residence(self, replica_id: ReplicaId) -> Residence | None:
        """Where the replica's engine lives, while it is READY. None for one that its owner runs: only its door is this node's."""
        ...

    def cards_given(self) -> frozenset[str]:
        """The uuids of the cards that engines of this node were given which start, run, or are being stopped. Not those of its owner's."""
        ...

    def on_change(self, callback: Callable[[], None]) -> None:
        """Calls back, on the event loop, after any status changed; the callback is quick and never raises."""
        ...

    def on_death(self, callback: Callable[[ReplicaId, FailureKind], None]) -> None:
        """Calls back, on the event loop, as soon as an engine that was READY is none any more: it ended, hung, or is about to be stopped.

        The callback is quick and never raises.
        """
        ...

    def end_hung(self, replica_id: ReplicaId, why: str) -> None:
        """Its engine has work and says nothing: it is killed with its whole group, and starts again as after a crash.

        `why` is for people. Not for one that its owner runs: what stands for that one here ends by itself when it is gone.
        """
        ...

    async def answers(self, replica_id: ReplicaId, *, token_seconds_max: float | None) -> bool:
        """Whether the replica's engine lives: it says a word, and, with a limit, gives a token within it. True if it is not READY."""
        ...

    async def run(self) -> None:
        """Works until cancelled, and has stopped every engine it started when it returns."""
        ...
