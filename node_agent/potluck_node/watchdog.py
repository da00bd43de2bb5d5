"""Ends engines that have work and say nothing any more.

Decides when they are looked at, that time in which this process itself stood still is nobody's silence, though what was before it counts,
and that a server which its owner runs is not judged here: he may keep it busy himself, and `attach_server` looks after it. `domain.silence`
judges the others, `attempts` knows who waits, and whoever runs the engines ends them; those that stand still as a whole `frozen_engines`
finds sooner. It must not know HTTP or processes.
"""

from __future__ import annotations

import asyncio
from typing import Final

import structlog

from potluck_node.attempts import Attempts
from potluck_node.domain.model_source import ATTACHED_KIND
from potluck_node.domain.silence import SILENCE_SECONDS_MAX, Verdict
from potluck_node.frozen_engines import FrozenEngines
from potluck_node.replicas import Replicas
from potluck_protocol.clock import Clock
from potluck_protocol.values import EngineStatus, ReplicaId

LOOK_SECONDS: Final = 0.25
ABSENCE_SECONDS_MIN: Final = 2.0
"""A look that comes so late says that this process could not run: a closed lid, a debugger, a machine without memory."""

_log = structlog.get_logger()


class Watchdog:
    """Looks after the engines of one node.

    Args:
        attempts: who waits for them.
        replicas: ends them.
        clock: time.
    """

    def __init__(self, *, attempts: Attempts, replicas: Replicas, clock: Clock) -> None:
        self._attempts = attempts
        self._replicas = replicas
        self._clock = clock
        self._looked_at_seconds = clock.monotonic_seconds()
        self._questions: dict[ReplicaId, asyncio.Task[None]] = {}
        self._frozen = FrozenEngines(attempts=attempts, replicas=replicas, clock=clock)

    async def run(self) -> None:
        """Works until cancelled."""
        try:
            while True:
                self.look()
                self._frozen.look()
                await asyncio.sleep(LOOK_SECONDS)
        finally:
            self._frozen.stop()
            for question in self._questions.values():
                question.cancel()

    def look(self) -> None:
        """Judges every engine once."""
        now_seconds = self._clock.monotonic_seconds()
        absence_seconds, self._looked_at_seconds = now_seconds - self._looked_at_seconds, now_seconds
        if absence_seconds > ABSENCE_SECONDS_MIN:
            _log.warning("agent_stood_still", seconds=round(absence_seconds, 1))
            self._attempts.watches.excuse_all(absence_seconds - LOOK_SECONDS)
            # What came meanwhile may not be heard yet: the next look judges.
            return
        for replica_id, verdict, silent_seconds in self._attempts.watches.verdicts():
            if verdict is Verdict.SOUND or self._is_its_owners(replica_id):
                continue
            if verdict is Verdict.HUNG:
                self._end(replica_id, f"the engine hung: it had work and gave no token for {silent_seconds:.0f} s")
            elif replica_id not in self._questions:
                self._questions[replica_id] = asyncio.create_task(self._ask(replica_id, silent_seconds), name=f"question {replica_id}")

    async def _ask(self, replica_id: ReplicaId, silent_seconds: float) -> None:
        """Of answers that come whole nothing is heard while they are made. A free slot can give a token; without one any word must do."""
        address = self._replicas.ready_address(replica_id)
        status = self._status(replica_id)
        has_room = status is not None and self._attempts.running_count(replica_id) < status.slot_count
        token_seconds_max = SILENCE_SECONDS_MAX if has_room else None
        try:
            answers = await self._replicas.answers(replica_id, token_seconds_max=token_seconds_max)
        finally:
            del self._questions[replica_id]
        if answers:
            self._attempts.watches.heard(replica_id)
        elif address == self._replicas.ready_address(replica_id):
            self._end(replica_id, f"the engine hung: it had work, said nothing for {silent_seconds:.0f} s, and did not answer when asked")

    def _is_its_owners(self, replica_id: ReplicaId) -> bool:
        status = self._status(replica_id)
        return status is not None and status.engine_kind == ATTACHED_KIND

    def _status(self, replica_id: ReplicaId) -> EngineStatus | None:
        return next((status for status in self._replicas.statuses() if status.replica_id == replica_id), None)

    def _end(self, replica_id: ReplicaId, why: str) -> None:
        _log.warning("engine_hung", replica_id=replica_id, reason=why)
        self._replicas.end_hung(replica_id, why)
