"""The audit: every balance derived anew from the postings, every hold compared with its payment.

Decides what counts as broken books, and how much of them is looked at in one transaction, for payments wait meanwhile: some thousand rows
and what belongs to them, and last all postings once more, added up by account. What is written between two steps as it should be is not
held against the books: postings and closed holds stay as they are, a step has a transaction or a hold whole, and an account with all of its
postings. It only reads, and it trusts none of the sums that the triggers keep: it finds what was changed behind their backs, by a tool or
by a fault of the disk.
"""

from __future__ import annotations

import hashlib
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, islice
from typing import Any, Final

from sqlalchemy import Connection, text

from potluck_coordinator.domain.ledger import AuditReport
from potluck_coordinator.domain.payees import split

HOLD_OVERDUE_MS: Final = 60_000
"""How long past its deadline an open hold may wait for the reaper before the audit asks why."""
FINDINGS_PER_RULE_MAX: Final = 20
PAGE_LENGTH: Final = 5_000
"""Postings, or holds, of one step: some 50 ms."""

# Each query returns one row for each breach, ready to be filled into its sentence, and finds partners by their keys: comparing every row
# with every other one would stop the pool for minutes. WITHIN(key) stands for the keys of one step. SUBSTR(…, 8) is what follows
# "settle:"; || '' keeps the planner from looking through all postings of the payer's account instead of the one transaction's.
_OF_TRANSACTIONS: Final = (
    (
        "transaction {0} has {2} postings that sum to {1}, not to zero",
        """SELECT transaction_id, SUM(amount), COUNT(*) FROM posting WHERE WITHIN(transaction_id)
        GROUP BY transaction_id HAVING SUM(amount) <> 0 OR COUNT(*) < 2 ORDER BY transaction_id""",
    ),
    (
        "transaction {0} has no postings",
        """SELECT transaction_id FROM ledger_transaction t WHERE WITHIN(t.transaction_id)
        AND NOT EXISTS (SELECT 1 FROM posting p WHERE p.transaction_id = t.transaction_id) ORDER BY transaction_id""",
    ),
    (
        "posting {0}/{1} belongs to no transaction",
        """SELECT transaction_id, line FROM posting p WHERE WITHIN(p.transaction_id)
        AND NOT EXISTS (SELECT 1 FROM ledger_transaction t WHERE t.transaction_id = p.transaction_id) ORDER BY transaction_id, line""",
    ),
    (
        "transaction {0} pays for no hold that settled",
        """SELECT t.transaction_id FROM ledger_transaction t WHERE WITHIN(t.transaction_id) AND t.kind = 'settle' AND NOT EXISTS (
        SELECT 1 FROM hold h WHERE h.hold_id = SUBSTR(t.transaction_id, 8) AND h.state <> 'open' AND h.settled > 0)
        ORDER BY t.transaction_id""",
    ),
)
_OF_HOLDS: Final = (
    (
        "hold {0} settled {1}, its payer's account was charged {2}",
        """SELECT h.hold_id, h.settled, COALESCE(-p.amount, 0) FROM hold h
        LEFT JOIN posting p ON p.transaction_id = 'settle:' || h.hold_id AND p.ledger_account_id || '' = 'user:' || h.payer_account_id
        WHERE WITHIN(h.hold_id) AND h.settled <> COALESCE(-p.amount, 0) ORDER BY h.hold_id""",
    ),
)
_OF_ACCOUNTS: Final = (
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
        "hold {0} is open {1} ms past its deadline",
        "SELECT hold_id, :now - expires_at_unix_ms FROM hold WHERE state = 'open' AND expires_at_unix_ms < :now - :grace",
    ),
)
_LINES: Final = """SELECT t.transaction_id, t.kind, t.fingerprint, p.ledger_account_id, p.amount
FROM ledger_transaction t JOIN posting p ON p.transaction_id = t.transaction_id WHERE WITHIN(t.transaction_id)
ORDER BY t.transaction_id, p.line"""
# What each payee of a closed hold got, of what was left of the payment after the fee: of every hold with several payees, and of those with
# one that did not get just this.
_EARNINGS: Final = """SELECT h.hold_id, h.settled - COALESCE(f.amount, 0),
COALESCE(s.account_id, h.payee_account_id), COALESCE(s.weight, 1), COALESCE(p.amount, 0) FROM hold h
LEFT JOIN hold_payee s ON s.hold_id = h.hold_id
LEFT JOIN posting f ON f.transaction_id = 'settle:' || h.hold_id AND f.ledger_account_id || '' = 'fee'
LEFT JOIN posting p ON p.transaction_id = 'settle:' || h.hold_id
AND p.ledger_account_id || '' = 'node_owner:' || COALESCE(s.account_id, h.payee_account_id)
WHERE WITHIN(h.hold_id) AND h.state <> 'open' AND (s.hold_id IS NOT NULL OR COALESCE(p.amount, 0) <> h.settled - COALESCE(f.amount, 0))
ORDER BY h.hold_id"""
_NUMBERS: Final = {
    "account_count": "SELECT COUNT(*) FROM ledger_account",
    "open_hold_count": "SELECT COUNT(*) FROM hold WHERE state = 'open'",
    "issued_micro_credits": "SELECT COALESCE(-SUM(amount), 0) FROM posting WHERE ledger_account_id = 'issuer'",
}
_POSTINGS: Final = "SELECT COUNT(*) FROM posting WHERE WITHIN(transaction_id)"
_TRANSACTIONS: Final = "SELECT COUNT(*) FROM ledger_transaction WHERE WITHIN(transaction_id)"
# By what is in the tables PostgreSQL's planner would rather join a step's rows with all of a table, and each step would read all of it.
_BY_KEYS: Final = tuple(f"SET LOCAL enable_{way} = off" for way in ("hashjoin", "mergejoin", "seqscan"))
_WITHIN: Final = re.compile(r"WITHIN\((.+?)\)")


@dataclass(frozen=True, slots=True)
class Page:
    """The keys of one step: those after the one and up to the other; None: from the first, or to the last."""

    after: str | None
    until: str | None


Findings = Mapping[str, Sequence[str]]
"""By rule, what is wrong."""


class Audit:
    """The books as one step sees them: each answer is what is wrong, sentence by sentence, at most `FINDINGS_PER_RULE_MAX` of a kind."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def page(self, key: str, table: str, after: str | None) -> Page:
        """The next keys of a table."""
        query = f"SELECT {key} FROM {table} WHERE WITHIN({key}) ORDER BY {key} LIMIT 1 OFFSET {PAGE_LENGTH - 1}"  # noqa: S608
        following = self._rows(query, Page(after, None))
        return Page(after, following[0][0] if following else None)

    def go_by_keys(self) -> None:
        """For the rest of the transaction, also for payments that share its commit: they go by keys in any case."""
        if self._connection.dialect.name == "postgresql":
            for setting in _BY_KEYS:
                self._connection.execute(text(setting))

    def count(self, query: str, page: Page) -> int:
        """How many rows of a page there are."""
        return int(self._rows(query, page)[0][0])

    def transactions(self, page: Page) -> Findings:
        """Whether each balances, is what was booked, and pays for a hold."""
        found = {sentence: self._breaches(sentence, query, page) for sentence, query in _OF_TRANSACTIONS}
        altered = islice(self._altered_transactions(page), FINDINGS_PER_RULE_MAX)
        return {**found, "altered": [f"transaction {transaction_id} is not what was booked" for transaction_id in altered]}

    def holds(self, page: Page) -> Findings:
        """Whether each was paid, and its payees got their shares."""
        found = {sentence: self._breaches(sentence, query, page) for sentence, query in _OF_HOLDS}
        return {**found, "misdivided": list(islice(self._misdivided_holds(page), FINDINGS_PER_RULE_MAX))}

    def accounts(self, now_unix_ms: int) -> Findings:
        """Whether each says what its postings and holds come to, and no hold was forgotten."""
        values = {"now": now_unix_ms, "grace": HOLD_OVERDUE_MS}
        found = {}
        for sentence, query in _OF_ACCOUNTS:
            rows = self._connection.execute(text(query), values if ":now" in query else {}).fetchmany(FINDINGS_PER_RULE_MAX)
            found[sentence] = [sentence.format(*row) for row in rows]
        return found

    def numbers(self) -> Mapping[str, int]:
        """The rest of an `AuditReport`, by its names."""
        return {name: int(self._connection.execute(text(query)).scalar_one()) for name, query in _NUMBERS.items()}

    def _breaches(self, sentence: str, query: str, page: Page) -> list[str]:
        return [sentence.format(*row) for row in islice(self._rows(query, page), FINDINGS_PER_RULE_MAX)]

    def _misdivided_holds(self, page: Page) -> Iterator[str]:
        """Holds whose payees did not get what `domain.payees.split` gives them; nobody else can have got it, for transactions balance."""
        for hold_id, rows in groupby(self._rows(_EARNINGS, page), lambda row: row[0]):
            lines = sorted((account_id, earned, weight, part) for _, earned, account_id, weight, part in rows)
            parts = tuple(part for *_, part in lines)
            due = split(lines[0][1], [weight for _, _, weight, _ in lines])
            if parts != due:
                payees = ", ".join(account_id for account_id, *_ in lines)
                yield f"hold {hold_id} paid {payees} {'+'.join(map(str, parts))}, their shares are {'+'.join(map(str, due))}"

    def _altered_transactions(self, page: Page) -> Iterator[str]:
        """Transactions whose postings no longer give their fingerprint (`domain.ledger.Transaction.fingerprint`)."""
        for (transaction_id, kind, fingerprint), rows in groupby(self._rows(_LINES, page), lambda row: tuple(row[:3])):
            lines = "".join(f"\n{account_id} {amount}" for *_, account_id, amount in rows)
            if hashlib.sha256(f"{transaction_id}\n{kind}{lines}".encode()).hexdigest() != fingerprint:
                yield transaction_id

    def _rows(self, query: str, page: Page) -> Sequence[Any]:
        bounds = {"after": page.after, "until": page.until}
        return self._connection.execute(text(within(query, page)), {name: key for name, key in bounds.items() if key is not None}).all()


def within(query: str, page: Page) -> str:
    """The query for a page alone, with `:after` and `:until` to be filled in."""
    bounds = [r"\1 > :after"] * (page.after is not None) + [r"\1 <= :until"] * (page.until is not None)
    return _WITHIN.sub(" AND ".join(bounds) or "TRUE", query)


class AuditRun:
    """One audit, from its first step to its report."""

    def __init__(self, now_unix_ms: int) -> None:
        self._now_unix_ms = now_unix_ms
        self._walks = deque([("transaction_id", "posting", self._look_at_transactions), ("hold_id", "hold", self._look_at_holds)])
        self._after: str | None = None
        self._found: dict[str, list[str]] = {}
        self._posting_count = 0
        self._transaction_count = 0

    @property
    def words(self) -> str:
        """How far it has come."""
        return f"{self._posting_count:,} postings looked at" + (", and now the holds" if len(self._walks) == 1 else "")

    @property
    def is_at_its_end(self) -> bool:
        """The step that is left looks at all accounts and postings; those before it each at a page."""
        return not self._walks

    def advance(self, books: Audit) -> AuditReport | None:
        """The next step, in a transaction of its own; the report, once there is none left."""
        if not self._walks:
            self._gather(books.accounts(self._now_unix_ms))
            return AuditReport(
                findings=tuple(chain.from_iterable(self._found.values())),
                transaction_count=self._transaction_count,
                posting_count=self._posting_count,
                **books.numbers(),
            )
        key, table, look_at = self._walks[0]
        books.go_by_keys()
        page = books.page(key, table, self._after)
        look_at(books, page)
        self._after = page.until
        if page.until is None:
            self._walks.popleft()
        return None

    def _look_at_transactions(self, books: Audit, page: Page) -> None:
        self._gather(books.transactions(page))
        self._posting_count += books.count(_POSTINGS, page)
        self._transaction_count += books.count(_TRANSACTIONS, page)

    def _look_at_holds(self, books: Audit, page: Page) -> None:
        self._gather(books.holds(page))

    def _gather(self, findings: Findings) -> None:
        for rule, more in findings.items():
            known = self._found.setdefault(rule, [])
            known += more[: FINDINGS_PER_RULE_MAX - len(known)]
