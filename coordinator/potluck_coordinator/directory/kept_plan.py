"""The plan in the books, so that a directory that starts anew disturbs nobody.

Decides what has to be written: what differs from what was last written, whichever plan made it so; and how often what nodes showed is, for
each of their figures changes a little of it, and it is written whole. Whoever tells the gateways of a plan has
it kept first: a group's generation that was told and forgotten would be given again. It must not know how a plan is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from potluck_coordinator.directory.planner import Planner
from potluck_coordinator.domain.fit.corrections import Corrections
from potluck_coordinator.domain.grouping.words import ShardGroup
from potluck_coordinator.domain.planning.words import PlannedReplica
from potluck_coordinator.storage.state import StateName
from potluck_coordinator.storage.store import Store
from potluck_coordinator.storage.unit_of_work import UnitOfWork
from potluck_protocol.values import ReplicaId

CORRECTIONS_SECONDS: Final = 60.0
"""Between two writings of what was learned; a directory that dies has learned for so much less."""


@dataclass(frozen=True, slots=True)
class _Written:
    replicas: Mapping[ReplicaId, PlannedReplica]
    groups: Mapping[ReplicaId, ShardGroup]
    generation: int
    corrections: Corrections


class KeptPlan:
    """One pool's plan as the books have it.

    Args:
        store: the books.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._written: _Written | None = None
        """None where it is not sure what the books hold."""
        self._corrections_written_at = float("-inf")

    async def planner(self, now: float) -> Planner:
        """A planner that goes on where the last one was. `now` is monotonic seconds."""

        def read(work: UnitOfWork) -> Planner:
            return Planner(work.plan.all(), work.groups.all(), work.state.counter(StateName.GROUP_GENERATION), work.plan.corrections(), now)

        planner = await self._store.run(read)
        self._written = _words(planner)
        return planner

    async def keep(self, planner: Planner, now: float) -> None:
        """Writes what is new. Raises PotluckError where it cannot: then the next call writes it. `now` is monotonic seconds."""
        before, made = self._written, _words(planner)
        is_due = now - self._corrections_written_at >= CORRECTIONS_SECONDS
        if before is not None and not is_due:
            made = replace(made, corrections=before.corrections)
        if made == before:
            return

        def write(work: UnitOfWork) -> None:
            replicas = before.replicas if before is not None else work.plan.all()
            if made.replicas != replicas:
                work.plan.keep(replicas, made.replicas)
            if before is None or (made.groups, made.generation) != (before.groups, before.generation):
                work.groups.keep(made.groups)
                work.state.put(StateName.GROUP_GENERATION, str(made.generation))
            if before is None or made.corrections != before.corrections:
                work.plan.keep_corrections(made.corrections)

        # Until it has come back: a caller that goes, or a store that fails, leaves it written or not.
        self._written = None
        await self._store.run(write)
        if before is None or made.corrections != before.corrections:
            self._corrections_written_at = now
        self._written = made


def _words(planner: Planner) -> _Written:
    return _Written(planner.replicas, planner.groups, planner.generation, planner.corrections)
