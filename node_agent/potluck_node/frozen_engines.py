"""Finds engines that stand still as a whole, long before one that only gives no tokens would be given up.

Decides when an engine is asked for any word at all, and when its answers go on elsewhere: nobody has heard it, its own server does not
answer, and none of its processes has used any processor time meanwhile. One that is busy uses some, and one whose cards are at work
answers. What hangs inside while its server answers is `watchdog`'s, and the gateway's. The engine is left as it is for a while, as it may
go on in a moment: then it takes attempts again. It must not know HTTP.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Final

import psutil
import structlog

from potluck_protocol.values import EndReason

if TYPE_CHECKING:
    from collections.abc import Callable

    from potluck_node.attempts import Attempts
    from potluck_node.replicas import Replicas
    from potluck_protocol.clock import Clock
    from potluck_protocol.values import ReplicaId

SILENT_SECONDS_MIN: Final = 0.75
"""So long has somebody waited in vain before the engine is asked."""
GROWN_FACTOR: Final = 1.5
"""An engine that answered is asked again once its silence is so many times as long: prompts may be read for minutes."""
WORD_SECONDS_MAX: Final = 0.5
STILL_SECONDS: Final = 0.25
"""Without any processor time, beyond the time in which it should have answered: the kernel counts in hundredths of a second."""
FROZEN_SECONDS_MAX: Final = 30.0
"""After that it is ended, and started anew."""
WORDS: Final = "the engine stands still: its server does not answer, and its processes use no processor time"

_log = structlog.get_logger()


def processor_seconds(process_id: int) -> float | None:
    """Used so far by the process and all that it started and that live; None: it is gone."""
    try:
        process = psutil.Process(process_id)
        return sum(sum(each.cpu_times()[:2]) for each in (process, *process.children(recursive=True)))
    except psutil.Error:
        return None


class FrozenEngines:
    """Looks after the engines of one node that this node started.

    Args:
        attempts: who waits for them.
        replicas: where they live, and whether they say anything.
        clock: time.
        used_seconds: the processor time of a process and its children.
    """

    def __init__(
        self, *, attempts: Attempts, replicas: Replicas, clock: Clock, used_seconds: Callable[[int], float | None] = processor_seconds
    ) -> None:
        self._attempts = attempts
        self._replicas = replicas
        self._clock = clock
        self._used_seconds = used_seconds
        self._questions: dict[ReplicaId, asyncio.Task[None]] = {}
        self._asked_after: dict[ReplicaId, float] = {}
        """The silence at which each engine that has been silent since was asked last."""
        self._frozen_at: dict[ReplicaId, float] = {}

    def look(self) -> None:
        """Asks whoever has been silent for so long, and those that stood still."""
        frozen = self._attempts.watches.frozen
        silent = {replica_id: seconds for replica_id, seconds in self._attempts.watches.silences() if seconds >= SILENT_SECONDS_MIN}
        self._asked_after = {replica_id: after for replica_id, after in self._asked_after.items() if replica_id in silent}
        for replica_id in (silent.keys() | frozen) - self._questions.keys():
            after = self._asked_after.get(replica_id)
            if replica_id in frozen or after is None or silent[replica_id] >= after * GROWN_FACTOR:
                self._asked_after[replica_id] = silent.get(replica_id, SILENT_SECONDS_MIN)
                question = self._questions[replica_id] = asyncio.create_task(self._ask(replica_id), name=f"word of {replica_id}")
                question.add_done_callback(partial(self._answered, replica_id))

    def stop(self) -> None:
        """Asks nobody any more."""
        for question in tuple(self._questions.values()):
            question.cancel()

    def _answered(self, replica_id: ReplicaId, _question: asyncio.Task[None]) -> None:
        del self._questions[replica_id]

    async def _ask(self, replica_id: ReplicaId) -> None:
        frozen, residence = self._attempts.watches.frozen, self._replicas.residence(replica_id)
        if residence is None or await self._says_a_word(replica_id, WORD_SECONDS_MAX):
            if replica_id in frozen:
                frozen.discard(replica_id)
                _log.info("engine_moves_again", replica_id=replica_id)
            return
        if replica_id in frozen:
            if self._clock.monotonic_seconds() - self._frozen_at[replica_id] > FROZEN_SECONDS_MAX:
                self._replicas.end_hung(replica_id, f"{WORDS}, for {FROZEN_SECONDS_MAX:.0f} s")
            return
        before = await asyncio.to_thread(self._used_seconds, residence.process_id)
        if await self._says_a_word(replica_id, STILL_SECONDS):
            return
        now = await asyncio.to_thread(self._used_seconds, residence.process_id)
        if before is None or now != before or self._replicas.residence(replica_id) != residence:
            return
        frozen.add(replica_id)
        self._frozen_at[replica_id] = self._clock.monotonic_seconds()
        ended_count = self._attempts.end_running(EndReason.ENGINE_FAILED, WORDS, replica_id)
        _log.warning("engine_stands_still", replica_id=replica_id, ended_count=ended_count)

    async def _says_a_word(self, replica_id: ReplicaId, seconds_max: float) -> bool:
        try:
            async with asyncio.timeout(seconds_max):
                return await self._replicas.answers(replica_id, token_seconds_max=None)
        except TimeoutError:
            return False
