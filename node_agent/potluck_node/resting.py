"""Carries out what `domain.rest` decides: from serving to rest, and back.

Decides the order in which a node gives its machine back. First it takes no more attempts, which it says at once. FINISH lets those under
way go on, within the owner's limit. What then still runs is handed back, behind everything that it has said, before its engine is stopped.
The node says that it is paused only when no engine lives and what they held is free. It must not know frames, nor where facts come from.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from typing import Final

import psutil
import structlog

from potluck_node.attempts import Attempts
from potluck_node.control import Control, RestLine, Stage
from potluck_node.domain.rest import SERVING, Facts, Memory, Moment, Posture, Rest, Rules, Word, decide
from potluck_node.probe.engine_remains import remains_of
from potluck_node.replicas import Replicas
from potluck_protocol.clock import Clock
from potluck_protocol.rest import RestCause
from potluck_protocol.values import EndReason, NodeState

LOOK_SECONDS: Final = 0.05
SLOW_SECONDS: Final = 20.0
"""Stopping an engine is bounded below this (`child_process`); what takes longer is told, and waited for more slowly."""
SLOW_LOOK_SECONDS: Final = 1.0
HANDED_BACK: Final = "the node's owner wants the machine back"

_log = structlog.get_logger()


def _nobody_listens() -> None:
    return


class Resting:
    """The node on its way between serving and rest.

    Args:
        rules: the owner's settings.
        facts: what is known now, given what the owner said.
        attempts: what runs.
        replicas: the engines.
        clock: time.
        drain_seconds: how long FINISH lets answers go on.
        children: this process's living children with theirs, the engines among them.
    """

    def __init__(
        self,
        *,
        rules: Rules,
        facts: Callable[[Word], Facts],
        attempts: Attempts,
        replicas: Replicas,
        clock: Clock,
        drain_seconds: float,
        children: Callable[[], Collection[psutil.Process]],
    ) -> None:
        self._rules = rules
        self._facts = facts
        self._attempts = attempts
        self._replicas = replicas
        self._clock = clock
        self._drain_seconds = drain_seconds
        self._children = children
        self.changed: Callable[[], None] = _nobody_listens
        """Called after the stage changed: the coordinator and the owner hear of it at once. The agent puts itself here."""
        self._memory = Memory()
        self._rest = SERVING
        # Where an agent begins: nothing runs before it is decided that something may.
        self._stage = Stage.FREE
        self._heard_unix_ms = 0
        self._living_count = 0
        self._began_at_seconds = 0.0
        self._work: asyncio.Task[None] | None = None
        self._leaving_off = False

    @property
    def line(self) -> RestLine:
        """For the owner."""
        return RestLine(self._stage, self._rest, self._heard_unix_ms, self._living_count)

    @property
    def state(self) -> NodeState:
        """For the coordinator."""
        if self._leaving_off:
            return NodeState.DRAINING
        return {Stage.SERVING: NodeState.SERVING, Stage.FREE: NodeState.PAUSED}.get(self._stage, NodeState.DRAINING)

    @property
    def causes(self) -> tuple[RestCause, ...]:
        """The same: why it does not serve."""
        return () if self.state is NodeState.SERVING else tuple(dict.fromkeys(reason.cause for reason in self._rest.reasons))

    def heed(self, control: Control) -> Rest:
        """Decides anew, and begins what follows; called every second."""
        moment = Moment(self._clock.unix_ms(), self._clock.monotonic_seconds())
        before, (self._rest, self._memory) = self._rest, decide(self._rules, self._facts(control.word), self._memory, moment)
        self._heard_unix_ms = control.said_at_unix_ms
        if self._rest.posture is not before.posture:
            _log.info("rest", posture=self._rest.posture, reasons=[reason.words for reason in self._rest.reasons])
        match self._rest.posture:
            case Posture.SERVE:
                self._serve()
            case Posture.FINISH if self._stage is Stage.SERVING:
                self._begin(Stage.FINISHING, self._drain_seconds)
            case Posture.HAND_OVER if self._stage in {Stage.SERVING, Stage.FINISHING}:
                self._begin(Stage.FREEING, 0.0)
        return self._rest

    def leave_off(self) -> None:
        """The agent ends: no more attempts, whatever is decided from now on; and what rests goes on resting."""
        self._leaving_off = True
        self.changed()

    async def close(self) -> None:
        """Ends what is under way here."""
        if self._work is not None:
            self._work.cancel()
            await asyncio.gather(self._work, return_exceptions=True)

    def _serve(self) -> None:
        if self._stage is Stage.SERVING:
            return
        if self._work is not None:
            self._work.cancel()
            self._work = None
        self._living_count = 0
        self._replicas.set_paused(False)
        self._enter(Stage.SERVING)

    def _begin(self, stage: Stage, patience_seconds: float) -> None:
        if self._stage is Stage.SERVING:
            self._began_at_seconds = self._clock.monotonic_seconds()
        if self._work is not None:
            self._work.cancel()
        self._enter(stage)
        self._work = asyncio.create_task(self._give_back(patience_seconds), name="giving the machine back")

    async def _give_back(self, patience_seconds: float) -> None:
        deadline = self._clock.monotonic_seconds() + patience_seconds
        while self._attempts.busy and self._clock.monotonic_seconds() < deadline:  # noqa: ASYNC110 - many things end it, and none tells
            await asyncio.sleep(LOOK_SECONDS)
        children = await asyncio.to_thread(self._children)
        handed_back_count = self._attempts.end_running(EndReason.HANDED_BACK, HANDED_BACK)
        self._replicas.set_paused(True)
        if self._stage is not Stage.FREEING:
            self._enter(Stage.FREEING)
        _log.info("handed_back", count=handed_back_count, seconds=self._passed_seconds())
        await self._until_free(children)
        self._enter(Stage.FREE)
        _log.info("memory_free", seconds=self._passed_seconds())

    async def _until_free(self, children: Collection[psutil.Process]) -> None:
        """An engine that cannot be stopped is told of, and waited for: nobody is told that memory is free which is not."""
        slow_at_seconds = self._clock.monotonic_seconds() + SLOW_SECONDS
        while living_count := len(self._replicas.statuses()) or len(await asyncio.to_thread(remains_of, children)):
            slow = self._clock.monotonic_seconds() >= slow_at_seconds
            if slow and self._living_count != living_count:
                self._living_count = living_count
                _log.warning("memory_not_free", living_count=self._living_count)
                self.changed()
            await asyncio.sleep(SLOW_LOOK_SECONDS if slow else LOOK_SECONDS)
        self._living_count = 0

    def _passed_seconds(self) -> float:
        return round(self._clock.monotonic_seconds() - self._began_at_seconds, 3)

    def _enter(self, stage: Stage) -> None:
        self._stage = stage
        self.changed()
