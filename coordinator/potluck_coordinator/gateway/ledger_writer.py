"""Carries ledger commands from the data plane to the directory, in order, many to a commit.

Decides only when to send: at once if nothing is on its way, else together with whatever else has come by then. A command leaves the queue
when the directory has answered, so a directory that restarts delays settlements and loses none. It must not know what the commands come to.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Final

import structlog

from potluck_coordinator.domain.ledger import LedgerOutcome, OpenHold
from potluck_protocol.errors import ErrorCode, PotluckError

if TYPE_CHECKING:
    from collections.abc import Callable

    from potluck_coordinator.domain.ledger import LedgerCommand
    from potluck_coordinator.ports import Ledger

_log = structlog.get_logger()

BATCH_LENGTH_MAX: Final = 256
QUEUE_LENGTH_MAX: Final = 50_000
RETRY_SECONDS: Final = 0.5


class LedgerWriter:
    """The one way money events leave the gateway.

    Args:
        ledger: the directory's desk.
        observe_commit_seconds: told how long each commit took.
    """

    def __init__(self, ledger: Ledger, observe_commit_seconds: Callable[[float], None]) -> None:
        self._ledger = ledger
        self._observe = observe_commit_seconds
        self._waiting: deque[tuple[LedgerCommand, asyncio.Future[LedgerOutcome]]] = deque()
        self._filled = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    def submit(self, command: LedgerCommand) -> asyncio.Future[LedgerOutcome]:
        """Queues a command; the future is its outcome.

        Raises:
            PotluckError: COORDINATOR_UNAVAILABLE for a new hold if the directory has been away for so long that the queue is full.
        """
        if isinstance(command, OpenHold) and len(self._waiting) >= QUEUE_LENGTH_MAX:
            raise PotluckError(ErrorCode.COORDINATOR_UNAVAILABLE, retry_after_seconds=5)
        outcome: asyncio.Future[LedgerOutcome] = asyncio.get_running_loop().create_future()
        self._waiting.append((command, outcome))
        self._idle.clear()
        self._filled.set()
        return outcome

    async def run(self) -> None:
        """Sends until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await self._filled.wait()
            batch = [self._waiting[index] for index in range(min(len(self._waiting), BATCH_LENGTH_MAX))]
            started_at = loop.time()
            try:
                outcomes = await self._apply([command for command, _ in batch])
            except PotluckError as error:
                # Commands carry stable ids, so sending them again cannot apply them twice.
                _log.warning("ledger_commit_failed", code=error.code, waiting=len(self._waiting))
                await asyncio.sleep(RETRY_SECONDS)
                continue
            self._observe(loop.time() - started_at)
            for (_, future), outcome in zip(batch, outcomes, strict=True):
                self._waiting.popleft()
                if not future.done():
                    future.set_result(outcome)
            if not self._waiting:
                self._filled.clear()
                self._idle.set()

    async def _apply(self, commands: list[LedgerCommand]) -> tuple[LedgerOutcome, ...]:
        """As the desk's; a command that the ledger fails on by itself is given up, so that it does not stop all others for ever."""
        try:
            return await self._ledger.apply(commands)
        except PotluckError as error:
            if error.code is not ErrorCode.INTERNAL_ERROR:
                raise
        if len(commands) == 1:
            _log.error("ledger_command_given_up", command=type(commands[0]).__name__, hold_id=commands[0].hold_id)
            return (LedgerOutcome.CONFLICT,)
        return tuple([(await self._apply([command]))[0] for command in commands])

    async def drain(self, seconds_max: float) -> bool:
        """Waits until nothing waits any more; False if that took too long."""
        try:
            await asyncio.wait_for(self._idle.wait(), seconds_max)
        except TimeoutError:
            return False
        return True
