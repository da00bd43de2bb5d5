"""Carries ledger commands from the data plane to the directory, in order, many to a commit.

Decides when to send. A hold has a client waiting for it and leaves at once, together with everything that waits before it: what an earlier
settlement frees may be what this hold needs. Marks and settlements have nobody waiting, and stay up to 20 ms for company. What comes while
a commit is on its way leaves with the next. A command leaves the queue when the directory has answered, so a directory that restarts delays
settlements and loses none; one that the ledger fails on by itself is given up. It must not know what the commands come to.
"""

from __future__ import annotations

import asyncio
from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, Final

import structlog

from potluck_coordinator.domain.ledger import LedgerOutcome, OpenHold
from potluck_protocol.errors import ErrorCode, PotluckError

if TYPE_CHECKING:
    from collections.abc import Callable

    from potluck_coordinator.desks import Ledger
    from potluck_coordinator.domain.ledger import LedgerCommand

_log = structlog.get_logger()

BATCH_LENGTH_MAX: Final = 256
"""Commands in one commit; more wait for the next, so that no client's hold waits behind a commit of any length."""
QUEUE_LENGTH_MAX: Final = 50_000
"""Commands that may wait for a directory that is away. Beyond it new holds are refused; marks and settlements are taken all the same."""
RETRY_SECONDS: Final = 0.5
"""After a failed commit. A directory that restarts is back after about two seconds, and a client waits for its hold meanwhile."""
COMPANY_SECONDS: Final = 0.02
"""How long marks and settlements wait for company."""


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
        self._due = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    def submit(self, command: LedgerCommand) -> asyncio.Future[LedgerOutcome]:
        """Queues a command; the future is its outcome.

        Raises:
            PotluckError: COORDINATOR_UNAVAILABLE for a new hold if the directory has been away for so long that the queue is full.
        """
        loop = asyncio.get_running_loop()
        urgent = isinstance(command, OpenHold)
        if urgent and len(self._waiting) >= QUEUE_LENGTH_MAX:
            raise PotluckError(ErrorCode.COORDINATOR_UNAVAILABLE, retry_after_seconds=5)
        outcome: asyncio.Future[LedgerOutcome] = loop.create_future()
        self._waiting.append((command, outcome))
        self._idle.clear()
        if urgent:
            self._due.set()
        elif self._timer is None:
            self._timer = loop.call_later(COMPANY_SECONDS, self._company_is_over)
        return outcome

    def _company_is_over(self) -> None:
        self._timer = None
        self._due.set()

    async def run(self) -> None:
        """Sends until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await self._due.wait()
            self._due.clear()
            batch = tuple(islice(self._waiting, BATCH_LENGTH_MAX))
            if not batch:
                continue  # a hold took along what the timer was for
            started_at = loop.time()
            try:
                outcomes = await self._apply([command for command, _ in batch])
            except PotluckError as error:
                # Commands carry stable ids, so sending them again cannot apply them twice.
                _log.warning("ledger_commit_failed", code=error.code, waiting=len(self._waiting))
                await asyncio.sleep(RETRY_SECONDS)
                self._due.set()
                continue
            self._observe(loop.time() - started_at)
            for (_, future), outcome in zip(batch, outcomes, strict=True):
                self._waiting.popleft()
                if not future.done():
                    future.set_result(outcome)
            if len(batch) == BATCH_LENGTH_MAX:
                self._due.set()
            if not self._waiting:
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
