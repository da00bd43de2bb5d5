"""Money: carries out what `domain.ledger` decides, one commit for everything that was asked together.

Decides nothing about amounts, and of repetition only that the same claim of earnings answers the same. Holds that are overdue, or of a
gateway that was replaced, are settled here at their marks. The audit (`storage.audit`) runs when the operator asks, and at no other
time; payments go on between its steps.
Refusals are found out before anything is written, so one command's refusal never undoes another's work.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import structlog

from potluck_coordinator.desks import Progress, StatementLine
from potluck_coordinator.domain import ledger
from potluck_coordinator.domain.ledger import (
    AuditReport,
    Balance,
    Hold,
    HoldState,
    LedgerAccountKind,
    LedgerCommand,
    LedgerOutcome,
    ledger_account_id,
)
from potluck_coordinator.domain.ledger_batch import LedgerBatch, LedgerChanges, accounts_of
from potluck_coordinator.storage.audit import AuditRun
from potluck_coordinator.storage.store import OWN_ERRORS, Store
from potluck_coordinator.storage.unit_of_work import UnitOfWork
from potluck_protocol.clock import Clock
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import AccountId

STATEMENT_LINES_MAX: Final = 500
CLAIM_ID_CHARACTERS_MAX: Final = 64
REAPED_COUNT_MAX: Final = 256
"""Holds settled in one commit, so that thousands of orphans do not keep a live request waiting."""
AUDIT_PATIENCE_SECONDS: Final = 1.0
"""How long one call waits for an audit's end before it says how far that has come."""
AUDIT_STEP_SECONDS_MAX: Final = 30.0
"""For each of a step's statements. Steps take a tenth of a second: after that a database that stands still is away for everybody."""
AUDIT_END_SECONDS_MAX: Final = 120.0
"""The same for the last step, which adds up all postings: that took four seconds for ten million."""
AUDIT_KEPT_SECONDS: Final = 10.0
"""How long an audit's report is kept for whoever will ask again. Later it would be about other books."""

_log = structlog.get_logger()


class LedgerDesk:
    """The desk `desks.Ledger`, and the reaper behind it.

    Args:
        store: the books.
        clock: for dates.
        fee_basis_points: the pool's share of each payment.
    """

    def __init__(self, store: Store, clock: Clock, *, fee_basis_points: int) -> None:
        self._store = store
        self._clock = clock
        self._fee_basis_points = fee_basis_points
        self._audit: _Audit | None = None

    async def apply(self, commands: Sequence[LedgerCommand]) -> tuple[LedgerOutcome, ...]:
        """As `desks.Ledger.apply`."""
        return await self._store.run(self.work_for(commands))

    def work_for(self, commands: Sequence[LedgerCommand]) -> Callable[[UnitOfWork], tuple[LedgerOutcome, ...]]:
        """The commands as a unit of work, dated now."""
        now_ms = self._clock.unix_ms()

        def apply(work: UnitOfWork) -> tuple[LedgerOutcome, ...]:
            holds = work.holds.several({command.hold_id for command in commands})
            batch = self._batch(work, commands, holds)
            outcomes = batch.carry_out(commands)
            _write(work, batch.changes(), now_ms)
            return outcomes

        return apply

    async def balance(self, account_id: AccountId) -> Balance:
        """As `desks.Ledger.balance`; raises NOT_FOUND."""
        return await self._store.run(lambda work: _balance(work, account_id))

    async def statement(self, account_id: AccountId, limit: int) -> tuple[StatementLine, ...]:
        """The newest lines, newest first; a limit of 0 means as many as there may be (`STATEMENT_LINES_MAX`). Raises NOT_FOUND."""
        line_count = min(limit, STATEMENT_LINES_MAX) if limit > 0 else STATEMENT_LINES_MAX

        def read(work: UnitOfWork) -> tuple[StatementLine, ...]:
            _balance(work, account_id)
            return work.ledger.lines_of(account_id, line_count)

        return await self._store.run(read)

    async def claim_earnings(self, account_id: AccountId, claim_id: str) -> int:
        """As `desks.Ledger.claim_earnings`; raises NOT_FOUND, and INVALID_REQUEST for a claim id that is none."""
        if not 1 <= len(claim_id) <= CLAIM_ID_CHARACTERS_MAX or not claim_id.isprintable():
            raise PotluckError(
                ErrorCode.INVALID_REQUEST,
                f"A claim needs an id of its own, of 1 to {CLAIM_ID_CHARACTERS_MAX} printable characters.",
                param="claim_id",
            )
        now_ms = self._clock.unix_ms()

        def claim(work: UnitOfWork) -> int:
            work.ledger.lock([ledger_account_id(kind, account_id) for kind in (LedgerAccountKind.USER, LedgerAccountKind.NODE_OWNER)])
            earned = _balance(work, account_id).earned_micro_credits
            claimed = work.ledger.claimed(account_id, claim_id)
            if claimed is not None:
                return claimed
            transaction = ledger.claim(account_id, claim_id, earned)
            if transaction is not None:
                work.ledger.post(transaction, now_ms)
            work.ledger.keep_claim(account_id, claim_id, earned, now_ms)
            return earned

        return await self._store.run(claim)

    async def audit(self) -> AuditReport | Progress:
        """As `desks.Ledger.audit`; what it finds is also logged."""
        now = self._clock.monotonic_seconds()
        if self._audit is None or (self._audit.ended_at is not None and now - self._audit.ended_at >= AUDIT_KEPT_SECONDS):
            self._audit = _Audit(self._store, self._clock)
        audit = self._audit
        await asyncio.wait({audit.task}, timeout=AUDIT_PATIENCE_SECONDS)
        if not audit.task.done():
            return Progress(audit.run.words)
        if self._audit is audit:
            self._audit = None
        return audit.task.result()

    async def settle_expired(self, now_unix_ms: int) -> int:
        """Settles open holds past their deadline at their delivered marks; how many there were."""
        return await self._reap(lambda work: work.holds.overdue(now_unix_ms, REAPED_COUNT_MAX))

    async def settle_orphans(self) -> int:
        """As `settle_expired` for the holds of epochs that are nobody's any more, and that nobody will come back to settle."""
        return await self._reap(lambda work: work.holds.orphaned(REAPED_COUNT_MAX))

    async def _reap(self, find: Callable[[UnitOfWork], tuple[Hold, ...]]) -> int:
        """Settles all that `find` gives."""
        settled_count = 0
        while settled := await self._settle_some(find):
            settled_count += settled
        if settled_count:
            _log.info("holds_settled_for_absent_gateway", hold_count=settled_count)
        return settled_count

    async def _settle_some(self, find: Callable[[UnitOfWork], tuple[Hold, ...]]) -> int:
        """Many in one commit. Where the database refuses that, each is tried alone."""
        hold_ids = [hold.hold_id for hold in await self._store.run(find)]
        try:
            return await self._settle_at_marks(hold_ids)
        except OWN_ERRORS:
            return sum([await self._settle_alone(hold_id) for hold_id in hold_ids])

    async def _settle_alone(self, hold_id: str) -> int:
        try:
            return await self._settle_at_marks([hold_id])
        except OWN_ERRORS as error:
            # The books were changed by another hand, and contradict themselves. What others hold must not wait for that.
            _log.error("hold_not_settled", hold_id=hold_id, reason=type(error).__name__, meaning="`potluck audit` says what is wrong")
            return 0

    async def _settle_at_marks(self, hold_ids: Sequence[str]) -> int:
        """How many of them were still open, and end now with what was delivered by their last marks."""

        def settle(work: UnitOfWork) -> int:
            holds = {hold_id: hold for hold_id, hold in work.holds.several(hold_ids).items() if hold.state is HoldState.OPEN}
            batch = self._batch(work, (), holds)
            for hold in holds.values():
                batch.close(hold, HoldState.EXPIRED, hold.delivered_micro_credits)
            _write(work, batch.changes(), self._clock.unix_ms())
            return len(holds)

        return await self._store.run(settle) if hold_ids else 0

    def _batch(self, work: UnitOfWork, commands: Sequence[LedgerCommand], holds: Mapping[str, Hold]) -> LedgerBatch:
        """Over the holds, which are locked, and then their accounts: the one order in which all that moves money locks."""
        positions = work.ledger.lock(accounts_of(commands, holds.values()))
        return LedgerBatch(holds, positions, work.gateways.epochs(), self._fee_basis_points)


class _Audit:
    """One that is under way: of several callers each waits for the same."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self.run = AuditRun(clock.unix_ms())
        self.ended_at: float | None = None
        self.task = asyncio.create_task(self._go_through(), name="audit")
        self.task.add_done_callback(self._end)

    async def _go_through(self) -> AuditReport:
        report = None
        while report is None:
            seconds_max = AUDIT_END_SECONDS_MAX if self.run.is_at_its_end else AUDIT_STEP_SECONDS_MAX
            report = await self._store.run(lambda work: self.run.advance(work.audit), seconds_max)
        if report.findings:
            _log.error("audit_found_broken_books", findings=report.findings)
        return report

    def _end(self, task: asyncio.Task[AuditReport]) -> None:
        self.ended_at = self._clock.monotonic_seconds()
        if not task.cancelled() and task.exception() is not None:
            _log.warning("audit_broke_off", error_type=type(task.exception()).__name__)


def _write(work: UnitOfWork, changes: LedgerChanges, now_ms: int) -> None:
    work.holds.add(changes.opened, now_ms)
    work.holds.mark(changes.marks)
    work.holds.close(changes.closed, now_ms)
    work.ledger.hold(changes.held_changes)
    work.ledger.book(changes.transactions, now_ms)


def _balance(work: UnitOfWork, account_id: AccountId) -> Balance:
    user = work.ledger.position(ledger_account_id(LedgerAccountKind.USER, account_id))
    earned = work.ledger.position(ledger_account_id(LedgerAccountKind.NODE_OWNER, account_id))
    if user is None or earned is None:
        raise PotluckError(ErrorCode.NOT_FOUND, f"There is no account {account_id}; see `potluck accounts list`.", param="account_id")
    posted, held = user
    return Balance(account_id, available_micro_credits=posted - held, held_micro_credits=held, earned_micro_credits=earned[0])
