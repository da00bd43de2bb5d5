"""Many threads spend one balance: `python -m tests.property.ledger_race --threads 16 --spends 1000 --balance 1000`.

Each spend holds and settles 1 micro-credit in one commit of its own. Exactly the balance may be spent. Ends 1 otherwise.
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


@dataclass(frozen=True)
class RaceOutcome:
    spent: int
    refused: int
    available_after: int
    earned_after: int
    findings: tuple[str, ...]


def race(url: str, *, thread_count: int, spend_count: int, balance: int) -> RaceOutcome:
    """Every thread spends `spend_count` times out of one account of `balance`."""
    books = Books(url)
    try:
        books.add_people("ann", grant=balance)
        books.add_people("bob", grant=0)
        barrier = threading.Barrier(thread_count)

        def spend(thread: int) -> Counter[LedgerOutcome]:
            outcomes: Counter[LedgerOutcome] = Counter()
            barrier.wait(60)
            for number in range(spend_count):
                hold_id = f"{thread}-{number}"
                opened, settled = books.apply_now(open_hold(hold_id, amount=1), SettleHold(hold_id, 1))
                assert settled is (LedgerOutcome.APPLIED if opened is LedgerOutcome.APPLIED else LedgerOutcome.CONFLICT)
                outcomes[opened] += 1
            return outcomes

        with ThreadPoolExecutor(thread_count) as threads:
            outcomes = sum(threads.map(spend, range(thread_count)), Counter())
        positions = [
            books.run_now(lambda work, account=account: work.ledger.position(account)) for account in ("user:ann", "node_owner:bob")
        ]
        return RaceOutcome(
            spent=outcomes[LedgerOutcome.APPLIED],
            refused=outcomes[LedgerOutcome.INSUFFICIENT_CREDITS],
            available_after=positions[0][0] - positions[0][1],
            earned_after=positions[1][0],
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
    exact = outcome.spent == expected == outcome.earned_after and outcome.available_after == arguments.balance - expected
    return 0 if exact and not outcome.findings else 1


if __name__ == "__main__":
    sys.exit(main())
