"""Carries ledger commands from the data plane to the directory, many to a commit, and never a settlement before its own hold.

Decides when to send. A hold has a client waiting for it and leaves at once, or with the commit after the one that is on its way; marks and
settlements have nobody, and wait 20 ms for company, so as not to be in the way of the next request's hold. A command leaves the queue when
the directory has answered, so a directory that restarts delays settlements and loses none; one that the ledger fails on by itself is given
up. It must not know what the commands come to.
"""

from __future__ import annotations

import asyncio
from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, Final, TypeAlias

import structlog

from potluck_coordinator.domain.ledger import LedgerOutcome, OpenHold
from potluck_protocol.errors import ErrorCode, PotluckError

if TYPE_CHECKING:
    from collections.abc import Callable

    from potluck_coordinator.desks import Ledger
    from potluck_coordinator.domain.ledger import LedgerCommand

    _Queue: TypeAlias = deque[tuple[LedgerCommand, asyncio.Future[LedgerOutcome]]]

_log = structlog.get_logger()

BATCH_LENGTH_MAX: Final = 256
"""Commands in one commit; more wait for the next, so that no client's hold waits behind a commit of any length."""
QUEUE_LENGTH_MAX: Final = 50_000
"""Commands that may wait for a directory that is away. Beyond it new holds are refused; marks and settlements are taken all the same."""
RETRY_SECONDS: Final = 0.5
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
        self._holds: _Queue = deque()
        self._others: _Queue = deque()
        self._others_due = False
        self._timer: asyncio.TimerHandle | None = None
        self._wanted = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    def submit(self, command: LedgerCommand) -> asyncio.Future[LedgerOutcome]:
        """Queues a command; the future is its outcome.

        Raises:
            PotluckError: COORDINATOR_UNAVAILABLE for a new hold if the directory has been away for so long that the queue is full.
        """
        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[LedgerOutcome] = loop.create_future()
        if isinstance(command, OpenHold):
            if len(self._holds) + len(self._others) >= QUEUE_LENGTH_MAX:
                raise PotluckError(ErrorCode.COORDINATOR_UNAVAILABLE, retry_after_seconds=5)
            self._holds.append((command, outcome))
            self._wanted.set()
        else:
            self._others.append((command, outcome))
            if not self._others_due and self._timer is None:
                self._timer = loop.call_later(COMPANY_SECONDS, self._others_are_due)
        self._idle.clear()
        return outcome

    def _others_are_due(self) -> None:
        self._timer = None
        self._others_due = True
        self._wanted.set()

    async def run(self) -> None:
        """Sends until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await self._wanted.wait()
            # All holds before anything else: a settlement must not overtake its own hold.
            holds = tuple(islice(self._holds, BATCH_LENGTH_MAX))
            others = tuple(islice(self._others, BATCH_LENGTH_MAX - len(holds))) if self._others_due else ()
            started_at = loop.time()
            try:
                outcomes = await self._apply([command for command, _ in (*holds, *others)])
            except PotluckError as error:
                # Commands carry stable ids, so sending them again cannot apply them twice.
                _log.warning("ledger_commit_failed", code=error.code, waiting=len(self._holds) + len(self._others))
                await asyncio.sleep(RETRY_SECONDS)
                continue
            self._observe(loop.time() - started_at)
            _answer(self._holds, outcomes[: len(holds)])
            _answer(self._others, outcomes[len(holds) :])
            self._others_due = self._others_due and bool(self._others)
            if not self._holds and not self._others_due:
                self._wanted.clear()
                if not self._others:
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


def _answer(queue: _Queue, outcomes: tuple[LedgerOutcome, ...]) -> None:
    for outcome in outcomes:
        _, future = queue.popleft()
        if not future.done():
            future.set_result(outcome)
