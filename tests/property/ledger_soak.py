"""Runs the ledger's state machine until it has done so many operations: `python -m tests.property.ledger_soak --operations 20000`.

On SQLite in memory, or with `--database postgresql` on a server that it starts. Prints operations and broken invariants; ends 1 if there
are any, with Hypothesis's shortest way to break them above.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import traceback

import structlog
from hypothesis import HealthCheck, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.property.ledger_machine import OPERATIONS, LedgerMachine
from tests.support.postgresql import cluster

ROUNDS_MAX = 100_000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--operations", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=None, help="the first round's; each later round counts one up")
    parser.add_argument("--database", choices=("sqlite", "postgresql"), default="sqlite")
    arguments = parser.parse_args()
    if arguments.database == "sqlite":
        return soak(LedgerMachine, arguments.operations, arguments.seed)
    with cluster() as server:
        machine = type("OnPostgresql", (LedgerMachine,), {"fresh_database": staticmethod(server.fresh_url)})
        return soak(machine, arguments.operations, arguments.seed)


def soak(machine: type[LedgerMachine], operation_count: int, first_seed: int | None) -> int:
    """The exit status."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    first_seed = time.time_ns() % 2**32 if first_seed is None else first_seed
    rules = settings(
        max_examples=20, stateful_step_count=60, deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=True
    )
    started, broken = time.monotonic(), 0
    for round_number in range(ROUNDS_MAX):
        if OPERATIONS.total() >= operation_count or broken:
            break
        try:
            run_state_machine_as_test(seed(first_seed + round_number)(type("Machine", (machine,), {})), settings=rules)
        except Exception:  # noqa: BLE001 - whatever it is, an invariant did not hold
            traceback.print_exc()
            broken += 1
    by_outcome = ", ".join(f"{outcome} {count}" for outcome, count in sorted(OPERATIONS.items()))
    print(f"seed {first_seed}: {OPERATIONS.total()} operations ({by_outcome}) in {time.monotonic() - started:.0f} s")
    print(f"broken invariants: {broken}")
    return 1 if broken or OPERATIONS.total() < operation_count else 0


if __name__ == "__main__":
    sys.exit(main())
