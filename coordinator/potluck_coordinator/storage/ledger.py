"""The ledger's accounts, transactions and postings, as rows.

Decides only how a transaction is written: lines first, then the row that seals them. The database's own triggers refuse a transaction that
does not sum to zero, a line for a sealed one, and any change of what is written; they also keep each account's `posted`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Final

from sqlalchemy import Connection, bindparam, func, insert
from sqlmodel import col, select

from potluck_coordinator.desks import StatementLine
from potluck_coordinator.domain.ledger import LedgerAccountId, LedgerAccountKind, Transaction, ledger_account_id
from potluck_coordinator.storage.bulk import Change, Insertion, Selection
from potluck_coordinator.storage.tables import EarningsClaimRow, LedgerAccountRow, LedgerTransactionRow, PostingRow
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import AccountId

_STATEMENT_WORDS: Final = {LedgerAccountKind.USER: "spending", LedgerAccountKind.NODE_OWNER: "earnings"}

_ACCOUNT: Final = LedgerAccountRow
_POSITION: Final = select(_ACCOUNT.posted, _ACCOUNT.held).where(col(_ACCOUNT.ledger_account_id) == bindparam("account"))
# Locked until the transaction ends, in one order for all who lock several.
_LOCK: Final = Selection("ledger_account_id, posted, held", "ledger_account", ("ledger_account_id", "text"), "ledger_account")
_HOLD: Final = Change("ledger_account", ("ledger_account_id", "text"), {"more": "bigint"}, {"held": "held + given.more"})
_FINGERPRINT: Final = select(LedgerTransactionRow.fingerprint).where(col(LedgerTransactionRow.transaction_id) == bindparam("transaction"))
_ADD_POSTINGS: Final = Insertion(
    "posting",
    {"transaction_id": "text", "line": "integer", "ledger_account_id": "text", "amount": "bigint", "created_at_unix_ms": "bigint"},
)
_ADD_TRANSACTIONS: Final = Insertion(
    "ledger_transaction", {"transaction_id": "text", "kind": "text", "fingerprint": "text", "created_at_unix_ms": "bigint"}
)


class LedgerRepository:
    """The `ledger_account`, `ledger_transaction`, `posting` and `earnings_claim` tables."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def open_account(self, kind: LedgerAccountKind, owner: AccountId | None = None) -> None:
        """Opens the account unless it is open."""
        account_id = ledger_account_id(kind, owner)
        if self.position(account_id) is None:
            values = {"ledger_account_id": account_id, "owner_account_id": owner, "kind": kind.value, "posted": 0, "held": 0}
            self._connection.execute(insert(LedgerAccountRow), values)

    def position(self, account_id: LedgerAccountId) -> tuple[int, int] | None:
        """What is posted and what of it is held, in micro-credits; None for no such account."""
        found = self._connection.execute(_POSITION, {"account": account_id}).first()
        return None if found is None else (found[0], found[1])

    def lock(self, account_ids: Collection[LedgerAccountId]) -> dict[LedgerAccountId, tuple[int, int]]:
        """The positions of those that there are, which nobody else can move before this transaction ends."""
        return {account_id: (posted, held) for account_id, posted, held in _LOCK.run(self._connection, account_ids)}

    def hold(self, changes: Mapping[LedgerAccountId, int]) -> None:
        """Sets more aside, or less; the database refuses to overdraw an account."""
        _HOLD.run(self._connection, list(changes.items()))

    def post(self, transaction: Transaction, now_unix_ms: int) -> bool:
        """Books a transaction; False for one that is booked already.

        Raises:
            PotluckError: ALREADY_EXISTS where the id is booked with other postings.
        """
        known = self._connection.execute(_FINGERPRINT, {"transaction": transaction.transaction_id}).scalar()
        if known is not None:
            if known != transaction.fingerprint:
                raise PotluckError(ErrorCode.ALREADY_EXISTS, f"Transaction {transaction.transaction_id} is booked with other postings.")
            return False
        self.lock([posting.ledger_account_id for posting in transaction.postings])
        self.book([transaction], now_unix_ms)
        return True

    def book(self, transactions: Sequence[Transaction], now_unix_ms: int) -> None:
        """Writes transactions that are new, over accounts that are locked."""
        _ADD_POSTINGS.run(
            self._connection,
            [
                (transaction.transaction_id, line, account_id, amount, now_unix_ms)
                for transaction in transactions
                for line, (account_id, amount) in enumerate(transaction.postings)
            ],
        )
        _ADD_TRANSACTIONS.run(
            self._connection,
            [(transaction.transaction_id, transaction.kind.value, transaction.fingerprint, now_unix_ms) for transaction in transactions],
        )

    def lines_of(self, account_id: AccountId, limit: int) -> tuple[StatementLine, ...]:
        """The newest postings to a person's two accounts, newest first."""
        lines = [line for kind in _STATEMENT_WORDS for line in self._newest_lines(kind, account_id, limit)]
        lines.sort(key=lambda line: (line.created_at_unix_ms, line.transaction_id), reverse=True)
        return tuple(lines[:limit])

    def _newest_lines(self, kind: LedgerAccountKind, owner: AccountId, limit: int) -> list[StatementLine]:
        # One account at a time: only then does the index give the newest lines without sorting all of them.
        row = PostingRow
        found = self._connection.execute(
            select(row.transaction_id, LedgerTransactionRow.kind, row.amount, row.created_at_unix_ms)
            .join(LedgerTransactionRow, col(PostingRow.transaction_id) == col(LedgerTransactionRow.transaction_id))
            .where(PostingRow.ledger_account_id == ledger_account_id(kind, owner))
            .order_by(col(PostingRow.created_at_unix_ms).desc())
            .limit(limit)
        )
        return [
            StatementLine(
                transaction_id=transaction_id,
                kind=transaction_kind,
                amount_micro_credits=amount,
                created_at_unix_ms=created_at_unix_ms,
                ledger_account_kind=_STATEMENT_WORDS[kind],
            )
            for transaction_id, transaction_kind, amount, created_at_unix_ms in found
        ]

    def earned_since(self, account_id: AccountId, since_unix_ms: int) -> int:
        """What a person's nodes earned since then, claimed or not."""
        row = PostingRow
        found = self._connection.execute(
            select(func.sum(row.amount)).where(
                row.ledger_account_id == ledger_account_id(LedgerAccountKind.NODE_OWNER, account_id),
                col(row.created_at_unix_ms) >= since_unix_ms,
                col(row.amount) > 0,
            )
        ).scalar()
        return int(found or 0)

    def claimed(self, account_id: AccountId, claim_id: str) -> int | None:
        """What that claim moved; None for a claim never made."""
        row = EarningsClaimRow
        found = self._connection.execute(select(row.amount).where(row.account_id == account_id, row.claim_id == claim_id))
        return found.scalar()

    def keep_claim(self, account_id: AccountId, claim_id: str, amount_micro_credits: int, now_unix_ms: int) -> None:
        """Remembers what a claim moved."""
        values = {"account_id": account_id, "claim_id": claim_id, "amount": amount_micro_credits, "created_at_unix_ms": now_unix_ms}
        self._connection.execute(insert(EarningsClaimRow), values)
