"""Carries ledger commands from the data plane to the directory, many to a commit, each attempt's in order.

Decides when to send. A hold has a client waiting for it and leaves at once, before what else waits. Where several left together, many are
asking: the next ones leave 10 ms later with all that waits, for a commit costs about the same for one and for ten, and engines take longer
to begin an answer. Marks and settlements have nobody waiting, and stay up to 20 ms for company. A hold for which the payer's credits do not
suffice is tried once more, in its place among all that waits: a settlement before it may free what it needs. A command leaves the queue
when the directory has answered, so a directory or a database that is away delays settlements and loses none; one that the ledger fails on
by itself is given up. Holds do not wait for long: once the ledger has failed for two seconds, those that wait are refused, and new ones at
once, until it answers again. Where it says nothing at all, only new ones are, after ten: what became of those that were sent, it alone
knows. It must not know amounts.
"""

from __future__ import annotations

import asyncio
from itertools import count, islice
from typing import TYPE_CHECKING, Final

import structlog

from potluck_coordinator.domain.ledger import LedgerOutcome, MarkDelivered, OpenHold, SettleHold
from potluck_protocol.errors import ErrorCode, PotluckError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from potluck_coordinator.desks import Ledger
    from potluck_coordinator.domain.ledger import LedgerCommand

    _Batch = list[tuple[int, tuple[LedgerCommand, asyncio.Future[LedgerOutcome]]]]

_log = structlog.get_logger()

BATCH_LENGTH_MAX: Final = 256
"""Commands in one commit; more wait for the next, so that no client's hold waits behind a commit of any length."""
QUEUE_LENGTH_MAX: Final = 50_000
"""Commands that may wait for a directory that is away. Beyond it new holds are refused; marks and settlements are taken all the same."""
RETRY_SECONDS: Final = 0.5
"""After a failed commit. A directory that restarts is back after about two seconds, and a client waits for its hold meanwhile."""
COMPANY_SECONDS: Final = 0.02
"""How long marks and settlements wait for company."""
HOLD_COMPANY_SECONDS: Final = 0.01
"""How long after several holds that left together the next ones leave, unless they fill a commit sooner."""
HOLD_PATIENCE_SECONDS: Final = 2.0
"""How long a ledger may fail before nobody waits for a hold any more."""
SILENCE_SECONDS_MAX: Final = 10.0
"""How long it may say nothing to what it was sent before new holds are refused. A directory that is started again is waited for as long."""
REFUSED: Final = "The pool's books are away for now, and no request can be answered without them. Nothing was charged; try again."
REFUSED_RETRY_SECONDS: Final = 2


class LedgerWriter:
    """The one way money events leave the gateway.

    Args:
        ledger: the directory's desk.
        observe_commit_seconds: told how long each commit took.
    """

    def __init__(self, ledger: Ledger, observe_commit_seconds: Callable[[float], None]) -> None:
        self._ledger = ledger
        self._observe = observe_commit_seconds
        self._waiting: dict[int, tuple[LedgerCommand, asyncio.Future[LedgerOutcome]]] = {}
        """By number, in the order of their coming."""
        self._numbers = count()
        self._marks: dict[str, int] = {}
        """The newest mark of each hold that waits, by its number: the one before it says nothing any more."""
        self._under_way: frozenset[int] = frozenset()
        self._sent_at: float | None = None
        """While they are."""
        self._failing_since: float | None = None
        self._due = asyncio.Event()
        self._all_due = False
        """Not only the holds."""
        self._timer: asyncio.TimerHandle | None = None
        self._leave_at_seconds = 0.0
        """What the timer is set to: uvloop's do not always know."""
        self._holds_leave_at = 0.0
        """By the loop's time, where they wait for company."""
        self._idle = asyncio.Event()
        self._idle.set()

    def submit(self, command: LedgerCommand) -> asyncio.Future[LedgerOutcome]:
        """Queues a command; the future is its outcome, or for a hold the error that it was refused with.

        Raises:
            PotluckError: as `check`, for a new hold.
        """
        loop = asyncio.get_running_loop()
        urgent = isinstance(command, OpenHold)
        if urgent:
            self.check()
        if isinstance(command, MarkDelivered) and (waiting := self._older_mark(command)) is not None:
            return waiting
        outcome: asyncio.Future[LedgerOutcome] = loop.create_future()
        number = next(self._numbers)
        self._waiting[number] = (command, outcome)
        if isinstance(command, MarkDelivered):
            self._marks[command.hold_id] = number
        self._idle.clear()
        now = loop.time()
        if urgent and (now >= self._holds_leave_at or len(self._waiting) >= BATCH_LENGTH_MAX):
            self._due.set()
        else:
            self._leave_at(self._holds_leave_at if urgent else now + COMPANY_SECONDS)
        return outcome

    def check(self) -> None:
        """Raises PotluckError(COORDINATOR_UNAVAILABLE) where a new hold is refused: the ledger fails, or is silent, or too much waits."""
        if self._holds_are_refused() or self._is_silent():
            raise self._refusal()
        if len(self._waiting) >= QUEUE_LENGTH_MAX:
            raise PotluckError(ErrorCode.COORDINATOR_UNAVAILABLE, retry_after_seconds=5)

    def _older_mark(self, command: MarkDelivered) -> asyncio.Future[LedgerOutcome] | None:
        """Puts a mark in the place of the same hold's earlier one, where that still waits."""
        number = self._marks.get(command.hold_id)
        if number is None or number in self._under_way:
            return None
        _, outcome = self._waiting[number]
        self._waiting[number] = (command, outcome)
        return outcome

    def _holds_are_refused(self) -> bool:
        since = self._failing_since
        return since is not None and asyncio.get_running_loop().time() - since >= HOLD_PATIENCE_SECONDS

    def _is_silent(self) -> bool:
        return self._sent_at is not None and asyncio.get_running_loop().time() - self._sent_at >= SILENCE_SECONDS_MAX

    def _refusal(self) -> PotluckError:
        """One of its own for each who is refused."""
        return PotluckError(ErrorCode.COORDINATOR_UNAVAILABLE, REFUSED, retry_after_seconds=REFUSED_RETRY_SECONDS)

    def _leave_at(self, when: float) -> None:
        """All that waits, then or before."""
        if self._timer is None or when < self._leave_at_seconds:
            self._forget_timer()
            self._leave_at_seconds = when
            self._timer = asyncio.get_running_loop().call_at(when, self._company_is_over)

    def _forget_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _company_is_over(self) -> None:
        self._forget_timer()
        self._send_all()

    def _send_all(self) -> None:
        self._all_due = True
        self._due.set()

    async def run(self) -> None:
        """Sends until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await self._due.wait()
            self._due.clear()
            everything, batch = self._all_due, self._next_batch()
            # Cleared now: what comes during the commit may want it set again.
            self._all_due = False
            if len(batch) == len(self._waiting):
                self._forget_timer()
            if not batch and self._failing_since is None:
                continue  # what the timer was for has left already
            started_at = loop.time()
            hold_count = sum(isinstance(command, OpenHold) for _, (command, _) in batch)
            self._holds_leave_at = started_at + HOLD_COMPANY_SECONDS if hold_count > 1 else 0.0
            self._under_way, self._sent_at = frozenset(number for number, _ in batch), started_at
            try:
                # Of nothing, where the ledger failed: that it answers is all that is asked.
                outcomes = await self._apply([command for _, (command, _) in batch])
            except PotluckError as error:
                self._under_way, self._sent_at = frozenset(), None
                self._failed(error, started_at)
                await asyncio.sleep(RETRY_SECONDS)
                self._send_all()
                continue
            self._under_way, self._sent_at = frozenset(), None
            if self._failing_since is not None:
                _log.info("ledger_answers_again", away_seconds=round(loop.time() - self._failing_since, 1), waiting=len(self._waiting))
                self._failing_since = None
            self._observe(loop.time() - started_at)
            if len(batch) == BATCH_LENGTH_MAX:
                self._send_all()
            self._answer(batch, outcomes, everything=everything)

    def _answer(self, batch: _Batch, outcomes: Sequence[LedgerOutcome], *, everything: bool) -> None:
        for (number, (command, future)), outcome in zip(batch, outcomes, strict=True):
            if outcome is LedgerOutcome.INSUFFICIENT_CREDITS and not everything:
                self._send_all()
                continue
            del self._waiting[number]
            if self._marks.get(command.hold_id) == number:
                del self._marks[command.hold_id]
            if not future.done():
                future.set_result(outcome)
        if not self._waiting:
            self._idle.set()

    def _failed(self, error: PotluckError, started_at: float) -> None:
        """Commands carry stable ids, so what was sent may be sent again: it is not applied twice, whatever became of it."""
        _log.warning("ledger_commit_failed", code=error.code, waiting=len(self._waiting))
        if self._failing_since is None:
            self._failing_since = started_at
        if not self._holds_are_refused():
            return
        for number, (command, outcome) in self._waiting.items():
            if isinstance(command, OpenHold):
                # It may stand, for all that is known: then it is freed.
                self._waiting[number] = (SettleHold(command.hold_id, 0), asyncio.get_running_loop().create_future())
                if not outcome.done():
                    outcome.set_exception(self._refusal())

    def _next_batch(self) -> _Batch:
        waiting = self._waiting.items()
        due = waiting if self._all_due else (item for item in waiting if isinstance(item[1][0], OpenHold))
        return list(islice(due, BATCH_LENGTH_MAX))

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
            async with asyncio.timeout(seconds_max):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True
