"""`python -m tests.benchmarks.group_commit --rounds 10`: settled requests per second, shared commits beside one commit for each request.

Decides what is compared, on the same disk, by turns (ABBA): clients whose holds and settlements go through the gateway's `LedgerWriter` and
share commits, and the same store with commits of one request each: its hold and its settlement together, which is one commit fewer than
such a gateway would need, and always the next one waiting. Every commit is flushed to the disk. A ratio's interval is a bootstrap's over
the rounds. Figures for both databases; ends 1 where a ratio's pessimistic end is below `--wanted`.

How often this disk flushes within a second is measured, too: the less a flush costs, the less there is to share.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from potluck_coordinator.domain.ledger import LedgerOutcome, SettleHold
from potluck_coordinator.gateway.ledger_writer import LedgerWriter
from potluck_coordinator.storage import store as store_module
from tests.benchmarks.arithmetic import Estimate, estimate
from tests.support.books import Books, open_hold
from tests.support.postgresql import cluster

DATABASES = ("sqlite", "postgresql")
SHARED, ALONE = "shared", "alone"
CLIENT_COUNT = 512
"""At a time: as many as may stream from a few hundred cards."""
ALONE_WAITING_COUNT = 64
PRICE = 5
GROUP_COUNT_MAX = store_module.GROUP_COMMIT_COUNT_MAX


@dataclass
class Contest:
    """One database, with what was measured on it."""

    books: Books
    seconds: float
    per_second: dict[str, list[float]] = field(default_factory=lambda: {SHARED: [], ALONE: []})
    numbers: Iterator[int] = field(default_factory=lambda: iter(range(10**9)))

    def new_request(self) -> tuple:
        hold_id = f"att_{next(self.numbers):016x}"
        return open_hold(hold_id, amount=PRICE), SettleHold(hold_id, PRICE)

    async def measure(self, way: str) -> None:
        ask, count = (self._shared, CLIENT_COUNT) if way == SHARED else (self._alone, ALONE_WAITING_COUNT)
        store_module.GROUP_COMMIT_COUNT_MAX = GROUP_COUNT_MAX if way == SHARED else 1
        writer = LedgerWriter(self.books.ledger, lambda _: None)
        running = asyncio.ensure_future(writer.run())
        started, until = time.perf_counter(), time.perf_counter() + self.seconds
        counts = await asyncio.gather(*(ask(writer, until) for _ in range(count)))
        self.per_second[way].append(sum(counts) / (time.perf_counter() - started))
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        store_module.GROUP_COMMIT_COUNT_MAX = GROUP_COUNT_MAX

    async def _shared(self, writer: LedgerWriter, until: float) -> int:
        count = 0
        while time.perf_counter() < until:
            hold, settlement = self.new_request()
            assert await writer.submit(hold) is LedgerOutcome.APPLIED
            assert await writer.submit(settlement) is LedgerOutcome.APPLIED
            count += 1
        return count

    async def _alone(self, _: LedgerWriter, until: float) -> int:
        count = 0
        while time.perf_counter() < until:
            assert set(await self.books.ledger.apply(self.new_request())) == {LedgerOutcome.APPLIED}
            count += 1
        return count

    @property
    def ratio(self) -> Estimate:
        return estimate([shared / alone for shared, alone in zip(self.per_second[SHARED], self.per_second[ALONE], strict=True)])


@contextmanager
def contest(kind: str, seconds: float) -> Iterator[Contest]:
    """On a fresh database, which is taken away again."""
    if kind == "sqlite":
        with tempfile.TemporaryDirectory() as folder:
            yield from _on(f"sqlite:///{Path(folder) / 'potluck.db'}", seconds)
    else:
        with cluster(durable=True) as server:
            yield from _on(server.url(server.new_database()), seconds)


def _on(url: str, seconds: float) -> Iterator[Contest]:
    books = Books(url)
    try:
        books.add_people("ann", grant=10**14)
        books.add_people("bob", grant=0)
        made = Contest(books, seconds)
        yield made
        findings = books.audit_now().findings
        assert findings == (), findings
    finally:
        books.store.close()


def flush_microseconds() -> float:
    """The median of some flushes of a small write in the temporary folder, where the databases are."""
    with tempfile.NamedTemporaryFile() as file:
        took = []
        for _ in range(200):
            file.write(random.Random(1).randbytes(4096))
            file.flush()
            started = time.perf_counter()
            os.fdatasync(file.fileno())
            took.append(time.perf_counter() - started)
    return median(took) * 1e6


async def rounds(contested: Contest, count: int) -> None:
    """One of each way first, which is not counted."""
    for way in (ALONE, SHARED):
        await contested.measure(way)
        contested.per_second[way].clear()
    for number in range(count):
        for way in (ALONE, SHARED) if number % 2 == 0 else (SHARED, ALONE):
            await contested.measure(way)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each way in each round")
    parser.add_argument("--wanted", type=float, default=10.0, help="the ratio's pessimistic end")
    parser.add_argument("--databases", nargs="+", choices=DATABASES, default=list(DATABASES))
    arguments = parser.parse_args()
    print(f"a flush of this disk takes {flush_microseconds():.0f} µs", flush=True)
    missed = False
    for kind in arguments.databases:
        with contest(kind, arguments.seconds) as contested:
            asyncio.run(rounds(contested, arguments.rounds))
        ratio, shared, alone = contested.ratio, estimate(contested.per_second[SHARED]), estimate(contested.per_second[ALONE])
        missed |= ratio.low < arguments.wanted
        print(
            f"{kind}: {shared.median:.0f} requests/s with shared commits, {alone.median:.0f} with one each;"
            f" ratio {ratio.median:.1f} [{ratio.low:.1f}, {ratio.high:.1f}]",
            flush=True,
        )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
