"""The race of one request's two attempts for the first token: the first, and a hedge that begins where that is late.

Decides nothing: `domain.requests` says what each event leads to, and `hedging` whether there is a hedge at all. It waits for the moment at
which the first token is late, and then for the hedge's; whoever reads the first attempt notices its token or its failure there. Of a
request whose first token is in time it is one timer. It must not know placement, money or what an answer is made of.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, TypeAlias

from potluck_coordinator.domain.decisions import StepKind
from potluck_coordinator.domain.hedging import HedgeEnd
from potluck_coordinator.domain.requests import HedgeBroke, Hedged
from potluck_protocol.errors import PotluckError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from potluck_coordinator.domain.requests import Event
    from potluck_coordinator.gateway.attempt import Attempt
    from potluck_coordinator.gateway.decisions import Note
    from potluck_coordinator.gateway.hedging import Hedge
    from potluck_protocol.values import NodeId

BeginHedge: TypeAlias = "Callable[[Attempt, frozenset[NodeId]], Hedge | None]"
"""A dispatched attempt at the same on another node, and on none of these; None: it is not worth it."""

_WORDS: Final = {
    HedgeEnd.WON: "its first token came first",
    HedgeEnd.LOST: "the other's first token came first",
    HedgeEnd.FAILED: "it broke off",
    HedgeEnd.REPLACED: "the other failed, and it goes on alone",
    HedgeEnd.GIVEN_UP: "the request was over before a token came",
}


def _no_hedge(_late: Attempt, _excluded: frozenset[NodeId]) -> None:
    return None


async def _unheard(_event: Event) -> None:
    return None


class Race:
    """One request's.

    Args:
        begin: starts a hedge.
        hear: carries out what an event of the race leads to.
        note: keeps what became of it.
    """

    def __init__(self, begin: BeginHedge, hear: Callable[[Event], Awaitable[object]], note: Note) -> None:
        self._begin = begin
        self._hear = hear
        self._note = note
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self.hedge: Hedge | None = None
        """The one that there was, whatever became of it."""

    def watch(self, first: Attempt, excluded: frozenset[NodeId]) -> None:
        """An attempt runs that may be hedged, on none of these nodes."""
        if first.late_after_seconds is not None:
            self._timer = asyncio.get_running_loop().call_later(first.late_after_seconds, self._be_late, first, excluded)

    def stop(self) -> None:
        """Nothing is to be hedged any more. Again is harmless."""
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None:
            self._task.cancel()
        self._timer = self._task = None

    def let_go(self) -> None:
        """The request is over. Whom this knows knows it, and both would stay for the garbage collector."""
        self.stop()
        self._begin, self._hear = _no_hedge, _unheard

    async def drop(self, end: HedgeEnd) -> None:
        """Cancels the hedge at its node; what it gave goes nowhere."""
        await self._over(end).attempt.close()

    def take(self, end: HedgeEnd) -> Attempt:
        """The hedge, which is now to be read."""
        return self._over(end).attempt

    def _over(self, end: HedgeEnd) -> Hedge:
        self.stop()
        hedge = self.hedge
        assert hedge is not None, "there is one to be dropped or taken"
        hedge.end = end
        self._note(StepKind.HEDGE_OVER, f"{end}: {_WORDS[end]}", node_id=hedge.attempt.node_id, attempt_id=hedge.attempt.attempt_id)
        return hedge

    def _be_late(self, first: Attempt, excluded: frozenset[NodeId]) -> None:
        self._timer = None
        self._task = asyncio.ensure_future(self._run(first, excluded))

    async def _run(self, first: Attempt, excluded: frozenset[NodeId]) -> None:
        hedge = None if first.has_begun else self._begin(first, excluded)
        if hedge is None:
            return
        self.hedge = hedge
        await self._hear(Hedged(hedge.attempt.node_id))
        try:
            await hedge.attempt.first_token()
        except PotluckError as error:
            # What ends it now must not cancel the one who says so.
            self._task = None
            self._note(StepKind.FAILED, error.message, node_id=hedge.attempt.node_id, attempt_id=hedge.attempt.attempt_id)
            await self._hear(HedgeBroke())
        else:
            first.outrun()
