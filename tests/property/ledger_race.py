"""Many threads spend one balance: `python -m tests.property.ledger_race --threads 16 --spends 1000 --balance 1000`.

On SQLite, or with `--database postgresql` on a server that it starts: then once through one store, as a coordinator does, and once over a
session for each thread, where nothing but the rows' own locks keeps them apart. Each spend holds and settles 5 micro-credits in one commit
of its own: by turns all of them bob's, and four of them bob's and one cat's. Of a balance for 1000 spends exactly that may be spent. Ends 1
otherwise.
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

from sqlalchemy import create_engine

from potluck_coordinator.domain.ledger import LedgerCommand, LedgerOutcome, SettleHold
from potluck_coordinator.storage.unit_of_work import UnitOfWork
from tests.support.books import Books, open_hold
from tests.support.postgresql import cluster

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


def race(url: str, *, thread_count: int, spend_count: int, balance: int, each_its_session: bool = False) -> RaceOutcome:
    """Every thread spends `spend_count` times out of one account whose balance is enough for so many; each over its own session, or not."""
    books = Books(url)
    try:
        books.add_people("ann", grant=balance * PRICE)
        books.add_people("bob", "cat", grant=0)
        barrier = threading.Barrier(thread_count)
        engine = create_engine(url, pool_size=thread_count)

        def apply(*commands: LedgerCommand) -> tuple[LedgerOutcome, ...]:
            if not each_its_session:
                return books.apply_now(*commands)
            with engine.begin() as connection, UnitOfWork(connection) as work:
                return books.ledger.work_for(commands)(work)

        def spend(thread: int) -> Counter[tuple[LedgerOutcome, int]]:
            outcomes: Counter[tuple[LedgerOutcome, int]] = Counter()
            barrier.wait(60)
            for number in range(spend_count):
                hold_id = f"{thread}-{number}"
                payees = SHARES[number % len(SHARES)]
                opened, settled = apply(open_hold(hold_id, payees=payees, amount=PRICE), SettleHold(hold_id, PRICE))
                assert settled is (LedgerOutcome.APPLIED if opened is LedgerOutcome.APPLIED else LedgerOutcome.CONFLICT)
                outcomes[opened, len(payees)] += 1
            return outcomes

        with ThreadPoolExecutor(thread_count) as threads:
            outcomes = sum(threads.map(spend, range(thread_count)), Counter())
        engine.dispose()
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
    parser.add_argument("--database", choices=("sqlite", "postgresql"), default="sqlite")
    arguments = parser.parse_args()
    if arguments.database == "sqlite":
        with tempfile.TemporaryDirectory() as folder:
            return 0 if _shown(f"sqlite:///{Path(folder) / 'race.db'}", arguments, each_its_session=False) else 1
    with cluster() as server:
        shown = []
        for each_its_session in (False, True):
            with server.fresh_url() as url:
                shown.append(_shown(url, arguments, each_its_session=each_its_session))
    return 0 if all(shown) else 1


def _shown(url: str, arguments: argparse.Namespace, *, each_its_session: bool) -> bool:
    """Whether it was exact."""
    started = time.monotonic()
    outcome = race(
        url,
        thread_count=arguments.threads,
        spend_count=arguments.spends,
        balance=arguments.balance,
        each_its_session=each_its_session,
    )
    attempts = arguments.threads * arguments.spends
    way = "a session for each thread" if each_its_session else "one store"
    print(f"{attempts} spends of a balance of {arguments.balance} over {way} in {time.monotonic() - started:.1f} s: {outcome}", flush=True)
    expected = min(attempts, arguments.balance)
    exact = outcome.spent == expected and outcome.exact and outcome.available_after == (arguments.balance - expected) * PRICE
    return exact and not outcome.findings


if __name__ == "__main__":
    sys.exit(main())
