"""Kills a process that writes the ledger, again and again: `python -m tests.chaos.ledger_crash --rounds 200 --database postgresql`.

On PostgreSQL two of three rounds first kill something of the server while the writer goes on: all of it, by SIGKILL of its first process,
or the one process that serves the writer, after which the server ends all sessions and recovers. The writer then sends again what it heard
no answer to, under the same ids, as the gateway does.

After each round the books are opened again: every acknowledged payment must be there, every other one whole or absent, the audit clean.
Every second payment is shared by two payees, of whom neither may have got a part without the other. Ends 1 otherwise. `--write URL ROUND`
is the process that is killed.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import structlog
from sqlalchemy import text

from potluck_coordinator.domain.ledger import LedgerOutcome, SettleHold
from potluck_coordinator.storage.absence import DatabaseAwayError
from potluck_protocol.errors import ErrorCode, PotluckError
from tests.support.books import Books, open_hold
from tests.support.postgresql import Cluster, cluster

REPOSITORY = Path(__file__).parents[2]
BALANCE = 10**12
THREAD_COUNT = 8
ACKNOWLEDGED_MAX = 400
PRICE = 5
SHARES = ({"bob": 1}, {"bob": 3, "cat": 1})
"""Of 5 cat's share is 1, rounded down."""
RETRY_SECONDS = 0.02
RECOVERY_SECONDS_MAX = 30.0
PROGRESS_ROUNDS = 10


@dataclass
class CrashOutcome:
    rounds: int = 0
    server_kills: int = 0
    acknowledged: int = 0
    lost: int = 0
    half_done: int = 0
    misdivided: int = 0
    findings: tuple[str, ...] = ()

    @property
    def clean(self) -> bool:
        return not (self.lost or self.half_done or self.misdivided or self.findings)


def crash(url: str, *, rounds: int, seed: int, server: Cluster | None = None) -> CrashOutcome:
    """Rounds of write, kill and check on one database."""
    chance = random.Random(seed)
    outcome = CrashOutcome()
    acknowledged: set[str] = set()
    for number in range(rounds):
        kill_server = None if server is None else (None, server.kill_and_start, server.kill_a_session)[number % 3]
        outcome.server_kills += kill_server is not None
        acknowledged |= _write_and_kill(url, number, chance.randrange(1, ACKNOWLEDGED_MAX), kill_server)
        outcome.rounds += 1
        outcome.acknowledged = len(acknowledged)
        _check_once_open(url, acknowledged, outcome)
        if outcome.rounds % PROGRESS_ROUNDS == 0:
            print(outcome, file=sys.stderr, flush=True)
        if not outcome.clean:
            break
    return outcome


def _write_and_kill(url: str, number: int, wanted: int, kill_server: Callable[[], None] | None) -> set[str]:
    """Lets the writer go until it has acknowledged so many payments, and kills it in the middle of the next ones.

    With the server it goes on for as many again after that one is killed, in the middle of them.
    """
    writer = subprocess.Popen(
        [sys.executable, "-m", "tests.chaos.ledger_crash", "--write", url, str(number)], stdout=subprocess.PIPE, cwd=REPOSITORY
    )
    assert writer.stdout is not None
    lines = []
    try:
        lines += [writer.stdout.readline() for _ in range(wanted)]
        if kill_server is not None:
            kill_server()
            lines += [writer.stdout.readline() for _ in range(wanted)]
    finally:
        writer.kill()
        lines += writer.stdout.readlines()
        writer.wait(30)
    acknowledged = {line.decode().strip() for line in lines if line.endswith(b"\n")}
    assert len(acknowledged) >= wanted, "the writer ended before it was killed"
    return acknowledged


def _check_once_open(url: str, acknowledged: set[str], outcome: CrashOutcome) -> None:
    """A server that has lost a session may let us in for a moment before it ends all sessions and recovers."""
    give_up_at = time.monotonic() + RECOVERY_SECONDS_MAX
    while True:
        try:
            _check(url, acknowledged, outcome)
        except PotluckError as error:
            if error.code is not ErrorCode.COORDINATOR_UNAVAILABLE or time.monotonic() > give_up_at:
                raise
            time.sleep(RETRY_SECONDS)
        else:
            return


def _check(url: str, acknowledged: set[str], outcome: CrashOutcome) -> None:
    books = Books(url)
    try:
        holds = books.run_now(lambda work: work.audit._connection.execute(text("SELECT hold_id, state, settled FROM hold")).all())
        share_count = books.run_now(lambda work: work.audit._connection.execute(text("SELECT COUNT(*) FROM hold_payee")).scalar())
        posted, held = books.run_now(lambda work: work.ledger.position("user:ann"))
        earned = [books.run_now(lambda work, name=name: work.ledger.position(f"node_owner:{name}"))[0] for name in ("bob", "cat")]
        whole = {hold_id for hold_id, state, settled in holds if (state, settled) == ("settled", PRICE)}
        shared_count = sum(_shares(hold_id) is SHARES[1] for hold_id in whole)
        outcome.lost = len(acknowledged - whole)
        outcome.half_done = len(holds) - len(whole) + abs(BALANCE - posted - len(whole) * PRICE) + held
        earned_wrongly = abs(earned[0] - len(whole) * PRICE + shared_count) + abs(earned[1] - shared_count)
        outcome.misdivided = earned_wrongly + abs(share_count - shared_count * len(SHARES[1]))
        outcome.findings = books.audit_now().findings
    finally:
        books.store.close()


def _shares(hold_id: str) -> dict[str, int]:
    return SHARES[int(hold_id.rpartition("-")[2]) % len(SHARES)]


def write(url: str, number: int) -> None:
    """Pays from many threads for ever, and prints each payment's id once it is acknowledged."""
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    books = Books(url)
    if number == 0:
        books.add_people("ann", grant=BALANCE)
        books.add_people("bob", "cat", grant=0)
    printing = threading.Lock()

    def pay(thread: int) -> None:
        for payment in range(10**9):
            hold_id = f"{number}-{thread}-{payment}"
            hold = open_hold(hold_id, payees=_shares(hold_id), amount=PRICE)
            while True:
                try:
                    outcomes = books.apply_now(hold, SettleHold(hold_id, PRICE))
                    break
                except DatabaseAwayError:
                    time.sleep(RETRY_SECONDS)
            assert set(outcomes) == {LedgerOutcome.APPLIED}
            with printing:
                os.write(1, f"{hold_id}\n".encode())

    for thread in range(THREAD_COUNT):
        threading.Thread(target=pay, args=(thread,)).start()


@contextmanager
def database(kind: str) -> Iterator[tuple[str, Cluster | None]]:
    """One that forgets nothing: its URL, and its server if it has one."""
    if kind == "sqlite":
        with tempfile.TemporaryDirectory() as folder:
            yield f"sqlite:///{Path(folder) / 'potluck.db'}", None
    else:
        with cluster(durable=True) as server:
            yield server.url(server.new_database()), server


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--database", choices=("sqlite", "postgresql"), default="sqlite")
    parser.add_argument("--write", nargs=2, metavar=("URL", "ROUND"))
    arguments = parser.parse_args()
    if arguments.write:
        write(arguments.write[0], int(arguments.write[1]))
        return 0
    started = time.monotonic()
    with database(arguments.database) as (url, server):
        outcome = crash(url, rounds=arguments.rounds, seed=arguments.seed, server=server)
    print(f"{outcome} in {time.monotonic() - started:.0f} s")
    return 0 if outcome.clean else 1


if __name__ == "__main__":
    sys.exit(main())
