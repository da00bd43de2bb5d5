"""Kills a process that writes the ledger, again and again: `python -m tests.chaos.ledger_crash --rounds 50`.

After each SIGKILL the books are opened again: every acknowledged payment must be there, every other one whole or absent, the audit clean.
Every second payment is shared by two payees, of whom neither may have got a part without the other. Ends 1 otherwise.
`--write FOLDER ROUND` is the process that is killed.
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
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import text

from potluck_coordinator.domain.ledger import LedgerOutcome, SettleHold
from tests.support.books import Books, open_hold

REPOSITORY = Path(__file__).parents[2]
BALANCE = 10**12
THREAD_COUNT = 8
ACKNOWLEDGED_MAX = 400
PRICE = 5
SHARES = ({"bob": 1}, {"bob": 3, "cat": 1})
"""Of 5 cat's share is 1, rounded down."""


@dataclass
class CrashOutcome:
    rounds: int = 0
    acknowledged: int = 0
    lost: int = 0
    half_done: int = 0
    misdivided: int = 0
    findings: tuple[str, ...] = ()

    @property
    def clean(self) -> bool:
        return not (self.lost or self.half_done or self.misdivided or self.findings)


def crash(folder: Path, *, rounds: int, seed: int) -> CrashOutcome:
    """Rounds of write, kill and check on one database."""
    chance = random.Random(seed)
    outcome = CrashOutcome()
    acknowledged: set[str] = set()
    for number in range(rounds):
        acknowledged |= _write_and_kill(folder, number, chance.randrange(1, ACKNOWLEDGED_MAX))
        outcome.rounds += 1
        outcome.acknowledged = len(acknowledged)
        _check(folder, acknowledged, outcome)
        if not outcome.clean:
            break
    return outcome


def _write_and_kill(folder: Path, number: int, wanted: int) -> set[str]:
    """Lets the writer go until it has acknowledged so many payments, and kills it in the middle of the next ones."""
    writer = subprocess.Popen(
        [sys.executable, "-m", "tests.chaos.ledger_crash", "--write", str(folder), str(number)], stdout=subprocess.PIPE, cwd=REPOSITORY
    )
    assert writer.stdout is not None
    lines = []
    try:
        lines += [writer.stdout.readline() for _ in range(wanted)]
    finally:
        writer.kill()
        lines += writer.stdout.readlines()
        writer.wait(30)
    acknowledged = {line.decode().strip() for line in lines if line.endswith(b"\n")}
    assert len(acknowledged) >= wanted, "the writer ended before it was killed"
    return acknowledged


def _check(folder: Path, acknowledged: set[str], outcome: CrashOutcome) -> None:
    books = Books(f"sqlite:///{folder / 'potluck.db'}")
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


def write(folder: Path, number: int) -> None:
    """Pays from many threads for ever, and prints each payment's id once it is acknowledged."""
    books = Books(f"sqlite:///{folder / 'potluck.db'}")
    if number == 0:
        books.add_people("ann", grant=BALANCE)
        books.add_people("bob", "cat", grant=0)
    printing = threading.Lock()

    def pay(thread: int) -> None:
        for payment in range(10**9):
            hold_id = f"{number}-{thread}-{payment}"
            hold = open_hold(hold_id, payees=_shares(hold_id), amount=PRICE)
            assert set(books.apply_now(hold, SettleHold(hold_id, PRICE))) == {LedgerOutcome.APPLIED}
            with printing:
                os.write(1, f"{hold_id}\n".encode())

    for thread in range(THREAD_COUNT):
        threading.Thread(target=pay, args=(thread,)).start()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--write", nargs=2, metavar=("FOLDER", "ROUND"))
    arguments = parser.parse_args()
    if arguments.write:
        write(Path(arguments.write[0]), int(arguments.write[1]))
        return 0
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        outcome = crash(Path(folder), rounds=arguments.rounds, seed=arguments.seed)
    print(f"{outcome} in {time.monotonic() - started:.0f} s")
    return 0 if outcome.clean else 1


if __name__ == "__main__":
    sys.exit(main())
