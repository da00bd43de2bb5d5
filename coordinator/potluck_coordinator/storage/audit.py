"""The audit: every balance derived anew from the postings, every hold compared with its payment.

Decides what counts as broken books. It only reads, and it trusts none of the sums that the triggers keep: it finds what was changed behind
their backs, by a tool or by a fault of the disk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from typing import Any, Final

from sqlalchemy import Connection, text

from potluck_coordinator.domain.ledger import AuditReport
from potluck_coordinator.domain.payees import split

HOLD_OVERDUE_MS: Final = 60_000
"""How long past its deadline an open hold may wait for the reaper before the audit asks why."""
FINDINGS_PER_RULE_MAX: Final = 20
ROWS_AT_A_TIME: Final = 1_000

# Each query returns one row for each breach, ready to be filled into its sentence, and finds partners by their keys: comparing every row
# with every other one would stop the pool for minutes. SUBSTR(…, 8) is what follows "settle:"; || '' keeps the planner from looking
# through all postings of the payer's account instead of the one transaction's.
_RULES: Final = (
    (
        "transaction {0} has {2} postings that sum to {1}, not to zero",
        """SELECT transaction_id, SUM(amount), COUNT(*) FROM posting GROUP BY transaction_id HAVING SUM(amount) <> 0 OR COUNT(*) < 2
        ORDER BY transaction_id""",
    ),
    (
        "transaction {0} has no postings",
        """SELECT transaction_id FROM ledger_transaction t
        WHERE NOT EXISTS (SELECT 1 FROM posting p WHERE p.transaction_id = t.transaction_id) ORDER BY transaction_id""",
    ),
    (
        "posting {0}/{1} belongs to no transaction",
        """SELECT transaction_id, line FROM posting p
        WHERE NOT EXISTS (SELECT 1 FROM ledger_transaction t WHERE t.transaction_id = p.transaction_id) ORDER BY transaction_id, line""",
    ),
    (
        "account {0} says {1} posted, its postings sum to {2}",
        """SELECT a.ledger_account_id, a.posted, COALESCE(s.total, 0) FROM ledger_account a
        LEFT JOIN (SELECT ledger_account_id, SUM(amount) AS total FROM posting GROUP BY ledger_account_id) s
        ON s.ledger_account_id = a.ledger_account_id
        WHERE a.posted <> COALESCE(s.total, 0) ORDER BY a.ledger_account_id""",
    ),
    (
        "account {0} says {1} held, its open holds sum to {2}",
        """SELECT a.ledger_account_id, a.held, COALESCE(s.total, 0) FROM ledger_account a
        LEFT JOIN (SELECT payer_account_id, SUM(amount) AS total FROM hold WHERE state = 'open' GROUP BY payer_account_id) s
        ON a.kind = 'user' AND s.payer_account_id = a.owner_account_id
        WHERE a.held <> COALESCE(s.total, 0) ORDER BY a.ledger_account_id""",
    ),
    (
        "account {0} is overdrawn: {1} posted, {2} held",
        """SELECT ledger_account_id, posted, held FROM ledger_account WHERE kind <> 'issuer' AND posted - held < 0
        ORDER BY ledger_account_id""",
    ),
    (
        "hold {0} settled {1}, its payer's account was charged {2}",
        """SELECT h.hold_id, h.settled, COALESCE(-p.amount, 0) FROM hold h
        LEFT JOIN posting p ON p.transaction_id = 'settle:' || h.hold_id AND p.ledger_account_id || '' = 'user:' || h.payer_account_id
        WHERE h.settled <> COALESCE(-p.amount, 0) ORDER BY h.hold_id""",
    ),
    (
        "transaction {0} pays for no hold that settled",
        """SELECT t.transaction_id FROM ledger_transaction t WHERE t.kind = 'settle' AND NOT EXISTS (
        SELECT 1 FROM hold h WHERE h.hold_id = SUBSTR(t.transaction_id, 8) AND h.state <> 'open' AND h.settled > 0)
        ORDER BY t.transaction_id""",
    ),
)
_OVERDUE: Final = "SELECT hold_id, :now - expires_at_unix_ms FROM hold WHERE state = 'open' AND expires_at_unix_ms < :now - :grace"
_LINES: Final = """SELECT t.transaction_id, t.kind, t.fingerprint, p.ledger_account_id, p.amount
FROM ledger_transaction t JOIN posting p ON p.transaction_id = t.transaction_id ORDER BY t.transaction_id, p.line"""
# What each payee of a closed hold got, of what was left of the payment after the fee: of every hold with several payees, and of those with
# one that did not get just this.
_EARNINGS: Final = """SELECT h.hold_id, h.settled - COALESCE(f.amount, 0),
COALESCE(s.account_id, h.payee_account_id), COALESCE(s.weight, 1), COALESCE(p.amount, 0) FROM hold h
LEFT JOIN hold_payee s ON s.hold_id = h.hold_id
LEFT JOIN posting f ON f.transaction_id = 'settle:' || h.hold_id AND f.ledger_account_id || '' = 'fee'
LEFT JOIN posting p ON p.transaction_id = 'settle:' || h.hold_id
AND p.ledger_account_id || '' = 'node_owner:' || COALESCE(s.account_id, h.payee_account_id)
WHERE h.state <> 'open' AND (s.hold_id IS NOT NULL OR COALESCE(p.amount, 0) <> h.settled - COALESCE(f.amount, 0)) ORDER BY h.hold_id"""


class Audit:
    """Checks the whole ledger within one transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def report(self, now_unix_ms: int) -> AuditReport:
        """What is wrong, sentence by sentence; at most `FINDINGS_PER_RULE_MAX` for each kind of breach."""
        findings: list[str] = []
        for sentence, query in _RULES:
            rows = self._connection.execute(text(query)).fetchmany(FINDINGS_PER_RULE_MAX)
            findings += [sentence.format(*row) for row in rows]
        overdue = self._connection.execute(text(_OVERDUE), {"now": now_unix_ms, "grace": HOLD_OVERDUE_MS}).fetchmany(FINDINGS_PER_RULE_MAX)
        findings += [f"hold {hold_id} is open {late_ms} ms past its deadline" for hold_id, late_ms in overdue]
        findings += islice(self._misdivided_holds(), FINDINGS_PER_RULE_MAX)
        altered = islice(self._altered_transactions(), FINDINGS_PER_RULE_MAX)
        findings += [f"transaction {transaction_id} is not what was booked" for transaction_id in altered]
        return AuditReport(
            findings=tuple(findings),
            account_count=self._number("SELECT COUNT(*) FROM ledger_account"),
            transaction_count=self._number("SELECT COUNT(*) FROM ledger_transaction"),
            posting_count=self._number("SELECT COUNT(*) FROM posting"),
            open_hold_count=self._number("SELECT COUNT(*) FROM hold WHERE state = 'open'"),
            issued_micro_credits=-self._number("SELECT COALESCE(SUM(amount), 0) FROM posting WHERE ledger_account_id = 'issuer'"),
        )

    def _misdivided_holds(self) -> Iterator[str]:
        """Holds whose payees did not get what `domain.payees.split` gives them; nobody else can have got it, for transactions balance."""
        for hold_id, rows in groupby(self._streamed(_EARNINGS), lambda row: row[0]):
            lines = sorted((account_id, earned, weight, part) for _, earned, account_id, weight, part in rows)
            parts = tuple(part for *_, part in lines)
            due = split(lines[0][1], [weight for _, _, weight, _ in lines])
            if parts != due:
                payees = ", ".join(account_id for account_id, *_ in lines)
                yield f"hold {hold_id} paid {payees} {'+'.join(map(str, parts))}, their shares are {'+'.join(map(str, due))}"

    def _altered_transactions(self) -> Iterator[str]:
        """Transactions whose postings no longer give their fingerprint (`domain.ledger.Transaction.fingerprint`)."""
        current, expected, digest = "", "", hashlib.sha256()
        for transaction_id, kind, fingerprint, account_id, amount in self._streamed(_LINES):
            if transaction_id != current:
                if current and digest.hexdigest() != expected:
                    yield current
                current, expected, digest = transaction_id, fingerprint, hashlib.sha256(f"{transaction_id}\n{kind}".encode())
            digest.update(f"\n{account_id} {amount}".encode())
        if current and digest.hexdigest() != expected:
            yield current

    def _streamed(self, query: str) -> Iterable[Any]:
        """Rows in portions: these are about as many as there are postings."""
        return self._connection.execute(text(query).execution_options(stream_results=True, max_row_buffer=ROWS_AT_A_TIME))

    def _number(self, query: str) -> int:
        return int(self._connection.execute(text(query)).scalar_one())
