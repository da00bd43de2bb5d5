"""Many threads spend one balance: `python -m tests.property.ledger_race --threads 16 --spends 1000 --balance 1000`.

Each spend holds and settles 5 micro-credits in one commit of its own: by turns all of them bob's, and four of them bob's and one cat's. Of
a balance for 1000 spends exactly that may be spent. Ends 1 otherwise.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from potluck_coordinator.domain.ledger import LedgerOutcome, SettleHold
from tests.support.books import Books, open_hold

PRICE = 5
SHARES = ({"bob": 1}, {"bob": 3, "cat": 1})
"""Of 5 cat's share is 1, rounded down."""


@dataclass(frozen=True)
class RaceOutcome:
    spent: int
    """How many spends were applied, of them `shared`."""
    shared: int
    refused: int
    available_after: int
    bob_earned: int
    cat_earned: int
    findings: tuple[str, ...]

    @property
    def exact(self) -> bool:
        """Whether each payee earned just its part of every spend."""
        return (self.bob_earned, self.cat_earned) == (self.spent * PRICE - self.shared, self.shared)


def race(url: str, *, thread_count: int, spend_count: int, balance: int) -> RaceOutcome:
    """Every thread spends `spend_count` times out of one account whose balance is enough for so many."""
    books = Books(url)
    try:
        books.add_people("ann", grant=balance * PRICE)
        books.add_people("bob", "cat", grant=0)
        barrier = threading.Barrier(thread_count)

        def spend(thread: int) -> Counter[tuple[LedgerOutcome, int]]:
            outcomes: Counter[tuple[LedgerOutcome, int]] = Counter()
            barrier.wait(60)
            for number in range(spend_count):
                hold_id = f"{thread}-{number}"
                payees = SHARES[number % len(SHARES)]
                opened, settled = books.apply_now(open_hold(hold_id, payees=payees, amount=PRICE), SettleHold(hold_id, PRICE))
                assert settled is (LedgerOutcome.APPLIED if opened is LedgerOutcome.APPLIED else LedgerOutcome.CONFLICT)
                outcomes[opened, len(payees)] += 1
            return outcomes

        with ThreadPoolExecutor(thread_count) as threads:
            outcomes = sum(threads.map(spend, range(thread_count)), Counter())
        ann, bob, cat = (
            books.run_now(lambda work, account=account: work.ledger.position(account))
            for account in ("user:ann", "node_owner:bob", "node_owner:cat")
        )
        return RaceOutcome(
            spent=outcomes[LedgerOutcome.APPLIED, 1] + outcomes[LedgerOutcome.APPLIED, 2],
            shared=outcomes[LedgerOutcome.APPLIED, 2],
            refused=outcomes[LedgerOutcome.INSUFFICIENT_CREDITS, 1] + outcomes[LedgerOutcome.INSUFFICIENT_CREDITS, 2],
            available_after=ann[0] - ann[1],
            bob_earned=bob[0],
            cat_earned=cat[0],
            findings=books.audit_now().findings,
        )
    finally:
        books.store.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--spends", type=int, default=1_000)
    parser.add_argument("--balance", type=int, default=1_000)
    arguments = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        outcome = race(
            f"sqlite:///{Path(folder) / 'race.db'}",
            thread_count=arguments.threads,
            spend_count=arguments.spends,
            balance=arguments.balance,
        )
    attempts = arguments.threads * arguments.spends
    print(f"{attempts} spends of a balance of {arguments.balance} in {time.monotonic() - started:.1f} s: {outcome}")
    expected = min(attempts, arguments.balance)
    exact = outcome.spent == expected and outcome.exact and outcome.available_after == (arguments.balance - expected) * PRICE
    return 0 if exact and not outcome.findings else 1


if __name__ == "__main__":
    sys.exit(main())
